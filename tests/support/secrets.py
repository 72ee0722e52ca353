"""Everything secret that the tests use, so that they can look for it where it must not be."""

from __future__ import annotations

import re
from itertools import islice

from tests.support.databases import SECRET_KEY

PLANTED: dict[str, None] = {SECRET_KEY: None}
"""Passwords, tokens and phones, in the order in which they came. Phones without their plus sign, which may be written
in several ways."""

_TRACEBACK = re.compile(r"Traceback \(most recent call last\)")


def plant(*secrets: str) -> None:
    """Remember secrets. Short ones would be found by chance; logs are searched between quotation marks."""
    for secret in secrets:
        if len(secret) < 8 or '"' in secret:
            raise ValueError("choose a longer secret, without quotation marks")
        PLANTED[secret.removeprefix("+")] = None


def check_log(text: str, where: str, *, tracebacks_allowed: bool = False, planted_since: int = 0) -> None:
    """Fail when a log shows a traceback or a secret, of all but the first so many."""
    # Most of a log says the same again and again, and there are thousands of secrets to look for.
    pieces = "\n".join(set(text.split('"')))
    for secret in islice(PLANTED, planted_since, None):
        if secret in pieces:
            line = next(line for line in text.splitlines() if secret in line)
            raise AssertionError(f"{where} shows the secret {secret!r}: {line[:500]}")
    if not tracebacks_allowed and (match := _TRACEBACK.search(text)):
        raise AssertionError(f"{where} has a traceback: {text[match.start() : match.start() + 3000]}")
