#!/usr/bin/env python3
"""Prints the table of settings in docs/operations.md, made from app/core/config.py. Run it from the project's root:

python scripts/settings_table.py            print the table
python scripts/settings_table.py --write    put it between the markers of docs/operations.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from pydantic import SecretStr  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from app.core.config import Settings  # noqa: E402

PAGE = ROOT / "docs" / "operations.md"
BEGIN = "<!-- settings: made by scripts/settings_table.py -->"
END = "<!-- /settings -->"


def table() -> str:
    """One row per setting, in the order of the class."""
    rows = [
        f"| `{name.upper()}` | {_default(field)} | {_escape(_meaning(field))} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| Name | Default | Meaning |", "|---|---|---|", *rows])


def replace_table(page: str) -> str:
    """The page with a fresh table between the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} has lost its markers.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value in ("", []):
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    text = field.description or ""
    if get_origin(field.annotation) is Literal:
        text += " One of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation)) + "."
    return text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(table() + "\n")
