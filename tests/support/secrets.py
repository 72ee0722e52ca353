"""Everything secret that the tests use, so that they can look for it where it must not be."""

from __future__ import annotations

import re

from tests.support.databases import SECRET_KEY

PLANTED: set[str] = {SECRET_KEY}
"""Passwords, tokens and phones. Phones without their plus sign, which may be written in several ways."""

_TRACEBACK = re.compile(r"Traceback \(most recent call last\)")


def plant(*secrets: str) -> None:
    """Remember secrets. Short ones would be found by chance."""
    for secret in secrets:
        if len(secret) < 8:
            raise ValueError("choose a longer secret")
        PLANTED.add(secret.removeprefix("+"))


def check_log(text: str, where: str, *, tracebacks_allowed: bool = False) -> None:
    """Fail when a log shows a secret or a traceback."""
    for secret in PLANTED:
        if secret in text:
            line = next(line for line in text.splitlines() if secret in line)
            raise AssertionError(f"{where} shows the secret {secret!r}: {line[:500]}")
    if not tracebacks_allowed and (match := _TRACEBACK.search(text)):
        raise AssertionError(f"{where} has a traceback: {text[match.start() : match.start() + 3000]}")
