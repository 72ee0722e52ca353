"""The ledger must find every kind of fault: each is planted here, and nothing else may be reported with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.ledger import Kind, Ledger, Received, Report, Stored, check, may_see, text_for_chat, text_for_users

CHAT = 7
ANN, BO, EVE = 1, 2, 9
MEMBERS = {CHAT: {ANN, BO}}


def _name(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _text(number: int) -> str:
    return text_for_users(f"message {number}", (ANN, BO))


def _received(user: int, number: int, **changes: Any) -> Received:
    row = Received(user, CHAT, number, 100 + number, _name(number), _text(number))
    return row._replace(**changes)


class Scene:
    """Ann sends five messages to Bo, and all is well, until a test spoils it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.history = [Stored(CHAT, n, 100 + n, ANN, _name(n), _text(n)) for n in range(1, 6)]
        for n in range(1, 6):
            self.ledger.sent(ANN, CHAT, _name(n), _text(n))
            self.ledger.acked(ANN, _name(n), 100 + n, n)
            for user in (ANN, BO):
                self.ledger.received_rows.append(_received(user, n))

    def check(self, **switches: bool) -> Report:
        return check(self.ledger, self.history, members=MEMBERS, present=MEMBERS, **switches)

    def drop(self, user: int, number: int) -> None:
        self.ledger.received_rows.remove(_received(user, number))

    def change(self, user: int, number: int, **changes: Any) -> None:
        index = self.ledger.received_rows.index(_received(user, number))
        self.ledger.received_rows[index] = _received(user, number, **changes)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def _kinds(report: Report) -> set[Kind]:
    assert report.ok == (not report.faults)
    return set(report.counts)


def test_all_is_well(scene: Scene) -> None:
    report = scene.check()

    assert report.ok
    assert (report.sent, report.acked, report.received, report.stored) == (5, 5, 10, 5)
    report.raise_if_faulty()


class TestHistory:
    def test_acked_but_lost(self, scene: Scene) -> None:
        del scene.history[4]
        for user in (ANN, BO):
            scene.drop(user, 5)

        report = scene.check()

        assert _kinds(report) == {Kind.LOST}
        with pytest.raises(AssertionError, match="LOST"):
            report.raise_if_faulty()

    def test_unacked_may_be_stored_or_not(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(6), _text(6))
        scene.ledger.sent(ANN, CHAT, _name(7), _text(7))
        scene.history.append(Stored(CHAT, 6, 106, ANN, _name(6), _text(6)))
        for user in (ANN, BO):
            scene.ledger.received_rows.append(_received(user, 6))

        assert scene.check().ok

    def test_unacked_stored_twice(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(6), _text(6))
        for seq in (6, 7):
            scene.history.append(Stored(CHAT, seq, 100 + seq, ANN, _name(6), _text(6)))
            for user in (ANN, BO):
                scene.ledger.received_rows.append(
                    Received(user, CHAT, seq, 100 + seq, _name(6), _text(6)),
                )

        assert _kinds(scene.check()) == {Kind.STORED_TWICE}

    def test_one_id_for_two_messages(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(6), _text(6))
        scene.history.append(Stored(CHAT, 6, 105, ANN, _name(6), _text(6)))

        assert _kinds(scene.check()) == {Kind.ID_TWICE}

    def test_one_seq_for_two_messages(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(6), _text(6))
        scene.history.append(Stored(CHAT, 5, 106, ANN, _name(6), _text(6)))
        for user in (ANN, BO):
            # By catching up, so that the order over the connection is not at fault.
            scene.ledger.received_rows.append(_received(user, 6, seq=5, live=False))

        assert _kinds(scene.check()) == {Kind.SEQ_TWICE}

    def test_hole(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(7), _text(7))
        scene.history.append(Stored(CHAT, 7, 107, ANN, _name(7), _text(7)))
        for user in (ANN, BO):
            scene.ledger.received_rows.append(_received(user, 7, session=1))

        assert _kinds(scene.check()) == {Kind.HISTORY_HOLE}
        assert scene.check(dense=False).ok

    def test_service_message_takes_a_seq_and_needs_no_sender(self, scene: Scene) -> None:
        scene.history.append(Stored(CHAT, 6, 106, ANN, _name(6), "", service=True))

        assert scene.check().ok

    def test_invented(self, scene: Scene) -> None:
        scene.history.append(Stored(CHAT, 6, 106, ANN, _name(6), _text(6)))
        for user in (ANN, BO):
            scene.ledger.received_rows.append(_received(user, 6))

        assert _kinds(scene.check()) == {Kind.INVENTED}
        assert scene.check(only_ours=False).ok

    @pytest.mark.parametrize("changes", [{"text": "other words"}, {"sender": BO}])
    def test_altered_in_the_history(self, scene: Scene, changes: dict[str, Any]) -> None:
        scene.history[2] = scene.history[2]._replace(**changes)
        if "text" in changes:
            for user in (ANN, BO):
                scene.change(user, 3, **changes)

        assert _kinds(scene.check()) == {Kind.ALTERED}

    def test_stored_in_another_chat(self, scene: Scene) -> None:
        scene.history[4] = scene.history[4]._replace(chat=8)
        for user in (ANN, BO):
            scene.change(user, 5, chat=8)

        assert _kinds(scene.check()) == {Kind.ALTERED}


class TestAcks:
    def test_ack_of_another_seq(self, scene: Scene) -> None:
        scene.ledger.acked_rows[1] = scene.ledger.acked_rows[1]._replace(seq=4)

        assert _kinds(scene.check()) == {Kind.ACK_DISAGREES}

    def test_ack_of_another_id(self, scene: Scene) -> None:
        scene.ledger.acked_rows[1] = scene.ledger.acked_rows[1]._replace(message_id=104)

        assert _kinds(scene.check()) == {Kind.ACK_DISAGREES}

    def test_retry_gets_the_same_answer(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(2), _text(2))
        scene.ledger.acked(ANN, _name(2), 102, 2)

        assert scene.check().ok

    def test_retry_gets_another_answer(self, scene: Scene) -> None:
        scene.ledger.acked(ANN, _name(2), 106, 6)

        assert _kinds(scene.check()) == {Kind.ACK_CHANGED}

    @pytest.mark.parametrize(("user", "number"), [(ANN, 99), (BO, 2)])
    def test_ack_of_what_was_never_sent(self, scene: Scene, user: int, number: int) -> None:
        scene.ledger.acked(user, _name(number), 100 + number, number)

        assert _kinds(scene.check()) == {Kind.ACK_UNKNOWN}


class TestReceived:
    def test_announced_but_not_stored(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(6), _text(6))
        scene.ledger.received_rows.append(_received(BO, 6))

        assert _kinds(scene.check()) == {Kind.NOT_STORED}

    def test_history_may_begin_later(self, scene: Scene) -> None:
        del scene.history[0]
        del scene.ledger.acked_rows[0]

        assert scene.check().ok

    def test_another_seq_than_stored(self, scene: Scene) -> None:
        scene.change(BO, 5, seq=6, live=False)

        assert _kinds(scene.check()) == {Kind.OTHER_ORDER}

    def test_two_receivers_disagree(self, scene: Scene) -> None:
        scene.change(BO, 4, message_id=105, client_id=_name(5), text=_text(5))
        scene.change(BO, 5, message_id=104, client_id=_name(4), text=_text(4))

        assert _kinds(scene.check()) == {Kind.OTHER_ORDER}

    def test_altered_on_the_way(self, scene: Scene) -> None:
        scene.change(BO, 3, text="other words")

        assert _kinds(scene.check()) == {Kind.ALTERED}

    def test_twice_over_one_connection(self, scene: Scene) -> None:
        scene.ledger.received_rows.append(_received(BO, 3))

        assert _kinds(scene.check()) == {Kind.REPEATED}

    def test_again_over_another_connection(self, scene: Scene) -> None:
        scene.ledger.received_rows.append(_received(BO, 3, session=1))

        assert scene.check().ok

    def test_again_by_catching_up(self, scene: Scene) -> None:
        scene.ledger.received_rows.append(_received(BO, 3, live=False))

        assert scene.check().ok

    def test_out_of_order(self, scene: Scene) -> None:
        scene.drop(BO, 3)
        scene.ledger.received_rows.append(_received(BO, 3))

        assert _kinds(scene.check(gap_free=False)) == {Kind.OUT_OF_ORDER}
        assert _kinds(scene.check()) == {Kind.OUT_OF_ORDER, Kind.GAP}
        assert scene.check(ordered=False, gap_free=False).ok

    def test_gap(self, scene: Scene) -> None:
        scene.drop(BO, 3)
        scene.ledger.received_rows.append(_received(BO, 3, live=False))

        assert _kinds(scene.check()) == {Kind.GAP}

    def test_catching_up_closes_a_gap(self, scene: Scene) -> None:
        for number in (3, 4):
            scene.drop(BO, number)
        at = scene.ledger.received_rows.index(_received(BO, 5))
        scene.ledger.received_rows[at:at] = [_received(BO, number, live=False) for number in (3, 4)]

        assert scene.check().ok

    def test_missed(self, scene: Scene) -> None:
        scene.drop(BO, 5)

        assert _kinds(scene.check()) == {Kind.MISSED}


class TestWrongPerson:
    def test_not_a_member(self, scene: Scene) -> None:
        scene.ledger.received_rows.append(_received(EVE, 3))

        report = scene.check()

        assert _kinds(report) == {Kind.WRONG_PERSON}
        assert "user 9" in str(report)

    def test_the_text_itself_is_not_for_them(self, scene: Scene) -> None:
        scene.ledger.received_rows.append(_received(EVE, 3))

        assert _kinds(check(scene.ledger, scene.history)) == {Kind.WRONG_PERSON}

    def test_marks(self) -> None:
        assert may_see(text_for_users("x", (2, 1)), 1, {})
        assert not may_see(text_for_users("x", (2, 1)), 12, {})
        assert may_see(text_for_chat("x", 7), 1, MEMBERS)
        assert not may_see(text_for_chat("x", 7), EVE, MEMBERS)
        assert not may_see(text_for_chat("x", 8), ANN, MEMBERS)
        assert may_see("no mark", EVE, MEMBERS)


class TestBigGroups:
    @pytest.fixture
    def group(self) -> Scene:
        scene = Scene()
        scene.ledger.received_rows.clear()
        return scene

    @pytest.fixture
    def rows(self) -> list[Received]:
        return [_received(0, number) for number in range(1, 6)]

    def test_all_is_well(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN, BO), rows)

        report = group.check()

        assert report.ok
        assert report.received == 10

    def test_missed(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN,), rows)
        group.ledger.received_by_all((BO,), rows[:4])

        assert _kinds(group.check()) == {Kind.MISSED}

    def test_gap(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN,), rows)
        group.ledger.received_by_all((BO,), rows[:2] + rows[3:])

        assert _kinds(group.check()) == {Kind.MISSED, Kind.GAP}

    def test_order(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN, BO), [*rows[:3], rows[4], rows[3]])

        assert _kinds(group.check(gap_free=False)) == {Kind.OUT_OF_ORDER}

    def test_repeated(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN, BO), [*rows, rows[4]])

        assert Kind.REPEATED in _kinds(group.check())

    def test_wrong_person(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN, BO, EVE), rows)

        assert _kinds(group.check()) == {Kind.WRONG_PERSON}

    def test_not_stored(self, group: Scene, rows: list[Received]) -> None:
        group.ledger.received_by_all((ANN, BO), [*rows, _received(0, 6)])

        assert _kinds(group.check()) == {Kind.NOT_STORED}


class TestReport:
    def test_every_fault_is_counted_and_few_are_told(self, scene: Scene) -> None:
        for _ in range(8):
            scene.ledger.received_rows.append(_received(EVE, 3, live=False))

        report = scene.check()

        assert report.counts[Kind.WRONG_PERSON] == 8
        assert len(report.faults) == Report.TOLD_PER_KIND

    def test_every_kind_is_planted_somewhere_here(self) -> None:
        source = Path(__file__).read_text(encoding="utf-8")

        assert [kind.name for kind in Kind if f"Kind.{kind.name}" not in source] == []

    def test_a_client_id_used_for_two_messages_is_the_tests_own_mistake(self, scene: Scene) -> None:
        scene.ledger.sent(ANN, CHAT, _name(1), "other words")

        with pytest.raises(ValueError, match="two different messages"):
            scene.check()


class TestFiles:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> Iterator[list[Path]]:
        ann, bo = tmp_path / "ann.jsonl", tmp_path / "bo.jsonl"
        with Ledger(ann) as first, Ledger(bo) as second:
            for n in range(1, 6):
                first.sent(ANN, CHAT, _name(n), _text(n))
                first.acked(ANN, _name(n), 100 + n, n)
                first.received(ANN, CHAT, n, 100 + n, _name(n), _text(n))
                second.received(BO, CHAT, n, 100 + n, _name(n), _text(n), session=3)
            # Readable while it is still open: every record is flushed.
            yield [ann, bo]

    def test_several_processes_are_joined(self, paths: list[Path], scene: Scene) -> None:
        scene.ledger = Ledger.read(paths)

        report = scene.check()

        assert report.ok
        assert (report.sent, report.acked, report.received) == (5, 5, 10)
        assert scene.ledger.received_rows[-1].session == 3

    def test_appending_to_an_older_file(self, paths: list[Path]) -> None:
        with Ledger(paths[0]) as again:
            again.sent(ANN, CHAT, _name(6), _text(6))

        assert len(Ledger.read(paths).sent_rows) == 6

    def test_torn_last_line_is_left_out(self, paths: list[Path]) -> None:
        paths[0].write_bytes(paths[0].read_bytes()[:-20])

        assert len(Ledger.read(paths).received_rows) == 9

    @pytest.mark.parametrize("line", [b"{torn\n", b'{"kind":"guess"}\n', b'{"kind":"acked","user":1}\n', b"[]\n"])
    def test_any_other_broken_line_is_refused(self, paths: list[Path], line: bytes) -> None:
        paths[1].write_bytes(line + paths[1].read_bytes())

        with pytest.raises(ValueError, match="line 1"):
            Ledger.read(paths)
