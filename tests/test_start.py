"""Starting and stopping: the brief's own commands, and what an operator reads when something is missing."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.accounts import register
from tests.support.databases import SECRET_KEY, make_settings
from tests.support.images import image
from tests.support.people import people
from tests.support.secrets import check_log
from tests.support.servers import COMMANDS, ROOT, Door, Server, environment, run

DOORS: list[Door] = ["tuned", "plain"]
MIGRATE = [sys.executable, "-c", "from app.db import database; database.create_all_tables()"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project as somebody gets it who clones it: no .env, no database, no key."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("app", "alembic"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("alembic.ini", ".env.example"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def clone_env(clone: Path) -> dict[str, str]:
    """The environment of a newcomer's shell."""
    env = environment()
    del env["PYTHONPATH"]
    return env


@pytest.fixture
def dead_mysql(tmp_path: Path) -> Iterator[Settings]:
    """Settings that lead to a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: it refuses, and nobody else gets it
        yield make_settings(db_host="127.0.0.1", db_port=taken.getsockname()[1], db_password="Hollow-mountain-77")


def assert_one_sentence(output: str, pattern: str) -> None:
    """The sentence stands there once, for people to read, and there is no traceback."""
    assert len(re.findall(pattern, output)) == 1, output
    check_log(output, "the output")


# --- the quick start --------------------------------------------------------------------------------------------


async def test_the_quick_start_of_the_brief_works_on_a_fresh_clone(clone: Path, clone_env: dict[str, str]) -> None:
    shutil.copy(clone / ".env.example", clone / ".env")
    made = run(MIGRATE, cwd=clone, env=clone_env)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    server = Server([*COMMANDS["plain"], "--reload"], cwd=clone, env=clone_env, log_path=clone / "server.log")
    try:
        server.wait_until_ready()
        server.wait_for_log("Application startup complete")
        # It sleeps until a file changes; uvicorn's own looks at every file again and again.
        assert "using WatchFiles" in server.log
        async with server.client() as client:
            someone = await register(client)
            answer = await client.get("/api/v1/users/me", headers=someone.headers)
            assert answer.status_code == 200
            assert (await client.get("/docs")).status_code == 200
    finally:
        server.stop()
        server.kill()
    check_log(server.log, "the server's log")


def test_the_example_of_the_settings_changes_nothing_and_names_what_the_brief_names(
    clone: Path, clone_env: dict[str, str]
) -> None:
    show = [
        sys.executable,
        "-c",
        "from app.core.config import get_settings; print(get_settings().model_dump(exclude={'secret_key'}))",
    ]
    before = run(show, cwd=clone, env=clone_env)
    shutil.copy(clone / ".env.example", clone / ".env")
    after = run(show, cwd=clone, env=clone_env)
    assert after.stdout == before.stdout
    names = re.findall(r"^#? ?([A-Z_]+)=", (clone / ".env.example").read_text(), re.MULTILINE)
    assert names == [
        *("DB_USER", "DB_PASSWORD", "DB_HOST", "DB_PORT", "DB_NAME"),
        *("SECRET_KEY", "ALGORITHM", "ACCESS_TOKEN_EXPIRE_MINUTES"),
        "FIREBASE_CREDENTIALS_PATH",
    ]


def test_making_the_tables_twice_is_quiet_and_harmless(clone: Path, clone_env: dict[str, str]) -> None:
    for _ in range(2):
        made = run(MIGRATE, cwd=clone, env=clone_env)
        assert (made.returncode, made.stdout, made.stderr) == (0, "", "")


def test_development_makes_a_key_of_its_own_and_keeps_it_private(clone: Path, clone_env: dict[str, str]) -> None:
    show = [
        sys.executable,
        "-c",
        "from app.core.config import get_settings; print(get_settings().secret_key.get_secret_value())",
    ]
    first, second = run(show, cwd=clone, env=clone_env), run(show, cwd=clone, env=clone_env)
    assert first.stdout == second.stdout
    assert len(first.stdout.strip()) >= 32
    assert stat.S_IMODE((clone / ".secret_key").stat().st_mode) == 0o600


async def test_a_relative_folder_of_files_is_in_the_folder_where_the_server_was_started(
    settings: Settings, start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(settings.model_copy(update={"upload_path": Path("files")}))
    async with server.client() as client:
        [someone] = await people(client, 1)
        await someone.upload(image(), "a.png", "image/png")
    assert any(path.is_file() for path in (tmp_path / "files").rglob("*"))


# --- what keeps it from starting --------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_a_database_without_tables_is_one_sentence(door: Door, clone: Path, clone_env: dict[str, str]) -> None:
    done = run(COMMANDS[door], cwd=clone, env=clone_env)
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"The database is empty; run: python -m app migrate")


@pytest.mark.parametrize("door", DOORS)
def test_a_mysql_that_does_not_answer_is_one_sentence(door: Door, clone: Path, dead_mysql: Settings) -> None:
    done = run(COMMANDS[door], cwd=clone, env=environment(dead_mysql))
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert_one_sentence(output, r"MySQL at 127.0.0.1:\d+ cannot be used .* check the DB_\* settings")
    assert "Hollow-mountain-77" not in output


@pytest.mark.parametrize("door", [*DOORS, "check"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"type": "service_account"}'])
def test_a_service_account_that_cannot_be_used_is_one_sentence(
    content: str | None, door: Door | Literal["check"], clone: Path, clone_env: dict[str, str]
) -> None:
    path = clone / "account.json"
    if content is not None:
        path.write_text(content)
    command = [sys.executable, "-m", "app", "check"] if door == "check" else COMMANDS[door]
    variables = {"FIREBASE_CREDENTIALS_PATH": str(path)}
    if content is None:  # which development forgives: see below
        variables |= {"ENVIRONMENT": "production", "SECRET_KEY": SECRET_KEY}
    done = run(command, cwd=clone, env={**clone_env, **variables})
    assert done.returncode != 0
    pattern = r"The Firebase service account \S+/account.json \(FIREBASE_CREDENTIALS_PATH\) cannot be used \("
    assert_one_sentence(done.stdout + done.stderr, pattern)


@pytest.mark.parametrize("command", [MIGRATE, [sys.executable, "-m", "app", "migrate"]])
def test_migrating_a_mysql_that_does_not_answer_is_one_sentence(
    command: list[str], clone: Path, dead_mysql: Settings
) -> None:
    done = run(command, cwd=clone, env=environment(dead_mysql))
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"MySQL at 127.0.0.1:\d+ cannot be used")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("key", ["", "your_super_secret_key_here_min_32_chars"])
def test_production_refuses_a_key_that_everybody_knows(
    door: Door, key: str, clone: Path, clone_env: dict[str, str]
) -> None:
    done = run(COMMANDS[door], cwd=clone, env=clone_env | {"ENVIRONMENT": "production", "SECRET_KEY": key})
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"SECRET_KEY is missing or still the placeholder")


@pytest.mark.parametrize("door", DOORS)
def test_a_short_key_is_refused(door: Door, clone: Path, clone_env: dict[str, str]) -> None:
    done = run(COMMANDS[door], cwd=clone, env=clone_env | {"SECRET_KEY": "too short, this one"})
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert_one_sentence(output, r"SECRET_KEY has 19 bytes; it needs at least 32")
    assert "too short, this one" not in output


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PORT", "many"),
        ("ALGORITHM", "none"),
        ("LIMIT_LOGIN_PER_IP", "often"),
        ("S3_ENDPOINT_URL", "127.0.0.1:9"),
    ],
)
def test_a_setting_that_cannot_be_read_is_one_sentence(
    door: Door, name: str, value: str, clone: Path, clone_env: dict[str, str]
) -> None:
    done = run(COMMANDS[door], cwd=clone, env=clone_env | {name: value})
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, rf"The setting {name} cannot be used")


@pytest.mark.parametrize("door", DOORS)
def test_a_second_server_on_one_sqlite_file_is_refused(
    door: Door, settings: Settings, start_server: StartServer
) -> None:
    if settings.uses_mysql:
        pytest.skip("MySQL serves as many as come")
    start_server(settings)
    second = start_server(settings, door, ready=False)
    assert second.wait() != 0
    assert_one_sentence(second.log, r"Another server is using .*dialect.db")


async def test_a_killed_server_leaves_no_lock_behind(settings: Settings, start_server: StartServer) -> None:
    start_server(settings).kill()
    async with start_server(settings).client() as client:
        assert (await client.get("/health/ready")).status_code == 200


def test_a_taken_port_is_told_without_a_traceback(settings: Settings, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "app", "--host", "127.0.0.1", "--port", str(port)]
        done = run(command, cwd=tmp_path, env=environment(settings))
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"address already in use")


# --- the operator's commands ------------------------------------------------------------------------------------


def test_check_says_what_is_fit(settings: Settings, tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "app", "check"], cwd=tmp_path, env=environment(settings))
    assert (done.returncode, done.stderr) == (0, "")
    engine = "MySQL" if settings.uses_mysql else "SQLite"
    assert done.stdout.splitlines() == [
        "settings: ok (development)",
        "push: off",
        f"database: ok ({engine}, reachable and up to date)",
    ]


def test_check_says_what_is_missing(clone: Path, clone_env: dict[str, str]) -> None:
    done = run([sys.executable, "-m", "app", "check"], cwd=clone, env=clone_env)
    assert done.returncode != 0
    assert done.stderr == "The database is empty; run: python -m app migrate\n"


def test_migrate_makes_a_database_fit(clone: Path, clone_env: dict[str, str]) -> None:
    for _ in range(2):
        done = run([sys.executable, "-m", "app", "migrate"], cwd=clone, env=clone_env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "The database is up to date.\n", "")
    assert run([sys.executable, "-m", "app", "check"], cwd=clone, env=clone_env).returncode == 0


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--port", "http"], ["dance"]])
def test_nonsense_on_the_command_line_is_explained(arguments: list[str], tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "app", *arguments], cwd=tmp_path, env=environment(make_settings()))
    assert done.returncode == 2
    assert re.search(r"error: .*(a port is a number from 0 to 65535|invalid choice)", done.stderr)
    check_log(done.stderr, "the output")


def test_make_says_that_it_installs_before_it_does(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    (tmp_path / "venv/.created").touch()
    command = ["make", "--silent", "--directory", str(ROOT), "run", f"VENV={tmp_path}/venv"]
    env = {name: value for name, value in environment().items() if not name.startswith("MAKE")}
    for installs in (True, False):
        done = run(command, cwd=tmp_path, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[-2:] == ["python -m app migrate", "python -m app"]
        assert (lines[0].startswith("Installing ") and lines[1].startswith("python -m pip install")) == installs
        assert len(lines) == (4 if installs else 2)


# --- stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_soon(door: Door, number: int, settings: Settings, start_server: StartServer) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        assert (await client.get("/health/live")).status_code == 200
        server.signal(number)
        server.wait(timeout=10)
    assert "Application shutdown complete" in server.log
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(server.url)


def test_without_a_service_account_the_server_says_once_that_push_is_off(server: Server) -> None:
    server.stop()
    assert len(re.findall("push_is_off", server.log)) == 1


@pytest.mark.settings(firebase_credentials_path=Path("serviceAccountKey.json"))
def test_the_settings_of_the_readme_start_a_server_before_there_is_a_service_account(server: Server) -> None:
    server.stop()
    [line] = [line for line in server.log.splitlines() if "push_is_off" in line]
    assert "serviceAccountKey.json" in line
