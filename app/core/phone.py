"""Phone numbers as people type them, to E.164 as they are stored and compared."""

from __future__ import annotations

import unicodedata
from typing import Literal

import phonenumbers

from app.core.errors import BadInput

_SEPARATORS = "()-./"
_MAX_E164 = 16
"""A plus sign and 15 digits (ITU-T E.164 section 6)."""


def parse_phone(text: str, *, validation: Literal["possible", "valid"], field: str = "phone") -> str:
    """A number in E.164, such as `+79991234567`. Raises BadInput unless it has its country code and may exist.

    In a form body, `username=+7999...` decodes to a space and digits, so a leading space means the plus it was.
    """
    try:
        number = phonenumbers.parse(_plain(text), None)
    except (phonenumbers.NumberParseException, ValueError):
        raise _invalid(field) from None
    if validation == "valid":
        acceptable = phonenumbers.is_valid_number(number)
    else:
        # Not `is_possible_number`: that takes numbers that can be dialled only from next door.
        reason = phonenumbers.is_possible_number_with_reason(number)
        acceptable = reason == phonenumbers.ValidationResult.IS_POSSIBLE
    phone = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    if not acceptable or len(phone) > _MAX_E164:
        raise _invalid(field)
    return phone


def _plain(text: str) -> str:
    """A plus and ASCII digits. Raises ValueError for anything that is not a number with its country code."""
    # NFKC turns full-width digits and signs into plain ones.
    folded = unicodedata.normalize("NFKC", text)
    bare = folded.strip()
    if folded[:1].isspace() and bare[:1].isdecimal():
        bare = "+" + bare
    if not bare.startswith("+"):
        raise ValueError("no country code")
    digits = ["+"]
    for character in bare[1:]:
        if character.isdecimal():
            digits.append(str(unicodedata.decimal(character)))
        elif character not in _SEPARATORS and unicodedata.category(character) not in ("Zs", "Pd"):
            raise ValueError("not part of a number")
    return "".join(digits)


def _invalid(field: str) -> BadInput:
    return BadInput(
        "invalid_phone", "This is not a phone number with its country code, such as +79991234567.", field=field
    )
