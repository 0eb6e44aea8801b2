"""Replace the nn.Linear layers of a model by layers that are trained, and quantize the embedding and lm_head.

Modules are replaced one by one, without graph tracing, so a new model family works as soon as transformers has it.
Weights and biases that a new layer keeps are shared with the model, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from nybble.compression.init import QuantizedInit
from nybble.models.layers_on_disk import into_memory
from nybble.qat.base import QuantizedLinear
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.qat.fake_quant_rounding import FakeQuantizedRoundingLinear
from nybble.qat.fixed_codes import FixedCodesLinear
from nybble.qat.lora import LoRALinear
from nybble.quant.grid import at_least_float32, dequantize, min_max_qparams, quantize
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

L = TypeVar("L", FakeQuantizedFullLinear, FakeQuantizedRoundingLinear)
M = TypeVar("M", bound=nn.Module)

# Rows of an embedding that are quantized at once. Their float32 copies take 32 MB with a hidden size of 2048, while
# those of a whole embedding with 150,000 rows would take 1.2 GB.
_ROWS_PER_CHUNK = 4096


# What is done to a new layer before the next one is made.
Prepare = Callable[[QuantizedLinear], None]


def as_it_is(layer: QuantizedLinear) -> None:
    """Leave a new layer as it is."""


def _taken(inits: Mapping[str, QuantizedInit], name: str) -> QuantizedInit:
    """Remove a layer where it is in memory; read it where it is not."""
    return inits.pop(name) if isinstance(inits, dict) else inits[name]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _replace(model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Linear], M]) -> dict[str, M]:
    """Replace linear layers by what `make` returns for a name and the layer, one after the other.

    A model on disk is in memory afterwards, with the new layers in place of the weights that it has on disk.
    """
    layers = {}
    for name in into_memory(model, names):
        layers[name] = make(name, _linear(model, name))
        model.set_submodule(name, layers[name])
    return layers


def insert_fake_quant_layers(
    model: nn.Module,
    inits: Mapping[str, QuantizedInit],
    schemes: Mapping[str, QuantScheme],
    rank: int,
    seed: int,
    prepare: Prepare = as_it_is,
) -> dict[str, FakeQuantizedLoRALinear]:
    """Replace linear layers, in place, by fake-quantized ones with LoRA adapters inside the rounding.

    Until it is trained, the model computes with the compressed weights.

    Args:
        model: the model whose layers are replaced.
        inits: layer name -> result of compression. They are removed from a dictionary one by one, so that their memory
            is freed.
        schemes: layer name -> scheme that the weight was compressed with.
        rank: rank of the adapters, clamped to the smaller side of each layer.
        seed: seed of the adapters and log scale shifts.
        prepare: called with each new layer before the next is made.

    Returns:
        Layer name -> new layer, in the order of `inits`.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, linear: nn.Linear) -> FakeQuantizedLoRALinear:
        layer = FakeQuantizedLoRALinear(
            _taken(inits, name), schemes[name], linear.bias, rank, linear.weight.dtype, generator
        )
        prepare(layer)
        return layer

    return _replace(model, list(inits), make)


def insert_fake_quant_layers_of(
    kind: type[L],
    model: nn.Module,
    inits: Mapping[str, QuantizedInit],
    schemes: Mapping[str, QuantScheme],
    seed: int,
    prepare: Prepare = as_it_is,
) -> dict[str, L]:
    """Replace linear layers, in place, by fake-quantized ones without adapters.

    Until it is trained, the model computes with the compressed weights.

    Args:
        kind: class of the layers: weights are trained, or the scales that round.
        model: the model whose layers are replaced.
        inits: layer name -> result of compression. They are removed from a dictionary one by one, so that their memory
            is freed.
        schemes: layer name -> scheme that the weight was compressed with.
        seed: seed of the log scale shifts.
        prepare: called with each new layer before the next is made.

    Returns:
        Layer name -> new layer, in the order of `inits`.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, linear: nn.Linear) -> L:
        layer = kind(_taken(inits, name), schemes[name], linear.bias, linear.weight.dtype, generator)
        prepare(layer)
        return layer

    return _replace(model, list(inits), make)


def insert_fixed_codes_layers(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], seed: int, prepare: Prepare = as_it_is
) -> dict[str, FixedCodesLinear]:
    """Replace linear layers, in place, by ones with fixed codes and trainable scales; the 16-bit weights are released.

    Until it is trained, the model computes with the compressed weights.

    Args:
        model: the model whose layers are replaced.
        weights: layer name -> compressed weight. It is moved to the device of the layer.
        seed: seed of the log scale shifts.
        prepare: called with each new layer before the next is made.

    Returns:
        Layer name -> new layer, in the order of `weights`.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, linear: nn.Linear) -> FixedCodesLinear:
        weight = weights[name].to(linear.weight.device)
        layer = FixedCodesLinear(weight, linear.bias, linear.weight.dtype, generator)
        prepare(layer)
        return layer

    return _replace(model, weights, make)


def insert_lora_layers(model: nn.Module, names: Iterable[str], rank: int, seed: int) -> dict[str, LoRALinear]:
    """Replace linear layers, in place, by ones with LoRA adapters on their own 16-bit weights.

    Until it is trained, the model computes as before.

    Args:
        model: the model whose layers are replaced.
        names: names of the layers.
        rank: rank of the adapters, clamped to the smaller side of each layer.
        seed: seed of the adapters.

    Returns:
        Layer name -> new layer, in the order of `names`.
    """
    generator = torch.Generator().manual_seed(seed)
    return _replace(
        model,
        names,
        lambda name, linear: LoRALinear(linear.weight.detach(), linear.bias, rank, linear.weight.dtype, generator),
    )


@torch.no_grad()
def quantize_embeddings(model: nn.Module, schemes: Mapping[str, QuantScheme]) -> dict[str, QuantizedWeight]:
    """Round the weights of embedding and lm_head to nearest, in place.

    An lm_head that is tied to the embedding shares the rounded weight.

    Args:
        model: the model whose weights are rounded.
        schemes: name of the module -> scheme: the embedding, and lm_head if it is not tied.

    Returns:
        Module name -> quantized weight.
    """
    quantized = {}
    for name, scheme in schemes.items():
        codes, scales, zero_points = [], [], []
        for rows_VD in model.get_submodule(name).get_parameter("weight").split(_ROWS_PER_CHUNK):
            scale_VG, zero_point_VG = min_max_qparams(rows_VD, scheme)
            codes.append(quantize(at_least_float32(rows_VD), scale_VG, zero_point_VG, scheme))
            rows_VD.copy_(dequantize(codes[-1], scale_VG, zero_point_VG))
            scales.append(scale_VG)
            zero_points.append(zero_point_VG.to(torch.uint8))
        quantized[name] = QuantizedWeight(torch.cat(codes), torch.cat(scales), torch.cat(zero_points), scheme)
    return quantized
