"""Round all layers of a model to nearest, as the simplest quantized model."""

from typing import Any

import torch

from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight

GROUPS_OF_32 = QuantScheme(group_size=32)


def round_model_to_nearest(model: Any, scheme: QuantScheme = GROUPS_OF_32) -> dict[str, QuantizedWeight]:
    """Quantize embedding, head and linear layers, and put the dequantized weights into the model.

    Returns:
        Module name -> quantized weight.
    """
    selection, quantized = select_layers(model), {}
    for name in (*selection.int8, *selection.int4):
        weight = model.get_submodule(name).weight
        of_layer = scheme if name in selection.int4 else INT8_PER_ROW
        scale_OG, zero_point_OG = min_max_qparams(weight.float(), of_layer)
        codes_OI = quantize(weight.float(), scale_OG, zero_point_OG, of_layer)
        quantized[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), of_layer)
        with torch.no_grad():
            weight.copy_(quantized[name].dequantize())
    return quantized
