"""Fake-quantized layers -> QuantizedWeight, bit for bit, and back to plain nn.Linear.

What leaves here is what the forward computed with. That is asserted on every layer of every run, with the adapters and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.layers import QuantizedLinear
from nybble.quantized import QuantizedWeight


@torch.no_grad()
def assert_absorbs_exactly(name: str, layer: QuantizedLinear) -> None:
    """Assert that the layer and the plain layer made of its codes give the same bits, at the active rank and at rank 0."""
    inputs = torch.randn(4, layer.in_features, device=layer.start_scale.device).to(layer.dtype)
    active = layer.active_rank
    for rank in (0, active):
        layer.active_rank = rank
        plain = F.linear(inputs, layer.absorb().dequantize().to(layer.dtype), layer.bias)
        assert torch.equal(layer(inputs), plain), f"{name} at rank {rank}: absorbed codes differ from the forward; please report this"


def plain_linear(quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """nn.Linear with the dequantized weight, frozen."""
    weight_OI = quantized.dequantize().to(dtype)
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, device="meta", dtype=dtype)
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
        layer.drop_step_cache()
        assert_absorbs_exactly(name, layer)
        absorbed = layer.absorb()
        model.set_submodule(name, plain_linear(absorbed, layer.bias, layer.dtype))
        quantized[name] = absorbed.cpu()
    return quantized


def codes_changed(before: Mapping[str, QuantizedWeight], after: Mapping[str, QuantizedWeight]) -> tuple[float, dict[str, float]]:
    """Share of the codes that tuning moved to another value: of all, and of each layer."""
    changed = {name: int((before[name].codes_OI != weight.codes_OI).sum()) for name, weight in after.items()}
    shares = {name: changed[name] / weight.codes_OI.numel() for name, weight in after.items()}
    return sum(changed.values()) / sum(weight.codes_OI.numel() for weight in after.values()), shares
