"""The quantizer written as slowly and plainly as possible: Python floats (float64), one weight at a time."""

import math

import torch
from torch import Tensor


def round_half_even(x: float) -> int:
    return round(x)  # Python's own rounding is half to even


def round_scale(scale: float) -> float:
    """7 significant bits, kept within the normal range of fp16."""
    exponent = math.floor(math.log2(scale)) if scale > 0 else -60
    unit = 2.0 ** (exponent - 6)
    return min(max(round_half_even(scale / unit) * unit, 2.0**-14), 65024.0)


def min_max(row: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero of one group."""
    top = 2**bits - 1
    if symmetric:
        return round_scale(max(abs(w) for w in row) / (2 ** (bits - 1) - 1)), 2 ** (bits - 1)
    low, high = min(0.0, *row), max(0.0, *row)
    scale = round_scale((high - low) / top)
    return scale, min(max(round_half_even(-low / scale), 0), top)


def code(weight: float, scale: float, zero: int, bits: int) -> int:
    return min(max(round_half_even(weight / scale) + zero, 0), 2**bits - 1)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Straight-through by detaching: plain autograd of float64 tensors [O, I], [O, G], [O, G]."""
    groups = scale.shape[1]
    w = weight.unflatten(1, (groups, -1))
    s, z = scale[..., None], zero[..., None]
    steps = w / s
    rounded = steps + (steps.round() - steps).detach()
    return (s * (torch.clamp(rounded + z, 0, 2**bits - 1) - z)).flatten(1)
