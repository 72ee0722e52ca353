"""What a password must be: long enough, not among the common ones, not the phone or the name it protects.

No rules about kinds of characters: they make passwords predictable (NIST SP 800-63B section 3.1.1.2).
"""

from __future__ import annotations

import string
import unicodedata
from functools import lru_cache
from itertools import islice

from zxcvbn.frequency_lists import FREQUENCY_LISTS

from app.core.errors import BadInput

COMMON = 10_000
"""So many of the most frequent leaked passwords of acceptable length are refused."""
_SERVICE = "dialect"
_PUNCTUATION = frozenset(string.punctuation + " ") - {"_"}


def prepare_password(password: str) -> str:
    """The form that is hashed: the same word from every keyboard (RFC 8265 OpaqueString: NFC, plain spaces)."""
    spaced = "".join(" " if unicodedata.category(character) == "Zs" else character for character in password)
    return unicodedata.normalize("NFC", spaced)


def check_password(password: str, *, min_length: int, phone: str, username: str) -> None:
    """Refuse a prepared password that would be guessed. Raises BadInput."""
    if len(password) < min_length:
        raise _weak(f"A password needs at least {min_length} characters.")
    if any(unicodedata.category(character) == "Cc" for character in password):
        raise _weak("A password cannot hold control characters.")
    lowered = password.lower()
    if lowered in _common(min_length):
        raise _weak("This is one of the most common passwords; choose another.")
    letters = "".join(character for character in lowered if character not in _PUNCTUATION)
    rest = letters
    for known in (phone.lstrip("+"), username.lower(), _SERVICE):
        rest = rest.replace(known, "")
    # The phone may also stand there without its country code.
    if (rest != letters and not rest.strip("_")) or (letters and phone.endswith(letters)):
        raise _weak("The password must not be made of the phone number, the username or the name of this service.")


@lru_cache(maxsize=1)
def _common(min_length: int) -> frozenset[str]:
    ranked = (word for word in FREQUENCY_LISTS["passwords"] if len(word) >= min_length)
    return frozenset(islice(ranked, COMMON))


def _weak(detail: str) -> BadInput:
    return BadInput("weak_password", detail, field="password")
