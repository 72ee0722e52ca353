"""Seeding: what it makes keeps every rule of the chat log, and the real server goes on from there."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pymysql
import pytest

from bench import seed as seeding
from bench.failure import Failed
from bench.population import (
    COLUMNS,
    LAGGARD,
    PASSWORD,
    READER,
    READER_BLOCKS,
    READER_PINNED,
    Row,
    Size,
    Used,
    phone_of,
    populate,
    unread_of_reader,
    username_of,
)
from bench.seed import MySQLTarget, SQLiteTarget, parse, seed
from bench.servers import MySQL
from tests.conftest import StartServer
from tests.support.databases import ENGINES, MYSQL_URL, make_settings

SMALL = Size(
    messages=3000,
    users=400,
    chats=150,
    large_chat_messages=1500,
    large_chat_members=60,
    largest_group=120,
    reader_chats=20,
)
NOW = datetime(2026, 5, 1, tzinfo=UTC).replace(tzinfo=None)
Table = list[dict[str, Any]]


# --- the rows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """All rows of a small population."""
    found: dict[str, Table] = {table: [] for table in COLUMNS}

    def emit(table: str, rows: list[Row]) -> None:
        found[table] += [dict(zip(COLUMNS[table], row, strict=True)) for row in rows]

    used = populate(SMALL, emit, now=NOW, password_hash="hash")
    assert used == Used(SMALL.users, SMALL.users, SMALL.chats, SMALL.messages)
    return found


def test_there_is_as_much_as_was_asked_for(tables: dict[str, Table]) -> None:
    by_chat = Counter(row["chat_id"] for row in tables["messages"])
    members = Counter(row["chat_id"] for row in tables["chat_members"])
    of_reader = [row["chat_id"] for row in tables["chat_members"] if row["user_id"] == READER]

    assert [len(tables[name]) for name in ("messages", "users", "chats")] == [SMALL.messages, SMALL.users, SMALL.chats]
    assert by_chat[SMALL.large_chat] == SMALL.large_chat_messages == max(by_chat.values())
    assert members[SMALL.large_chat] == SMALL.large_chat_members
    assert members[SMALL.largest_chat_by_members] == SMALL.largest_group == max(members.values())
    assert sorted(of_reader) == sorted(SMALL.chats_of_reader())
    assert {row["type"] for row in tables["chats"]} == {"personal", "group", "saved"}


def test_every_table_comes_in_the_order_of_its_key(tables: dict[str, Table]) -> None:
    for table, rows in tables.items():
        width = {
            "messages": 2,
            "chat_members": 2,
            "user_pairs": 2,
            "hidden_messages": 3,
            "chat_settings": 2,
            "drafts": 2,
            "fanout_marks": 3,
            "push_marks": 2,
        }
        keys = [tuple(row.values())[: width.get(table, 1)] for row in rows]
        assert keys, table
        assert keys == sorted(set(keys)), table


def test_every_message_names_the_worker_that_the_trace_knows(tables: dict[str, Table]) -> None:
    [worker] = tables["workers"]
    assert {row["worker"] for row in tables["messages"]} == {worker["number"]}
    assert {row["worker"] for row in tables["fanout_marks"]} == {worker["name"]}


def test_seqs_and_versions_of_each_chat_are_dense(tables: dict[str, Table]) -> None:
    members = {chat_id: list(rows) for chat_id, rows in groupby(tables["chat_members"], lambda row: row["chat_id"])}
    messages = {chat_id: list(rows) for chat_id, rows in groupby(tables["messages"], lambda row: row["chat_id"])}
    for chat in tables["chats"]:
        rows = messages[chat["id"]]
        assert [row["seq"] for row in rows] == list(range(1, chat["last_seq"] + 1))
        # Each message and change of members took a version, each edit and deletion one more; each row has its last.
        changes = sum(1 + bool(row["edited_at"]) + bool(row["deleted_at"]) for row in rows)
        joinings = {row["joined_version"] for row in members[chat["id"]]}
        stamps = {row["version"] for row in members[chat["id"]]}
        assert chat["version"] == changes + len(joinings | stamps)
        assert [row["version"] for row in rows] == sorted({row["version"] for row in rows})
        assert not {row["version"] for row in rows} & (joinings | stamps)
        assert [row["created_at"] for row in rows] == sorted({row["created_at"] for row in rows})
        assert chat["last_activity_at"] == rows[-1]["created_at"] < NOW
        assert chat["pushed_seq"] == chat["last_seq"]


def test_members_are_counted_and_their_marks_lie_between_joining_and_the_end(tables: dict[str, Table]) -> None:
    chats = {row["id"]: row for row in tables["chats"]}
    active = Counter(row["chat_id"] for row in tables["chat_members"] if row["left_seq"] is None)
    assert active == {chat_id: row["member_count"] for chat_id, row in chats.items()}
    sent: dict[tuple[int, int], int] = {}
    for row in tables["messages"]:
        sent[row["chat_id"], row["sender_id"]] = row["seq"]
    for row in tables["chat_members"]:
        end = row["left_seq"] if row["left_seq"] is not None else chats[row["chat_id"]]["last_seq"]
        last_sent = sent.get((row["chat_id"], row["user_id"]), 0)
        assert max(row["joined_seq"] - 1, last_sent) <= row["read_seq"] <= row["delivered_seq"] <= end
        assert row["public_read_seq"] <= row["read_seq"]
        assert row["public_delivered_seq"] <= row["delivered_seq"]
        assert row["visible_from_seq"] in (1, row["joined_seq"])
    assert any(row["left_seq"] is not None for row in tables["chat_members"])
    members = {(row["chat_id"], row["user_id"]) for row in tables["chat_members"]}
    assert set(sent) <= members
    kept = {(row["chat_id"], row["user_id"]) for row in tables["chat_members"] if row["left_seq"] is None}
    for table in ("chat_settings", "drafts"):
        assert {(row["chat_id"], row["user_id"]) for row in tables[table]} <= kept


def test_account_versions_are_dense_and_stand_on_the_users(tables: dict[str, Table]) -> None:
    stamps: list[tuple[int, int]] = []
    for table in ("chat_members", "hidden_messages", "chat_settings", "drafts", "user_settings"):
        stamps += [(row["user_id"], row["account_version"]) for row in tables[table]]
    for row in tables["user_pairs"]:
        stamps += [(row["low_id"], row["low_account_version"]), (row["high_id"], row["high_account_version"])]
    stamps = [stamp for stamp in stamps if stamp[1]]
    assert len(stamps) == len(set(stamps))
    latest: dict[int, int] = {}
    for user_id, version in stamps:
        latest[user_id] = max(latest.get(user_id, 0), version)
    assert {row["id"]: row["account_version"] for row in tables["users"] if row["account_version"]} == latest


def test_personal_chats_stand_on_the_pair_of_their_two(tables: dict[str, Table]) -> None:
    people: dict[int, list[int]] = {}
    for row in tables["chat_members"]:
        people.setdefault(row["chat_id"], []).append(row["user_id"])
    types = {row["id"]: row["type"] for row in tables["chats"]}
    found = {row["chat_id"]: [row["low_id"], row["high_id"]] for row in tables["user_pairs"] if row["chat_id"]}
    assert found.keys() == {chat_id for chat_id, type in types.items() if type != "group"}
    for chat_id, pair in found.items():
        assert pair == (people[chat_id] if types[chat_id] == "personal" else people[chat_id] * 2)
    blocked = [row for row in tables["user_pairs"] if row["low_id"] == READER and row["low_blocks_high"]]
    assert len(blocked) == READER_BLOCKS


def test_names_phones_and_ids_are_unique(tables: dict[str, Table]) -> None:
    for name in ("phone", "username"):
        assert len({row[name] for row in tables["users"]}) == SMALL.users
    assert len({row["id"] for row in tables["messages"]}) == SMALL.messages
    assert len({(row["sender_id"], row["client_id"]) for row in tables["messages"]}) == SMALL.messages


def test_the_same_size_gives_the_same_rows(tables: dict[str, Table]) -> None:
    again: list[Row] = []
    populate(SMALL, lambda table, rows: again.extend(rows if table == "messages" else []), now=NOW, password_hash="x")
    assert again == [tuple(row.values()) for row in tables["messages"]]


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        populate(Size(100, 100, 90, 50, reader_chats=10), lambda table, rows: None, now=NOW, password_hash="x")


# --- the database -----------------------------------------------------------------------------------------------


class Place:
    """Where to seed: a new file, or a new database of MySQL."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine = engine
        self.path = folder / "seeded.db"
        self.name = f"dialect_seeded_{os.getpid()}"
        self.mysql = MySQL.from_url(MYSQL_URL) if engine == "mysql" else None

    def target(self) -> SQLiteTarget | MySQLTarget:
        """A fresh one. Raises Failed when something is there."""
        return MySQLTarget(self.mysql, self.name) if self.mysql else SQLiteTarget(self.path)

    def settings(self) -> dict[str, Any]:
        """What leads a server to it."""
        if self.mysql is None:
            return {"sqlite_path": self.path}
        mysql = self.mysql
        return {
            "db_host": mysql.host, "db_port": mysql.port, "db_user": mysql.user, "db_password": mysql.password,
            "db_name": self.name,
        }  # fmt: skip

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        """What stands in the database."""
        if self.mysql is None:
            with closing(sqlite3.connect(self.path)) as file:
                return list(file.execute(statement))
        mysql = self.mysql
        with (
            closing(
                pymysql.connect(
                    host=mysql.host, port=mysql.port, user=mysql.user, password=mysql.password, database=self.name
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            return list(cursor.fetchall())

    def left(self) -> list[str]:
        """What is there of it, whole or not."""
        if self.mysql is None:
            return sorted(path.name for path in self.path.parent.glob("seeded*"))
        mysql = self.mysql
        with (
            closing(
                pymysql.connect(host=mysql.host, port=mysql.port, user=mysql.user, password=mysql.password)
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SHOW DATABASES LIKE %s", (self.name.replace("_", "\\_") + "%",))
            return sorted(row[0] for row in cursor.fetchall())

    def drop(self) -> None:
        """Leave nothing behind."""
        if self.mysql is not None:
            for name in self.left():
                self.mysql.run(f"DROP DATABASE `{name}`")


@pytest.fixture(params=ENGINES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(request.param, tmp_path)
    yield place
    place.drop()


async def test_the_real_server_goes_on_from_what_was_seeded(place: Place, start_server: StartServer) -> None:
    await asyncio.to_thread(lambda: seed(place.target(), SMALL))
    server = start_server(make_settings(**place.settings()))
    async with httpx.AsyncClient(base_url=server.url + "/api/v1", timeout=30) as client:

        async def log_in(user_id: int) -> dict[str, str]:
            form = {"username": phone_of(user_id), "password": PASSWORD}
            answer = await client.post("/auth/token", data=form)
            assert answer.status_code == 200, answer.text
            return {"Authorization": f"Bearer {answer.json()['access_token']}"}

        async def do(method: str, path: str, who: dict[str, str], **options: Any) -> Any:
            answer = await client.request(method, path, headers=who, **options)
            assert answer.is_success, (path, answer.text)
            return answer.json()

        reader, laggard = await log_in(READER), await log_in(LAGGARD)

        listed = await do("GET", "/chats", reader, params={"limit": 100})
        order = {chat_id: index for index, chat_id in enumerate(SMALL.chats_of_reader())}
        assert {chat["id"]: chat["unread_count"] for chat in listed["items"]} == {
            chat_id: unread_of_reader(index) for chat_id, index in order.items()
        }
        assert len([chat for chat in listed["items"] if chat["settings"]["pinned"]]) == READER_PINNED
        activity = [chat["last_activity_at"] for chat in listed["items"]]
        assert activity == sorted(activity, reverse=True)

        chat_id = SMALL.large_chat
        page = await do("GET", f"/messages/history/{chat_id}", reader, params={"around": 700, "limit": 10})
        assert [item["seq"] for item in page["items"]] == list(range(696, 706))
        assert (await do("GET", f"/chats/{chat_id}", laggard))["unread_count"] > 999

        known = {str(chat["id"]): chat["version"] for chat in listed["items"]}
        sent = await do("POST", f"/chats/{chat_id}/messages", laggard, json={"content": "first since the seed"})
        assert (sent["message"]["seq"], sent["message"]["id"]) == (SMALL.large_chat_messages + 1, SMALL.messages + 1)
        state = {"chats": known, "account_version": 0, "epoch": None}
        events = await do("POST", "/messages/resume", reader, json=state)
        [changes] = [event for event in events if event["type"] == "chat_changes"]
        assert [item["content"] for item in changes["messages"]] == ["first since the seed"]
        assert (changes["prev"], changes["version"]) == (known[str(chat_id)], known[str(chat_id)] + 1)

        found = await do("GET", "/users/search", reader, params={"q": username_of(77)})
        assert [user["id"] for user in found["items"]] == [77]
        body = {"phone": "+79991234567", "password": "Orchid-lantern-00000!", "username": "newcomer"}
        registered = await client.post("/auth/register", json=body)
        assert registered.json()["id"] == SMALL.users + 1
    [(epoch,)] = place.ask("SELECT epoch FROM server_state")
    assert epoch.startswith(f"seeded-{SMALL.messages}-")

    with pytest.raises(Failed, match="not touched"):  # a database that is there is left as it is
        place.target()
    assert place.ask("SELECT COUNT(*) FROM messages") == [(SMALL.messages + 1,)]


@pytest.mark.parametrize("fault", ["the database refuses", "somebody presses Ctrl-C"])
def test_what_fails_half_way_leaves_nothing(place: Place, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(size: Size, emit: Any, **options: Any) -> Used:
        def emitting(table: str, rows: list[Row]) -> None:
            if table == "users":
                if fault == "somebody presses Ctrl-C":
                    raise KeyboardInterrupt
                rows = [(*rows[0][:1], None, *rows[0][2:])]  # nobody has no phone
            emit(table, rows)

        return populate(size, emitting, **options)

    monkeypatch.setattr(seeding, "populate", broken)
    with pytest.raises((KeyboardInterrupt, pymysql.MySQLError, sqlite3.Error)):
        seed(place.target(), SMALL)

    assert place.left() == []


@pytest.mark.parametrize("messages", ["5k", "9999", "-1", "many"])
def test_a_size_that_is_none_is_refused(messages: str) -> None:
    with pytest.raises(SystemExit):
        parse(["--messages", messages])


def test_sizes_have_short_names() -> None:
    options = parse(["--messages", "10M"])
    assert (options.count, options.name) == (10_000_000, "bench_scale_10m")


@pytest.mark.skipif("mysql" not in ENGINES, reason="SQLite takes values as they are")
def test_literals_survive_what_people_write() -> None:
    text = "it's \\ a \"quote\"; 'DROP' -- % %s 😀\n"
    mysql = MySQL.from_url(MYSQL_URL)
    with (
        closing(pymysql.connect(host=mysql.host, port=mysql.port, user=mysql.user, password=mysql.password)) as one,
        one.cursor() as cursor,
    ):
        cursor.execute(f"SELECT {seeding.literal(text)}")
        assert cursor.fetchall() == ((text,),)
