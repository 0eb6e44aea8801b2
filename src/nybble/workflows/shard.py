"""--shard: which models can be trained with their rows divided among processes, and what it saves and costs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nybble import processes
from nybble.errors import ModelError
from nybble.models.composite import is_composite
from nybble.models.experts import SplitExperts
from nybble.models.selection import LayerSelection
from nybble.models.shards import find_blocks
from nybble.qat.base import QuantizedLinear, row_shards
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
def sharded(layers: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Divide the rows of all layers among the processes inside the context; afterwards the first one has them all."""
    before, weights = _bytes(layers), sum(layer.out_features * layer.in_features for layer in layers.values())
    codes = sum(layer.out_features * layer.in_features * layer.scheme.bits / 8 for layer in layers.values())
    with row_shards(layers):
        hand_back_freed_memory()
        log.info(
            "%d processes keep %.1f of %.1f MB of the layers each, and gather %.1f MB of codes in a pass through the "
            "model, where bfloat16 weights have %.1f MB",
            processes.count(), _bytes(layers) / 1e6, before / 1e6, codes / 1e6, 2 * weights / 1e6,
        )  # fmt: skip
        yield


def _bytes(layers: Mapping[str, QuantizedLinear]) -> int:
    """Bytes of the parameters and buffers of layers."""
    tensors = [tensor for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers())]
    return sum(tensor.nbytes for tensor in tensors)
