"""Figures: a task's metric on its test rows, with standard errors.

Most rows are right, or wrong, in all models that are compared. The difference of two models therefore has a smaller
standard error than either figure, if it is computed row by row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single value.

    sqrt(sum((v - mean)^2) / (n - 1) / n)
    """
    mean = statistics.fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


@dataclass(frozen=True)
class Figure:
    """A task's metric on its test rows.

    Attributes:
        value: mean over the rows, between 0 and 1.
        documents: number of rows.
        right: 1 or 0 for each row, or the share of seeds that had the row right; empty where rows are not known.
    """

    value: float
    documents: int
    right: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """Standard error of the mean over rows; without rows that of zeros and ones, sqrt(p (1 - p) / (n - 1))."""
        if self.right:
            return standard_error(self.right)
        return math.sqrt(self.value * (1 - self.value) / max(self.documents - 1, 1))

    def minus(self, other: Figure) -> tuple[float, float]:
        """Difference to another figure of the same rows, and its standard error; nan where the rows are not known."""
        if not self.right or len(self.right) != len(other.right):
            return self.value - other.value, math.nan
        differences = [mine - theirs for mine, theirs in zip(self.right, other.right, strict=True)]
        return statistics.fmean(differences), standard_error(differences)


# task -> column -> figure
Figures = Mapping[str, Mapping[str, Figure]]


def mean_figure(figures: Sequence[Figure]) -> Figure:
    """The mean of one task's figures over seeds, row by row where all have the same number of known rows."""
    same_rows = len({len(figure.right) for figure in figures}) == 1
    right = tuple(map(statistics.fmean, zip(*(figure.right for figure in figures), strict=True))) if same_rows else ()
    return Figure(statistics.fmean(figure.value for figure in figures), figures[0].documents, right)


def mean_of(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values with independent standard errors, and its standard error: sqrt(sum of squares) / n."""
    total, squares = sum(value for value, _ in values), sum(error**2 for _, error in values)
    return total / len(values), math.sqrt(squares) / len(values)
