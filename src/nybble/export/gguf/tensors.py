"""The tensors of a model as GGUF holds them: names, order of rows, norms.

llama.cpp's architecture "llama" rotates pairs of neighbours (2i, 2i + 1) in a head, where transformers pairs i with
i + D / 2. The rows of the query and key projections, and their biases, are reordered for it. Rows move as a whole, so
codes, scales and zero points stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.containers import exact_dtype
from nybble.export.gguf.architectures import MODEL_TYPES, architecture_rope, query_factor
from nybble.export.gguf.blocks import block_type, to_blocks
from nybble.export.gguf.file import FLOATS, TensorPlan, file_places, rope_heads
from nybble.export.gguf.latent import latent_heads
from nybble.export.gguf.rope import RopeFields
from nybble.export.places import Place, by_tensor, reorder_weight, stored_shape, take_rows, to_neighbours
from nybble.export.stacks import expert_width
from nybble.models.checkpoint import QuantizedCheckpoint

_FLOAT_KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

_ROUTER = ".ffn_gate_inp"
"""In float32, as llama.cpp's converter has it: with matrices in 16 bits, llama.cpp rounds activations to 16 bits."""


def plan_tensors(checkpoint: QuantizedCheckpoint) -> Iterator[TensorPlan]:
    """Plan all tensors of the file, stacks behind the others.

    Raises:
        ExportError: llama.cpp has no tensor for a parameter.
    """
    config = checkpoint.config
    find = file_places(
        MODEL_TYPES[config.model_type], config.num_hidden_layers, expert_width(config), latent_heads(config)
    )
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": shape for module, shape in checkpoint.shapes.items()}
    shapes |= {parameter: tuple(tensor.shape) for parameter, tensor in checkpoint.others.items()}
    tensors = by_tensor(place for parameter in shapes for place in _existing(find, parameter))
    for name in sorted(tensors, key=lambda name: tensors[name][0].matrix is not None):
        places, kind = tensors[name], _kind(checkpoint, tensors[name])
        read = partial(_read, checkpoint, places, kind)
        yield TensorPlan(name, stored_shape(places, shapes.__getitem__), kind, read)
    rope = architecture_rope(config)
    assert isinstance(rope, RopeFields), rope
    for name, factors in rope.tensors.items():
        yield TensorPlan(name, tuple(factors.shape), "F32", factors.numpy)


def _existing(find: Callable[[str], list[Place]], parameter: str) -> list[Place]:
    places = find(parameter)
    if not places:
        raise ExportError(
            "an export to GGUF needs a tensor of llama.cpp for every parameter; there is none for "
            f"{parameter}; remove gguf from --export"
        )
    return places


def _kind(checkpoint: QuantizedCheckpoint, places: Sequence[Place]) -> str:
    """The type of a tensor."""
    scheme = checkpoint.selection.schemes.get(_module(places[0].name))
    if scheme is None:
        is_matrix = places[0].name.endswith(".weight") and checkpoint.others[places[0].name].ndim > 1
        if not is_matrix or _ROUTER in places[0].tensor:
            return "F32"
        return _FLOAT_KINDS[exact_dtype(_floats(checkpoint, name) for name in dict.fromkeys(p.name for p in places))]
    if places[0].transposed:  # its rows are no rows of groups
        return "F16" if scheme.bits <= 4 else "F32"
    return block_type(scheme)


def _read(checkpoint: QuantizedCheckpoint, places: Sequence[Place], kind: str) -> NDArray[Any]:
    """Read the numbers of a tensor, or the bytes of its blocks, one matrix at a time."""
    arrays = _arrays(checkpoint, places, kind)
    first = next(arrays)
    if places[0].matrix is None:
        return first
    stack = np.empty((len(places), *first.shape), first.dtype)
    stack[0] = first
    for i, array in enumerate(arrays, start=1):
        stack[i] = array
    return stack


def _arrays(checkpoint: QuantizedCheckpoint, places: Sequence[Place], kind: str) -> Iterator[NDArray[Any]]:
    """Yield what is at each place. A weight with several places is read once."""
    config = checkpoint.config
    heads, key_value_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    for parameter, parts in groupby(places, lambda place: place.name):
        module, layer = _module(parameter), parameter.rpartition(".")[0]  # differ for biases
        order = rope_heads(MODEL_TYPES[config.model_type], layer, heads, key_value_heads or heads)
        if module not in checkpoint.shapes:
            numbers = _floats(checkpoint, parameter)
            for place in parts:
                rows = numbers[place.rows] if order is None else to_neighbours(numbers[place.rows], order)
                yield _array(rows, place, kind)
            continue
        weight = checkpoint.quantized[module]
        for place in parts:
            part = reorder_weight(take_rows(weight, place.rows), order, to_neighbours)
            yield _array(part.dequantize(), place, kind) if kind in FLOATS else to_blocks(part)


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _array(numbers: Tensor, place: Place, kind: str) -> NDArray[Any]:
    return FLOATS[kind]((numbers.T if place.transposed else numbers).contiguous())


def _floats(checkpoint: QuantizedCheckpoint, parameter: str) -> Tensor:
    """The numbers of a parameter that is not quantized, as llama.cpp needs them, float32."""
    architecture = MODEL_TYPES[checkpoint.config.model_type]
    offset = architecture.norm_offset if parameter.endswith("norm.weight") else 0.0
    factor = query_factor(checkpoint.config) if parameter.endswith("q_norm.weight") else 1.0
    return (checkpoint.others[parameter].float() + offset) * factor
