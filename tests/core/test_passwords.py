from __future__ import annotations

import unicodedata

import pytest

from app.core.errors import BadInput
from app.core.passwords import check_password, prepare_password


def check(password: str, *, min_length: int = 8) -> None:
    check_password(prepare_password(password), min_length=min_length, phone="+79991234567", username="John_Doe")


@pytest.mark.parametrize(
    "password",
    [
        "SecurePass123!",  # the brief's own
        "correct horse battery staple",
        "пароль-что-надо",
        "🦊🐙🦋🐝🌵🍄🌊🔥",
        "x7#Qp!2z",
        "john_doe likes tea",
        "q" * 5 + "W9!" + "z" * 248,
        "a!b!c!d!",
    ],
)
def test_a_password_that_is_hard_to_guess_is_accepted(password: str) -> None:
    check(password)


@pytest.mark.parametrize(
    "password",
    [
        "",
        "Short7!",
        "é" * 7,
        "password",
        "PASSWORD",
        "12345678",
        "qwertyuiop",
        "iloveyou",
        "+79991234567",
        "79991234567",
        "9991234567",
        "+7 (999) 123-45-67",
        "john_doe",
        "JOHN_DOE",
        "john_doe!!!",
        "john_doejohn_doe",
        "john_doe79991234567",
        "dialect-dialect",
        "tab\tin the middle",
        "escape \x1b here",
    ],
)
def test_a_password_that_would_be_guessed_is_refused(password: str) -> None:
    with pytest.raises(BadInput) as caught:
        check(password)
    assert (caught.value.code, caught.value.field) == ("weak_password", "password")
    assert not password or password == "password" or password not in caught.value.detail


def test_the_least_length_is_a_setting() -> None:
    with pytest.raises(BadInput, match="15"):
        check("x7#Qp!2z", min_length=15)


def test_a_password_is_the_same_from_every_keyboard() -> None:
    composed = "Café de Flore"
    assert unicodedata.normalize("NFD", composed) != composed
    assert prepare_password(unicodedata.normalize("NFD", composed)) == composed
    assert prepare_password("Café\u00a0de\u3000Flore") == composed


def test_a_password_is_not_changed_otherwise() -> None:
    assert prepare_password(" ＳecurePass123! ") == " ＳecurePass123! "
