"""How far a compressed layer is from the original one. It is for people: nothing is decided by it.

Errors of outputs are computed on at most 256 rows of a weight, evenly spaced: a row costs I^2 products, four times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.compression.init import QuantizedInit
from nybble.compression.output_error import output_error
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize, to_groups
from nybble.quant.scheme import QuantScheme

_MAX_ROWS = 256


def _some(rows: Tensor) -> Tensor:
    """At most 256 of the rows, evenly spaced; a view."""
    return rows[:: -(-len(rows) // _MAX_ROWS)]


@dataclass(frozen=True)
class LayerError:
    """Errors of one layer.

    Attributes:
        rtn: mean square error of the layer's outputs on the calibration text, relative to their mean square, if the
            original weight is rounded to nearest. None without calibration text.
        compressed: the same for the compressed weight. None without calibration text.
        weight: root mean square error of the weight, relative to its root mean square.
        clipped: fraction of the weights that lie outside of the range of their group.
    """

    rtn: float | None
    compressed: float | None
    weight: float
    clipped: float


@dataclass(frozen=True)
class OutputReference:
    """Outputs of the original layer, which the error of the compressed layer is relative to.

    Attributes:
        mean_square_O: mean square of each output on the calibration text, of some rows.
        rtn_error: mean square error with the original weight rounded to nearest, relative to the mean square.
    """

    mean_square_O: Tensor
    rtn_error: float

    @staticmethod
    @torch.no_grad()
    def of(weight_OI: Tensor, gram_II: Tensor, scheme: QuantScheme) -> OutputReference:
        """The reference of a 16-bit weight before anything is folded into it.

        Args:
            weight_OI: in the dtype of the model.
            gram_II: mean of x x^T over the inputs x.
            scheme: bits and group size.
        """
        weight_OI = at_least_float32(_some(weight_OI))
        mean_square_O = output_error(weight_OI, gram_II)
        rounded_OI = quantize_dequantize(weight_OI, *min_max_qparams(weight_OI, scheme), scheme)
        error_O = output_error(rounded_OI - weight_OI, gram_II)
        return OutputReference(mean_square_O, float(error_O.sum()) / (float(mean_square_O.sum()) or 1.0))


@torch.no_grad()
def weight_error(weight_OI: Tensor, init: QuantizedInit, scheme: QuantScheme) -> LayerError:
    """Errors that need no calibration text.

    Args:
        weight_OI: the 16-bit weight, in the dtype of the model.
        init: the compressed layer.
        scheme: bits and group size.
    """
    compressed_OI, weight_OI = init.quantized(scheme).dequantize(), at_least_float32(weight_OI)
    error = float((compressed_OI - weight_OI).norm()) / (float(weight_OI.norm()) or 1.0)
    steps_OGK = to_groups(weight_OI, init.scale_OG.shape[-1]) / init.scale_OG[..., None]
    codes_OGK = steps_OGK + init.zero_point_OG[..., None]
    clipped_OGK = (codes_OGK < -0.5) | (codes_OGK > scheme.max_code + 0.5)
    return LayerError(None, None, error, float(clipped_OGK.float().mean()))


@torch.no_grad()
def layer_error(
    weight_OI: Tensor, init: QuantizedInit, scheme: QuantScheme, gram_II: Tensor, reference: OutputReference
) -> LayerError:
    """All errors of a layer.

    Folding divides the outputs of a layer that is the source of another one (v_proj, up_proj). The error of each output
    is therefore scaled back to the size that the output had before.

    Args:
        weight_OI: the 16-bit weight after folding, in the dtype of the model.
        init: the compressed layer.
        scheme: bits and group size.
        gram_II: mean of x x^T over the inputs x, after folding.
        reference: of the weight before folding.
    """
    known, weight_OI = weight_error(weight_OI, init, scheme), at_least_float32(_some(weight_OI))
    some = QuantizedInit(_some(init.weight_OI), _some(init.scale_OG), _some(init.zero_point_OG))
    error_O = output_error(some.quantized(scheme).dequantize() - weight_OI, gram_II)
    before_O, after_O = reference.mean_square_O, output_error(weight_OI, gram_II)
    error = float((error_O * torch.where(after_O > 0, before_O / after_O, 1.0)).sum())
    return LayerError(reference.rtn_error, error / (float(before_O.sum()) or 1.0), known.weight, known.clipped)
