"""Convert trained layers to plain nn.Linear layers, and measure what training changed.

Quantized layers become codes. LoRA layers become the rounded sum of weight and adapters. Both conversions check, for
every layer of every run, that the plain layer computes the same outputs to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.qat.base import QuantizedLinear
from nybble.qat.lora import LoRALinear
from nybble.quant.weight import QuantizedWeight


@torch.no_grad()
def assert_absorbs_exactly(name: str, layer: QuantizedLinear) -> None:
    """Assert that a layer and the plain layer with its absorbed weight compute the same outputs to the last bit.

    Rank 0 and the active rank are checked.

    Args:
        name: name of the layer, for the error message.
        layer: the layer to check. It gets random inputs from the global generator.

    Raises:
        AssertionError: the outputs differ.
    """
    inputs = torch.randn(4, layer.in_features, device=layer.init_scale.device).to(layer.dtype)
    active_rank = layer.active_rank
    for rank in (0, active_rank):
        layer.active_rank = rank
        plain = F.linear(inputs, layer.absorb().dequantize().to(layer.dtype), layer.bias)
        assert torch.equal(layer(inputs), plain), (
            f"absorbed codes must equal the forward: layer {name} differs at rank {rank}; please report this bug"
        )


def frozen_linear(weight_OI: Tensor, bias: Tensor | None) -> nn.Linear:
    """Create an nn.Linear that shares a weight [O, I] and a bias [O] and trains neither."""
    linear = nn.Linear(
        weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None, device="meta", dtype=weight_OI.dtype
    )
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def absorb_layers(
    model: nn.Module,
    layers: MutableMapping[str, QuantizedLinear],
    note: Callable[[str, QuantizedLinear], None] = lambda name, layer: None,
) -> dict[str, QuantizedWeight]:
    """Take the weights out of quantized layers, and put plain linear layers in their places that have none.

    What is returned is saved, loaded again and measured. A second copy of it in the model would, for a large one, take
    more memory than the training did.

    Args:
        model: the model that holds the layers.
        layers: layer name -> layer. Layers are removed from it one by one, so that their memory is freed. Where the
            rows of a layer are divided, all processes must take part, and the first one gets the rows.
        note: called with each layer that is whole here, before it goes.

    Returns:
        Layer name -> quantized weight to export, on the CPU; none where the rows went to another process.

    Raises:
        AssertionError: a plain layer computes other outputs than the layer it replaces.
    """
    quantized = {}
    for name in list(layers):
        layer = layers.pop(name)
        layer.drop_weight_cache()
        empty_OI = torch.empty((layer.out_features, layer.in_features), dtype=layer.dtype, device="meta")
        model.set_submodule(name, frozen_linear(empty_OI, layer.bias))
        if layer.shard is not None:
            layer.bring_all_rows()
        if layer.shard is None:
            assert_absorbs_exactly(name, layer)
            note(name, layer)
            quantized[name] = layer.absorb().to("cpu")
    return quantized


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, QuantizedWeight], device: torch.device) -> None:
    """Give the plain layers that `absorb_layers` has put in the weights that it returned; others stay as they are."""
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.weight.is_meta:
            weight_OI = weight.to(device).dequantize().to(linear.weight.dtype)
            model.set_submodule(name, frozen_linear(weight_OI, linear.bias))


@torch.no_grad()
def merge_adapters(model: nn.Module, layers: MutableMapping[str, LoRALinear]) -> None:
    """Replace LoRA layers by plain linear layers with weight and adapters, at the active rank, merged; in place.

    Args:
        model: the model that holds the layers.
        layers: layer name -> layer. Layers are removed from it one by one, so that their memory is freed.

    Raises:
        AssertionError: a plain layer computes other outputs than the layer it replaces.
    """
    for name in list(layers):
        layer = layers.pop(name)
        layer.drop_weight_cache()
        plain = frozen_linear(layer.compute_weight(), layer.bias)
        inputs = torch.randn(4, layer.in_features, device=layer.weight.device).to(layer.dtype)
        assert torch.equal(layer(inputs), plain(inputs)), (
            f"merged weights must equal the forward: layer {name} differs at rank {layer.active_rank}; "
            "please report this bug"
        )
        model.set_submodule(name, plain)


@dataclass(frozen=True)
class WeightChanges:
    """Difference between compressed weights before and after training.

    Attributes:
        codes_changed: share of the codes of all layers that have another value, 0 .. 1.
        scales_moved: root mean square of the relative changes of the scales of all layers.
        layer_codes_changed: layer name -> codes_changed of the layer.
        layer_scales_moved: layer name -> scales_moved of the layer.
    """

    codes_changed: float
    scales_moved: float
    layer_codes_changed: dict[str, float]
    layer_scales_moved: dict[str, float]


def weight_changes(before: Mapping[str, QuantizedWeight], after: Mapping[str, QuantizedWeight]) -> WeightChanges:
    """Compare the weights of the layers in `after` with those of the same names in `before`."""
    changed = {name: int((before[name].codes_OI != weight.codes_OI).sum()) for name, weight in after.items()}
    squares = {
        name: float((weight.scale_OG / before[name].scale_OG - 1).square().sum()) for name, weight in after.items()
    }
    codes = {name: weight.codes_OI.numel() for name, weight in after.items()}
    scales = {name: weight.scale_OG.numel() for name, weight in after.items()}
    return WeightChanges(
        codes_changed=sum(changed.values()) / sum(codes.values()),
        scales_moved=math.sqrt(sum(squares.values()) / sum(scales.values())),
        layer_codes_changed={name: changed[name] / codes[name] for name in after},
        layer_scales_moved={name: math.sqrt(squares[name] / scales[name]) for name in after},
    )
