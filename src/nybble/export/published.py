"""The layout in which a model is published: names and shapes of tensors on the hub, which differ from those in memory.

transformers renames tensors, stacks experts and fuses projections when it loads a model, and undoes that when it saves
one. Which row goes where is found out here with its own code: a copy of the model's state whose numbers are row numbers
goes through `revert_weight_conversion`, and each row of what comes out tells where it is from.

    in memory    mlp.experts.3.gate_up_proj [2 F, D]
    published    block_sparse_moe.experts.3.w1.weight [F, D] and .w3.weight [F, D],
                 or rows of one block_sparse_moe.input_linear.weight [E, 2 F, D], or of a transposed [E, D, 2 F]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import ExportError, describe_error
from nybble.export.containers import exact_dtype
from nybble.export.places import Place, by_name, by_tensor, join_tensors, stored_shape, take_rows
from nybble.export.safetensors_writer import weight_blocks
from nybble.export.transformers_folder import quantized_names
from nybble.files import TensorReader
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model, transformers_model
from nybble.models.experts import find_stacks
from nybble.models.tensor_writer import TensorLayout

_COLUMNS = 2
"""Of every matrix in the copy; their numbers tell rows from columns."""

_CONVOLUTION = 3
"""Axes of the kernel of a short convolution [channels, 1, width]. Kimi Linear publishes one in three parts."""


def published_layout(config: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[Place]]:
    """Return the tensors of a published model and where their rows are in memory.

    Args:
        config: transformers configuration.
        shapes: name of every quantized module in memory -> [O, I].

    Returns:
        Published name -> its places. The name of a place is that of a module that is quantized, of an expert or a
        Conv1D, or of any other tensor, which counts as one row unless it has three axes, as a convolution has.

    Raises:
        ExportError: transformers cannot undo what it does when it loads the model, or it mixes columns.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = transformers_model(config, trust_remote_code=False)
    rows: list[tuple[str, int]] = []
    try:
        reverted = revert_weight_conversion(model, _numbered_state(model, shapes, rows))
        return by_tensor(place for name, tensor in reverted.items() for place in _decode(name, tensor, rows))
    except Exception as error:  # conversions of transformers have no common error
        raise ExportError(
            f"an export in the published layout needs a model that transformers saves as it loads it; "
            f"{config.model_type} is not ({describe_error(error)}); remove hf and vllm from --export"
        ) from error


def locate_modules(folder: Path) -> dict[str, list[Place]]:
    """Return where the rows of each quantized module are in an export in the published layout."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model, names = empty_model(config, trust_remote_code=False), quantized_names(folder)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    found = by_name(place for places in published_layout(config, shapes).values() for place in places)
    return {name: found[name] for name in names}


def tensor_layout(checkpoint: QuantizedCheckpoint, places: Sequence[Place]) -> TensorLayout:
    """Dtype and shape of a published tensor.

    The dtype is float16 where that is exact, as it is for quantized weights of up to 4 bits; else the one of 16 bits
    that is exact, else float32.
    """
    if places[0].name in checkpoint.others:
        others = [_other_tensor(checkpoint, place) for place in places]
        shape = tuple(others[0].shape)
        if others[0].ndim == _CONVOLUTION:
            shape = (sum(map(len, others)), *shape[1:])
        elif len(others) > 1:
            shape = (len(others), *shape)
        return TensorLayout(exact_dtype(others) if others[0].is_floating_point() else others[0].dtype, shape)
    names, quantized = {place.name for place in places}, checkpoint.shapes
    in_16_bits = {name: _weight_in_16_bits(checkpoint, name) for name in names if name not in quantized}
    dtypes = [exact_dtype([in_16_bits[name]]) if name in in_16_bits else torch.float16 for name in names]
    shape = stored_shape(places, lambda name: tuple(in_16_bits[name].shape if name in in_16_bits else quantized[name]))
    return TensorLayout(reduce(torch.promote_types, dtypes), shape)


def float16_blocks(checkpoint: QuantizedCheckpoint, places: Sequence[Place], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the values of a published tensor as consecutive blocks.

    Args:
        checkpoint: the quantized model.
        places: of the tensor.
        dtype: of `tensor_layout`. Quantized weights are rounded to float16 first.
    """
    for place in places:
        if place.name in checkpoint.others:
            yield _other_tensor(checkpoint, place).to(dtype)
            continue
        if place.name in checkpoint.shapes:
            values = weight_blocks(take_rows(checkpoint.quantized[place.name], place.rows))
            blocks = (block.dequantize().half().to(dtype) for block in values)
        else:
            blocks = (part.to(dtype) for part in [_weight_in_16_bits(checkpoint, place.name)[place.rows]])
        if place.transposed:
            yield torch.cat(list(blocks)).T
        else:
            yield from blocks


def _other_tensor(checkpoint: QuantizedCheckpoint, place: Place) -> Tensor:
    """What a place holds of a tensor that is no weight of a linear layer: rows of a convolution, or all of it."""
    tensor = checkpoint.others[place.name]
    return tensor[place.rows] if tensor.ndim == _CONVOLUTION else tensor


def _weight_in_16_bits(checkpoint: QuantizedCheckpoint, module: str) -> Tensor:
    """The weight [O, I] of an expert or of a Conv1D that is not quantized."""
    return checkpoint.others[f"{module}.weight"]


def read_rows(reader: TensorReader, places: Sequence[Place]) -> Tensor:
    """Read the weight of a module back.

    Args:
        reader: of the file.
        places: of the module.

    Returns:
        [O, I] in the dtype of the file.
    """
    parts = []
    for place in places:
        first = place.first_row
        rows = slice(first, first + place.count(place.rows.stop))
        index = (slice(None), rows) if place.transposed else (rows,)
        part = reader.read(place.tensor, *(() if place.matrix is None else (place.matrix,)), *index)
        parts.append(part.T if place.transposed else part)
    return join_tensors(places, parts)


def _numbered_state(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], rows: list[tuple[str, int]]
) -> dict[str, Tensor]:
    """The state of a model with row numbers for values; `rows` gets the row that each number stands for."""
    stacks = find_stacks(model)
    for name, stack in stacks.items():
        if len(model.get_parameter(name)) != stack.count:
            raise ValueError(f"{name} has entries that belong to no expert")
    own = dict(model.named_parameters()).keys()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    state = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if name not in stacks:
            module = name.removesuffix(".weight")
            if module != name and isinstance(model.get_submodule(module), Conv1D):
                state[name] = _numbered(module, model.get_parameter(name).shape[1], rows).T
            else:
                count = len(tensor) if module in shapes or tensor.ndim == _CONVOLUTION else 1
                state[name] = _numbered(module if module in shapes else name, count, rows)
            continue
        stack = stacks[name]
        modules = [stack.module(i) for i in range(stack.count)]
        if len(stack.shape) == 1:
            state[name] = torch.cat([_numbered(f"{module}.bias", 1, rows) for module in modules])
        else:
            state[name] = torch.stack([_numbered(module, stack.shape[0], rows) for module in modules])
            state[name] = state[name].transpose(1, 2) if stack.transposed else state[name]
    return state


def _numbered(name: str, count: int, rows: list[tuple[str, int]]) -> Tensor:
    """A matrix [count, _COLUMNS] with a number for each entry."""
    first = len(rows)
    rows.extend((name, i) for i in range(count))
    return (torch.arange(first, len(rows))[:, None] * _COLUMNS) + torch.arange(_COLUMNS)


def _decode(name: str, tensor: Tensor, rows: list[tuple[str, int]]) -> Iterator[Place]:
    """Find the rows of a published tensor. ValueError where it does not consist of whole rows."""
    is_stack = tensor.ndim == 3
    matrices = tensor if is_stack else tensor[None]
    columns = torch.arange(_COLUMNS)
    transposed = matrices.shape[-1] != _COLUMNS or not torch.equal(matrices[0, 0] % _COLUMNS, columns)
    if transposed:
        matrices = matrices.transpose(1, 2)
    if matrices.shape[-1] != _COLUMNS or not bool((matrices % _COLUMNS == columns).all()):
        raise ValueError("columns are mixed")
    for i, matrix in enumerate(matrices):
        runs = list(_runs([rows[number] for number in (matrix[:, 0] // _COLUMNS).tolist()]))
        if transposed and len(runs) > 1:
            raise ValueError("a transposed matrix has rows of several layers")
        for first_row, module, part in runs:
            yield Place(name, module, part, i if is_stack else None, first_row, transposed)


def _runs(rows: list[tuple[str, int]]) -> Iterator[tuple[int, str, slice]]:
    """Find rows that follow each other: the number of the first, the module, and which of its rows they are."""
    i = 0
    while i < len(rows):
        module, start = rows[i]
        end = i + 1
        while end < len(rows) and rows[end] == (module, start + end - i):
            end += 1
        yield i, module, slice(start, start + end - i)
        i = end
