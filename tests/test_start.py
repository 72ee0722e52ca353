"""Starting and stopping: the brief's own commands, and what an operator reads when something is missing."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import re
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import httpx
import pymysql
import pytest
from sqlalchemy import create_engine, text

import app
from app.core.config import COMPOSE_NAMES, Settings
from app.core.errors import StartupError
from app.db.database import database_name, database_url
from app.workers import bind
from tests.conftest import StartServer
from tests.support.accounts import new_person, register
from tests.support.databases import MYSQL_URL, SECRET_KEY, SqliteTemplate, make_settings
from tests.support.images import image
from tests.support.people import people
from tests.support.redis_server import RedisServer
from tests.support.secrets import check_log
from tests.support.servers import COMMANDS, ROOT, Door, Server, environment, run

DOORS: list[Door] = ["tuned", "plain"]
pytestmark = pytest.mark.by_command
MIGRATE = [sys.executable, "-c", "from app.db import database; database.create_all_tables()"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project as somebody gets it who clones it: no .env, no database, no key."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("app", "alembic"):
        shutil.copytree(ROOT / name, folder / name)  # with what Python has compiled, which takes it half a second
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
    """The sentence is all there is, whatever `check` found well before it."""
    lines = [line for line in output.splitlines() if not re.match(r"(settings|redis|push|storage): (ok|off)", line)]
    assert len(lines) == 1, output
    assert re.search(pattern, lines[0]), output
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


@pytest.mark.parametrize("command", [MIGRATE, [sys.executable, "-m", "app", "check"]], ids=["migrate", "check"])
def test_a_new_sqlite_file_is_for_its_owner_only(command: list[str], clone: Path, clone_env: dict[str, str]) -> None:
    run(["sh", "-c", 'umask 022 && exec "$@"', "sh", *command], cwd=clone, env=clone_env)
    assert stat.S_IMODE((clone / "dialect.db").stat().st_mode) == 0o600


async def test_what_sqlite_puts_beside_its_file_is_as_private_as_the_file(
    settings: Settings, start_server: StartServer
) -> None:
    if settings.uses_mysql:
        pytest.skip("MySQL keeps its files itself")
    path = settings.sqlite_path
    for mode in (0o600, 0o640):  # the second is the owner's choice, and stays
        path.chmod(mode)
        server = start_server(settings)
        async with server.client() as client:
            await register(client)
        for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            assert stat.S_IMODE(file.stat().st_mode) == mode, file
        server.stop()


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


OPERATORS: list[Door | Literal["check", "migrate"]] = [*DOORS, "check", "migrate"]


def operate(door: Door | Literal["check", "migrate"]) -> list[str]:
    """How a server, or one of the operator's commands, is started."""
    return COMMANDS[door] if door in DOORS else [sys.executable, "-m", "app", door]


@pytest.fixture
def newer(settings: Settings) -> Iterator[Settings]:
    """A database that a later version of the server has migrated."""
    engine = create_engine(database_url(settings, driver="sync"))
    with engine.begin() as connection:
        known = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
    yield settings
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :known"), {"known": known})
    engine.dispose()


@pytest.mark.parametrize("door", OPERATORS)
def test_a_database_of_a_newer_version_is_one_sentence(
    door: Door | Literal["check", "migrate"], newer: Settings, tmp_path: Path
) -> None:
    done = run(operate(door), cwd=tmp_path, env=environment(newer))
    assert done.returncode != 0
    assert_one_sentence(
        done.stdout + done.stderr,
        r"^The database belongs to a newer Dialect \(revision 0099\): install that version, or restore the backup.$",
    )


@pytest.mark.parametrize("door", [*DOORS, "check"])
def test_a_missing_mysql_database_is_one_sentence(
    door: Door | Literal["check"], mysql_settings: Settings, tmp_path: Path
) -> None:
    done = run(operate(door), cwd=tmp_path, env=environment(mysql_settings, DB_NAME="dialect_nowhere"))
    assert done.returncode != 0
    assert_one_sentence(
        done.stdout + done.stderr, r"^MySQL at .* has no database dialect_nowhere yet; run: python -m app migrate$"
    )


@pytest.mark.parametrize("door", OPERATORS)
def test_a_password_that_mysql_refuses_is_one_sentence(
    door: Door | Literal["check", "migrate"], mysql_settings: Settings, tmp_path: Path
) -> None:
    env = environment(mysql_settings, DB_USER="nobody_here", DB_PASSWORD="Hollow-mountain-77")
    done = run(operate(door), cwd=tmp_path, env=env)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert_one_sentence(output, r"^MySQL at .* refuses this DB_USER or DB_PASSWORD \(the user is nobody_here\)\.$")
    assert "Hollow-mountain-77" not in output


@pytest.fixture
def poor_user(mysql_settings: Settings) -> Iterator[str]:
    """A user of MySQL who may do nothing."""
    url = urlsplit(MYSQL_URL)
    connection = pymysql.connect(
        host=url.hostname, port=url.port or 3306, user=unquote(url.username or ""), password=unquote(url.password or "")
    )
    name = f"dialect_poor_{os.getpid()}"  # other test processes have one, too
    with connection.cursor() as cursor:
        cursor.execute(f"DROP USER IF EXISTS {name}")
        cursor.execute(f"CREATE USER {name} IDENTIFIED BY 'Hollow-mountain-77'")
        yield name
        cursor.execute(f"DROP USER {name}")
    connection.close()


@pytest.mark.parametrize("door", OPERATORS)
def test_a_mysql_user_without_rights_is_one_sentence(
    door: Door | Literal["check", "migrate"], mysql_settings: Settings, poor_user: str, tmp_path: Path
) -> None:
    env = environment(mysql_settings, DB_USER=poor_user, DB_PASSWORD="Hollow-mountain-77", DB_NAME="dialect_elsewhere")
    done = run(operate(door), cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert_one_sentence(
        done.stdout + done.stderr,
        rf"^MySQL at .* does not let the user {poor_user} use or create the database dialect_elsewhere: ",
    )


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


REDIS_REFUSES = {
    "a wrong password": ("redis://:wrong-word@127.0.0.1:{port}/0", "Redis refuses the password in REDIS_URL"),
    "no password": ("redis://127.0.0.1:{port}/0", "Redis refuses the password in REDIS_URL"),
    "no such database": ("redis://:right-word@127.0.0.1:{port}/99", "Redis has no such database as REDIS_URL names"),
}


@pytest.mark.parametrize("door", ["tuned", "check"])
@pytest.mark.parametrize(("url", "sentence"), REDIS_REFUSES.values(), ids=REDIS_REFUSES)
def test_a_redis_that_will_never_serve_is_one_sentence(
    door: Literal["tuned", "check"], url: str, sentence: str, settings: Settings, redis: RedisServer, tmp_path: Path
) -> None:
    redis.require_password("right-word")
    command = [sys.executable, "-m", "app", "check"] if door == "check" else COMMANDS[door]
    done = run(command, cwd=tmp_path, env=environment(settings, REDIS_URL=url.format(port=redis.port)))
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, sentence)
    assert "-word" not in done.stdout + done.stderr


@pytest.mark.settings(limit_register_per_ip="9/hour", limit_login_per_ip="9/hour")
async def test_a_redis_that_is_away_keeps_nobody_from_starting_and_refuses_who_must_be_counted(
    settings: Settings, start_server: StartServer, redis: RedisServer
) -> None:
    redis.kill()
    async with start_server(settings, REDIS_URL=redis.url).client() as client:
        person = new_person()
        login = {"username": person["phone"], "password": person["password"]}
        registered = await client.post("/api/v1/auth/register", json=person)
        logged_in = await client.post("/api/v1/auth/token", data=login)
    assert [answer.status_code for answer in (registered, logged_in)] == [503, 503]
    assert registered.json()["detail"] == "Registrations cannot be counted right now; try again."
    assert logged_in.json()["detail"] == "Logins cannot be counted right now; try again."


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
        ("MAX_PRESENCE_SUBSCRIPTIONS", "1001"),
    ],
)
def test_a_setting_that_cannot_be_read_is_one_sentence(
    door: Door, name: str, value: str, clone: Path, clone_env: dict[str, str]
) -> None:
    done = run(COMMANDS[door], cwd=clone, env=clone_env | {name: value})
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, rf"The setting {name} cannot be used")


@pytest.mark.parametrize("door", [*DOORS, "check"])
@pytest.mark.parametrize(
    ("variables", "pattern"),
    [
        ({"UPLOAD_PATH": "/proc/uploads"}, r"^The folder /proc/uploads cannot be written \("),
        ({"UPLOAD_PATH": "alembic.ini"}, r"^The folder alembic.ini cannot be written \("),
        ({"S3_BUCKET": "files", "S3_ACCESS_KEY_ID": "half"}, r"^The bucket files cannot be used \("),
        ({"ALGORITHM": "HS512", "SECRET_KEY": SECRET_KEY}, r"^SECRET_KEY has 48 bytes; HS512 needs 64"),
        (
            {"MAX_MESSAGE_CHARS": "16384"},
            r"^SOCKET_MAX_FRAME_BYTES is 65536, but a message of MAX_MESSAGE_CHARS=16384 characters may take 198088 b",
        ),
    ],
    ids=["no folder", "a file", "half a key", "short for the algorithm", "a frame too small for a message"],
)
def test_what_the_server_refuses_check_refuses_by_the_same_sentence(
    door: Door | Literal["check"],
    variables: dict[str, str],
    pattern: str,
    clone: Path,
    clone_env: dict[str, str],
    sqlite_template: SqliteTemplate,
) -> None:
    sqlite_template.new(clone)
    done = run(operate(door), cwd=clone, env=clone_env | variables)
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, pattern)


def test_check_refuses_several_workers_on_sqlite(clone: Path, clone_env: dict[str, str]) -> None:
    done = run(operate("check"), cwd=clone, env=clone_env | {"WORKERS": "2"})
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, "^2 workers need MySQL")


@pytest.mark.parametrize("command", [*COMMANDS.values(), operate("check"), MIGRATE], ids=[*COMMANDS, "check", "tables"])
def test_without_the_dependencies_every_command_says_so(
    command: list[str], clone: Path, clone_env: dict[str, str]
) -> None:
    if "uvicorn" in command:
        pytest.skip("which is one of them")
    done = run([command[0], "-S", *command[1:]], cwd=clone, env=clone_env)  # without site-packages
    assert done.returncode == 1
    assert_one_sentence(
        done.stdout + done.stderr,
        r"^The dependencies are not installed in this Python \(\w+ is missing\): source venv/bin/activate, ",
    )


def test_an_older_python_says_so(clone: Path, clone_env: dict[str, str]) -> None:
    older = "import sys; sys.version_info = (3, 10, 12, 'final', 0); import app"
    done = run([sys.executable, "-S", "-c", older], cwd=clone, env=clone_env)
    assert done.returncode == 1
    assert_one_sentence(done.stdout + done.stderr, r"^Dialect needs Python 3.11 or newer, and this is 3.10: ")
    ast.parse((ROOT / "app/__init__.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_every_dependency_of_the_code_is_looked_for() -> None:
    imported: set[str] = set()
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    assert imported - {"app"} - sys.stdlib_module_names - set(app.DEPENDENCIES) == set()


@pytest.mark.parametrize("door", OPERATORS)
@pytest.mark.parametrize("content", [b"SECRET_KEY=\xff\xfe", None], ids=["no text", "no access"])
def test_an_env_file_that_cannot_be_read_is_one_sentence(
    content: bytes | None, door: Door | Literal["check", "migrate"], clone: Path, clone_env: dict[str, str]
) -> None:
    if content is None:
        (clone / ".env").symlink_to("/proc/self/mem")  # which not even root can read from its beginning
    else:
        (clone / ".env").write_bytes(content)
    done = run(operate(door), cwd=clone, env=clone_env)
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"^`\.env` cannot be read \((it is not UTF-8|Input/output)")


@pytest.mark.parametrize("door", DOORS)
def test_a_key_file_with_other_text_is_one_sentence(door: Door, clone: Path, clone_env: dict[str, str]) -> None:
    (clone / ".secret_key").write_text("ключ " * 20, encoding="utf-8")
    done = run(COMMANDS[door], cwd=clone, env=clone_env)
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"^\.secret_key holds no usable key; delete it and start again\.$")


@pytest.mark.parametrize("door", OPERATORS)
def test_names_in_the_env_file_that_are_no_settings_are_told_once(
    door: Door | Literal["check", "migrate"], clone: Path, clone_env: dict[str, str]
) -> None:
    lines = ["DB_PASSWORDD=Hollow-mountain-77", "Log_Level=INFO", "MYSQL_ROOT_PASSWORD=Hollow-mountain-77"]
    # The last two are what is left of a secret that was broken in two.
    (clone / ".env").write_text("\n".join([*lines, "FLAVOUR=sweet", "hollowmountain", "Hollow=mountain"]))
    done = run(operate(door), cwd=clone, env=clone_env)
    assert done.stderr.splitlines()[:1] == [
        "Warning: `.env` has names that are no settings: DB_PASSWORDD (is it DB_PASSWORD?), FLAVOUR."
    ]
    assert done.stderr.count("Warning") == 1
    assert "ollow" not in done.stderr


def test_the_names_of_compose_in_the_env_file_are_known() -> None:
    names = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "compose.yaml").read_text(encoding="utf-8")))
    assert names - {name.upper() for name in Settings.model_fields} == COMPOSE_NAMES


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


def test_a_database_in_use_is_not_migrated_on_sqlite(
    settings: Settings, start_server: StartServer, tmp_path: Path
) -> None:
    if settings.uses_mysql:
        pytest.skip("there the server of the version before runs on the new schema")
    start_server(settings)
    done = run(operate("migrate"), cwd=tmp_path, env=environment(settings))
    assert (done.returncode, done.stderr) == (0, "")  # nothing to do
    engine = create_engine(database_url(settings, driver="sync"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    done = run(operate("migrate"), cwd=tmp_path, env=environment(settings))
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, r"^Another server is using .*dialect.db")


async def test_a_killed_server_leaves_no_lock_behind(settings: Settings, start_server: StartServer) -> None:
    start_server(settings).kill()
    async with start_server(settings).client() as client:
        assert (await client.get("/health/ready")).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_taken_port_is_one_sentence_with_a_way_out(workers: str, tmp_path: Path) -> None:
    # Before anything else is begun: there is neither this database nor this Redis.
    values = {"DB_NAME": "nowhere", "DB_PORT": "1", "REDIS_URL": "redis://127.0.0.1:1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "app", "--host", "127.0.0.1", "--port", str(port), "--workers", workers]
        done = run(command, cwd=tmp_path, env=environment(make_settings(), **values))
    assert done.returncode != 0
    assert_one_sentence(
        done.stdout + done.stderr,
        rf"^Port {port} is taken by another program: stop it, or choose another: python -m app --port {port + 1} ",
    )


@pytest.mark.parametrize(
    ("host", "says"),
    [("192.0.2.1", "This machine has no address 192.0.2.1;"), ("nowhere.invalid", "The host nowhere.invalid")],
)
def test_a_host_that_is_not_this_machine_is_one_sentence(host: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app", "--host", host, "--port", "0"]
    done = run(command, cwd=tmp_path, env=environment(make_settings()))
    assert done.returncode != 0
    assert_one_sentence(done.stdout + done.stderr, f"^{says} .*--host 127.0.0.1")


def test_a_port_that_only_root_may_use_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def bind(self, _address: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(StartupError, match="This user may not listen on port 80; choose one above 1023"):
        bind("127.0.0.1", 80)


def test_any_port_is_the_same_one_on_all_addresses_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: two)
    bound = bind("here", 0)
    try:
        first, second = (one.getsockname() for one in bound)
        assert (first[0], second[0]) == ("127.0.0.1", "127.0.0.2")
        assert first[1] == second[1] != 0
    finally:
        for one in bound:
            one.close()


# --- the operator's commands ------------------------------------------------------------------------------------


def test_check_says_what_is_fit(settings: Settings, tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "app", "check"], cwd=tmp_path, env=environment(settings))
    assert (done.returncode, done.stderr) == (0, "")
    if settings.uses_mysql:
        database = f"MySQL {settings.db_host}:{settings.db_port}/{settings.db_name}"
    else:
        database = f"SQLite {tmp_path}/dialect.db"
    assert done.stdout.splitlines() == [
        "settings: ok (development)",
        "push: off",
        f"storage: ok (the folder {settings.upload_path})",
        f"database: ok ({database}, reachable and up to date)",
    ]


def test_the_server_says_which_database_it_uses(server: Server, settings: Settings) -> None:
    [line] = [line for line in server.log.splitlines() if '"event":"started"' in line]
    assert f'"database":"{database_name(settings)}"' in line


def test_check_says_what_is_missing(clone: Path, clone_env: dict[str, str]) -> None:
    done = run([sys.executable, "-m", "app", "check"], cwd=clone, env=clone_env)
    assert done.returncode != 0
    assert done.stderr == "The database is empty; run: python -m app migrate\n"


def test_check_of_an_empty_database_says_what_the_page_for_operators_shows(
    clone: Path, clone_env: dict[str, str]
) -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^\$ python -m app check .*never migrated\n(.+?)^```", page, re.MULTILINE | re.DOTALL)
    done = run([sys.executable, "-m", "app", "check"], cwd=clone, env=clone_env)
    assert done.stdout + done.stderr == shown


def test_migrate_makes_a_database_fit(clone: Path, clone_env: dict[str, str]) -> None:
    for _ in range(2):
        done = run([sys.executable, "-m", "app", "migrate"], cwd=clone, env=clone_env)
        assert (done.returncode, done.stdout, done.stderr) == (
            0,
            "The database is up to date: SQLite dialect.db.\n",
            "",
        )
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
    env = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "ARGS"))}
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


async def begin_a_request_that_never_ends(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(f"POST /api/v1/auth/register HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 9\r\n\r\n".encode())
    await writer.drain()
    async with server.client() as client:  # which comes after it
        assert (await client.get("/health/live")).status_code == 200
    return reader, writer


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.settings(shutdown_seconds=4.0)
async def test_a_request_that_never_ends_holds_up_no_stop(
    door: Door, settings: Settings, start_server: StartServer
) -> None:
    server = start_server(settings, door)
    answers, unfinished = await begin_a_request_that_never_ends(server)
    server.signal(signal.SIGTERM)
    await asyncio.to_thread(server.wait, 6)
    assert "Application shutdown complete" in server.log
    assert (await answers.read()).startswith(b"HTTP/1.1 503 ")
    unfinished.close()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.settings(shutdown_seconds=60.0)
async def test_a_second_signal_does_not_wait(
    door: Door, number: int, settings: Settings, start_server: StartServer
) -> None:
    server = start_server(settings, door)
    _, unfinished = await begin_a_request_that_never_ends(server)
    server.signal(number)
    await asyncio.to_thread(server.wait_for_log, "Waiting for connections to close")
    server.signal(number)
    await asyncio.to_thread(server.wait, 5)
    unfinished.close()


def test_without_a_service_account_the_server_says_once_that_push_is_off(server: Server) -> None:
    server.stop()
    assert len(re.findall("push_is_off", server.log)) == 1


@pytest.mark.settings(firebase_credentials_path=Path("serviceAccountKey.json"))
def test_the_settings_of_the_readme_start_a_server_before_there_is_a_service_account(server: Server) -> None:
    server.stop()
    [line] = [line for line in server.log.splitlines() if "push_is_off" in line]
    assert "serviceAccountKey.json" in line
