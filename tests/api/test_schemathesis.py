"""Schemathesis against a live server: every operation of the OpenAPI document, every check, two people.

`DIALECT_SCHEMATHESIS_EXAMPLES` sets the examples of an operation (a nightly run takes hundreds),
`DIALECT_SCHEMATHESIS_SEED` the seed. A failed run prints the seed and how to reproduce each failure.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from app.core.config import Settings
from tests.support.accounts import register
from tests.support.people import Person
from tests.support.servers import ROOT, Server

EXAMPLES = int(os.environ.get("DIALECT_SCHEMATHESIS_EXAMPLES", "0"))
SEED = os.environ.get("DIALECT_SCHEMATHESIS_SEED", "2026")
# On MySQL it is the same code up to the database: a shorter run looks for what only MySQL refuses.
DEFAULT_EXAMPLES = {"sqlite": 160, "mysql": 15}
LEAST_CASES = {"sqlite": 5000, "mysql": 1500}
CHECKS = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
    "ignored_auth",
    "object_level_authorization",
}
HOOKS = ROOT / "tests" / "support" / "schemathesis_hooks.py"
LOGIN = {
    "endpoint": "/api/v1/auth/token",
    "verb": "POST",
    "contentType": "application/x-www-form-urlencoded",
    "token": {
        "extractFrom": "body",
        "extractSelector": "/access_token",
        "sendIn": "header",
        "sendName": "Authorization",
        "sendTemplate": "Bearer {token}",
    },
}


@pytest.mark.schemathesis
@pytest.mark.timeout(6 * 3600 if EXAMPLES else 1800)
async def test_schemathesis_finds_nothing(
    server: Server, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = "mysql" if settings.uses_mysql else "sqlite"
    users, user_ids = await _settle(server, tmp_path)
    examples = EXAMPLES or DEFAULT_EXAMPLES[engine]
    output, report, events = tmp_path / "output.txt", tmp_path / "report.json", tmp_path / "events.ndjson"
    arguments = [
        *("--no-color", "--config-file", str(ROOT / "schemathesis.toml")),
        # Not `--checks all`: all of them run anyway, and naming them here would overrule what the file says of some.
        *("run", f"{server.url}/openapi.json"),
        *("--max-examples", str(examples), "--seed", SEED, "--generation-database", "none"),
        *("--report", "json,ndjson", "--report-json-path", str(report), "--report-ndjson-path", str(events)),
    ]
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("st")),
            *arguments,
            cwd=tmp_path,
            env={
                **os.environ,
                "DIALECT_SCHEMATHESIS_USERS": str(users),
                "DIALECT_SCHEMATHESIS_USER_IDS": json.dumps(user_ids),
                "SCHEMATHESIS_HOOKS": str(HOOKS),
            },
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
        )
        code = await process.wait()
    text = output.read_text(encoding="utf-8", errors="replace")
    assert report.exists(), text[-5000:]
    summary = json.loads(report.read_bytes())
    with capsys.disabled():
        sys.stdout.write(
            f"\nSchemathesis on {engine}: {summary['test_cases']['generated']} cases in "
            f"{summary['running_time']:.0f} s, seed {summary['seed']}\n"
        )

    assert server.exit_code is None
    problems = "\n".join(line[:2000] for line in text.splitlines())[-30_000:]
    assert (code, summary["failures"], summary["errors"]) == (0, [], []), problems
    assert summary["complete"]
    assert {phase["status"] for phase in summary["phases"].values()} == {"success"}, problems
    operations = summary["operations"]
    assert operations["tested"] == operations["selected"] == operations["total"] > 30
    assert summary["test_cases"]["generated"] >= (0 if EXAMPLES else LEAST_CASES[engine])
    checks, probes = _what_ran(events)
    assert set(checks) >= CHECKS, checks
    assert all(checks[name] > summary["test_cases"]["generated"] * 0.5 for name in CHECKS), checks
    # The two really looked at each other's objects: reads that worked for their owner were tried as the other.
    assert any("{chat_id}" in probe and probe.endswith(" 404") for probe in probes["bob"]), probes


async def _settle(server: Server, folder: Path) -> tuple[Path, dict[str, int]]:
    """People, chats under the ids of the documentation's examples, the file that tells how two log in, and their ids.

    Bob comes last: with an id of the examples he would soon be a member of every chat that ann opens, and none would
    be left that he must not see.
    """
    entries = []
    async with server.client() as client:
        # None has the password of the examples: with it, POST /auth/password would work.
        ann, carl, *_, bob = [Person(client, await register(client)) for _ in range(30)]
        for owner in (ann, bob):
            group = await owner.group(carl)
            for number in range(60):
                await owner.say(group, f"message {number}")
        for name, person in (("ann", ann), ("bob", bob)):
            payload = {
                "username": person.account.phone,
                "password": person.account.password,
                "usernameField": "username",
                "passwordField": "password",
            }
            entries.append({"name": name, "loginEndpointAuth": {**LOGIN, "payloadUserPwd": payload}})
    file = folder / "users.json"
    file.write_text(json.dumps({"auth": entries}), encoding="utf-8")
    return file, {"ann": ann.id, "bob": bob.id}


def _what_ran(events: Path) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """How often each check ran; and requests that were sent once more as another person: who, what and its status.

    Schemathesis sends the latter itself after the request they repeat: they have that one as parent and no checks.
    """
    checks: Counter[str] = Counter()
    probes: dict[str, Counter[str]] = {"ann": Counter(), "bob": Counter()}
    for line in events.read_text(encoding="utf-8").splitlines():
        scenario: dict[str, Any] = json.loads(line).get("ScenarioFinished", {})
        recorder = scenario.get("recorder", {})
        for ran in recorder.get("checks", {}).values():
            checks.update(check["name"] for check in ran)
        for case_id, case in recorder.get("cases", {}).items():
            value = case["value"]
            interaction = recorder.get("interactions", {}).get(case_id)
            if interaction and case.get("parent_id") and case_id not in recorder["checks"]:
                parent = recorder["cases"][case["parent_id"]]["value"]
                identity = value.get("auth_identity")
                if identity in probes and identity != parent.get("auth_identity"):
                    status = (interaction["response"] or {}).get("status_code")
                    probes[identity][f"{value['method']} {value['path']} {status}"] += 1
    return checks, probes
