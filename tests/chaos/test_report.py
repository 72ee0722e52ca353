"""The report itself: a figure beyond its bar fails, and the page keeps what a run did not measure."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.chaos.report import Row, SceneReport, dumps, merge
from tests.support.servers import ROOT

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


# --- the page that is kept ---


@cache
def scenes() -> dict[str, set[str]]:
    """The figures that each scene may report: those of its own module, and of what the scenes share."""
    named = {path: reported(path) for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)}
    shared = set().union(*(names for path, names in named.items() if not path.name.startswith("test_")))
    return {
        test.removeprefix("test_").replace("_", " "): names | shared
        for path, names in named.items()
        for test in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def reported(path: Path) -> set[str]:
    """What a module says to a report."""
    return {
        call.args[0].value
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"tell", "exactly", "at_most", "at_least"}
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def stale(page: str) -> list[str]:
    """What the page's tables tell of that no scene reports any more."""
    found: list[str] = []
    rows = [line for part in re.findall(r"<!-- chaos: .+?<!-- end", page, re.DOTALL) for line in part.splitlines()]
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        if len(cells) != 5 or cells[0] == "Promise" or cells[0].startswith("-"):
            continue
        if cells[1] not in scenes():
            found.append(cells[1])
            continue
        for figure in cells[3].split("; "):
            what = re.sub(r" -?[\d,.]+(?: [\w/%]+)?(?: \([=≤≥] .+\))?$", "", figure)
            if what not in scenes()[cells[1]]:
                found.append(f"{cells[1]}: {what}")
    return found


def test_the_page_names_no_scene_and_no_figure_that_is_not_reported_any_more() -> None:
    assert stale((ROOT / "docs/reliability.md").read_text(encoding="utf-8")) == []


def test_a_scene_or_a_figure_that_is_gone_is_found_on_the_page() -> None:
    scene = "a google that limits fails and hangs slows no send and loses no push"
    row = "| Push | {scene} | mysql | sends in trouble 300; {figure} 34 ms (≤ 50) | 2026-11-25 |"
    old = row.format(scene=scene, figure="p99 above that in trouble")
    gone = row.format(scene="a scene that was", figure="median in trouble")
    good = row.format(scene=scene, figure="median in trouble")
    page = "<!-- chaos: short -->\n" + "\n".join([old, gone, good]) + "\n<!-- end of chaos: short -->"
    assert stale(page) == [f"{scene}: p99 above that in trouble", "a scene that was"]
