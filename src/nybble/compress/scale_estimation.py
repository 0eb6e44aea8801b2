"""Scale estimation: the scale and zero of each group that minimise the error of the layer's output, not that of its weight.

    error(row) = (w' - w)^T H (w' - w),      H = mean of x x^T over the layer's inputs,      w'_g = scale_g (codes_g - zero_g)

1. search: ranges from the full one down to 60 % of it, weighed by the diagonal of H; each group takes its best.
2. fit and round again, in turns. With the codes fixed, the best scales of a row solve G linear equations that know all of H,
   (C^T H C) scale = C^T H w, where column g of C holds codes - zero of group g and nothing else. Then the weights are rounded with the new
   scales. A row takes the result of a turn only if its error is lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import min_max_qparams, qparams_from_range, quantize, quantize_dequantize, round_scale, to_groups
from nybble.quant.scheme import QuantScheme

# Shares of the full range that are tried.
SHRINKS = tuple(1 - 0.04 * i for i in range(11))
TURNS = 4


def output_error(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """[O]: d^T H d of each row: the mean square of the error of that output."""
    return ((difference_OI @ gram_II) * difference_OI).sum(-1)


def search(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero [O, G] of the range, out of SHRINKS times the full one, with the least square error weighed by importance."""
    assert not scheme.symmetric, "a symmetric grid has no range to choose"
    groups = scheme.groups(weight_OI.shape[-1])
    w_OGK, importance_GK = to_groups(weight_OI, groups), to_groups(importance_I, groups)
    low_OG, high_OG = w_OGK.amin(-1), w_OGK.amax(-1)
    best_OG = torch.full_like(low_OG, torch.inf)
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    for shrink in SHRINKS:
        scale, zero = qparams_from_range(low_OG * shrink, high_OG * shrink, scheme)
        error_OGK = to_groups(quantize_dequantize(weight_OI, scale, zero, scheme), groups).sub_(w_OGK).square_()
        error_OG = error_OGK.mul_(importance_GK).sum(-1)
        better = error_OG < best_OG
        best_OG = torch.where(better, error_OG, best_OG)
        scale_OG, zero_point_OG = torch.where(better, scale, scale_OG), torch.where(better, zero, zero_point_OG)
    return scale_OG, zero_point_OG


@dataclass(frozen=True)
class Quadratic:
    """A row's error as a function of its scales, the codes being fixed: scale^T a scale - 2 b^T scale + c."""

    a_OGG: Tensor
    b_OG: Tensor
    c_O: Tensor

    @staticmethod
    def of(codes_OI: Tensor, zero_point_OG: Tensor, weight_OI: Tensor, seen_OI: Tensor, gram_II: Tensor) -> Quadratic:
        """`seen_OI` is weight_OI @ gram_II, which stays the same over all codes."""
        groups = zero_point_OG.shape[-1]
        c_OGK = to_groups(codes_OI, groups).to(weight_OI.dtype).sub_(zero_point_OG[..., None])
        a_OGG = torch.empty(len(weight_OI), groups, groups, dtype=weight_OI.dtype, device=weight_OI.device)
        size = weight_OI.shape[-1] // groups
        for g in range(groups):  # symmetric: on and below the diagonal only
            part_OI = c_OGK[:, g] @ gram_II[g * size : (g + 1) * size, : (g + 1) * size]
            a_OGG[:, g, : g + 1] = a_OGG[:, : g + 1, g] = (to_groups(part_OI, g + 1) * c_OGK[:, : g + 1]).sum(-1)
        return Quadratic(a_OGG, (to_groups(seen_OI, groups) * c_OGK).sum(-1), (seen_OI * weight_OI).sum(-1))

    def error(self, scale_OG: Tensor) -> Tensor:
        """[O]"""
        return ((self.a_OGG @ scale_OG[..., None])[..., 0] * scale_OG - 2 * self.b_OG * scale_OG).sum(-1) + self.c_O

    def solve(self, scale_OG: Tensor) -> Tensor:
        """The best scales, on the scale grid. A group without a positive solution keeps `scale_OG`, and so does a row that rounding makes worse."""
        tiny_O11 = 1e-6 * self.a_OGG.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye_GG = torch.eye(scale_OG.shape[-1], dtype=scale_OG.dtype, device=scale_OG.device)
        solved_OG = torch.linalg.solve_ex(self.a_OGG + tiny_O11 * eye_GG, self.b_OG)[0]
        solved_OG = torch.where(solved_OG.isfinite() & (solved_OG > 0), solved_OG, scale_OG)
        solved_OG = round_scale(solved_OG)
        return torch.where((self.error(solved_OG) < self.error(scale_OG))[:, None], solved_OG, scale_OG)


def estimate(weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme, turns: int = TURNS) -> tuple[Tensor, Tensor]:
    """Scale and zero [O, G] for rounding to nearest.

    Args:
        weight_OI: float32 (float64 in tests).
        gram_II: mean of x x^T of the layer's inputs, in the same dtype.
        turns: of fitting and rounding again.
    """
    scale_OG, zero_point_OG = search(weight_OI, gram_II.diagonal(), scheme)
    seen_OI = weight_OI @ gram_II
    quadratic = Quadratic.of(
        quantize(weight_OI, scale_OG, zero_point_OG, scheme), zero_point_OG, weight_OI, seen_OI, gram_II
    )
    error_O = quadratic.error(scale_OG)
    trial_OG = scale_OG
    for _ in range(turns):
        trial_OG = quadratic.solve(trial_OG)
        quadratic = Quadratic.of(
            quantize(weight_OI, trial_OG, zero_point_OG, scheme), zero_point_OG, weight_OI, seen_OI, gram_II
        )
        now_O = quadratic.error(trial_OG)
        better_O = now_O < error_O
        error_O = torch.where(better_O, now_O, error_O)
        scale_OG = torch.where(better_O[:, None], trial_OG, scale_OG)
    return scale_OG, zero_point_OG
