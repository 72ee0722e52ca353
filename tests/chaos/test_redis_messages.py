"""What loses Redis's messages loses those alone, wherever the bytes are cut."""

from __future__ import annotations

import pytest

from tests.support.redis_messages import LosesMessages

FIRST = b"*3\r\n$7\r\nmessage\r\n$3\r\nall\r\n$3\r\none\r\n"
SECOND = b">3\r\n$7\r\nmessage\r\n$3\r\nall\r\n$10\r\ntwo\r\n\r\ntwo\r\n"
REST = (b"+OK\r\n", b":1\r\n", b"$-1\r\n*2\r\n$4\r\npong\r\n$0\r\n\r\n")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("lost", [(True, True), (False, True), (True, False), (False, False)])
def test_only_messages_of_channels_get_lost_and_only_those_chosen(size: int, lost: tuple[bool, bool]) -> None:
    stream = REST[0] + FIRST + REST[1] + SECOND + REST[2]
    chances = iter(lost)
    edit = LosesMessages(lambda _: next(chances))
    passed = b"".join(edit(stream[at : at + size]) for at in range(0, len(stream), size))
    kept = (b"" if lost[0] else FIRST, b"" if lost[1] else SECOND)
    assert passed == REST[0] + kept[0] + REST[1] + kept[1] + REST[2]
