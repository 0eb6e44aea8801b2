"""Figures, their standard errors and differences, against torch's standard deviation."""

import math

import pytest
import torch

from nybble.report.figures import Figure, mean_figure, mean_of, standard_error
from tests.helpers.runs import known


def test_standard_error_is_that_of_torch() -> None:
    values = [0.5, 1.5, 4.0, -2.0]
    assert standard_error(values) == pytest.approx(torch.tensor(values).std().item() / 2)
    assert standard_error([3.0]) == 0


def test_the_error_of_a_figure_is_the_same_with_and_without_rows() -> None:
    assert Figure(0.5, 101).error == pytest.approx(0.05)
    assert known("1" * 36 + "0" * 64).error == pytest.approx(Figure(0.36, 100).error)
    assert Figure(0.0, 1).error == 0


def test_differences_are_computed_row_by_row() -> None:
    better, worse = known("1" * 36 + "0" * 64), known("1" * 30 + "0" * 6 + "1" * 4 + "0" * 60)
    rows = torch.tensor(better.right) - torch.tensor(worse.right)
    assert better.minus(worse) == (pytest.approx(0.02), pytest.approx(rows.std().item() / 10))
    assert worse.minus(better)[0] == pytest.approx(-0.02)


@pytest.mark.parametrize("other", [Figure(0.3, 100), known("01")])
def test_the_error_of_a_difference_is_nan_without_the_same_rows(other: Figure) -> None:
    difference, error = known("1100").minus(other)
    assert difference == pytest.approx(0.5 - other.value)
    assert math.isnan(error)


def test_the_mean_over_seeds_keeps_rows_that_all_seeds_know() -> None:
    assert mean_figure([known("1100"), known("1010")]) == Figure(0.5, 4, (1.0, 0.5, 0.5, 0.0))
    assert mean_figure([known("1100"), Figure(0.25, 4)]) == Figure(0.375, 4)


def test_the_mean_of_independent_values() -> None:
    assert mean_of([(0.5, 0.05), (1.0, 0.0)]) == (0.75, pytest.approx(0.025))
    assert mean_of([(0.0, 3.0), (0.0, 4.0)]) == (0.0, pytest.approx(2.5))
