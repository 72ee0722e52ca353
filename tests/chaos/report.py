"""What each scene promised and what was measured: held against its bar at once, told at the end of the run.

A scene is a test marked `@pytest.mark.chaos("the promise")` that takes `report` and gives it its figures. `make chaos`
prints them; with DIALECT_CHAOS_REPORT=docs/reliability.md they also replace those rows of that page's table which this
run has measured anew.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEAD = "| Promise | Scene | On | Measured (bar) | Passed on |\n|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Figure:
    """Something measured. Without a bar it is only told."""

    what: str
    value: float
    unit: str = ""
    bar: str = ""

    def __str__(self) -> str:
        return f"{self.what} {number(self.value)}{self.unit and ' ' + self.unit}{self.bar and f' ({self.bar})'}"


@dataclass
class SceneReport:
    """The figures of one scene."""

    figures: list[Figure] = field(default_factory=list)

    def tell(self, what: str, value: float, unit: str = "") -> None:
        """A figure without a bar: how much happened, so that nobody takes a scene for a proof that proved nothing."""
        self.figures.append(Figure(what, value, unit))

    def exactly(self, what: str, value: int, bar: int) -> None:
        """A figure that must be this. Fails the test when it is not."""
        self._hold(value == bar, Figure(what, value, "", f"= {number(bar)}"))

    def at_most(self, what: str, value: float, bar: float, unit: str = "") -> None:
        """A figure that may be at most this. Fails the test when it is more."""
        self._hold(value <= bar, Figure(what, value, unit, f"≤ {number(bar)}"))

    def at_least(self, what: str, value: float, bar: float, unit: str = "") -> None:
        """A figure that must be at least this. Fails the test when it is less."""
        self._hold(value >= bar, Figure(what, value, unit, f"≥ {number(bar)}"))

    def _hold(self, held: bool, figure: Figure) -> None:
        self.figures.append(figure)
        assert held, f"beyond its bar: {figure}"


def number(value: float) -> str:
    """A number as people read it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"


@dataclass(frozen=True)
class Row:
    """One scene of a run, on one database."""

    promise: str
    scene: str
    variant: str
    seconds: float
    passed: bool
    figures: list[Figure]

    @classmethod
    def loads(cls, text: str, *, seconds: float, passed: bool) -> Row:
        """What `dumps` has written."""
        row = json.loads(text)
        figures = [Figure(**figure) for figure in row.pop("figures")]
        return cls(**row, figures=figures, seconds=seconds, passed=passed)

    def told(self) -> list[str]:
        """Lines for a terminal."""
        head = f"{'passed' if self.passed else 'FAILED'}  {self.scene}"
        return [
            f"{head}{self.variant and f' [{self.variant}]'} ({self.seconds:.0f} s)",
            *(f"        {f}" for f in self.figures),
        ]

    @property
    def markdown(self) -> str:
        """A line of the page's table."""
        cells = (self.promise, self.scene, self.variant, "; ".join(map(str, self.figures)), time.strftime("%Y-%m-%d"))
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def dumps(promise: str, name: str, figures: list[Figure]) -> str:
    """What travels with a test's result, between processes too. `name` is pytest's: `test_what_is_so[sqlite]`."""
    test, _, variant = name.partition("[")
    return json.dumps(
        {
            "promise": promise,
            "scene": test.removeprefix("test_").replace("_", " "),
            "variant": variant.removesuffix("]"),
            "figures": [asdict(figure) for figure in figures],
        }
    )


def merge(page: str, form: str, rows: list[Row]) -> str:
    """The page with the rows of this run in its table of this form; rows that the run did not measure stay.

    Raises ValueError when the page has no such table.
    """
    begin, end = f"<!-- chaos: {form} -->\n", f"<!-- end of chaos: {form} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin.strip()} with an end")
    before, _, rest = page.partition(begin)
    old, _, after = rest.partition(end)
    lines = {_key(line): line for line in old.splitlines(keepends=True) if re.match(r"\| (?!Promise|-)", line)}
    lines |= {_key(row.markdown): row.markdown for row in rows}
    return f"{before}{begin}\n{HEAD}{''.join(lines[key] for key in sorted(lines))}\n{end}{after}"


def _key(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split("|")[1:4])


def write(path: Path, form: str, rows: list[Row]) -> None:
    """Put the rows into the page. What did not pass is no figure to promise, and stays out."""
    page = path.read_text(encoding="utf-8")
    path.write_text(merge(page, form, [row for row in rows if row.passed]), encoding="utf-8")
