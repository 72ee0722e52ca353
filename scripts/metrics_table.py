#!/usr/bin/env python3
"""Prints the table of metrics in docs/operations.md, made from app/core/metrics.py. Run it from the project's root:

python scripts/metrics_table.py            print the table
python scripts/metrics_table.py --write    put it between the markers of docs/operations.md
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from app.core.metrics import CATALOG, Described  # noqa: E402

PAGE = ROOT / "docs" / "operations.md"
BEGIN = "<!-- metrics: made by scripts/metrics_table.py -->"
END = "<!-- /metrics -->"


def table() -> str:
    """One row per metric, in the order of the module."""
    rows = [f"| `{metric.name}` | {_kind(metric)} | {metric.help} |" for metric in CATALOG]
    return "\n".join(["| Name | Kind, and labels | Meaning |", "|---|---|---|", *rows])


def replace_table(page: str) -> str:
    """The page with a fresh table between the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} has lost its markers.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _kind(metric: Described) -> str:
    return metric.kind + "".join(f", `{label}`" for label in metric.labels)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(table() + "\n")
