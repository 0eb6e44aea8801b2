"""Scale estimation (se): scale and zero point of each group that minimize the error of the layer's output.

    error(row) = (w' - w)^T H (w' - w)      H = mean of x x^T over the inputs x      w'_g = scale_g (codes_g - zero_g)

1. `search` tries ranges from 100 % down to 60 % of the full range of each group (symmetric: scales of both signs, from
   116 % down to 32 % of the one of round-to-nearest), with the error weighed by the diagonal of H, and keeps the best.
2. `estimate` then alternates between fitting and rounding. With the codes fixed, the best scales of a row solve G
   linear equations that use all of H,

       (C^T H C) scale = C^T H w        C [I, G]: column g holds codes - zero point of group g, and 0 elsewhere

   and the weights are rounded again with the new scales. A row keeps the result of a pass only if its error is lower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.compression.base import ScaleMethod
from nybble.compression.output_error import RoundingTarget
from nybble.quant.grid import min_max_qparams, qparams_from_range, quantize, quantize_dequantize, round_scale, to_groups
from nybble.quant.scheme import QuantScheme

# Fractions of the full range that `search` tries.
RANGE_FRACTIONS = tuple(1 - 0.04 * i for i in range(11))
# Fractions of the symmetric scale of round-to-nearest that `search` tries. 2 bits want the small ones.
SYMMETRIC_FRACTIONS = tuple(1 - 0.04 * i for i in range(18))
# The same where scales have a sign. With the other sign, the outermost code on the side of the farthest weight is one
# step nearer to zero: to hold this weight, 4 bits then need 8/7 of the scale.
_SIZES = tuple(1 - 0.04 * i for i in range(-4, 18))
SIGNED_FRACTIONS = (*_SIZES, *(-size for size in _SIZES))
# Passes of fitting and rounding in `estimate`.
PASSES = 4
# Numbers in the rows that are computed at a time on a CPU: in float32 they take 2 MB, which stay in a core's cache. For
# weights of 4096 x 4096 and more, `search` then takes a quarter of the time and C^T H C two fifths.
_CACHED_NUMBERS = 1 << 19
# Added to the diagonal of the equations, relative to its mean. It makes them solvable where all codes of a group are 0.
_RIDGE = 1e-6


class ScaleEstimation(ScaleMethod):
    """The method se."""

    def search(self, weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """See the function `search` of this module."""
        return search(weight_OI, importance_I, scheme)

    def estimate(self, weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        """See the function `estimate` of this module."""
        return estimate(weight_OI, gram_II, scheme)

    def fit(self, target: RoundingTarget, codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
        """See ScaleQuadratic.solve."""
        return ScaleQuadratic.of(target, codes_OI, zero_point_OG).solve(scale_OG)


def search(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range with the least weighed square error.

    Args:
        weight_OI: at least float32.
        importance_I: weight of the square error of each column, in the same dtype.
        scheme: bits, group size and symmetry.

    Returns:
        scale_OG on the scale grid and zero_point_OG (whole numbers), in the dtype of weight_OI.
    """
    parts = [_search_rows(part_OI, importance_I, scheme) for part_OI in weight_OI.split(_cached_rows(weight_OI))]
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def _cached_rows(weight_OI: Tensor) -> int:
    """Number of rows that are computed at a time. A row does not depend on others."""
    if weight_OI.device.type != "cpu":
        return len(weight_OI)
    return max(64, _CACHED_NUMBERS // weight_OI.shape[-1])


def _search_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    groups = scheme.num_groups(weight_OI.shape[-1])
    w_OGK, importance_GK = to_groups(weight_OI, groups), to_groups(importance_I, groups)
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    best_error_OG = torch.full_like(scale_OG, torch.inf)
    for trial_scale_OG, trial_zero_point_OG in _trials(w_OGK, scale_OG, zero_point_OG, scheme):
        rounded_OI = quantize_dequantize(weight_OI, trial_scale_OG, trial_zero_point_OG, scheme)
        error_OGK = to_groups(rounded_OI, groups).sub_(w_OGK).square_()
        error_OG = error_OGK.mul_(importance_GK).sum(-1)
        better_OG = error_OG < best_error_OG
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        scale_OG = torch.where(better_OG, trial_scale_OG, scale_OG)
        zero_point_OG = torch.where(better_OG, trial_zero_point_OG, zero_point_OG)
    return scale_OG, zero_point_OG


def _trials(
    w_OGK: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points that `search` tries, from those of round-to-nearest."""
    if scheme.symmetric:
        for fraction in SIGNED_FRACTIONS if scheme.signed_scales else SYMMETRIC_FRACTIONS:
            yield round_scale(scale_OG * fraction), zero_point_OG
    else:
        low_OG, high_OG = w_OGK.amin(-1), w_OGK.amax(-1)
        for fraction in RANGE_FRACTIONS:
            yield qparams_from_range(low_OG * fraction, high_OG * fraction, scheme)


@dataclass(frozen=True)
class ScaleQuadratic:
    """The error of each row as a function of its scales, for fixed codes: scale^T a scale - 2 b^T scale + c.

    Attributes:
        a_OGG: C^T H C of each row.
        b_OG: C^T H w of each row.
        c_O: w^T H w of each row.
    """

    a_OGG: Tensor
    b_OG: Tensor
    c_O: Tensor

    @staticmethod
    def of(target: RoundingTarget, codes_OI: Tensor, zero_point_OG: Tensor) -> ScaleQuadratic:
        """The quadratic form of these codes (uint8) and zero points (whole numbers)."""
        weight_OI, gram_II, weight_gram_OI = target.weight_OI, target.gram_II, target.weight_gram_OI
        groups = zero_point_OG.shape[-1]
        c_OGK = to_groups(codes_OI, groups).to(weight_OI.dtype).sub_(zero_point_OG[..., None])
        a_OGG = torch.empty(len(weight_OI), groups, groups, dtype=weight_OI.dtype, device=weight_OI.device)
        size = weight_OI.shape[-1] // groups
        rows = _cached_rows(weight_OI)
        for part_OGG, c_RGK in zip(a_OGG.split(rows), c_OGK.split(rows), strict=True):
            for g in range(groups):  # a is symmetric, so only the part on and below the diagonal is computed
                hc_RI = c_RGK[:, g] @ gram_II[g * size : (g + 1) * size, : (g + 1) * size]
                products_RGK = to_groups(hc_RI, g + 1).mul_(c_RGK[:, : g + 1])
                part_OGG[:, g, : g + 1] = part_OGG[:, : g + 1, g] = products_RGK.sum(-1)
        b_OG = (to_groups(weight_gram_OI, groups) * c_OGK).sum(-1)
        return ScaleQuadratic(a_OGG, b_OG, (weight_gram_OI * weight_OI).sum(-1))

    def error(self, scale_OG: Tensor) -> Tensor:
        """Error of each row [O] with these scales."""
        return ((self.a_OGG @ scale_OG[..., None])[..., 0] * scale_OG - 2 * self.b_OG * scale_OG).sum(-1) + self.c_O

    def solve(self, scale_OG: Tensor) -> Tensor:
        """The best scales, on the scale grid.

        Args:
            scale_OG: the present scales. A group whose solution has another sign keeps its scale, and so does a row
                whose error is not lower after the solution is rounded to the scale grid.

        Returns:
            [O, G], in the same dtype.
        """
        ridge_O11 = _RIDGE * self.a_OGG.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye_GG = torch.eye(scale_OG.shape[-1], dtype=scale_OG.dtype, device=scale_OG.device)
        solved_OG = torch.linalg.solve_ex(self.a_OGG + ridge_O11 * eye_GG, self.b_OG)[0]
        solved_OG = torch.where(solved_OG.isfinite() & (solved_OG * scale_OG > 0), solved_OG, scale_OG)
        solved_OG = round_scale(solved_OG)
        return torch.where((self.error(solved_OG) < self.error(scale_OG))[:, None], solved_OG, scale_OG)


def estimate(weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme, passes: int = PASSES) -> tuple[Tensor, Tensor]:
    """Scale and zero point for round-to-nearest: `search`, then passes of fitting and rounding.

    Args:
        weight_OI: at least float32.
        gram_II: mean of x x^T over the inputs x, in the same dtype.
        scheme: bits, group size and symmetry.
        passes: passes of fitting and rounding; fewer in tests.

    Returns:
        scale_OG on the scale grid and zero_point_OG (whole numbers), in the dtype of weight_OI.
    """
    target = RoundingTarget(weight_OI, gram_II)
    scale_OG, zero_point_OG = search(weight_OI, gram_II.diagonal(), scheme)

    def quadratic_of(scale_OG: Tensor) -> ScaleQuadratic:
        return ScaleQuadratic.of(target, quantize(weight_OI, scale_OG, zero_point_OG, scheme), zero_point_OG)

    quadratic = quadratic_of(scale_OG)
    error_O = quadratic.error(scale_OG)
    trial_OG = scale_OG
    for _ in range(passes):
        trial_OG = quadratic.solve(trial_OG)
        quadratic = quadratic_of(trial_OG)
        trial_error_O = quadratic.error(trial_OG)
        better_O = trial_error_O < error_O
        error_O = torch.where(better_O, trial_error_O, error_O)
        scale_OG = torch.where(better_O[:, None], trial_OG, scale_OG)
    return scale_OG, zero_point_OG
