"""Looking up rows by keys of two columns, in a form that both databases answer from the index.

SQLite reads the whole table for `(a, b) IN (...)`, and takes no expression of more than a thousand terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import Column, ColumnElement, and_, or_

TERMS_MAX = 400


def key_conditions(
    first: Column[int], second: Column[int], keys: Sequence[tuple[int, int]]
) -> Iterator[ColumnElement[bool]]:
    """Conditions that together match these keys; one query each."""
    for start in range(0, len(keys), TERMS_MAX):
        groups: dict[int, list[int]] = {}
        for a, b in keys[start : start + TERMS_MAX]:
            groups.setdefault(a, []).append(b)
        yield or_(*(and_(first == a, second.in_(bs)) for a, bs in groups.items()))
