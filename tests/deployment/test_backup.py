"""A backup of a running server, and its restoration, by the very commands of docs/operations.md."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.databases import SqliteTemplate, make_settings
from tests.support.images import image
from tests.support.people import Person, people
from tests.support.secrets import plant
from tests.support.servers import PATIENCE, ROOT, environment

NEW_KEY = "the key after the restore: 9876543210fedcba"


def commands(name: str) -> str:
    """The commands of the page that stand under this name."""
    page = (ROOT / "docs/operations.md").read_text()
    [block] = re.findall(rf"<!-- tested: {name} -->\n```bash\n(.+?)```", page, re.DOTALL)
    return str(block)


def obey(name: str, settings: Settings, folder: Path) -> None:
    """Type them, in the server's folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands(name)],
        cwd=folder,
        env=environment(settings, PATH=path),
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


async def test_a_backup_of_a_running_server_brings_back_what_was_then_and_clients_notice(
    sqlite_template: SqliteTemplate, start_server: StartServer, tmp_path: Path
) -> None:
    plant(NEW_KEY)
    settings = make_settings(**sqlite_template.new(tmp_path), upload_path=tmp_path / "uploads")
    server = start_server(settings)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        file = await ann.upload(image(size=(900, 500)), "a.png", "image/png")
        await ann.send_files(chat_id, "image", file, content="Before the backup")
        before = (await bo.fetch(file["file_id"])).content
        await asyncio.to_thread(obey, "sqlite backup", settings, tmp_path)
        for name in ("backup.db", "files.tar.gz"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, f"{name} is readable by others"
        await ann.say(chat_id, "After the backup")
        later = await ann.upload(b"after the backup")
        epoch = (await ann.resume(account_version=0, chats={}))[-1]["epoch"]
        server.stop()

    await asyncio.to_thread(obey, "sqlite restore", settings, tmp_path)
    assert stat.S_IMODE((tmp_path / "dialect.db").stat().st_mode) == 0o600
    server = start_server(settings.model_copy(update={"secret_key": type(settings.secret_key)(NEW_KEY)}))
    async with server.client() as client:
        ann, bo = Person(client, ann.account), Person(client, bo.account)
        assert await ann.refused("GET", "/users/me") == (401, "invalid_token")
        for person in (ann, bo):
            form = {"username": person.account.phone, "password": person.account.password}
            answer = await client.post("/api/v1/auth/token", data=form)
            person.account.access_token = answer.json()["access_token"]
            plant(person.account.access_token, answer.json()["refresh_token"])
        assert [one["content"] for one in (await bo.history(chat_id))["items"]] == ["Before the backup"]
        assert (await bo.fetch(file["file_id"])).content == before
        assert (await ann.fetch(later["file_id"])).status_code == 404
        resumed = (await ann.resume(account_version=0, chats={}))[-1]
        assert resumed["type"] == "resumed"
        assert resumed["epoch"] != epoch
        assert "After the backup" not in str(await ann.resume(epoch=epoch, account_version=0, chats={}))
