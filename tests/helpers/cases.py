"""Parametrized cases of which some belong to the slow tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_cases(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Cases of a test; those that are not in `fast` belong to the slow tests."""
    return [case if case in fast else slow_case(case) for case in cases]


def first_fast(count: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of a test; those after the first `count` belong to the slow tests."""
    return [case if i < count else slow_case(case) for i, case in enumerate(cases)]


def every_second(cases: Iterable[Any]) -> list[Any]:
    """Cases of a test; the second, fourth and so on belong to the slow tests."""
    return [slow_case(case) if i % 2 else case for i, case in enumerate(cases)]


def slow_case(case: Any) -> Any:
    """A case, a tuple where a test has several parameters, that belongs to the slow tests."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
