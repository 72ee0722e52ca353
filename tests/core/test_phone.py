from __future__ import annotations

import pytest

from app.core.errors import BadInput
from app.core.phone import parse_phone


@pytest.mark.parametrize(
    "text",
    [
        "+79991234567",
        " 79991234567",  # what `username=+7999...` decodes to in a form
        "  +7 999 123-45-67 ",
        "+7 (999) 123-45-67",
        "+7.999.123.45.67",
        "+7–999–123–45–67",
        "+7\u00a0999\u00a0123\u00a045\u00a067",
        "＋７９９９１２３４５６７",
        "+٧٩٩٩١٢٣٤٥٦٧",
    ],
)
def test_one_phone_has_one_form_however_it_is_typed(text: str) -> None:
    assert parse_phone(text, validation="possible") == "+79991234567"


def test_a_trunk_zero_between_country_and_number_is_dropped() -> None:
    assert parse_phone("+44 (0)20 7946 0958", validation="possible") == "+442079460958"


def test_an_italian_zero_belongs_to_the_number() -> None:
    assert parse_phone("+39 06 698 82", validation="possible").startswith("+3906")


@pytest.mark.parametrize(
    "text",
    [
        "79991234567",
        "89991234567",
        "0079991234567",
        "",
        " ",
        "+",
        "+7",
        "+7999",
        "+1234567",  # a local number: it can be dialled only from next door
        "+799912345678901234",
        "+0000000000000",
        "+999123456789",
        "john",
        "+1800FLOWERS",
        "+79991234567;ext=5",
        "+79991234567 ext. 5",
        "tel:+79991234567",
        "+79991234567,+79991234568",
        "++79991234567",
        "+7999123\u200b4567",
        "+7999\n1234567",
        "+79991234567\x00",
        "+７９９９１２３４５６７①",
        "9" * 32,
    ],
)
def test_what_is_no_phone_with_a_country_code_is_refused(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_phone(text, validation="possible", field="username")
    assert (caught.value.code, caught.value.field) == ("invalid_phone", "username")
    assert caught.value.detail == "This is not a phone number with its country code, such as +79991234567."


def test_a_number_never_exceeds_the_length_of_e164() -> None:
    with pytest.raises(BadInput):
        parse_phone("+49" + "1" * 15, validation="possible")


def test_a_range_that_nobody_was_given_is_possible_but_not_valid() -> None:
    assert parse_phone("+70001234567", validation="possible") == "+70001234567"
    with pytest.raises(BadInput):
        parse_phone("+70001234567", validation="valid")
    assert parse_phone("+79991234567", validation="valid") == "+79991234567"
