"""The tensors of a model as GGUF holds them: names, order of rows, norms.

llama.cpp's architecture "llama" rotates pairs of neighbours (2i, 2i + 1) in a head, where transformers pairs i with
i + D / 2. The rows of the query and key projections, and their biases, are reordered for it. Rows move as a whole, so
codes, scales and zero points stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.gguf.architectures import MODEL_TYPES, query_factor
from nybble.export.gguf.blocks import block_type, to_blocks
from nybble.export.gguf.file import TensorPlan, rope_heads, tensor_names
from nybble.export.gguf.rope import RopeFields, rope_fields
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.quant.weight import QuantizedWeight


def to_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: row i of the first half comes before row i of the second. [O, ...] -> [O, ...]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-untyped-call,no-any-return]


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Undo `to_neighbours`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-untyped-call,no-any-return]


def reorder_weight(
    weight: QuantizedWeight, heads: int | None, reorder: Callable[[Tensor, int], Tensor]
) -> QuantizedWeight:
    """Reorder the rows of a weight of `heads` heads; None leaves them as they are."""
    if heads is None:
        return weight
    codes_OI, scale_OG, zero_point_OG = (
        reorder(part, heads) for part in (weight.codes_OI, weight.scale_OG, weight.zero_point_OG)
    )
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, weight.scheme)


def plan_tensors(checkpoint: QuantizedCheckpoint) -> Iterator[TensorPlan]:
    """Plan all tensors of the file.

    Raises:
        ExportError: llama.cpp has no tensor for a parameter.
    """
    config = checkpoint.config
    architecture = MODEL_TYPES[config.model_type]
    name_of = tensor_names(architecture, config.num_hidden_layers)
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads

    def place(parameter: str) -> tuple[str, int | None]:
        name, module = name_of(parameter), parameter.rpartition(".")[0]
        if name is None:
            raise ExportError(
                "an export to GGUF needs a tensor of llama.cpp for every parameter; there is none for "
                f"{parameter}; remove gguf from --export"
            )
        return name, rope_heads(architecture, module, heads, key_value_heads)

    for module, shape in checkpoint.shapes.items():
        name, order = place(f"{module}.weight")
        kind = block_type(checkpoint.selection.schemes[module])
        yield TensorPlan(name, shape, kind, _reading_blocks(checkpoint, module, order))
    for parameter in checkpoint.others:
        name, order = place(parameter)
        yield TensorPlan(
            name, tuple(checkpoint.others[parameter].shape), "F32", _reading_floats(checkpoint, parameter, order)
        )
    rope = rope_fields(config, architecture.rope_freqs, architecture.long_rope)
    assert isinstance(rope, RopeFields), rope
    for name, factors in rope.tensors.items():
        yield TensorPlan(name, tuple(factors.shape), "F32", factors.numpy)


def _reading_blocks(checkpoint: QuantizedCheckpoint, module: str, order: int | None) -> Callable[[], NDArray[np.uint8]]:
    return lambda: to_blocks(reorder_weight(checkpoint.quantized[module], order, to_neighbours))


def _reading_floats(checkpoint: QuantizedCheckpoint, parameter: str, order: int | None) -> Callable[[], NDArray[Any]]:
    architecture = MODEL_TYPES[checkpoint.config.model_type]
    offset = architecture.norm_offset if parameter.endswith("norm.weight") else 0.0
    factor = query_factor(checkpoint.config) if parameter.endswith("q_norm.weight") else 1.0

    def read() -> NDArray[Any]:
        numbers = (checkpoint.others[parameter].float() + offset) * factor
        return (numbers if order is None else to_neighbours(numbers, order)).contiguous().numpy()

    return read
