"""The report itself: a figure beyond its bar fails, and the page keeps what a run did not measure."""

from __future__ import annotations

import pytest

from tests.chaos.report import Row, SceneReport, dumps, merge

PAGE = "above\n<!-- chaos: short -->\n<!-- end of chaos: short -->\nbelow\n"


def row(name: str, lost: int = 0) -> Row:
    report = SceneReport()
    report.exactly("lost", lost, lost)
    return Row.loads(dumps("Nothing is lost", name, report.figures), seconds=1.0, passed=True)


def test_a_figure_beyond_its_bar_fails_and_is_told_all_the_same() -> None:
    report = SceneReport()
    report.at_most("answered in", 5, 5, "s")
    report.at_least("acked", 10_000, 10_000)
    with pytest.raises(AssertionError, match=r"lost 1 \(= 0\)"):
        report.exactly("lost", 1, 0)
    with pytest.raises(AssertionError, match="answered in"):
        report.at_most("answered in", 5.01, 5, "s")
    with pytest.raises(AssertionError, match="acked"):
        report.at_least("acked", 9_999, 10_000)
    assert [str(figure) for figure in report.figures][:3] == [
        "answered in 5 s (≤ 5)",
        "acked 10,000 (≥ 10,000)",
        "lost 1 (= 0)",
    ]


def test_the_page_gets_the_rows_of_a_run_and_keeps_those_that_it_did_not_measure() -> None:
    page = merge(PAGE, "short", [row("test_a_kill[sqlite]"), row("test_a_kill[mysql]")])
    assert page.startswith("above\n")
    assert page.endswith("\nbelow\n")
    assert page.count("| Nothing is lost | a kill |") == 2
    again = merge(page, "short", [row("test_a_kill[mysql]", lost=7), row("test_a_stop")])
    assert again.count("| Nothing is lost |") == 3
    assert "| a kill | mysql | lost 7 (= 7) |" in again
    assert "| a kill | sqlite | lost 0 (= 0) |" in again
    assert merge(again, "short", []) == again
    with pytest.raises(ValueError, match="chaos: long"):
        merge(page, "long", [])
