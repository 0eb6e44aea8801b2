"""The tensors of a model as GGUF holds them: names, order of rows, norms.

llama.cpp's architecture "llama" rotates pairs of neighbours (2i, 2i + 1) in a head, where transformers pairs i with
i + D / 2. The rows of the query and key projections, and their biases, are reordered for it. Rows move as a whole, so
codes, scales and zero points stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.gguf.architectures import MODEL_TYPES, architecture_rope, query_factor
from nybble.export.gguf.blocks import block_type, to_blocks
from nybble.export.gguf.experts import stack_arrays
from nybble.export.gguf.file import TensorPlan, file_places, rope_heads
from nybble.export.gguf.rope import RopeFields
from nybble.export.places import take_rows
from nybble.export.stacks import expert_width
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.quant.weight import QuantizedWeight

_Reading = Callable[[slice, int | None], Callable[[], NDArray[Any]]]
"""Rows of a parameter, and heads whose rows are reordered -> the function that reads them."""


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
    places_of = file_places(architecture, config.num_hidden_layers, expert_width(config))
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    stacks: dict[str, dict[int, TensorPlan]] = {}

    def plan(parameter: str, shape: tuple[int, ...], kind: str, reading: _Reading) -> Iterator[TensorPlan]:
        places, module = places_of(parameter), parameter.rpartition(".")[0]
        if not places:
            raise ExportError(
                "an export to GGUF needs a tensor of llama.cpp for every parameter; there is none for "
                f"{parameter}; remove gguf from --export"
            )
        order = rope_heads(architecture, module, heads, key_value_heads)
        for place in places:
            part = (place.count(shape[0]), *shape[1:])
            tensor = TensorPlan(place.tensor, part, kind, reading(place.rows, order))
            if place.matrix is None:
                yield tensor
            else:
                stacks.setdefault(place.tensor, {})[place.matrix] = tensor

    for module, shape in checkpoint.shapes.items():
        kind = block_type(checkpoint.selection.schemes[module])
        yield from plan(f"{module}.weight", shape, kind, partial(_reading_blocks, checkpoint, module))
    for parameter in checkpoint.others:
        numbers_shape = tuple(checkpoint.others[parameter].shape)
        yield from plan(parameter, numbers_shape, "F32", partial(_reading_floats, checkpoint, parameter))
    for name, stack in stacks.items():
        experts = [stack[i] for i in sorted(stack)]
        reads = [expert.read for expert in experts]
        yield TensorPlan(name, (len(experts), *experts[0].shape), experts[0].kind, partial(stack_arrays, reads))
    rope = architecture_rope(config)
    assert isinstance(rope, RopeFields), rope
    for name, factors in rope.tensors.items():
        yield TensorPlan(name, tuple(factors.shape), "F32", factors.numpy)


def _reading_blocks(
    checkpoint: QuantizedCheckpoint, module: str, rows: slice, order: int | None
) -> Callable[[], NDArray[np.uint8]]:
    return lambda: to_blocks(reorder_weight(take_rows(checkpoint.quantized[module], rows), order, to_neighbours))


def _reading_floats(
    checkpoint: QuantizedCheckpoint, parameter: str, rows: slice, order: int | None
) -> Callable[[], NDArray[Any]]:
    architecture = MODEL_TYPES[checkpoint.config.model_type]
    offset = architecture.norm_offset if parameter.endswith("norm.weight") else 0.0
    factor = query_factor(checkpoint.config) if parameter.endswith("q_norm.weight") else 1.0

    def read() -> NDArray[Any]:
        numbers = (checkpoint.others[parameter][rows].float() + offset) * factor
        return (numbers if order is None else to_neighbours(numbers, order)).contiguous().numpy()

    return read
