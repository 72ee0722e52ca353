"""`python -m bench`: measures Dialect, an ordinary FastAPI server and a bare echo side by side, and prints a table.

Each server is one process on one core; the load generator, in its own process, and the database have another. Every
message is checked by the ledger: a run that loses, doubles or misplaces one fails, however fast it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from app.core.config import Settings
from bench import ejabberd, files, machine, scale, servers
from bench.client import Result, Task
from bench.failure import Failed
from bench.seed import SIZES, say
from bench.servers import MYSQL_URL_NAME, DatabaseCore, DatabaseName, MySQL, Server, ServerName
from bench.tables import aligned, yes

RESULTS = Path(__file__).resolve().parent / "results"
TASK_SECONDS = 600

What = Literal["pairs", "group", "open"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the table."""

    id: str
    title: str
    what: What
    bar: str
    factor: float = 0.0
    """At least so many times the reference."""
    limit_ms: float = 0.0
    """At most so many milliseconds at the 99th percentile."""
    members: int = 0
    per_second: int = 0
    """Messages a second of an open load."""


@dataclass(slots=True)
class Plan:
    """What to run and for how long."""

    scenarios: list[Scenario]
    databases: list[DatabaseName]
    repeat: int
    seconds: float
    warmup: float
    pairs: int
    short: bool = False
    peers: bool = False
    """Whether ejabberd is measured, too, on MySQL."""
    workers: Sequence[int] = (1,)
    """How many workers of dialect: one, two (on MySQL), or both in turns."""

    def ours(self, database: DatabaseName) -> list[ServerName]:
        """The servers that are ours."""
        names: list[ServerName] = []
        if 1 in self.workers or database == "sqlite":
            names.append("dialect")
        if 2 in self.workers and database == "mysql":
            names.append("workers")
        return names

    def rated(self, database: DatabaseName) -> list[ServerName]:
        """Those, the reference, and the peer."""
        peers: list[ServerName] = ["ejabberd"] if self.peers and database == "mysql" else []
        return ["naive", *self.ours(database), *peers]

    @property
    def variants(self) -> list[tuple[DatabaseName, ServerName]]:
        """The databases with our servers on them."""
        return [(database, name) for database in self.databases for name in self.ours(database)]

    @property
    def groups(self) -> list[int]:
        """Sizes of the groups."""
        return sorted({scenario.members for scenario in self.scenarios if scenario.members})

    @property
    def people(self) -> int:
        """Accounts needed; two strangers stand beside the largest group."""
        return max([2 * self.pairs, *(size + 2 for size in self.groups)])


@dataclass(slots=True)
class Measured:
    """All repeats of one cell."""

    scenario: str
    database: str
    server: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any repeat had a problem: its figures do not count, and the others would flatter."""
        return any(result.problems for result in self.results)

    @property
    def rate(self) -> float:
        """Median messages a second."""
        return statistics.median(result.rate for result in self.results)

    def latency(self, name: str) -> float:
        """Median over the repeats of one percentile."""
        return statistics.median(result.latency_ms.get(name, 0.0) for result in self.results)

    def cpu(self, name: str) -> float:
        """Median share of a core."""
        return statistics.median(result.cpu.get(name, 0.0) for result in self.results)


def scenarios(short: bool) -> list[Scenario]:
    """P1 to P4 of the table."""
    pairs, crowd, rate = (50, 200, 300) if short else (100, 1000, 1000)
    return [
        Scenario("p1", f"{pairs} pairs, closed loop", "pairs", ">= 12x", factor=12),
        Scenario("p2", "group of 100 online", "group", ">= 25x", factor=25, members=100),
        Scenario("p3", f"group of {crowd} online", "group", ">= 25x", factor=25, members=crowd),
        Scenario("p4", f"{rate:,} msg/s in pairs: p99", "open", "<= 10 ms", limit_ms=10, per_second=rate),
    ]


class Bench:
    """One run of the whole benchmark."""

    def __init__(self, plan: Plan, folder: Path, mysql: MySQL | None) -> None:
        self.plan = plan
        self.folder = folder
        self.mysql = mysql
        self.cores = machine.cores()
        self.measured: dict[tuple[str, str, str], Measured] = {}
        self.echo: list[Result] = []
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.scale: dict[str, list[scale.Column]] = {}
        self.transfers: dict[str, files.Transfers] = {}
        self._database_pid: int | None = None
        self._step = 0
        rated = sum(len(plan.rated(database)) for database in plan.databases)
        self._steps = plan.repeat * (len(plan.scenarios) * rated + len(plan.databases))

    @property
    def server_core(self) -> int | None:
        """The core of the server under test."""
        return self.cores[0] if self.cores else None

    @property
    def other_core(self) -> int | None:
        """The core of everything else."""
        return self.cores[1] if self.cores else None

    def run(self) -> None:
        """Measure everything.

        Raises Failed when something cannot be started.
        """
        if self.cores is None:
            self.notes.append("this machine offers one core: server, generator and database share it")
        for database in self.plan.databases:
            held = DatabaseCore()
            running: dict[ServerName, Server] = {}
            try:
                if database == "mysql" and self.mysql is not None:
                    held = DatabaseCore.hold(self.mysql, self.other_core)
                    self.notes.append(held.note)
                self._database_pid = held.pid
                rated = self.plan.rated(database)
                for name in ("echo", *rated):
                    say(f"{database}: starting {name}")
                    running[name] = servers.start(name, database, self.folder, self.server_core, self.mysql)
                for name in rated:
                    self._setup(running[name], database)
                for _ in range(self.plan.repeat):
                    self._round(running, database)
            finally:
                for server in running.values():
                    server.stop()
                held.release()

    def _setup(self, server: Server, database: str) -> None:
        plan = self.plan
        say(f"{database}: {server.name}: registering {plan.people} people and making their chats")
        task = self.task(server, "setup", database)
        task.people, task.pairs, task.groups = plan.people, plan.pairs, plan.groups
        result = self.generate(server, task)
        if result.problems:
            raise Failed(
                f"{server.name} on {database} could not be set up: {result.problems[0]}\n"
                f"Its log ends with:\n{server.last_words()}"
            )

    def _round(self, running: dict[ServerName, Server], database: DatabaseName) -> None:
        echo = running["echo"]
        result = self.generate(echo, self.task(echo, "echo", database))
        self.echo.append(result)
        self._progress(f"echo: {result.rate:,.0f}/s", result, echo, f"echo beside {database}")
        for scenario in self.plan.scenarios:
            for name in self.plan.rated(database):
                server = running[name]
                task = self.task(server, scenario.what, database)
                task.members, task.rate = scenario.members, scenario.per_second
                result = self.generate(server, task)
                key = (scenario.id, database, name)
                self.measured.setdefault(key, Measured(*key)).results.append(result)
                figure = f"{result.rate:,.0f} msg/s"
                if result.latency_ms:
                    figure += f", p50 {result.latency_ms['p50']:.1f} ms, p99 {result.latency_ms['p99']:.1f} ms"
                self._progress(f"{scenario.id} {name}: {figure}", result, server, f"{scenario.id} on {database}")

    def _progress(self, figure: str, result: Result, server: Server, where: str) -> None:
        self._step += 1
        verdict = "ok" if not result.problems else "FAILED"
        say(f"[{self._step}/{self._steps}] {where}: {figure}: {verdict}")
        for problem in result.problems:
            self.problems.append(f"{where}, {server.name}: {problem}")

    def task(self, server: Server, what: Literal["setup", "echo"] | What, database: str) -> Task:
        """What the generator is to do, apart from numbers of people."""
        dialect = server.name in servers.OURS
        return Task(
            what=what,
            port=server.port,
            world=str(self.folder / f"world-{server.name}-{database}.json"),
            door="bearer" if dialect else "query",
            seqs=dialect,
            framed_once=server.name == "dialect",  # of two workers one may heal a hole, by another frame
            server_pid=server.process.pid,
            database_pid=self._database_pid if database == "mysql" else None,
            warmup=self.plan.warmup,
            seconds=self.plan.seconds,
            drain=30.0 if self.plan.short else 60.0,
            pairs=self.plan.pairs,
            archive=server.archive,
        )

    def generate(self, server: Server, task: Task) -> Result:
        """Run the load generator.

        Raises Failed when the server or the generator itself breaks.
        """
        path = self.folder / "task.json"
        path.write_bytes(orjson.dumps(task))
        generator = subprocess.run(
            [sys.executable, "-m", "bench.xmpp" if server.name == "ejabberd" else "bench.client", str(path)],
            cwd=servers.ROOT,
            env=servers.child_environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=None if task.what == "idle" else subprocess.PIPE,
            preexec_fn=servers.on_core(self.other_core),
            timeout=TASK_SECONDS,
            check=False,
        )
        if generator.returncode:
            words = (generator.stderr or b"").decode(errors="replace")[-3000:]
            raise Failed(f"the load generator broke (status {generator.returncode}):\n{words}")
        if server.process.poll() is not None:
            raise Failed(
                f"{server.name} died during {task.what} (status {server.process.returncode}); "
                f"its log ends with:\n{server.last_words()}"
            )
        return Result(**orjson.loads(generator.stdout))

    # --- what is printed ----------------------------------------------------------------------------------------

    def table(self) -> str:
        """The table and what belongs under it."""
        rows: list[tuple[str, ...]] = [("scenario", "database", "naive", "dialect", "ratio", "bar", "met?")]
        below: list[str] = []
        for scenario in self.plan.scenarios:
            for database in self.plan.databases:
                naive = self.measured[scenario.id, database, "naive"]
                ours = [self.measured[scenario.id, database, name] for name in self.plan.ours(database)]
                rows += [self._row(scenario, naive, cell) for cell in ours]
                below += [_latency_line(scenario, cell) for cell in (naive, *ours)]
        lines = aligned(rows, range(2, 5))
        floor = statistics.median(result.rate for result in self.echo)
        if self.plan.peers:
            lines += ["", *self._peers()]
        lines.append(f"\nfloor: a bare uvicorn WebSocket echo does {floor:,.0f} round trips/s on the same core")
        lines += ["", "latency and shares of a core (medians):", *below]
        lines.append("")
        lines += self._footnotes()
        return "\n".join(lines)

    def _row(self, scenario: Scenario, naive: Measured, ours: Measured) -> tuple[str, ...]:
        head = (f"{scenario.id.upper()} {scenario.title}", where(ours.database, ours.server))
        if scenario.what == "open":
            mine, theirs = ours.latency("p99"), naive.latency("p99")
            figures, ratio = (f"{theirs:,.1f} ms", f"{mine:,.1f} ms"), theirs / mine if mine else 0.0
            met = mine <= scenario.limit_ms
        else:
            figures, ratio = (
                (f"{naive.rate:,.0f}/s", f"{ours.rate:,.0f}/s"),
                ours.rate / naive.rate if naive.rate else 0.0,
            )
            met = ratio >= scenario.factor
        if naive.failed or ours.failed:
            shown = ("FAILED" if cell.failed else figure for cell, figure in zip((naive, ours), figures, strict=True))
            return (*head, *shown, "-", scenario.bar, "FAILED")
        return (*head, *figures, f"{ratio:,.1f}x", scenario.bar, yes(met))

    def _peers(self) -> list[str]:
        rows: list[tuple[str, ...]] = [("scenario", "ejabberd", "dialect", "ratio", "p50", "p99")]
        for scenario in self.plan.scenarios:
            theirs = self.measured[scenario.id, "mysql", "ejabberd"]
            for name in self.plan.ours("mysql"):
                ours = self.measured[scenario.id, "mysql", name]
                failed = theirs.failed or ours.failed
                rows.append(
                    (
                        f"{scenario.id.upper()} {scenario.title}" + (", 2 workers" if name == "workers" else ""),
                        f"{theirs.rate:,.0f}/s",
                        f"{ours.rate:,.0f}/s",
                        "FAILED" if failed else f"{ours.rate / theirs.rate:,.1f}x",
                        *(f"{theirs.latency(part):,.1f} / {ours.latency(part):,.1f} ms" for part in ("p50", "p99")),
                    )
                )
        return [*aligned(rows, range(1, 6)), *ejabberd.NOT_COMPARABLE]

    def _footnotes(self) -> list[str]:
        plan = self.plan
        pinned = f"core {self.server_core}" if self.cores else "no core of its own"
        checked = sum(result.messages for cell in self.measured.values() for result in cell.results)
        lines = [
            f"machine: {machine.describe()}",
            f"medians of {plan.repeat}; {plan.seconds:g} s each after {plan.warmup:g} s of warm-up; "
            f"server: one process, {pinned}; generator and database: "
            + (f"core {self.other_core}" if self.cores else "the same core"),
            "dialect runs with its defaults, except: rate limits off, cheap password hashes, long tokens",
            f"messages inside the measured time: {checked:,}; these and those of warm-up and drain were checked by "
            "the ledger against the server's history (order and holes only for dialect: the reference promises none)",
            *self.notes,
        ]
        if 2 in plan.workers and "mysql" in plan.databases:
            lines.append("two workers over Redis run on any core, beside generator, database and Redis")
        if plan.short:
            lines.append("a short run: it shows that everything works, its figures prove nothing")
        return lines

    def as_json(self) -> dict[str, object]:
        """Everything measured."""
        return {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": machine.describe(),
            "cores": self.cores,
            "plan": asdict(self.plan),
            "echo": [asdict(result) for result in self.echo],
            "measured": [asdict(cell) for cell in self.measured.values()],
            "scale": {name: [asdict(column) for column in columns] for name, columns in self.scale.items()},
            "files": {name: asdict(transfers) for name, transfers in self.transfers.items()},
            "notes": self.notes,
            "problems": self.problems,
        }


def where(database: str, server: str) -> str:
    """A database, and whether two workers are on it."""
    return f"{database}, 2 workers" if server == "workers" else database


def _latency_line(scenario: Scenario, cell: Measured) -> str:
    if cell.failed:
        return f"  {scenario.id.upper()} {cell.database:6} {cell.server:8} FAILED, see below"
    shares = ", ".join(f"{name} {cell.cpu(name):.0%}" for name in ("server", "database", "generator"))
    times = ", ".join(f"{name} {cell.latency(name):,.1f} ms" for name in ("p50", "p99", "max"))
    late = cell.latency("generator late p99") if scenario.what == "open" else None
    tail = f"; generator late by {late:.2f} ms (p99, counted as latency)" if late is not None else ""
    return f"  {scenario.id.upper()} {cell.database:6} {cell.server:8} {times}; {shares}{tail}"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=servers.ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


# --- P5 ---------------------------------------------------------------------------------------------------------

IDLE_LIMIT_KIB = 40.0
IDLE_ACCOUNTS = 1000


def run_idle(bench: Bench, connections: int, seconds: float) -> str:
    """Hold idle connections and print what each costs."""
    rows = [("scenario", "database", "connections", "KB each", "drops", "connected in", "bar", "met?")]
    accounts = min(IDLE_ACCOUNTS, connections)
    per_user = max(10, -(-connections // accounts))
    for database, name in bench.plan.variants:
        say(f"{where(database, name)}: starting dialect for {connections:,} idle connections")
        server = servers.start(name, database, bench.folder, bench.server_core, bench.mysql, sockets_per_user=per_user)
        try:
            task = bench.task(server, "setup", database)
            task.people, task.pairs, task.groups = accounts, 0, []
            made = bench.generate(server, task)
            if made.problems:
                raise Failed(f"dialect could not be set up: {made.problems[0]}\n{server.last_words()}")
            task.what, task.connections, task.seconds = "idle", connections, seconds
            say(f"{database}: connecting, then {seconds:g} s of silence")
            result = bench.generate(server, task)
            bench.measured["p5", database, name] = Measured("p5", database, name, [result])
            bench.problems += [f"p5 on {where(database, name)}: {problem}" for problem in result.problems]
        finally:
            server.stop()
        met = result.drops == 0 and result.connected == connections and result.kib_each <= IDLE_LIMIT_KIB
        rows.append(
            (
                f"P5 idle {seconds:g} s",
                where(database, name),
                f"{result.connected:,} of {connections:,}",
                f"{result.kib_each:.1f}",
                str(result.drops),
                f"{result.connect_seconds:.1f} s",
                f"<= {IDLE_LIMIT_KIB:g} KB, 0 drops",
                yes(met),
            )
        )
    lines = aligned(rows, range(2, 5))
    lines.append(
        f"\nBearer door, {accounts:,} accounts, {per_user} sockets each at most, sources 127.0.0.2 to 127.0.0.21; "
        "KB each: growth of the server's RSS, of two workers together\n" + f"machine: {machine.describe()}"
    )
    return "\n".join(lines)


# --- P6 ---------------------------------------------------------------------------------------------------------


def run_scale(bench: Bench, database: DatabaseName, sizes: list[str]) -> str:
    """Measure databases of several sizes side by side."""
    held = DatabaseCore()
    try:
        columns: list[scale.Column] = []
        for size in sizes:
            place = scale.Place(database, size, bench.mysql, RESULTS, keep=not bench.plan.short)
            with place.seeded():
                if bench.mysql is not None and database == "mysql" and held.pid is None:
                    held = DatabaseCore.hold(bench.mysql, bench.other_core)
                say(f"p6: {database}: measuring {size}")
                columns.append(scale.measure(place, bench.folder, bench.server_core))
    finally:
        held.release()
    bench.scale[database] = columns
    problems = [problem for column in columns for problem in column.problems]
    bench.problems += [f"p6 on {database}: {problem}" for problem in problems]
    return "\n".join([*scale.table(database, columns), held.note, f"machine: {machine.describe()}"])


# --- files ------------------------------------------------------------------------------------------------------


def run_files(bench: Bench) -> str:
    """Large files up and down, beside the same through a bare uvicorn app and nginx."""
    size = (4 if bench.plan.short else 50) * files.MIB
    repeat = 1 if bench.plan.short else max(5, bench.plan.repeat)
    say(f"files: {size // files.MIB} MiB up and down, {repeat} times")
    rows, bench.transfers = files.run(
        bench.plan.databases, bench.folder, bench.cores, bench.mysql, size=size, repeat=repeat
    )
    lines = aligned(rows, range(2, 7))
    lines.append(
        f"\nmedians of {repeat}; each server on core {bench.server_core}, the client on core {bench.other_core}. Bare "
        "uvicorn writes the body to a file and syncs it;\nnginx (WebDAV PUT, static GET) does not sync. Dialect's "
        "hashes it, too, and looks at what it is.\nmemory: how far the server's rose above where it stood, at most\n"
        f"machine: {machine.describe()}"
    )
    return "\n".join(lines)


# --- what goes on beside P4's load --------------------------------------------------------------------------------


class Beside:
    """The process that does something beside the measured chat (`bench.beside`)."""

    def __init__(self, folder: Path, core: int | None) -> None:
        folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.beside", str(folder)],
            cwd=servers.ROOT,
            env=servers.child_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=servers.on_core(core),
        )
        self.environment: dict[str, str] = self._answer()

    def begin(self, what: str, port: int) -> None:
        """Begin, against the server on this port. Raises Failed."""
        self._say(orjson.dumps({"what": what, "port": port}))

    def end(self) -> dict[str, int]:
        """End; how often what was done. Raises Failed."""
        return self._say(b"stop")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _say(self, line: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "problem" in answer:
            raise Failed(f"what was to go on beside the chat failed: {answer['problem']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed("the process that was to do something beside the chat ended by itself")
        answer: dict[str, Any] = orjson.loads(line)
        return answer


@dataclass(frozen=True, slots=True)
class BesideScenario:
    """P4's load, alone and with company."""

    id: str
    title: str
    what: str
    factor: float = 0.0
    limit_ms: float = 0.0

    @property
    def bar(self) -> str:
        """What is asked."""
        return f"<= {self.factor:g}x alone" if self.factor else f"<= {self.limit_ms:g} ms"

    def met(self, alone: float, beside: float) -> bool:
        """Whether it is met, by the 99th percentiles."""
        return beside <= (self.factor * alone if self.factor else self.limit_ms)


BESIDE = (
    BesideScenario("p4-beside", "P4 beside uploads, images, push", "files", limit_ms=10),
    BesideScenario("p7", "P7 P4 beside 50 logins at once", "logins", factor=1.5),
)


def run_beside(bench: Bench, scenario: BesideScenario) -> str:
    """P4's open load with something else beside it, and without, in turns."""
    plan = bench.plan
    rate = 300 if plan.short else 1000
    rows: list[tuple[str, ...]] = [
        ("scenario", "database", "alone: p50", "p99", "beside: p50", "p99", "ratio", "bar", "met?", "a second beside")
    ]
    # What the passwords cost is P7's whole point.
    costs = {
        name.upper(): str(Settings.model_fields[name].default) for name in ("argon2_memory_kib", "argon2_time_cost")
    }
    for database, name in plan.variants:
        held = DatabaseCore()
        beside = Beside(bench.folder / f"{scenario.id}-{database}-{name}", bench.other_core)
        server: Server | None = None
        try:
            if database == "mysql" and bench.mysql is not None:
                held = DatabaseCore.hold(bench.mysql, bench.other_core)
            settings = {**beside.environment, **(costs if scenario.what == "logins" else {})}
            say(f"{where(database, name)}: starting dialect for {scenario.id}")
            server = servers.start(name, database, bench.folder, bench.server_core, bench.mysql, settings=settings)
            task = bench.task(server, "setup", database)
            task.people = 2 * plan.pairs
            made = bench.generate(server, task)
            if made.problems:
                raise Failed(f"dialect could not be set up: {made.problems[0]}\n{server.last_words()}")
            task.what, task.rate, task.database_pid = "open", rate, held.pid
            alone, together = (Measured(scenario.id, where(database, name), how) for how in ("alone", "beside"))
            done: Counter[str] = Counter()
            took = 0.0
            for _ in range(plan.repeat):
                alone.results.append(bench.generate(server, task))
                beside.begin(scenario.what, server.port)
                begun = time.monotonic()
                together.results.append(bench.generate(server, task))
                took += time.monotonic() - begun
                done.update(beside.end())
                say(f"{scenario.id} on {alone.database}: {together.results[-1].latency_ms}")
        finally:
            if server is not None:
                server.stop()
            beside.close()
            held.release()
        for cell in (alone, together):
            bench.measured[scenario.id, cell.database, cell.server] = cell
            bench.problems += [
                f"{scenario.id} on {cell.database}, {cell.server}: {problem}"
                for result in cell.results
                for problem in result.problems
            ]
        before, after = alone.latency("p99"), together.latency("p99")
        rows.append(
            (
                scenario.title,
                alone.database,
                *(f"{cell.latency(part):.1f} ms" for cell in (alone, together) for part in ("p50", "p99")),
                f"{after / before:.2f}x" if before else "-",
                scenario.bar,
                "FAILED" if alone.failed or together.failed else yes(scenario.met(before, after)),
                ", ".join(f"{count / took:.1f} {what}" for what, count in done.items()),
            )
        )
    lines = aligned(rows, range(2, 7))
    lines.append(
        f"\n{rate:,} messages a second in {plan.pairs} pairs, {plan.repeat} times alone and beside in turns, medians; "
        "photos of 12 megapixels, files of 10 MiB;\nserver, image processes and hashing threads on core "
        f"{bench.server_core}, everything else on core {bench.other_core}\nmachine: {machine.describe()}"
    )
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------


KNOWN = {"p1", "p2", "p3", "p4", "p5", "p6", "files", *(scenario.id for scenario in BESIDE)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure Dialect beside an ordinary FastAPI server and a bare echo."
    )
    parser.add_argument("--short", action="store_true", help="a run of a minute that only shows that all of it works")
    parser.add_argument(
        "--only", default="", help="for example p1,p2; p5 (idle connections) and p6 (scale) run only when named"
    )
    parser.add_argument("--db", default="sqlite,mysql", help="sqlite, mysql or both (default)")
    parser.add_argument(
        "--workers", default="1,2", help="on MySQL: 1 worker, 2 over Redis, or both (default 1,2); on SQLite always 1"
    )
    parser.add_argument("--repeat", type=int, help="repeats of each measurement; the median counts (default 3)")
    parser.add_argument("--seconds", type=float, help="seconds per measurement (default 8)")
    parser.add_argument("--connections", type=int, default=10_000, help="idle connections of p5 (default 10,000)")
    parser.add_argument("--hold", type=float, default=60, help="seconds that p5 holds them (default 60)")
    parser.add_argument("--scale", default="10k,1m,10m", help="messages of p6's databases (default 10k,1M,10M)")
    parser.add_argument("--peers", action="store_true", help="P1 and P2 of ejabberd, too (Debian's), on the same MySQL")
    options = parser.parse_args(arguments)
    if options.repeat is not None and options.repeat < 1:
        parser.error("--repeat must be at least 1")
    options.only = [part.strip().lower() for part in options.only.split(",") if part.strip()]
    unknown = set(options.only) - KNOWN
    if unknown:
        parser.error(f"--only knows {', '.join(sorted(KNOWN))}, not {', '.join(sorted(unknown))}")
    if options.peers:
        options.only, options.db = ["p1", "p2"], "mysql"
    options.db = [part.strip().lower() for part in options.db.split(",") if part.strip()]
    if not options.db or set(options.db) - set(get_args(DatabaseName)):
        parser.error("--db takes sqlite, mysql or sqlite,mysql")
    if options.workers not in ("1", "2", "1,2"):
        parser.error("--workers takes 1, 2 or 1,2")
    options.workers = [int(part) for part in options.workers.split(",")]
    options.scale = [part.strip().lower() for part in options.scale.split(",") if part.strip()]
    if not options.scale or set(options.scale) - SIZES.keys():
        parser.error("--scale takes some of 10k, 1M and 10M")
    return options


def choose_databases(wanted: list[DatabaseName], short: bool) -> tuple[list[DatabaseName], MySQL | None]:
    """The databases that can be measured.

    Raises Failed when MySQL is wanted by CI, or nothing is left.
    """
    url = os.environ.get(MYSQL_URL_NAME, "")
    if "mysql" not in wanted:
        return wanted, None
    if url:
        mysql = MySQL.from_url(url)
        mysql.run("SELECT 1")
        return wanted, mysql
    how = f"start one with `make mysql` and put the URL it prints into {MYSQL_URL_NAME}"
    if short and os.environ.get("CI", "").lower() in ("true", "1"):
        raise Failed(f"CI measures MySQL too, and {MYSQL_URL_NAME} is not set: {how}.")
    left: list[DatabaseName] = [name for name in wanted if name != "mysql"]
    if not left:
        raise Failed(f"{MYSQL_URL_NAME} is not set: {how}.")
    say(f"MySQL IS LEFT OUT: {MYSQL_URL_NAME} is not set; to measure it, {how}.")
    return left, None


def main() -> int:
    """Run what the command line asks for; 1 when the ledger or a server failed, whatever the figures."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [scenario for scenario in scenarios(options.short) if not options.only or scenario.id in options.only]
    seconds = options.seconds or (1.0 if options.short else 8.0)
    RESULTS.mkdir(exist_ok=True)
    # On the disk of the project: a temporary folder may be memory, where a durable commit costs nothing.
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=RESULTS))
    try:
        databases, mysql = choose_databases(options.db, options.short)
        plan = Plan(
            chosen,
            databases,
            options.repeat or (1 if options.short else 3),
            seconds,
            0.3 if options.short else 2.0,
            50 if options.short else 100,
            short=options.short,
            workers=options.workers,
            peers=options.peers,
        )
        bench = Bench(plan, folder, mysql)
        if chosen:
            bench.run()
            print("\n" + bench.table(), flush=True)
        if not options.only or "files" in options.only:
            print("\n" + run_files(bench), flush=True)
        for scenario in BESIDE:
            if not options.only or scenario.id in options.only:
                print("\n" + run_beside(bench, scenario), flush=True)
        if "p5" in options.only:
            print("\n" + run_idle(bench, options.connections, options.hold), flush=True)
        if "p6" in options.only or (options.short and not options.only):
            sizes = ["10k"] if options.short else options.scale
            for database in databases:
                print("\n" + run_scale(bench, database, sizes), flush=True)
    except Failed as failure:
        print(f"\nThe benchmark stopped: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"{stamp}.json"
    path.write_bytes(orjson.dumps(bench.as_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))
    print(f"\nall figures: {path.relative_to(servers.ROOT)}")
    if bench.problems:
        print("\nFAILED: figures do not count when messages go astray:", file=sys.stderr)
        for problem in bench.problems:
            print(f"  {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
