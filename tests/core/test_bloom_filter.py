from __future__ import annotations

from app.core.bloom_filter import UsernameFilter


def warm_filter(capacity: int, count: int) -> UsernameFilter:
    names = UsernameFilter(capacity)
    names.update(f"taken_{number}" for number in range(count))
    names.finish_warming()
    return names


def test_a_taken_name_is_never_called_free() -> None:
    names = warm_filter(1000, 1000)
    assert all(names.may_be_taken(f"taken_{number}") for number in range(1000))


def test_at_most_one_free_name_in_a_hundred_is_called_taken() -> None:
    names = warm_filter(10_000, 10_000)
    wrong = sum(names.may_be_taken(f"free_{number}") for number in range(10_000))
    assert wrong <= 100


def test_it_grows_beyond_its_capacity_and_stays_useful() -> None:
    names = warm_filter(1000, 20_000)
    assert all(names.may_be_taken(f"taken_{number}") for number in range(20_000))
    wrong = sum(names.may_be_taken(f"free_{number}") for number in range(10_000))
    assert wrong <= 400


def test_case_makes_no_difference() -> None:
    names = warm_filter(1000, 0)
    names.add("John_Doe")
    assert names.may_be_taken("jOHN_dOE")


def test_before_it_is_warm_it_knows_nothing() -> None:
    assert UsernameFilter(1000).may_be_taken("anybody")
