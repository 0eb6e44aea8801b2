"""Fake quantization: the arithmetic of grid.py with straight-through gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quant.grid import SCALE_MAX, SCALE_MIN, quantize_dequantize, round_scale, to_groups
from nybble.quant.scheme import QuantScheme


class _RoundScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(scale)
        return round_scale(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (scale,) = ctx.saved_tensors
        size, grad_size = scale.abs(), grad * scale.sign()
        outwards = ((size < SCALE_MIN) & (grad_size > 0)) | ((size > SCALE_MAX) & (grad_size < 0))
        return grad.masked_fill(outwards, 0.0)


def round_scale_ste(scale: Tensor) -> Tensor:
    """Compute `round_scale` with the gradient of the identity (straight-through estimator, STE).

    The gradient is 0 where a descent would take a scale further beyond the ends of the grid.
    """
    return _RoundScale.apply(scale)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(weight_OI, scale_OG, zero_point_OG)
        ctx.scheme = scheme
        return quantize_dequantize(weight_OI, scale_OG, zero_point_OG, scheme)

    @staticmethod
    def backward(ctx, grad_OI: Tensor):  # type: ignore[no-untyped-def,override]
        weight_OI, scale_OG, zero_point_OG = ctx.saved_tensors
        grad_OGK = to_groups(grad_OI, scale_OG.shape[-1])
        scaled_OGK = to_groups(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]
        # code - zero_point before and after clamping. Comparing the two finds the weights that are not clipped.
        unclamped_OGK = scaled_OGK.round()
        low_OG1, high_OG1 = -zero_point_OG[..., None], (ctx.scheme.max_code - zero_point_OG)[..., None]
        clamped_OGK = unclamped_OGK.clamp(low_OG1, high_OG1)
        inside_OGK = unclamped_OGK.eq_(clamped_OGK)  # 1.0 or 0.0, because multiplying with booleans is slow
        need_weight, need_scale, need_zero_point, _ = ctx.needs_input_grad
        grad_weight = (grad_OGK * inside_OGK).flatten(-2) if need_weight else None
        grad_scale = grad_zero_point = None
        if need_scale:
            grad_scale = clamped_OGK.sub_(scaled_OGK.mul_(inside_OGK)).mul_(grad_OGK).sum(-1)
        if need_zero_point:
            grad_zero_point = -scale_OG * (grad_OGK * (1 - inside_OGK)).sum(-1)
        return grad_weight, grad_scale, grad_zero_point, None


def fake_quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Compute dequantize(quantize(weight)) with straight-through gradients.

                         not clipped                           clipped
        d/d weight     = 1                                     0
        d/d scale      = (code - zero_point) - weight / scale  code - zero_point     summed over the group
        d/d zero_point = 0                                     -scale                summed over the group

    The gradient of the scale is that of LSQ (https://arxiv.org/abs/1902.08153). The gradient of the zero point is
    that of LSQ+ (https://arxiv.org/abs/2004.09576).

    Args:
        weight_OI, scale_OG, zero_point_OG, scheme: see `grid.quantize`. Weight and scale have the same dtype.

    Returns:
        Weights [O, I] in the dtype of the arguments.
    """
    return _FakeQuantize.apply(weight_OI, scale_OG, zero_point_OG, scheme)  # type: ignore[no-any-return]


def codes_and_inside(
    weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """Compute the codes of `grid.quantize`, uint8 [O, I], and where they are not clipped, bool [O, I]."""
    rounded_OGK = (to_groups(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]).round_()
    shifted_OGK = rounded_OGK.add_(zero_point_OG[..., None])
    codes_OGK = shifted_OGK.clamp(0, scheme.max_code)
    return codes_OGK.to(torch.uint8).flatten(-2), codes_OGK.eq(shifted_OGK).flatten(-2)


class _CenteredCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:  # type: ignore[no-untyped-def,override]
        rounded_OGK = (to_groups(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]).round_()
        centered_OGK = (
            (rounded_OGK + zero_point_OG[..., None]).clamp_(0, scheme.max_code).sub_(zero_point_OG[..., None])
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded_OGK.eq_(centered_OGK), scale_OG)  # 1.0 where the code is not clipped
        return centered_OGK

    @staticmethod
    def backward(ctx, grad_OGK: Tensor):  # type: ignore[no-untyped-def,override]
        inside_OGK, scale_OG = ctx.saved_tensors
        return (grad_OGK * inside_OGK).div_(scale_OG[..., None]).flatten(-2), None, None, None


def centered_codes(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Compute code - zero_point with a straight-through gradient to the weight.

        d/d weight = 1 / scale if the code is not clipped, else 0

    Scale and zero point get no gradient.

    Args:
        weight_OI, scale_OG, zero_point_OG, scheme: see `grid.quantize`. Weight and scale have the same dtype.

    Returns:
        Centered codes [O, G, K] in the dtype of the arguments.
    """
    return _CenteredCodes.apply(weight_OI, scale_OG, zero_point_OG, scheme)  # type: ignore[no-any-return]
