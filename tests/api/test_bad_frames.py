"""Bad frames on the socket, through both doors: each gets its error, and those who chat meanwhile notice nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from app.core.config import Settings
from app.db.events import AnyCommand
from tests.conftest import StartServer
from tests.support.people import people
from tests.support.servers import Door, Server
from tests.support.socket_client import SocketClient
from tests.support.watch import watched

pytestmark = pytest.mark.timeout(300)

Json = dict[str, Any]
MISSING = 999_999
both_doors = pytest.mark.parametrize("door", ["tuned", "plain"])

WRONG: dict[str, tuple[str, ...]] = {
    "null": ("null",),
    "boolean": ("true", "false"),
    "integer": ("7",),
    "number": ("1.5",),
    "string": ('"x"', '""', '"7"'),
    "array": ("[]", "[[]]"),
    "object": ("{}", '{"a": 1}'),
}
CANNOT_BE = (
    "NaN",
    "Infinity",
    r'"\ud83d"',
    r'"a\ude00b"',
    "[" * 30_000 + "]" * 30_000,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
)
HUGE = ("9007199254740992", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "-1", "1e400", "1.5")


def good_frames(chat_id: int, message_id: int, user_id: int, token: str) -> dict[str, Json]:
    """Each command with every field, as it works; in an order in which each still works after the others."""
    client_id = "4fa0e1d4-0f0f-4d1e-9a5e-0c6bdb3c9a51"
    return {
        "ping": {},
        "new_message": {
            "chat_id": chat_id,
            "content": "x",
            "message_type": "text",
            "client_id": client_id,
            "reply_to": message_id,
        },
        "edit_message": {"chat_id": chat_id, "message_id": message_id, "content": "y"},
        "message_read": {"chat_id": chat_id, "message_id": message_id},
        "message_delivered": {"chat_id": chat_id, "message_id": message_id},
        "typing": {"chat_id": chat_id, "active": True},
        "subscribe_presence": {"user_ids": [user_id]},
        "reauth": {"token": token},
        "resume": {"epoch": "x", "account_version": 0, "chats": {str(chat_id): 0}},
        "delete_message": {"chat_id": chat_id, "message_id": message_id, "for_everyone": True},
    }


def schemas() -> dict[str, Json]:
    """The JSON Schema of each command, by its type."""
    found = {}
    for command in get_args(AnyCommand):
        schema = command.model_json_schema()
        found[schema["properties"]["type"]["const"]] = schema
    return found


def spoilt(schema: Json, good: Json) -> Iterator[tuple[str, set[str]]]:
    """Frames with one thing wrong, as text, with the codes of the error."""
    for name, field in schema["properties"].items():
        rest = {other: value for other, value in good.items() if other != name}
        parts = field.get("anyOf", [field])
        accepted = {part.get("type", "string") for part in parts}
        refused = {"invalid_frame"} if name != "type" else {"unknown_type"}
        values: list[tuple[str, set[str]]] = [(value, refused | {"invalid_json"}) for value in CANNOT_BE]
        for kind, wrong in WRONG.items():
            if kind not in accepted:
                values += [(value, refused) for value in wrong]
        if "integer" in accepted:
            values += [(value, refused | {"invalid_json"}) for value in HUGE]
        if "array" in accepted:
            values += [(f"[{value}]", refused | {"invalid_json"}) for value in ('"x"', "null", "0", *HUGE)]
        if "object" in accepted:
            values += [(f'{{"1": {value}}}', refused | {"invalid_json"}) for value in ('"x"', "null", "true", *HUGE)]
            values += [(json.dumps({key: 0}), refused) for key in ("", "0", "01", "x", "\x00", "9" * 16, "9" * 17)]
        if name in ("content", "client_id", "message_type", "type"):
            values.append((r'"a\u0000b"', refused))
        if name == "token":
            values.append((r'"a\u0000b"', {"invalid_token"}))
        if name in ("ref", "epoch", "client_id", "message_type"):
            values.append((json.dumps("x" * 20_000), refused))
        for value, codes in values:
            yield f'{json.dumps(rest)[:-1]}{", " if rest else ""}"{name}": {value}}}', codes
            if len(value) < 1000:  # of two keys the last one counts
                yield f'{json.dumps(good)[:-1]}, "{name}": {value}}}', codes
        if name in schema["required"]:
            yield json.dumps(rest), refused
    yield json.dumps({**good, "unknown": 1}), {"invalid_frame"}
    yield json.dumps({**good, "\u202e" * 3000: 1}), {"invalid_frame"}
    yield json.dumps(good)[:-1], {"invalid_json"}
    yield json.dumps(good) * 2, {"invalid_json"}
    yield json.dumps(good).replace('"', "'"), {"invalid_json"}
    yield "\ufeff" + json.dumps(good), {"invalid_json"}


UNKNOWN_FIELDS = {
    "foo": "foo: unknown field",
    "имя": "имя: unknown field",
    "a\nb\x00\x1b[31m": r"a\nb\x00\x1b[31m: unknown field",
    "\u202e": r"\u202e: unknown field",
    "x" * 5000: "x" * 64 + ": unknown field",
    "\u202e" * 5000: r"\u202e" * 10 + r"\u20" + ": unknown field",
}


@pytest.mark.parametrize("name", UNKNOWN_FIELDS, ids=range(len(UNKNOWN_FIELDS)))
async def test_an_unknown_field_is_named_in_short_and_in_print(shared_server: Server, name: str) -> None:
    async with shared_server.client() as client:
        [ann] = await people(client, 1)
    async with await ann.open(shared_server) as socket:
        answer = await error_of(socket, json.dumps({"type": "ping", name: 1}, ensure_ascii=False))
    assert (answer["code"], answer["detail"]) == ("invalid_frame", UNKNOWN_FIELDS[name])


NO_COMMANDS = {
    "": "invalid_json",
    " ": "invalid_json",
    "null": "invalid_frame",
    "true": "invalid_frame",
    "1": "invalid_frame",
    "1e999": "invalid_frame",
    '"ping"': "invalid_frame",
    "[]": "invalid_frame",
    '[{"type": "ping"}]': "invalid_frame",
    "{}": "unknown_type",
    '{"type": "nonsense"}': "unknown_type",
    '{"type": "PING"}': "unknown_type",
    '{"type": "hello"}': "unknown_type",
    '{"Type": "ping"}': "unknown_type",
    "[" * 60_000: "invalid_json",
    "{" * 60_000: "invalid_json",
    "x" * 65_536: "invalid_json",
    "\x00": "invalid_json",
}


async def error_of(socket: SocketClient, frame: str | bytes, **options: Any) -> Json:
    """What a frame is answered with."""
    await socket.connection.send(frame, **options)
    answer = await socket.wait(lambda event: event["type"] in ("error", "ack", "pong", "resumed"))
    assert answer["type"] == "error", (frame[:300], answer)
    assert set(answer) == {"type", "code", "detail", "retryable", "retry_after", "ref", "client_id"}
    assert len(answer["detail"]) < 300
    assert answer["retryable"] is False
    return answer


@both_doors
async def test_every_bad_frame_gets_its_error_and_harms_nobody(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        ann, bo, cy, dan, eve = await people(client, 5)
        chat_id = await ann.personal(bo)
        message = await ann.say(chat_id, "kept")
        others_chat = await cy.group(dan, title="others")
        others_message = await cy.say(others_chat, "of others")
        own_chat = await ann.personal(eve)
        commands = good_frames(chat_id, message["id"], bo.id, ann.account.access_token)
        assert set(commands) == set(schemas()), "a new command needs an example here"

        async with (
            watched(server, cy, dan) as watch,
            watch.talking(least=10),
            await ann.open(server) as socket,
        ):
            # What is wrong with its form.
            for kind, good in commands.items():
                for frame, codes in spoilt(schemas()[kind], {"type": kind, **good}):
                    answer = await error_of(socket, frame)
                    assert answer["code"] in codes, (kind, frame[:300], answer)
            for frame, code in NO_COMMANDS.items():
                assert (await error_of(socket, frame))["code"] == code, frame[:100]
            for binary in (b"", b"\x00\xff", json.dumps({"type": "ping"}).encode(), b"x" * 65_536):
                assert (await error_of(socket, binary))["code"] == "binary_frame"

            # What is somebody else's is as good as missing, to the byte.
            strange: list[tuple[str, Json, Json]] = []
            for kind, good in commands.items():
                if "chat_id" in good:
                    foreign = {**good, "chat_id": others_chat}
                    missing = {**good, "chat_id": MISSING}
                    if "message_id" in good:
                        foreign["message_id"] = missing["message_id"] = others_message["id"]
                        one = {**good, "chat_id": own_chat, "message_id": others_message["id"]}
                        strange.append((kind, one, {**one, "message_id": MISSING}))
                    strange.append((kind, foreign, missing))
            fresh = {"content": "x", "chat_id": own_chat}
            strange.append(("new_message", {**fresh, "reply_to": message["id"]}, {**fresh, "reply_to": MISSING}))
            assert len(strange) >= 11
            for kind, foreign, missing in strange:
                told = [await error_of(socket, json.dumps({"type": kind, **frame})) for frame in (foreign, missing)]
                assert told[0] == told[1], kind
                assert told[0]["code"] in ("chat_not_found", "message_not_found", "reply_not_found"), (kind, told)
            silent = []
            for user_id in (cy.id, MISSING):
                await socket.send(type="subscribe_presence", user_ids=[user_id], ref="p")
                silent.append(await socket.wait(ref="p"))
            assert silent[0] == silent[1]
            gone = []
            for other_id in (others_chat, MISSING):
                await socket.send(type="resume", chats={str(other_id): 0}, ref="r")
                await socket.wait(type="resumed", ref="r")
                gone.append([event["type"] for event in socket.inbox if event.get("chat_id") == other_id])
            assert gone[0] == gone[1] == ["chat_removed"]

            # What breaks the protocol ends this socket, and no other.
            for data, as_text, close_code in (
                (b"x" * (settings.socket_max_frame_bytes + 1), True, 1009),
                (b"x" * (settings.socket_max_frame_bytes + 1), False, 1009),
                (b"\xff\xfe", True, 1007),
                (b'{"type": "ping", "ref": "\xed\xa0\x80"}', True, 1007),
            ):
                async with await ann.open(server) as doomed:
                    await doomed.connection.send(data, text=as_text)
                    assert await doomed.wait_closed() == close_code
            await socket.barrier()

            # After all this nothing has happened, and every good frame still works.
            assert (await ann.history(chat_id))["items"] == [message]
            for kind, good in commands.items():
                await socket.send(type=kind, ref=kind, **good)
                if kind != "typing":  # which is not answered when all is well
                    answer = await socket.wait(lambda event: event["type"] in ("ack", "error", "pong", "resumed"))
                    assert answer["type"] in ("ack", "pong", "resumed"), (kind, answer)
