"""The error that compression methods minimize: that of a layer's outputs, not that of its weight.

    error(row) = (w' - w)^T H (w' - w)      H = gram = mean over all tokens of x x^T, x: input of the layer

This is the mean square error of one output over the calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


def output_error(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Mean square error of each output.

    Args:
        difference_OI: compressed weight minus original weight.
        gram_II: mean of x x^T, in the same dtype.

    Returns:
        [O], d^T H d for each row d.
    """
    return ((difference_OI @ gram_II) * difference_OI).sum(-1)


@dataclass(frozen=True)
class RoundingTarget:
    """The rows that a rounded weight must approximate, and the matrix that weighs the error.

    Attributes:
        weight_OI: the original rows; float32, or float64 for a float64 model.
        gram_II: H of the error, in the same dtype; with damping where a method adds some.
    """

    weight_OI: Tensor
    gram_II: Tensor

    @cached_property
    def weight_gram_OI(self) -> Tensor:
        """W H [O, I]. It does not depend on codes or scales, so it is computed once."""
        return self.weight_OI @ self.gram_II
