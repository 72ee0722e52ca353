"""RFC 6455 to the letter: what the Autobahn|Testsuite checks in its sections 1 to 7 and 10, and what it leaves out.

The server is the echo server of `tests/support/echo_server.py`, through both doors; the client owns every byte. The
tuned door is ours and strict. The plain door is uvicorn's own: where it is laxer than the RFC, `PLAIN` says so.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import uvicorn

from tests.support.echo_server import EchoDoor, echo_config
from tests.support.wire import BINARY, CLOSE, PATIENCE, PING, PONG, TEXT, Chop, Client, Frame, fragments, frame

MAX_BYTES = 128 * 1024
HELLO = "Hello, world! Привет 👋".encode()
OCTETS = bytes((0, 255, 254, 253, 252, 251, 0, 255))
NORMAL = (1000).to_bytes(2)

CHOPS: tuple[Chop, ...] = ("at once", "by frame", "by octet")


@dataclass(frozen=True)
class Case:
    """Frames that are sent, and what must come back: these answers, then a close frame.

    Without a code nothing was wrong: the client closes with 1000 once it has the answers.
    """

    name: str
    sent: Sequence[bytes]
    answers: Sequence[Frame] = ()
    code: int | None = None
    chop: Chop = "at once"
    rest: bytes = field(default=b"", repr=False)
    """What would have followed: a strict server does not wait for it."""


# --- the cases --------------------------------------------------------------------------------------------------


def framing() -> Iterator[Case]:
    """Every way to write a length."""
    for opcode, size in itertools.product((TEXT, BINARY), (0, 1, 125, 126, 127, 128, 65535, 65536)):
        payload = b"*" * size if opcode == TEXT else b"\xfe" * size
        yield Case(f"{'text' if opcode == TEXT else 'binary'} of {size}", [frame(opcode, payload)], [(opcode, payload)])
    whole = frame(TEXT, b"*" * 65536)
    pieces = [whole[at : at + 997] for at in range(0, len(whole), 997)]
    yield Case("text of 65536 in chops of 997", pieces, [(TEXT, b"*" * 65536)], chop="by frame")
    for size in (0, 125, 126, 300):
        yield Case(f"octet by octet {size}", [frame(TEXT, b"*" * size)], [(TEXT, b"*" * size)], chop="by octet")
    yield Case("125 in two bytes of length", [frame(TEXT, b"*" * 125, wide=2)], code=1002)
    yield Case("0 in eight bytes of length", [frame(TEXT, b"", wide=8)], code=1002)
    yield Case("65535 in eight bytes of length", [frame(BINARY, b"*" * 65535, wide=8)], code=1002)
    yield Case("a length of more than 63 bits", [b"\x81\xff\x80" + bytes(7) + b"mask"], code=1002)
    yield Case("a frame that is not masked", [b"\x81\x05Hello"], code=1002)
    yield Case("a ping that is not masked", [frame(TEXT, HELLO), b"\x89\x00"], [(TEXT, HELLO)], 1002)
    yield Case("more than the limit", [frame(TEXT, b"*" * (MAX_BYTES + 1))], code=1009)
    yield Case("more than the limit, said only", [b"\x82\xff" + (1 << 40).to_bytes(8) + b"mask"], code=1009)
    half = b"*" * (MAX_BYTES // 2)
    yield Case("the limit in fragments", fragments(BINARY, half, half), [(BINARY, half + half)])
    yield Case("more than the limit in fragments", fragments(TEXT, half, half, b"*"), code=1009)


def pings() -> Iterator[Case]:
    """Pings and pongs."""
    for size in range(126):
        yield Case(f"ping of {size}", [frame(PING, b"\xfe" * size)], [(PONG, b"\xfe" * size)])
    yield Case("ping of 126", [frame(PING, b"\xfe" * 126)], code=1002)
    yield Case("pong of 126", [frame(PONG, b"\xfe" * 126)], code=1002)
    yield Case("ping octet by octet", [frame(PING, b"\xfe" * 125)], [(PONG, b"\xfe" * 125)], chop="by octet")
    yield Case("pong unasked, then ping", [frame(PONG, b"unasked"), frame(PONG), frame(PING, b"p")], [(PONG, b"p")])
    for chop in CHOPS:
        payloads = [f"payload {n}".encode() for n in range(10)]
        sent = [frame(PING, payload) for payload in payloads]
        yield Case(f"ten pings {chop}", sent, [(PONG, payload) for payload in payloads], chop=chop)


def reserved() -> Iterator[Case]:
    """Bits and opcodes that mean nothing yet."""
    for rsv, opcode in itertools.product(range(1, 8), (TEXT, BINARY, CLOSE, PING, PONG)):
        yield Case(f"reserved bits {rsv:03b} of opcode {opcode}", [frame(opcode, b"", rsv=rsv)], code=1002)
    for rsv in range(1, 8):
        yield Case(
            f"reserved bits {rsv:03b} of a fragment", [*fragments(TEXT, b"a", b"")[:1], frame(0, rsv=rsv)], code=1002
        )
    for opcode, payload in itertools.product((3, 4, 5, 6, 7, 11, 12, 13, 14, 15), (b"", HELLO)):
        yield Case(f"opcode {opcode} with {len(payload)}", [frame(opcode, payload)], code=1002)
    for chop in CHOPS:
        for breach, name in (
            (frame(TEXT, HELLO, rsv=2), "reserved bit"),
            *((frame(opcode, HELLO), f"opcode {opcode}") for opcode in (5, 7, 11, 15)),
        ):
            sent = [frame(TEXT, HELLO), breach, frame(PING)]
            yield Case(f"{name} after a message {chop}", sent, [(TEXT, HELLO)], 1002, chop)
    yield Case("opcode 3 within a message", [*fragments(TEXT, b"a", b"")[:1], frame(3)], code=1002)


def fragmentation() -> Iterator[Case]:
    """Messages in pieces, and control frames between them."""
    one, two = fragments(TEXT, b"fragment1", b"fragment2")
    whole: Frame = (TEXT, b"fragment1fragment2")
    nothing = frame(0, b"continues nothing")
    nothing_yet = frame(0, b"continues nothing", fin=False)
    for opcode in (CLOSE, PING, PONG):
        yield Case(f"opcode {opcode} in fragments", [frame(opcode, b"", fin=False), frame(0, b"")], code=1002)
    for chop in CHOPS:
        yield Case(f"two fragments {chop}", [one, two], [whole], chop=chop)
        yield Case(f"a ping between {chop}", [one, frame(PING, b"p"), two], [(PONG, b"p"), whole], chop=chop)
        yield Case(f"a pong between {chop}", [one, frame(PONG, b"p"), two], [whole], chop=chop)
        for start, name in ((nothing, "the end"), (nothing_yet, "a middle")):
            yield Case(f"{name} of nothing {chop}", [start, frame(TEXT, HELLO)], code=1002, chop=chop)
        yield Case(f"a message within another {chop}", [one, frame(TEXT, b"fragment2")], code=1002, chop=chop)
        yield Case(f"the start of another {chop}", [one, frame(BINARY, b"", fin=False)], code=1002, chop=chop)
        pieces = fragments(TEXT, b"a", b"b", b"c", b"d", b"e")
        sent = [*pieces[:2], frame(PING, b"1"), *pieces[2:4], frame(PING, b"2"), pieces[4]]
        yield Case(f"pings among five {chop}", sent, [(PONG, b"1"), (PONG, b"2"), (TEXT, b"abcde")], chop=chop)
    yield Case("more of a message that has ended", [one, two, nothing_yet, frame(TEXT, HELLO)], [whole], 1002)
    yield Case("nothing goes on, twice", [nothing_yet, one, two] * 2, code=1002)
    yield Case("nothing ends, twice", [nothing, one, two] * 2, code=1002)
    yield Case("empty fragments", fragments(TEXT, b"", b"", b""), [(TEXT, b"")])
    yield Case("text among empty fragments", fragments(TEXT, b"", HELLO, b""), [(TEXT, HELLO)])
    yield Case("binary fragments", fragments(BINARY, OCTETS, b"", OCTETS), [(BINARY, OCTETS * 2)])
    yield Case(
        "two messages in fragments", [one, two, *fragments(BINARY, b"\xff", b"\xfe")], [whole, (BINARY, b"\xff\xfe")]
    )
    text = b"*" * 65536
    cut = [text[at : at + 1300] for at in range(0, len(text), 1300)]
    yield Case("64 KiB in fragments of 1300", fragments(TEXT, *cut), [(TEXT, text)])
    yield Case("64 KiB in fragments of 1300, one by one", fragments(TEXT, *cut), [(TEXT, text)], chop="by frame")


KOSME = "κόσμε".encode()
GOOD_TEXTS = {
    "ascii": b"hello$world",
    "two bytes": b"hello\xc2\xa2world",
    "three bytes": b"hello\xe2\x82\xacworld",
    "four bytes": b"hello\xf0\xa4\xad\xa2world",
    "greek": KOSME,
    "mixed": "Hello-µ@ßöäüàá-UTF-8!!".encode(),
    # The first and the last of each length, and the neighbours of the surrogates (RFC 3629 section 4).
    **{
        f"U+{point:04X}": chr(point).encode()
        for point in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0x1000, 0xCFFF, 0xD000, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF)
    },
    **{f"U+{point:04X}": chr(point).encode() for point in (0x10000, 0x3FFFF, 0x40000, 0xFFFFF, 0x100000, 0x10FFFF)},
    # Characters that are none are valid nevertheless, and so are the specials.
    **{
        f"U+{plane:X}{low}": chr(plane * 0x10000 + int(low, 16)).encode()
        for plane in range(17)
        for low in ("FFFE", "FFFF")
    },
    **{f"U+{point:04X}": chr(point).encode() for point in range(0xFFF9, 0xFFFE)},
}
BAD_TEXTS = {
    "a code point that does not exist": b"\xf4\x90\x80\x80",
    "the last of four bytes": b"\xf7\xbf\xbf\xbf",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "the last of five bytes": b"\xfb\xbf\xbf\xbf\xbf",
    "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "the last of six bytes": b"\xfd\xbf\xbf\xbf\xbf\xbf",
    **{f"{count} continuations": (b"\x80\xbf" * 3)[:count] for count in range(1, 7)},
    "a continuation BF": b"\xbf",
    "all continuations": bytes(range(0x80, 0xC0)),
    **{
        f"lonely starts of {length}": b"".join(bytes((byte, 0x20)) for byte in starts)
        for length, starts in (
            (2, range(0xC0, 0xE0)),
            (3, range(0xE0, 0xF0)),
            (4, range(0xF0, 0xF8)),
            (5, range(0xF8, 0xFC)),
            (6, range(0xFC, 0xFE)),
        )
    },
    **{
        f"the end missing after {torn.hex()}": torn
        for torn in (
            b"\xc0",
            b"\xe0\x80",
            b"\xf0\x80\x80",
            b"\xf8\x80\x80\x80",
            b"\xfc\x80\x80\x80\x80",
            b"\xdf",
            b"\xef\xbf",
            b"\xf7\xbf\xbf",
            b"\xfb\xbf\xbf\xbf",
            b"\xfd\xbf\xbf\xbf\xbf",
            b"\xf0\x90\x80",
            b"a\xe2\x82",
        )
    },
    "many ends missing": b"\xc0\xe0\x80\xf0\x80\x80\xf8\x80\x80\x80\xdf\xef\xbf\xf7\xbf\xbf",
    "FE": b"\xfe",
    "FF": b"\xff",
    "FE FE FF FF": b"\xfe\xfe\xff\xff",
    **{
        f"a long way to write / or NUL, {bad.hex()}": bad
        for bad in (
            b"\xc0\xaf",
            b"\xe0\x80\xaf",
            b"\xf0\x80\x80\xaf",
            b"\xf8\x80\x80\x80\xaf",
            b"\xfc\x80\x80\x80\x80\xaf",
            b"\xc0\x80",
            b"\xe0\x80\x80",
            b"\xf0\x80\x80\x80",
            b"\xf8\x80\x80\x80\x80",
            b"\xfc\x80\x80\x80\x80\x80",
            b"\xc1\xbf",
            b"\xe0\x9f\xbf",
            b"\xf0\x8f\xbf\xbf",
            b"\xf8\x87\xbf\xbf\xbf",
            b"\xfc\x83\xbf\xbf\xbf\xbf",
        )
    },
    **{
        f"surrogate {point:04X}": chr(point).encode("utf-8", "surrogatepass")
        for point in (0xD800, 0xDB7F, 0xDB80, 0xDBFF, 0xDC00, 0xDF80, 0xDFFF)
    },
    **{
        f"surrogates {high:04X} {low:04X}": (chr(high) + chr(low)).encode("utf-8", "surrogatepass")
        for high, low in itertools.product((0xD800, 0xDB7F, 0xDB80, 0xDBFF), (0xDC00, 0xDFFF))
    },
}


def utf8() -> Iterator[Case]:
    """Text that is UTF-8, and text that is not, torn in every way."""
    for name, text in GOOD_TEXTS.items():
        yield Case(f"good: {name}", [frame(TEXT, text)], [(TEXT, text)])
        octets = [text[at : at + 1] for at in range(len(text))]
        yield Case(f"good: {name}, in fragments of 1", fragments(TEXT, *octets), [(TEXT, text)])
        yield Case(f"good: {name}, octet by octet", [frame(TEXT, text)], [(TEXT, text)], chop="by octet")
    for name, text in BAD_TEXTS.items():
        yield Case(f"bad: {name}", [frame(TEXT, text)], code=1007)
        octets = [text[at : at + 1] for at in range(len(text))]
        yield Case(f"bad: {name}, in fragments of 1", fragments(TEXT, *octets), code=1007)
        yield Case(f"bad: {name}, octet by octet", [frame(TEXT, KOSME + text)], code=1007, chop="by octet")
        yield Case(f"not text: {name}", [frame(BINARY, text)], [(BINARY, text)])
    for at in range(1, len(KOSME)):  # each way to cut it short, and to cut it in two
        try:
            KOSME[:at].decode()
        except UnicodeDecodeError:
            yield Case(f"cut short after {at}", [frame(TEXT, KOSME[:at])], code=1007)
        else:
            yield Case(f"a beginning of {at}", [frame(TEXT, KOSME[:at])], [(TEXT, KOSME[:at])])
        yield Case(f"cut in two after {at}", fragments(TEXT, KOSME[:at], KOSME[at:]), [(TEXT, KOSME)])
    yield Case(
        "fragments between characters",
        fragments(TEXT, "Hello-µ@ßöä".encode(), "üàá-UTF-8!!".encode()),
        [(TEXT, "Hello-µ@ßöäüàá-UTF-8!!".encode())],
    )

    # Whatever follows cannot make it UTF-8 again, so a strict server does not wait for it.
    bad, end = b"\xf4\x90\x80\x80", b"edited"
    for after, name in ((4, "all of it"), (2, "the first octet that cannot be")):
        text = KOSME + bad[:after]
        first, middle, last = fragments(TEXT, KOSME, bad[:after], bad[after:] + end)
        yield Case(f"fails fast in fragments on {name}", [first, middle], code=1007, chop="by frame", rest=last)
        whole = frame(TEXT, KOSME + bad + end)
        yield Case(f"fails fast in a frame on {name}", [whole[: 6 + len(text)]], code=1007, rest=whole[6 + len(text) :])
        yield Case(
            f"fails fast in chops on {name}",
            [whole[: 6 + len(KOSME)], whole[6 + len(KOSME) : 6 + len(text)]],
            code=1007,
            chop="by frame",
            rest=whole[6 + len(text) :],
        )
        torn = frame(0, bad + end)
        yield Case(
            f"fails fast in a torn fragment on {name}",
            [fragments(TEXT, KOSME, b"")[0], torn[: 6 + after]],
            code=1007,
            chop="by octet",
            rest=torn[6 + after :],
        )
    yield Case("after a good message", [frame(TEXT, HELLO), frame(TEXT, b"\xff")], [(TEXT, HELLO)], 1007)


def closing() -> Iterator[Case]:
    """The closing handshake. The code is that of the server's close frame: 0 when it has none."""
    yield Case("a message, then a close", [frame(TEXT, HELLO), frame(CLOSE, NORMAL)], [(TEXT, HELLO)], 1000)
    yield Case("two closes", [frame(CLOSE, NORMAL), frame(CLOSE, NORMAL)], code=1000)
    yield Case("a ping after the close", [frame(CLOSE, NORMAL), frame(PING)], code=1000)
    yield Case("text after the close", [frame(CLOSE, NORMAL), frame(TEXT, HELLO)], code=1000)
    one, two = fragments(TEXT, b"fragment1", b"fragment2")
    yield Case("a close within a message", [one, frame(CLOSE, NORMAL), two], code=1000)
    yield Case(
        "a close behind much text",
        [frame(TEXT, b"*" * MAX_BYTES), frame(CLOSE, NORMAL)],
        [(TEXT, b"*" * MAX_BYTES)],
        1000,
    )
    yield Case("no code", [frame(CLOSE)], code=0)
    yield Case("half a code", [frame(CLOSE, b"a")], code=1002)
    yield Case("a code", [frame(CLOSE, NORMAL)], code=1000)
    yield Case("a reason", [frame(CLOSE, NORMAL + HELLO)], code=1000)
    yield Case("the longest reason", [frame(CLOSE, NORMAL + b"*" * 123)], code=1000)
    yield Case("a longer reason", [frame(CLOSE, NORMAL + b"*" * 124)], code=1002)
    yield Case("a reason that is not UTF-8", [frame(CLOSE, NORMAL + KOSME + b"\xed\xa0\x80edited")], code=1007)
    yield Case("a reason that is cut", [frame(CLOSE, NORMAL + KOSME[:-1])], code=1007)
    yield Case("a close octet by octet", [frame(CLOSE, NORMAL + HELLO)], code=1000, chop="by octet")
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999):
        yield Case(f"code {code}", [frame(CLOSE, code.to_bytes(2))], code=code)
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
        yield Case(f"code {code}", [frame(CLOSE, code.to_bytes(2))], code=1002)


SECTIONS = (framing, pings, reserved, fragmentation, utf8, closing)

PLAIN = {"a length of more than 63 bits": 1009, "a close within a message": 1002}
"""Codes with which uvicorn's own classes close where another is right."""
PLAIN_TAKES = {"125 in two bytes of length", "0 in eight bytes of length", "65535 in eight bytes of length"}
"""What they do not mind at all."""


# --- the servers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tuned", "asgi", "plain"])
def door(request: pytest.FixtureRequest) -> EchoDoor:
    """Whose protocol class it is: ours or uvicorn's."""
    name: EchoDoor = request.param
    return name


@pytest.fixture(scope="module")
def port(door: EchoDoor) -> Iterator[int]:
    """The port of an echo server in a thread of this process."""
    config = echo_config(0, door, MAX_BYTES)
    listening = config.bind_socket()
    listening.listen()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()
    listening.close()


# --- the tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_conformance(port: int, door: EchoDoor, section: Callable[[], Iterator[Case]]) -> None:
    failures = []
    for case in section():
        if door == "plain" and case.name in PLAIN_TAKES:
            continue
        try:
            play(port, door, case)
        except (AssertionError, EOFError, OSError) as error:
            failures.append(f"{case.name}: {error!r}")
    assert not failures


def play(port: int, door: EchoDoor, case: Case) -> None:
    """Fail where the server does anything else than the case says."""
    code, sent = case.code, case.sent
    if door == "plain":
        code = PLAIN.get(case.name, code)
        sent = [*sent, case.rest]
    with Client(port) as client:
        client.send(sent, case.chop)
        if code is None:
            answers = [client.frame() for _ in case.answers]
            client.send([frame(CLOSE, NORMAL)])
            code = 1000
        else:
            answers = []
        if door == "plain" and case.name == "more than the limit":
            return  # it resets, and the reset may overtake the close frame
        more, told = client.until_close()
        assert told == code
        answers += more
        expected = list(case.answers)
        # uvicorn hangs up before the application has answered what came earlier.
        assert answers == (expected[: len(answers)] if door == "plain" else expected)
        client.send([frame(CLOSE, NORMAL)])
        client.ended()


def test_all_of_it_is_here() -> None:
    names = [case.name for section in SECTIONS for case in section()]
    assert len(names) > 700
    assert len(set(names)) == len(names)
    assert set(names) > {*PLAIN, *PLAIN_TAKES}


# --- what the cases cannot say ----------------------------------------------------------------------------------


def test_both_close_at_once(port: int, door: EchoDoor) -> None:
    if door == "plain":
        pytest.skip("uvicorn trips over it, with a traceback")
    with Client(port) as client:
        # Our close crosses the server's refusal: neither waits for the other, and there is one close frame each way.
        client.send([frame(TEXT, b"\xff"), frame(CLOSE, NORMAL)])
        assert client.until_close() == ([], 1007)
        client.ended()


def test_a_close_while_much_is_on_its_way_comes_after_it(port: int, door: EchoDoor) -> None:
    many = [frame(TEXT, b"%d " % number * 2000) for number in range(50)]
    with Client(port) as client:
        client.send(many)
        answers = [client.frame() for _ in many] if door == "plain" else []  # uvicorn would drop them
        client.send([frame(CLOSE, NORMAL)])
        more, code = client.until_close()
        assert (code, len(answers + more)) == (1000, len(many))
        client.ended()


def handshake(port: int, line: str = "GET /echo HTTP/1.1", more: str = "", **changed: str | None) -> tuple[int, bytes]:
    """The status and all of the answer to a handshake with some headers changed or, being None, left out."""
    headers: dict[str, str | None] = {
        "Host": "x",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    headers |= {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n" + more + "\r\n").encode("latin-1"))
        answer = b""
        while b"\r\n\r\n" not in answer and (data := connection.recv(65536)):
            answer += data
        status = int(answer[9:12])
        if status in (400, 405, 426):  # and says so to the end, and hangs up
            while data := connection.recv(65536):
                answer += data
        return status, answer


def test_the_handshake_is_answered_as_the_rfc_shows(port: int) -> None:
    status, answer = handshake(port)
    assert status == 101
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
    assert handshake(port, Upgrade="WebSocket", Connection="keep-alive, Upgrade")[0] == 101


@pytest.mark.parametrize("offer", ["permessage-deflate", "permessage-deflate; client_max_window_bits, x-other", ";;;"])
def test_no_extension_is_agreed_upon(port: int, door: EchoDoor, offer: str) -> None:
    if door == "plain":
        pytest.skip("the plain server's own affair")
    status, answer = handshake(port, Sec_WebSocket_Extensions=offer)
    assert status == 101
    assert b"sec-websocket-extensions" not in answer.lower()


def test_no_subprotocol_is_agreed_upon(port: int) -> None:
    status, answer = handshake(port, Sec_WebSocket_Protocol="chat, superchat")
    assert status == 101
    assert b"sec-websocket-protocol" not in answer.lower()


BAD_HANDSHAKES: dict[str, tuple[dict[str, str | None], int]] = {
    "no key": ({"Sec_WebSocket_Key": None}, 400),
    "a short key": ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400),
    "a key that is not base64": ({"Sec_WebSocket_Key": "!!!!!!!!!!!!!!!!!!!!!!=="}, 400),
    "two keys": ({"more": "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"}, 400),
    "no host": ({"Host": None}, 400),
    "two hosts": ({"more": "Host: y\r\n"}, 400),
    "version 8": ({"Sec_WebSocket_Version": "8"}, 426),
    "versions 13 and 8": ({"Sec_WebSocket_Version": "13, 8"}, 426),
    "no version": ({"Sec_WebSocket_Version": None}, 426),
    "two versions": ({"more": "Sec-WebSocket-Version: 13\r\n"}, 426),
    "POST": ({"line": "POST /echo HTTP/1.1"}, 405),
    "a body": ({"more": "Content-Length: 5\r\n\r\nhello"}, 400),
    "a body in chunks": ({"more": "Transfer-Encoding: chunked\r\n"}, 400),
    "a list of protocols that is none": ({"Sec_WebSocket_Protocol": ",;"}, 400),
    "a header that is too long": ({"X_Long": "y" * 20_000}, 400),
    "too many headers": ({"more": "".join(f"X{number}: y\r\n" for number in range(200))}, 400),
    "a path that is too long": ({"line": f"GET /{'x' * 20_000} HTTP/1.1"}, 400),
}


@pytest.mark.parametrize("name", BAD_HANDSHAKES)
def test_a_bad_handshake_is_refused_with_a_problem(port: int, door: EchoDoor, name: str) -> None:
    if door == "plain":
        pytest.skip("the plain server's own affair: some of these it never answers")
    changes, expected = BAD_HANDSHAKES[name]
    status, answer = handshake(port, **changes)  # type: ignore[arg-type]
    assert status == expected
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    codes = {400: "bad_handshake", 405: "method_not_allowed", 426: "upgrade_required"}
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (status, codes[status])
    assert b"content-type: application/problem+json" in lines
    if status == 426:
        assert {b"sec-websocket-version: 13", b"upgrade: websocket"} < set(lines)
    if status == 405:
        assert lines.count(b"allow: get") == 1
    assert b"yyy" not in body, "a problem repeats nothing that was sent"


def test_what_asks_for_no_websocket_is_an_ordinary_request(port: int) -> None:
    for changes in ({"Upgrade": None}, {"Upgrade": "h2c"}, {"Connection": None}, {"Connection": "close"}):
        assert handshake(port, **changes)[0] == 404
