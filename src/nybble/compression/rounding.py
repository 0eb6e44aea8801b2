"""Rounding the layers that share an input, as one matrix of stacked rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nybble.compression.base import Rounder
from nybble.compression.init import QuantizedInit, RoundedWeight
from nybble.quant.grid import at_least_float32
from nybble.quant.scheme import QuantScheme

# Upper bound on the numbers in the equations of scale estimation (G x G for each row) that exist at the same time.
MAX_EQUATION_NUMBERS = 16 << 20


@torch.no_grad()
def round_layers(linears: Mapping[str, nn.Linear], rounder: Rounder, scheme: QuantScheme) -> dict[str, QuantizedInit]:
    """Round the weights of layers that share an input, some rows at a time.

    Args:
        linears: name -> layer; all layers have the same number of inputs.
        rounder: rounds rows.
        scheme: bits and group size.

    Returns:
        Name -> the compressed layer, in the dtype of the layer. The layers themselves do not change.
    """
    weight_OI = torch.cat([at_least_float32(layer.weight) for layer in linears.values()])
    rows = max(1, MAX_EQUATION_NUMBERS // scheme.num_groups(weight_OI.shape[-1]) ** 2)
    parts = [rounder(part_OI) for part_OI in weight_OI.split(rows)]
    sizes = [len(layer.weight) for layer in linears.values()]
    codes, weights, scales, zero_points = (
        torch.cat([getattr(part, leaf) for part in parts]).split(sizes)
        for leaf in ("codes_OI", "weight_OI", "scale_OG", "zero_point_OG")
    )
    inits = {}
    for i, (name, layer) in enumerate(linears.items()):
        # The clones free the stack; the weight is copied by the conversion.
        rounded = RoundedWeight(codes[i], weights[i], scales[i].clone(), zero_points[i].clone())
        inits[name] = QuantizedInit.from_rounded(rounded, scheme, layer.weight.dtype)
    return inits
