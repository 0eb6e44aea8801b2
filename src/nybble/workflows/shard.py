"""--shard: which models can be trained with their rows divided among processes, and what it saves and costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from nybble import processes
from nybble.errors import ModelError
from nybble.models.composite import is_composite
from nybble.models.experts import SplitExperts
from nybble.models.layers_on_disk import LayersOnDisk, block_number, layers_on_disk
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.models.shards import find_blocks
from nybble.qat.base import QuantizedLinear
from nybble.quant.weight import QuantizedWeight
from nybble.runtime import hand_back_freed_memory

log = logging.getLogger("nybble")


def check_shardable(model: Any, selection: LayerSelection) -> None:
    """Check that all processes compute the same layers in the same order, whatever the text is.

    Raises:
        ModelError: a mixture of experts, a model of several parts, or one without a chain of decoder blocks.
    """
    path, reason = find_blocks(model), ""
    named = any("expert" in name for name in selection.linears)
    if named or any(isinstance(module, SplitExperts) for module in model.modules()):
        reason = "it is a mixture of experts, whose tokens choose the layers"
    elif is_composite(model.config):
        reason = "it has other parts beside its text decoder"
    elif path is None or not any(name.startswith(f"{path}.") for name in selection.linears):
        reason = "it has no list of decoder blocks"
    if reason:
        raise ModelError(f"--shard needs a model that computes the same layers for every text; {reason}; leave it out")


@contextmanager
def rounded_blocks(model: Any, linears: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Let a model on disk compute with the quantized weights of linear layers inside the context."""
    layers = layers_on_disk(model)
    assert layers is not None, "the weights of a model in memory are those before rounding"
    before: dict[int, Callable[[], Mapping[str, Tensor]]] = {}
    outside = {name: model.get_submodule(name).weight for name in linears if block_number(layers, name) is None}
    saved = {name: weight.detach().clone() for name, weight in outside.items()}
    for name, weight in outside.items():
        weight.data.copy_(linears[name].dequantize())
    for i in range(len(layers.modules)):
        before[i] = layers.replace(i, partial(_rounded_block, layers, i, linears, before))
    yield
    for i, read in before.items():
        layers.replace(i, read)
    for name, weight in outside.items():
        weight.data.copy_(saved[name])


def _rounded_block(
    layers: LayersOnDisk,
    i: int,
    linears: Mapping[str, QuantizedWeight],
    before: Mapping[int, Callable[[], Mapping[str, Tensor]]],
) -> Mapping[str, Tensor]:
    """What LayersOnDisk reads of block i: quantized weights, and everything else as before."""
    tensors, prefix = before[i](), layers.prefix(i)
    dtypes = {name: tensor.dtype for name, tensor in layers.modules[i].state_dict().items()}

    def read(name: str) -> Tensor:
        layer = prefix + name.removesuffix(".weight")
        if not name.endswith(".weight") or layer not in linears:
            return tensors[name]
        return linears[layer].dequantize().to(layers.device, dtypes[name])

    return LazyMapping(tensors, read)


def divide_rows(layers: Mapping[str, QuantizedLinear]) -> None:
    """Divide the rows of all layers among the processes, where they are not divided yet; `absorb_layers` undoes it."""
    for number, layer in enumerate(layers.values()):
        if layer.shard is None:
            layer.divide_rows(number)
    hand_back_freed_memory()
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    codes = sum(layer.out_features * layer.in_features * layer.scheme.bits / 8 for layer in layers.values())
    tensors = [tensor for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers())]
    log.info(
        "%d processes keep %.1f MB of the layers each, and gather %.1f MB of codes in a pass through the model, where "
        "bfloat16 weights have %.1f MB",
        processes.count(), sum(tensor.nbytes for tensor in tensors) / 1e6, codes / 1e6, 2 * weights / 1e6,
    )  # fmt: skip
