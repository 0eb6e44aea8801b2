"""Trained layers -> plain nn.Linear: fake-quantized ones by way of their QuantizedWeight, adapters on 16-bit weights by their sum; bit for bit.

What leaves here is what the forward computed with. That is asserted on every layer of every run, with the adapters and without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.qat.layers import LoRALinear, QuantizedLinear
from nybble.quant.weight import QuantizedWeight


@torch.no_grad()
def assert_absorbs_exactly(name: str, layer: QuantizedLinear) -> None:
    """Assert that the layer and the plain layer made of its codes give the same bits, at the active rank and at rank 0."""
    inputs = torch.randn(4, layer.in_features, device=layer.init_scale.device).to(layer.dtype)
    active = layer.active_rank
    for rank in (0, active):
        layer.active_rank = rank
        plain = F.linear(inputs, layer.absorb().dequantize().to(layer.dtype), layer.bias)
        assert torch.equal(layer(inputs), plain), (
            f"{name} at rank {rank}: absorbed codes differ from the forward; please report this"
        )


def plain_linear(weight_OI: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear with this weight, frozen."""
    linear = nn.Linear(
        weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, device="meta", dtype=weight_OI.dtype
    )
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def absorb(model: Any, layers: dict[str, QuantizedLinear]) -> dict[str, QuantizedWeight]:
    """Replace every layer by a plain one, in place, taking it out of `layers` so that its memory is freed.

    Returns: name -> the codes that ship, on the CPU.
    """
    quantized = {}
    for name in list(layers):
        layer = layers.pop(name)
        layer.drop_weight_cache()
        assert_absorbs_exactly(name, layer)
        absorbed = layer.absorb()
        model.set_submodule(name, plain_linear(absorbed.dequantize().to(layer.dtype), layer.bias))
        quantized[name] = absorbed.cpu()
    return quantized


@torch.no_grad()
def merge(model: Any, layers: dict[str, LoRALinear]) -> None:
    """Replace every layer by a plain one with the weight of its forward at the active rank, in place, taking it out of `layers`."""
    for name in list(layers):
        layer = layers.pop(name)
        layer.drop_weight_cache()
        plain = plain_linear(layer.compute_weight(), layer.bias)
        inputs = torch.randn(4, layer.in_features, device=layer.weight.device).to(layer.dtype)
        assert torch.equal(layer(inputs), plain(inputs)), (
            f"{name} at rank {layer.active_rank}: the merged weight differs from the forward; please report this"
        )
        model.set_submodule(name, plain)


def changes(before: Mapping[str, QuantizedWeight], after: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """What training did to the 4-bit weights, for the results: of all layers, and by layer.

    codes_changed: share of the codes that have another value. scales_moved: root mean square of the relative changes of scales.
    """
    codes = {name: int((before[name].codes_OI != weight.codes_OI).sum()) for name, weight in after.items()}
    squares = {
        name: float((weight.scale_OG / before[name].scale_OG - 1).square().sum()) for name, weight in after.items()
    }
    weights, scales = (
        {name: getattr(weight, part).numel() for name, weight in after.items()} for part in ("codes_OI", "scale_OG")
    )
    return {
        "codes_changed": sum(codes.values()) / sum(weights.values()),
        "scales_moved": math.sqrt(sum(squares.values()) / sum(scales.values())),
        "layer_codes_changed": {name: codes[name] / weights[name] for name in after},
        "layer_scales_moved": {name: math.sqrt(squares[name] / scales[name]) for name in after},
    }
