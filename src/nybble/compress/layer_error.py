"""How far a compressed layer is from the original."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.compress import scale_estimation
from nybble.compress.init import QuantizedInit
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class LayerError:
    """How a layer came out.

    Attributes:
        rtn, compressed: mean square error of the layer's outputs relative to their mean square, on the calibration text, rounded to nearest and as compressed.
            None without calibration text.
        weight: root mean square error of the weights relative to their root mean square.
        clipped: share of the weights outside of their group's range.
    """

    rtn: float | None
    compressed: float | None
    weight: float
    clipped: float


@torch.no_grad()
def weight_error(weight_OI: Tensor, start: QuantizedInit, scheme: QuantScheme) -> LayerError:
    """Without calibration text; weight_OI is the 16-bit weight."""
    made_OI, weight_OI = start.quantized(scheme).dequantize(), at_least_float32(weight_OI)
    error = float((made_OI - weight_OI).norm()) / (float(weight_OI.norm()) or 1.0)
    bounds = (torch.full_like(start.zero_point_OG, code) for code in (0, scheme.max_code))
    low_OG, high_OG = (start.scale_OG * (bound - start.zero_point_OG) for bound in bounds)
    w_OGK = weight_OI.unflatten(-1, (low_OG.shape[-1], -1))
    slack_OG = start.scale_OG / 2
    outside = (w_OGK < (low_OG - slack_OG)[..., None]) | (w_OGK > (high_OG + slack_OG)[..., None])
    return LayerError(None, None, error, float(outside.float().mean()))


@dataclass(frozen=True)
class NearestRounding:
    """What the outputs of a layer are like: the mean square of each, and the share of their sum that rounding to nearest gets wrong."""

    square_O: Tensor
    error: float

    @staticmethod
    @torch.no_grad()
    def of(weight_OI: Tensor, scheme: QuantScheme, gram_II: Tensor) -> NearestRounding:
        weight_OI = at_least_float32(weight_OI)
        square_O = scale_estimation.output_error(weight_OI, gram_II)
        scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
        made_OI = quantize_dequantize(weight_OI, scale_OG, zero_point_OG, scheme)
        return NearestRounding(
            square_O,
            float(scale_estimation.output_error(made_OI - weight_OI, gram_II).sum()) / (float(square_O.sum()) or 1.0),
        )


@torch.no_grad()
def layer_error(
    weight_OI: Tensor, start: QuantizedInit, scheme: QuantScheme, gram_II: Tensor, nearest: NearestRounding
) -> LayerError:
    """weight_OI is the 16-bit weight, folded where that was asked for, and gram_II belongs to it. Folding divides the outputs of what feeds other layers
    (v_proj, up_proj): each counts as what it was before."""
    known, weight_OI = weight_error(weight_OI, start, scheme), at_least_float32(weight_OI)
    error_O = scale_estimation.output_error(start.quantized(scheme).dequantize() - weight_OI, gram_II)
    before_O, after_O = nearest.square_O, scale_estimation.output_error(weight_OI, gram_II)
    error = float((error_O * torch.where(after_O > 0, before_O / after_O, 1.0)).sum())
    return LayerError(nearest.error, error / (float(before_O.sum()) or 1.0), known.weight, known.clipped)
