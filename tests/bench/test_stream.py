"""Comparing bytes with the common stream must miss nothing that parsing would have seen."""

from __future__ import annotations

import random
import struct

import pytest

from bench.stream import CommonStream, Reader


def _frame(payload: bytes, first: int = 0x81) -> bytes:
    if len(payload) < 126:
        return bytes((first, len(payload))) + payload
    return struct.pack("!BBH", first, 126, len(payload)) + payload


def _message(number: int) -> bytes:
    return _frame(b'{"type":"new_message","n":%d,"text":"%s"}' % (number, b"x" * (number * 37 % 200)))


def _ack(number: int) -> bytes:
    return _frame(b'{"type":"ack","n":%d}' % number)


class Member:
    """A reader, and what it cut out."""

    def __init__(self, stream: CommonStream) -> None:
        self.others: list[tuple[int, bytes]] = []
        self.reader = Reader(stream, lambda first, payload: self.others.append((first, payload)))


@pytest.fixture
def seen() -> list[bytes]:
    return []


@pytest.fixture
def stream(seen: list[bytes]) -> CommonStream:
    return CommonStream(lambda payload, _: seen.append(payload))


@pytest.mark.parametrize("seed", range(20))
def test_any_chunks_with_private_frames_between(stream: CommonStream, seen: list[bytes], seed: int) -> None:
    chance = random.Random(seed)
    members = [Member(stream) for _ in range(4)]
    wires: list[bytearray] = [bytearray() for _ in members]
    private: list[list[tuple[int, bytes]]] = [[] for _ in members]
    for number in range(60):
        for wire, own in zip(wires, private, strict=True):
            if chance.random() < 0.2:
                wire += _ack(number)
                own.append((0x81, _ack(number)[2:]))
            if chance.random() < 0.1:
                wire += _frame(b"ping", 0x89)
                own.append((0x89, b"ping"))
            wire += _message(number)
    while any(wires):
        which = chance.randrange(len(wires))
        size = chance.choice((1, 7, 150, 1000, 5000))
        members[which].reader.feed(bytes(wires[which][:size]))
        del wires[which][:size]

    assert len(seen) == 60
    for member, own in zip(members, private, strict=True):
        assert member.reader.frames() == 60
        assert member.reader.position == len(stream.data)
        assert member.others == own
        assert not member.reader.diverged
        assert not member.reader.skipped


def test_a_frame_left_out_is_noticed(stream: CommonStream) -> None:
    first, second = Member(stream), Member(stream)
    first.reader.feed(_message(1) + _message(2) + _message(3))
    second.reader.feed(_message(1) + _message(3))

    assert second.reader.skipped == [(len(_message(1)), len(_message(1) + _message(2)))]
    assert not second.reader.diverged


def test_another_order_is_noticed(stream: CommonStream) -> None:
    first, second = Member(stream), Member(stream)
    first.reader.feed(_message(1) + _message(2) + _message(3))
    second.reader.feed(_message(1) + _message(3) + _message(2))

    assert second.reader.skipped
    assert not second.reader.diverged
    # After the jump it stood at the end, so what came late went into the stream a second time: the ledger sees it.
    assert len(stream.ends) == 4


def test_a_changed_byte_is_noticed(stream: CommonStream) -> None:
    first, second = Member(stream), Member(stream)
    first.reader.feed(_message(1) + _message(2) + _message(3))
    second.reader.feed(_message(1) + _message(2).replace(b"x", b"y") + _message(3))

    assert second.reader.diverged


def test_a_repeated_frame_is_noticed(stream: CommonStream) -> None:
    first, second = Member(stream), Member(stream)
    first.reader.feed(_message(1) + _message(2) + _message(3))
    second.reader.feed(_message(1) + _message(1) + _message(2))

    assert second.reader.diverged
