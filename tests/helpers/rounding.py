"""Round all layers of a model to nearest, as the simplest quantized model."""

from collections.abc import Mapping
from typing import Any

import torch

from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight

GROUPS_OF_32 = QuantScheme(group_size=32)


def round_model_to_nearest(
    model: Any, scheme: QuantScheme = GROUPS_OF_32, schemes: Mapping[str, QuantScheme] | None = None
) -> dict[str, QuantizedWeight]:
    """Quantize embedding, head and linear layers, and put the dequantized weights into the model.

    Args:
        model: changed in place.
        scheme: of the linear layers; embedding and head have 8 bits per row.
        schemes: name -> scheme of all layers that are quantized, instead of that.

    Returns:
        Module name -> quantized weight.
    """
    selection, quantized = select_layers(model), {}
    if schemes is None:
        schemes = dict.fromkeys(selection.embeddings, INT8_PER_ROW) | dict.fromkeys(selection.linears, scheme)
    for name, of_layer in schemes.items():
        weight = model.get_submodule(name).weight
        scale_OG, zero_point_OG = min_max_qparams(weight.float(), of_layer)
        codes_OI = quantize(weight.float(), scale_OG, zero_point_OG, of_layer)
        quantized[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), of_layer)
        with torch.no_grad():
            weight.copy_(quantized[name].dequantize())
    return quantized
