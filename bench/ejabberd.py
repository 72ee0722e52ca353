"""Debian's ejabberd, with its archive (XEP-0313) in the same MySQL: what `--peers` measures beside Dialect."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import orjson
import pymysql
from pymysql.constants import CLIENT

from bench.failure import Failed

SCHEMA = Path("/usr/share/ejabberd/sql/mysql.sql")
LIBRARIES = Path("/usr/lib") / "x86_64-linux-gnu"
PASSWORD = "open-sesame"
PACKAGES = "ejabberd erlang-p1-mysql"
NOT_COMPARABLE = (
    "ejabberd: Debian's package, one scheduler on the same core; archive of every message for both people and for "
    "rooms in the same MySQL",
    "not comparable: it has no acknowledgement of a stored message (what has arrived counts, and the archive is "
    "counted at the end); no numbering without holes, no receipts, no push; plain XMPP over TCP, without TLS or "
    "WebSocket; Dialect resumes, and makes each message durable once for all",
)
"""What belongs under a table with its figures."""


def command(folder: Path, port: int, database: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """What starts it, and with which environment, once its configuration and tables are made.

    `database` are pymysql's arguments.

    Raises Failed where it is not installed.
    """
    erl = shutil.which("erl")
    found = sorted(LIBRARIES.parent.glob("*/ejabberd-*"))
    if erl is None or not found or not SCHEMA.exists():
        raise Failed(f"ejabberd was not found; on Debian, as root: apt-get install {PACKAGES}")
    with pymysql.connect(**database, client_flag=CLIENT.MULTI_STATEMENTS) as connection:
        cursor = connection.cursor()
        cursor.execute(SCHEMA.read_text())
        while cursor.nextset():
            pass
        connection.commit()
    (folder / "spool").mkdir()
    configuration = {
        "hosts": ["localhost"],
        "loglevel": "error",
        "listen": [
            {"port": port, "ip": "127.0.0.1", "module": "ejabberd_c2s", "access": "all", "shaper": "none"}
            | {"starttls": False, "max_stanza_size": 262144}
        ],
        "sql_type": "mysql",
        "sql_server": database["host"],
        "sql_port": database["port"],
        "sql_database": database["database"],
        "sql_username": database["user"],
        "sql_password": database["password"],
        "sql_pool_size": 10,
        "default_db": "sql",
        "auth_method": "sql",
        "auth_password_format": "plain",
        "modules": {
            "mod_mam": {"default": "always", "compress_xml": False},
            "mod_muc": {
                "max_users": 2000,
                "default_room_options": {"persistent": True, "mam": True, "max_users": 2000},
            },
        },
    }
    (folder / "ejabberd.yml").write_bytes(orjson.dumps(configuration))  # all JSON is YAML
    node = re.sub(r"\W", "_", database["database"])
    arguments = ["+K", "true", "+S", "1:1", "-noinput", "-sname", f"{node}@localhost"]
    arguments += ["-start_epmd", "false", "-dist_listen", "false"]  # else a daemon stays behind
    arguments += ["-mnesia", "dir", f'"{folder / "spool"}"', "-s", "ejabberd"]
    environment = {
        "ERL_LIBS": str(found[-1].parent),
        "EJABBERD_CONFIG_PATH": str(folder / "ejabberd.yml"),
        "EJABBERD_LOG_PATH": str(folder / "server.log"),
        "HOME": str(folder),
    }
    return [erl, *arguments], environment
