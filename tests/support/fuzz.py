"""Frames that nobody sends in good faith, made from the schema of the commands: a new one is fuzzed by itself.

The same ones in each run: a frame that finds something finds it again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.db.events import COMMANDS
from tests.support.wire import BINARY, CLOSE, PING, PONG, TEXT, frame

Json = dict[str, Any]

# After the Big List of Naughty Strings: what breaks parsers, databases, templates, shells and displays.
NAUGHTY = (
    "undefined",
    "null",
    "NaN",
    "-1/0",
    "1e309",
    "0x0",
    "١٢٣",
    "9" * 400,
    "' OR 1=1 --",
    "'; DROP TABLE messages; --",
    '"; SELECT sleep(9); #',
    "%s%n%x {0} {{7*7}} ${7*7} $(id) `id`",
    "\\",
    "\\u0000\\x00\\",
    "../../etc/passwd",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "]]><!--",
    "\ufeffBOM",
    "\u202eright to left\u202c and \u2066isolated\u2069",
    "zero\u200bwidth\u200djoiner\u2060",
    "\u00ad\u034f\u115f\u3164",
    "Z̮̞̠͙͔ͅḀ̗̞͈̻̗Ḷ͙͎̯̹̞͓G̻O̭̗̮",
    "👨‍👩‍👧‍👦🏳️‍🌈👋🏿",
    "ﷺ",
    "𝕋𝕙𝕖 𝓺𝓾𝓲𝓬𝓴",
    "İıſẞß K Å",
    "e\u0301 é",
    "가각",
    "ﬀﬁ",
    "田中さんにあげて下さい",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "line\r\nbreak\ttab\x0b\x0c\x85\u2028\u2029end",
    " \xa0\u2003spaces around\u3000 ",
    "\ue000\uf8ff\U000f0000\U0010ffff\uffff\ufffe",
    "\U000e0001\U000e0061",
    "ᎪᏴ аdmіn",
)
IMPOSSIBLE = (
    "NaN",
    "-Infinity",
    "1" + "0" * 400,
    "-9223372036854775809",
    "1e400",
    "1.0",
    "01",
    r'"\ud83d"',
    r'"\ude00\ud83d"',
    r'"\u0000"',
    '"\x00"',
    "[" * 30_000 + "]" * 30_000,
    '{"a":' * 10_000 + "0" + "}" * 10_000,
    "[" * 60_000,
    '"' + "x" * 60_000 + '"',
    "{",
    "",
)


# --- JSON -------------------------------------------------------------------------------------------------------


def _text(schema: Json) -> st.SearchStrategy[Any]:
    least, most = schema.get("minLength", 0), schema.get("maxLength", 100)
    texts = st.text(min_size=least, max_size=min(most, 40))
    if schema.get("format") == "uuid":
        return st.uuids().map(str) | texts
    return texts | st.sampled_from(NAUGHTY) | st.integers(most - 2, most + 2).map(lambda size: "я" * max(size, 0))


def _from_schema(schema: Json, aims: Json, name: str = "") -> st.SearchStrategy[Any]:
    """Mostly what the schema allows, and what lies just beyond. `aims` holds values that lead somewhere, by field."""
    if "anyOf" in schema:
        return st.one_of([_from_schema(part, aims, name) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
            return st.sampled_from([*aims.get(name, []), low, high, low - 1, high + 1]) | st.integers(low, high)
        case "number":
            return st.floats()
        case "boolean":
            return st.booleans()
        case "string":
            return _text(schema) | st.sampled_from(aims[name]) if name in aims else _text(schema)
        case "array":
            return st.lists(_from_schema(schema.get("items", {}), aims, name), max_size=4)
        case "object":
            keys = st.sampled_from([str(key) for key in aims.get(name, [1])]) | st.text(max_size=20)
            extra = schema.get("additionalProperties")
            return st.dictionaries(keys, _from_schema(extra if isinstance(extra, dict) else {}, aims), max_size=4)
        case "null":
            return st.none()
        case _:
            return st.sampled_from([None, True, 0, -1.5, "x", [], {}, [[]], {"a": {}}])


def commands(aims: Json) -> st.SearchStrategy[Json]:
    """Commands of all types, with any of their fields."""
    schema = COMMANDS.json_schema()
    kinds = []
    for reference in schema["discriminator"]["mapping"].values():
        model = schema["$defs"][reference.rpartition("/")[2]]
        fields = {name: _from_schema(field, aims, name) for name, field in model["properties"].items()}
        needed = {name: fields.pop(name) for name in model["required"]}
        kinds.append(st.fixed_dictionaries(needed, optional=fields))
    return st.one_of(kinds)


def generated(aims: Json, count: int) -> list[Json]:
    """So many commands."""
    found: list[Json] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(commands(aims))
    def collect(command: Json) -> None:
        found.append(command)

    collect()
    return found


def spoil(command: Json, chance: random.Random) -> bytes:
    """A command as JSON, with none to three things changed in what it means or in how it is written."""
    command = dict(command)
    pieces: list[str] = []
    for _ in range(chance.choice((0, 0, 1, 1, 2))):
        name = chance.choice(list(command) or ["type"])
        match chance.randrange(7):
            case 0:
                command.pop(name, None)
            case 1:
                command[name.upper() if chance.random() < 0.5 else name + "_"] = command.pop(name, None)
            case 2:
                command[name] = chance.choice([None, True, 0, 1.5, "", "7", [], {}, [0], {"1": 0}, 2**53, -1, 10**30])
            case 3:
                command[name] = [command.get(name)] * chance.randrange(4)
            case 4:
                command[name] = chance.choice(NAUGHTY)
            case 5:
                pieces.append(f"{json.dumps(name)}: {chance.choice(IMPOSSIBLE)}")
            case _:
                pieces.append(f"{json.dumps(name)}: {json.dumps(command.get(name))}")  # twice: the last one counts
    text = json.dumps(command, ensure_ascii=chance.random() < 0.5)
    if pieces:
        text = f"{text[:-1]}{', ' if command else ''}{', '.join(pieces)}}}"
    data = bytearray(text.encode("utf-8", "replace"))
    for _ in range(chance.choice((0, 0, 0, 1, 3))):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[place:place] = chance.choice((b'"', b"{", b"}", b"[", b",", b"\\u0000", b"\\ud800", b"1", b"\x00"))
            case 1:
                data[place : place + 1] = bytes((chance.randrange(128),))
            case 2:
                del data[place : place + chance.randint(1, 20)]
            case _:
                data[place:place] = data[place : place + 20] * chance.randint(1, 50)
    return bytes(data.decode("utf-8", "replace").encode()[: 64 * 1024].decode("utf-8", "ignore").encode())


def is_refused(data: bytes) -> bool:
    """Whether this is no command at all."""
    try:
        COMMANDS.validate_json(data)
    except ValueError:
        return True
    return False


# --- bytes ------------------------------------------------------------------------------------------------------


def streams(messages: Sequence[bytes], count: int, chance: random.Random) -> Iterator[tuple[int, bytes]]:
    """WebSocket frames with their headers and masks, good and spoilt: how many, and their bytes, for one connection.

    `count` frames in all.
    """
    while count > 0:
        number = min(count, chance.randint(1, 12))
        count -= number
        yield number, b"".join(_frame(messages, chance) for _ in range(number))


def _frame(messages: Sequence[bytes], chance: random.Random) -> bytes:
    kind = chance.randrange(16)
    payload = chance.choice(messages)
    if kind < 6:
        return frame(TEXT, payload)
    if kind < 8:  # one that is right in its form
        cut = chance.randrange(len(payload) + 1)
        ping = frame(PING, payload[:125])
        return frame(TEXT, payload[:cut], fin=False) + ping + frame(0, b"", fin=False) + frame(0, payload[cut:])
    match kind:
        case 8:
            return frame(chance.choice((BINARY, PING, PONG)), payload[:125])
        case 9:
            code = chance.choice((1000, 1001, 1005, 1016, 3000, 4999, 5000, chance.randrange(65536)))
            return frame(CLOSE, chance.choice((b"", b"\x03", code.to_bytes(2), code.to_bytes(2) + payload[:123])))
        case 10:
            return frame(chance.randrange(16), payload[:200], fin=chance.random() < 0.7, rsv=chance.randrange(8))
        case 11:
            return frame(TEXT, chance.choice((b"\xff", b"\xed\xa0\x80", payload + b"\xc0\xaf", b"\xf4\x90")))
        case 12:
            return frame(TEXT, b"x" * chance.choice((65_536, 65_537, 70_000)))
        case 13:
            return chance.randbytes(chance.randint(1, 60))
        case 14:
            data = bytearray(frame(TEXT, payload))
            for _ in range(chance.randint(1, 4)):  # most of all in the header, of which a payload has none
                data[chance.randrange(min(len(data), chance.choice((2, 14, len(data)))))] ^= 1 << chance.randrange(8)
            return bytes(data)
        case _:
            data = bytearray(frame(TEXT, payload))
            begin = chance.randrange(len(data))
            del data[begin : begin + chance.randint(1, 8)]
            return bytes(data)
