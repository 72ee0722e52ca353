"""P6: what a page, the list of chats, a search, catching up and unread counts cost as the database grows.

One server on a database that `bench.seed` filled, one client that asks over HTTP, one request at a time. On MySQL, what
every hot query reads is counted as well (`bench/probes.py`) and must not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import probes, servers
from bench.population import LAGGARD, PASSWORD, READER, Size, display_name_of, phone_of, username_of
from bench.probes import PROBES, Examined
from bench.seed import PATIENCE_SECONDS, SIZES, MySQLTarget, SQLiteTarget, find_seeded, seed, settings_of
from bench.servers import DatabaseName, MySQL
from bench.tables import aligned, yes

PAGE = 50
REPEATS = 30
PLACES = 12
"""Of the largest chat, at random, beside its ends and its middle."""
SEARCHES = 200
MISSED = (1, 100, 10_000)
QUERIES_MAX = 4
SEARCH_P99_MS = 50.0
PAGE_RATIO = 1.3


@dataclass(slots=True)
class Column:
    """What was measured of one size."""

    size: str
    ms: dict[str, float | None] = field(default_factory=dict)
    """None where there is not so much to be had."""
    counts: dict[str, int] = field(default_factory=dict)
    examined: dict[str, Examined] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Place:
    """A seeded database, used again by the next run if it may stay."""

    def __init__(self, database: DatabaseName, size: str, mysql: MySQL | None, folder: Path, *, keep: bool) -> None:
        self.label = size
        self.size = Size.of(SIZES[size])
        self.mysql = mysql if database == "mysql" else None
        suffix = "" if keep else f"_{time.time_ns():x}"
        self.name = f"bench_scale_{size}{suffix}"
        self.path = folder / f"{self.name}.db"
        self._keep = keep

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Seeds it unless it is there. Raises Failed when something else has its name."""
        if find_seeded(self.mysql or self.path, self.name) != self.size.messages:
            seed(MySQLTarget(self.mysql, self.name) if self.mysql else SQLiteTarget(self.path), self.size)
        try:
            yield
        finally:
            if not self._keep:
                if self.mysql:
                    self.mysql.run(f"DROP DATABASE `{self.name}`")
                for path in self.path.parent.glob(f"{self.path.name}*"):
                    path.unlink()

    def settings(self) -> dict[str, str]:
        """What leads a server to it."""
        patience = {"DB_TIMEOUT_SECONDS": str(PATIENCE_SECONDS)}
        if self.mysql is None:
            return patience | {"SQLITE_PATH": str(self.path)}
        return patience | {
            "DB_HOST": self.mysql.host, "DB_PORT": str(self.mysql.port), "DB_USER": self.mysql.user,
            "DB_PASSWORD": self.mysql.password, "DB_NAME": self.name,
        }  # fmt: skip


def measure(place: Place, folder: Path, core: int | None) -> Column:
    """One column of the table. Raises Failed when the server does not start."""
    column = Column(place.label)
    server = servers.start_on(place.settings(), folder, core)
    try:
        asyncio.run(_ask(f"http://127.0.0.1:{server.port}/api/v1", place, column))
    finally:
        server.stop()
    if place.mysql is not None:
        column.examined = asyncio.run(probes.measure(settings_of(place.mysql, place.name), place.size))
    return column


class _Client:
    """Asks for somebody, and keeps the time."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._headers: dict[str, str] = {}

    async def log_in(self, user_id: int) -> None:
        """From now on ask for this one."""
        form = {"username": phone_of(user_id), "password": PASSWORD}
        answer = await self._http.post("/auth/token", data=form)
        answer.raise_for_status()
        self._headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}

    async def ask(self, method: str, path: str, **options: Any) -> tuple[Any, float]:
        """The answer, and how many milliseconds it took."""
        begun = time.perf_counter()
        answer = await self._http.request(method, path, headers=self._headers, **options)
        milliseconds = (time.perf_counter() - begun) * 1000
        answer.raise_for_status()
        return answer.json(), milliseconds

    async def median(self, path: str, **params: Any) -> float:
        """Milliseconds of a request that was made before."""
        await self.ask("GET", path, params=params)
        return statistics.median([(await self.ask("GET", path, params=params))[1] for _ in range(REPEATS)])


async def _ask(url: str, place: Place, column: Column) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        client = _Client(http)
        await client.log_in(READER)
        await _pages(client, place, column)
        await _list(client, place, column)
        await _search(client, place, column)
        await _resume(client, place, column)
        await client.log_in(LAGGARD)
        column.ms["unread, 999+"] = await client.median(f"/chats/{place.size.large_chat}")


async def _pages(client: _Client, place: Place, column: Column) -> None:
    chat, last = place.size.large_chat, place.size.large_chat_messages
    drawn = random.Random(1)
    where: dict[str, dict[str, int]] = {
        "newest": {},
        "middle": {"before": last // 2},
        "oldest": {"before": PAGE + 1},
        **{f"at {number}": {"before": drawn.randrange(PAGE + 1, last)} for number in range(PLACES)},
    }
    times: dict[str, list[float]] = {name: [] for name in where}
    for turn in range(REPEATS + 1):
        for name, params in where.items():  # in turns, so that all share what disturbs the machine
            page, milliseconds = await client.ask("GET", f"/messages/history/{chat}", params={"limit": PAGE, **params})
            if len(page["items"]) != PAGE:
                column.problems.append(f"{column.size}: a page {name} has {len(page['items'])} messages")
            if turn:  # the first time it was cold
                times[name].append(milliseconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name in ("newest", "middle", "oldest"):
        column.ms[f"page, {name}"] = medians[name]
    column.ms["page, slowest of 15 places"] = max(medians.values())


async def _list(client: _Client, place: Place, column: Column) -> None:
    meter = probes.Meter(settings_of(place.mysql, place.name)) if place.mysql is not None else None
    await client.ask("GET", "/chats", params={"limit": 100})
    if meter is not None:
        counts: list[int] = []
        for _ in range(5):
            before = meter.read()
            await client.ask("GET", "/chats", params={"limit": 100})
            counts.append(probes.between(before, meter.read()).statements)
        column.counts["list"] = min(counts)  # more, when the server's own sweep came between
        meter.close()
    column.ms["list, first 100 of 500 chats"] = await client.median("/chats", limit=100)
    whole: list[float] = []
    for _ in range(5):
        seen, cursor, total = 0, None, 0.0
        while True:
            page, milliseconds = await client.ask(
                "GET", "/chats", params={"limit": 100, **({"cursor": cursor} if cursor else {})}
            )
            seen, cursor, total = seen + len(page["items"]), page["next"], total + milliseconds
            if cursor is None:
                break
        if seen != place.size.reader_chats:
            column.problems.append(f"{column.size}: the list has {seen} chats")
        whole.append(total)
    column.ms["list, all 500 in 5 pages"] = statistics.median(whole)


async def _search(client: _Client, place: Place, column: Column) -> None:
    drawn = random.Random(2)
    times: list[float] = []
    for number in range(SEARCHES):
        somebody = drawn.randrange(1, place.size.users)
        name = display_name_of(somebody) if number % 3 == 0 else username_of(somebody)
        query = name[: drawn.randrange(3, len(name) + 1)].strip()
        found, milliseconds = await client.ask("GET", "/users/search", params={"q": query if len(query) > 2 else name})
        if not found["items"]:
            column.problems.append(f"{column.size}: nobody is called {query}")
        times.append(milliseconds)
    times.sort()
    column.ms["search, p50"] = times[len(times) // 2]
    column.ms["search, p99"] = times[len(times) * 99 // 100]


async def _resume(client: _Client, place: Place, column: Column) -> None:
    chats: dict[str, int] = {}
    cursor: str | None = None
    while True:
        page, _ = await client.ask("GET", "/chats", params={"limit": 100, **({"cursor": cursor} if cursor else {})})
        chats |= {str(chat["id"]): chat["version"] for chat in page["items"]}
        cursor = page["next"]
        if cursor is None:
            break
    chat = str(place.size.large_chat)
    for missed in MISSED:
        name = f"resume, {missed:,} missed"
        column.ms[name] = None
        if chats[chat] - missed < 1:
            continue
        totals: list[float] = []
        for _ in range(REPEATS // 4 if missed < 1000 else 2):
            known = {**chats, chat: chats[chat] - missed}
            changed, total, complete = 0, 0.0, False
            while not complete:
                state = {"epoch": None, "account_version": 10**9, "chats": known}
                events, milliseconds = await client.ask("POST", "/messages/resume", json=state)
                total += milliseconds
                for event in events:
                    if event["type"] == "chat_changes":
                        changed += event["version"] - event["prev"]
                        known[chat] = event["version"]
                complete = events[-1]["complete"]
            if changed != missed:
                column.problems.append(f"{column.size}: resuming after {missed} brought {changed}")
            totals.append(total)
        column.ms[name] = statistics.median(totals)


# --- what is printed --------------------------------------------------------------------------------------------


def table(database: str, columns: Sequence[Column]) -> list[str]:
    """The columns side by side, and the bars."""
    rows: list[tuple[str, ...]] = [
        (f"P6 on {database}", *(f"{_title(column.size)} messages" for column in columns), "bar", "met?")
    ]
    for name in columns[0].ms:
        figures = [column.ms[name] for column in columns]
        shown = ("-" if figure is None else f"{figure:,.1f} ms" for figure in figures)
        rows.append((name, *shown, *_bar(name, columns)))
    if columns[0].counts:
        counts = [column.counts["list"] for column in columns]
        met = yes(max(counts) <= QUERIES_MAX)
        rows.append(("list, queries of a page", *map(str, counts), f"<= {QUERIES_MAX}", met))
    lines = aligned(rows, range(1, len(columns) + 1))
    if columns[0].examined:
        lines += ["", *_examined(columns)]
    return lines


def _title(size: str) -> str:
    return size.replace("m", "M")


def _bar(name: str, columns: Sequence[Column]) -> tuple[str, str]:
    largest = columns[-1].ms
    if name.startswith("page, ") and name != "page, newest":
        met = all((column.ms[name] or 0) <= PAGE_RATIO * (column.ms["page, newest"] or 0) for column in columns)
        return f"<= {PAGE_RATIO} x newest", yes(met)
    if name == "search, p99":
        return f"<= {SEARCH_P99_MS:g} ms", yes((largest[name] or 0) <= SEARCH_P99_MS)
    return "", ""


def _examined(columns: Sequence[Column]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("rows read by MySQL", *(_title(column.size) for column in columns), "at most", "met?")
    ]
    most: Callable[[Column, probes.Probe], int] = lambda column, probe: probe.most(Size.of(SIZES[column.size]))  # noqa: E731
    for probe in PROBES:
        least = columns[0].examined[probe.name]
        wrong = [
            f"{probe.name}, {column.size}: {fault}"
            for column in columns
            if (fault := probes.verdict(probe, Size.of(SIZES[column.size]), least, column.examined[probe.name]))
        ]
        columns[0].problems.extend(wrong)
        figures = (f"{column.examined[probe.name].rows:,}" for column in columns)
        rows.append((probe.name, *figures, f"{most(columns[0], probe):,}", yes(not wrong)))
    return aligned(rows, range(1, len(columns) + 2))
