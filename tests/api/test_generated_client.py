"""A stranger's client: what a public generator makes of docs/openapi.json, at work against a real server."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scripts import api_documents
from tests.support.accounts import new_person
from tests.support.contract import document, judge
from tests.support.images import image
from tests.support.libraries import require_library
from tests.support.secrets import plant
from tests.support.servers import PATIENCE, Server
from tests.test_docs import PROTOCOL

# It knows few types of bytes by name: docs/protocol.md has what it must be told of pictures. Nobody reads the code
# here, so nothing formats it.
CONFIG = re.findall(r"```yaml\n(.+?)```", PROTOCOL, re.DOTALL)[0] + "post_hooks: []\n"
PACKAGE = "generated_dialect_client"


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a client, generated without a warning."""
    folder = tmp_path_factory.mktemp("generated")
    config, package = folder / "config.yaml", folder / PACKAGE
    config.write_text(CONFIG, encoding="utf-8")
    require_library("openapi_python_client")
    generator = Path(sys.executable).with_name("openapi-python-client")
    arguments = ["generate", "--path", str(api_documents.OPENAPI), "--config", str(config), "--fail-on-warning"]
    done = subprocess.run(
        [generator, *arguments, "--meta", "none", "--output-path", str(package)],
        text=True,
        capture_output=True,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    return package


@pytest.fixture(scope="session")
def library(generated: Path) -> Iterator[SimpleNamespace]:
    """That client, imported: its classes, and its functions by operation id."""
    sys.path.insert(0, str(generated.parent))
    try:
        package = importlib.import_module(PACKAGE)
        functions: dict[str, ModuleType] = {
            path.stem: importlib.import_module(f"{PACKAGE}.api.{path.parent.name}.{path.stem}")
            for path in (generated / "api").glob("*/[a-z]*.py")
        }
        models = importlib.import_module(f"{PACKAGE}.models")
        types = importlib.import_module(f"{PACKAGE}.types")
        yield SimpleNamespace(package=package, api=functions, models=models, types=types)
    finally:
        sys.path.remove(str(generated.parent))


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def test_the_generator_leaves_nothing_out(library: SimpleNamespace, generated: Path) -> None:
    operations = {one["operationId"] for methods in document()["paths"].values() for one in methods.values()}
    assert set(library.api) == operations
    schemas = document()["components"]["schemas"]
    assert len(schemas) > 60
    for name, schema in schemas.items():
        model = getattr(library.models, name)
        assert (generated / "models" / f"{_snake(name)}.py").exists(), name
        fields = {re.sub("_$", "", field) for field in model.__annotations__}
        assert set(schema["properties"]) <= fields, name


class Stranger:
    """Somebody who has the generated client and nothing else."""

    def __init__(self, library: SimpleNamespace, server: Server, token: str = "") -> None:
        self.library = library
        kind = library.package.AuthenticatedClient if token else library.package.Client
        options: dict[str, Any] = {"token": token} if token else {}
        self.client = kind(
            base_url=server.url,
            raise_on_unexpected_status=True,
            timeout=PATIENCE,
            httpx_args={"event_hooks": {"response": [judge]}},
            **options,
        )

    async def call(self, operation: str, expected: int, *path: Any, **arguments: Any) -> Any:
        """Call an operation; what the client makes of its answer."""
        answer = await self.library.api[operation].asyncio_detailed(*path, client=self.client, **arguments)
        assert answer.status_code == expected, (operation, answer)
        return answer.parsed

    async def __aenter__(self) -> Stranger:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.__aexit__(*error)


async def test_two_people_tell_each_other_something_by_a_generated_client(
    library: SimpleNamespace, shared_server: Server
) -> None:
    models, file_of = library.models, library.types.File
    bodies = [new_person(), new_person()]
    async with Stranger(library, shared_server) as stranger:
        ann_me, bo_me = [
            await stranger.call("register_account", 201, body=models.RegisterIn(**body)) for body in bodies
        ]
        form = models.LoginForm(username=bodies[0]["phone"], password=bodies[0]["password"])
        tokens = await stranger.call("log_in", 200, body=form)
        plant(tokens.access_token, tokens.refresh_token, ann_me.access_token, bo_me.access_token)
        assert tokens.token_type == "bearer"
        wrong = models.LoginForm(username=bodies[0]["phone"], password="not the password")
        assert (await stranger.call("log_in", 401, body=wrong)).code == "invalid_credentials"

    async with (
        Stranger(library, shared_server, tokens.access_token) as ann,
        Stranger(library, shared_server, bo_me.access_token) as bo,
    ):
        found = await ann.call("search_users", 200, q=bo_me.username)
        assert [user.id for user in found.items] == [bo_me.id]
        assert found.next_ is None
        chat = await ann.call("open_personal_chat", 201, body=models.PersonalChatIn(user_id=bo_me.id))
        assert (chat.type_, chat.peer_id, chat.last_message) == ("personal", bo_me.id, None)

        sent = await ann.call("send_message", 201, chat.id, body=models.MessageIn(content="Hello world!"))
        answer = models.MessageIn(content="Hello!", reply_to=sent.message.id)
        reply = await bo.call("send_message", 201, chat.id, body=answer)
        assert reply.message.reply_to_seq == sent.message.seq
        await ann.call("mark_message_read", 204, chat.id, reply.message.id)
        history = await ann.call("get_history", 200, chat.id)
        assert [message.content for message in history.items] == ["Hello world!", "Hello!"]
        readers = await bo.call("list_message_readers", 200, chat.id, reply.message.id)
        assert [reader.user_id for reader in readers.read_by] == [ann_me.id]

        group = await ann.call("create_group", 201, body=models.GroupIn(title="Trip", member_ids=[bo_me.id]))
        admin = models.RoleIn(role=models.RoleInRole.ADMIN)
        await ann.call("set_member_role", 200, group.id, bo_me.id, body=admin)
        members = await bo.call("list_members", 200, group.id)
        assert {member.user_id: member.role for member in members.items} == {ann_me.id: "owner", bo_me.id: "admin"}

        picture = image(size=(400, 300))
        part = file_of(payload=io.BytesIO(picture), file_name="oslo.png", mime_type="image/png")
        upload = await ann.call("upload_file", 201, body=models.UploadFileBody(file=part))
        media = models.MessageIn(message_type=models.MessageInMessageType.IMAGE, attachments=[upload.file_id])
        photo = await ann.call("send_message", 201, group.id, body=media)
        assert [one.name for one in photo.message.attachments] == ["oslo.png"]
        fetched = await bo.call("fetch_file", 200, upload.file_id)
        assert len(fetched.payload.read()) == upload.size
        thumbnail = await bo.call("fetch_thumbnail", 200, upload.file_id)
        assert thumbnail.payload.read()[8:12] == b"WEBP"

        part = file_of(payload=io.BytesIO(picture), file_name="me.png", mime_type="image/png")
        me = await ann.call("upload_my_avatar", 200, body=models.UploadMyAvatarBody(file=part))
        name = me.avatar_url.rpartition("/")[2]
        small = await bo.call("fetch_avatar", 200, name, size=models.FetchAvatarSize.SMALL)
        assert small.payload.read()[8:12] == b"WEBP"
        assert (await bo.call("get_user", 200, ann_me.id)).avatar_url == me.avatar_url

        events = await bo.call("catch_up", 200, body=models.ResumeIn())
        assert {type(event).__name__ for event in events} >= {"ResetEvent", "SyncedEvent", "ResumedEvent"}
        assert (await bo.call("get_chat", 404, 2**53 - 1)).code == "chat_not_found"

    async with Stranger(library, shared_server) as stranger:
        renewed = await stranger.call("refresh_tokens", 200, body=models.RefreshIn(refresh_token=tokens.refresh_token))
        plant(renewed.access_token, renewed.refresh_token)
    async with Stranger(library, shared_server, renewed.access_token) as ann:
        await ann.call("log_out", 204)
        assert (await ann.call("get_me", 401)).code == "invalid_token"
