"""Looking up rows in a form that both databases answer from the index.

SQLite reads the whole table for `(a, b) IN (...)`, and takes no expression of more than a thousand terms. MySQL may
read and sort all that matches, a chat of a million messages for instance, where an index has the first fifty in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import Column, ColumnElement, Select, Table, and_, or_

TERMS_MAX = 400

S = TypeVar("S", bound=Select[Any])


def in_order_of(statement: S, table: Table, index: str = "PRIMARY") -> S:
    """Have MySQL walk this index, whatever it guesses of the table: for pages, in the index's order. SQLite does so."""
    return statement.with_hint(table, f"FORCE INDEX ({index})", "mysql")


def key_conditions(
    first: Column[int], second: Column[int], keys: Sequence[tuple[int, int]]
) -> Iterator[ColumnElement[bool]]:
    """Conditions that together match these keys; one query each."""
    for start in range(0, len(keys), TERMS_MAX):
        groups: dict[int, list[int]] = {}
        for a, b in keys[start : start + TERMS_MAX]:
            groups.setdefault(a, []).append(b)
        yield or_(*(and_(first == a, second.in_(bs)) for a, bs in groups.items()))
