"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def yes(met: bool) -> str:
    """Whether a bar is met."""
    return "yes" if met else "NO"


def aligned(rows: Sequence[tuple[str, ...]], figures: range) -> list[str]:
    """Lines of a table whose first row is its head; `figures` are the columns of numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column in figures else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" | ".join(cells).rstrip())
        if number == 0:
            lines.append("-+-".join("-" * width for width in widths))
    return lines
