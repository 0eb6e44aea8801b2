"""The arithmetic of the quantized weight. The only file that rounds or clamps weights.

    codes = clamp(round(weight / scale) + zero, 0, 2**bits - 1)        weight' = scale * (codes - zero)

Codes and zero are unsigned integers of `bits` bits; each group of `group_size` weights along the input axis shares one
scale > 0 and one zero. Scales live on a coarse grid of their own, 7 significant bits within the normal range of fp16, so that
scale, scale * (code - zero) and scale * zero have at most 11 significant bits and are exact in fp16 (4-bit codes): every
export holds the same weight to the last bit.

Shapes: O outputs, I inputs, G groups per row, K = I / G weights per group. Everything is computed in the dtype given (float32
in training, float64 in tests), rounding half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nybble.errors import OptionError

SCALE_BITS = 7
# Smallest and largest numbers with 7 significant bits in the normal range of fp16: 2**-14 and (2 - 2**-6) * 2**15.
SCALE_MIN, SCALE_MAX = 2.0**-14, 65024.0


@dataclass(frozen=True)
class Grid:
    """How a weight is quantized.

    Attributes:
        bits: width of a code: 4 or 8.
        group_size: weights per scale along the input axis; None = the whole row.
        symmetric: zero is fixed at the middle code (8 or 128) instead of chosen per group.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        group = "per row" if self.group_size is None else f"group {self.group_size}"
        return f"uint{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"


INT8_ROW = Grid(bits=8, group_size=None, symmetric=True)


def check_group_size(name: str, in_features: int, group_size: int) -> None:
    """Raise OptionError, naming the layer and the sizes that do work, unless group_size divides in_features."""
    if group_size <= 0 or in_features % group_size:
        powers = [k for k in (16, 32, 64, 128, 256) if in_features % k == 0]
        choices = powers or [k for k in range(1, in_features + 1) if in_features % k == 0 and k <= 256][-5:]
        raise OptionError(
            f"in_features must be a multiple of group_size: layer {name} has in_features={in_features}, "
            f"got group_size={group_size}; choose {', '.join(map(str, choices))}"
        )


def group(weight_OI: Tensor, groups: int) -> Tensor:
    """[O, I] -> [O, G, K], a view."""
    return weight_OI.unflatten(-1, (groups, -1))  # type: ignore[no-any-return, no-untyped-call]


def wide(tensor: Tensor) -> Tensor:
    """In at least float32, the precision in which weights are computed with."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def round_scale(scale: Tensor) -> Tensor:
    """Round to 7 significant bits and keep within the normal fp16 range. 0.1 -> 0.099609375 = 102 / 1024."""
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    return torch.ldexp(torch.round(mantissa * 2**SCALE_BITS), exponent - SCALE_BITS).clamp(SCALE_MIN, SCALE_MAX)


def shift_within_cell(scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logarithms of factors, one a scale, that `round_scale` takes back: round_scale(scale * exp(shift)) == scale.

    scale * exp(shift) is drawn uniformly, on the CPU, from the numbers that round to the scale. Trained from there, about as large a share of the
    scales crosses a rounding border as the mean scale has moved by; started from the middle, none would before all had gone half a cell
    (0.4 to 0.8 %).

    Args:
        scale: on the scale grid, any shape. Returns: the same shape and dtype.
    """
    step = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - SCALE_BITS)
    drawn = scale + step * (torch.rand(scale.shape, generator=generator).to(scale) - 0.5)
    shift = (drawn / scale).log()
    return torch.where(round_scale(scale * shift.exp()) == scale, shift, 0)  # at a power of two the cell is narrower below


def min_max(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero by round-to-nearest: the range of each group, widened to hold 0, spread over all codes.

    Args:
        weight_OI: weights, any float dtype; computed in at least float32.
        grid: the grid; its group_size must divide I.

    Returns:
        scale_OG on the scale grid and zero_OG (whole numbers), both in the dtype of the computation.
    """
    w_OGK = group(wide(weight_OI), grid.groups(weight_OI.shape[-1]))
    if grid.symmetric:
        scale_OG = round_scale(w_OGK.abs().amax(-1) / (grid.middle - 1))
        return scale_OG, torch.full_like(scale_OG, grid.middle)
    return from_range(w_OGK.amin(-1), w_OGK.amax(-1), grid)


def from_range(low_OG: Tensor, high_OG: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of an asymmetric grid that spreads all codes over a range, widened to hold 0."""
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    scale_OG = round_scale((high_OG - low_OG) / grid.max_code)
    return scale_OG, round_zero(-low_OG / scale_OG, grid)


def round_zero(zero: Tensor, grid: Grid) -> Tensor:
    """Nearest valid zero: a whole number from 0 to the largest code."""
    return zero.round().clamp(0, grid.max_code)


def quantize(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:
    """Codes [O, I] uint8 of the weights. scale_OG must be on the scale grid, zero_OG whole."""
    return _codes(weight_OI, scale_OG, zero_OG, grid).flatten(-2).to(torch.uint8)


def _codes(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:
    """Codes [O, G, K] as floats."""
    codes_OGK = group(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]
    return codes_OGK.round_().add_(zero_OG[..., None]).clamp_(0, grid.max_code)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """Weights [O, I] = scale * (codes - zero), in the dtype of scale."""
    w_OGK = group(codes_OI, scale_OG.shape[-1]).to(scale_OG.dtype)
    return w_OGK.sub_(zero_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)


def quantize_dequantize(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:
    """dequantize(quantize(weight)), without the detour over integers: the same bits."""
    codes_OGK = _codes(weight_OI, scale_OG, zero_OG, grid)
    return codes_OGK.sub_(zero_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)


class _RoundScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scale: Tensor) -> Tensor:
        return round_scale(scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def round_scale_through(scale: Tensor) -> Tensor:
    """`round_scale` whose gradient is that of the identity (straight-through)."""
    return _RoundScale.apply(scale)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(weight_OI, scale_OG, zero_OG)
        ctx.grid = grid
        return quantize_dequantize(weight_OI, scale_OG, zero_OG, grid)

    @staticmethod
    def backward(ctx, grad_OI: Tensor):  # type: ignore[no-untyped-def,override]
        weight_OI, scale_OG, zero_OG = ctx.saved_tensors
        grad_OGK = group(grad_OI, scale_OG.shape[-1])
        steps_OGK = group(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]
        # code - zero, before and after clamping
        offset_OGK = steps_OGK.round()
        low_OG1, high_OG1 = -zero_OG[..., None], (ctx.grid.max_code - zero_OG)[..., None]
        clamped_OGK = offset_OGK.clamp(low_OG1, high_OG1)
        inside_OGK = offset_OGK.eq_(clamped_OGK)  # 1.0 or 0.0: booleans are slow to multiply with
        need_weight, need_scale, need_zero, _ = ctx.needs_input_grad
        grad_weight = (grad_OGK * inside_OGK).flatten(-2) if need_weight else None
        grad_scale = grad_zero = None
        if need_scale:
            grad_scale = clamped_OGK.sub_(steps_OGK.mul_(inside_OGK)).mul_(grad_OGK).sum(-1)
        if need_zero:
            grad_zero = -scale_OG * (grad_OGK * (1 - inside_OGK)).sum(-1)
        return grad_weight, grad_scale, grad_zero, None


def fake_quantize(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:
    """dequantize(quantize(weight)), with straight-through gradients (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    d/d weight = 1 where the code is not clipped, else 0;
    d/d scale  = (code - zero) - weight / scale where not clipped, else code - zero; summed over the group;
    d/d zero   = 0 where not clipped, else -scale; summed over the group.

    Args: as `quantize`. Returns: [O, I] in the dtype of weight and scale, which must agree.
    """
    return _FakeQuantize.apply(weight_OI, scale_OG, zero_OG, grid)  # type: ignore[no-any-return]


class _CenteredCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:  # type: ignore[no-untyped-def,override]
        rounded_OGK = (group(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]).round_()
        centered_OGK = (rounded_OGK + zero_OG[..., None]).clamp_(0, grid.max_code).sub_(zero_OG[..., None])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded_OGK.eq_(centered_OGK), scale_OG)  # 1.0 where the code is not clipped
        return centered_OGK

    @staticmethod
    def backward(ctx, grad_OGK: Tensor):  # type: ignore[no-untyped-def,override]
        inside_OGK, scale_OG = ctx.saved_tensors
        return (grad_OGK * inside_OGK).div_(scale_OG[..., None]).flatten(-2), None, None, None


def centered_codes(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid) -> Tensor:
    """code - zero, with a straight-through gradient to the weight: 1 / scale where the code is not clipped, else 0.

    Args: as `quantize`. Returns: [O, G, K] in the dtype of weight and scale, which must agree.
    """
    return _CenteredCodes.apply(weight_OI, scale_OG, zero_OG, grid)  # type: ignore[no-any-return]
