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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nybble.errors import ExportError, describe_error
from nybble.export.safetensors_writer import TensorLayout, weight_blocks
from nybble.export.transformers_folder import quantized_names
from nybble.models.checkpoint import QuantizedCheckpoint, empty_model, transformers_model
from nybble.models.experts import find_stacks
from nybble.quant.weight import QuantizedWeight

_COLUMNS = 2
"""Of every matrix in the copy; their numbers tell rows from columns."""


@dataclass(frozen=True)
class Piece:
    """Rows of one weight in memory that follow each other in a published tensor.

    Attributes:
        module: the module in memory, or the name of a tensor that is no weight of a linear layer.
        start, stop, step: which of its rows.
    """

    module: str
    start: int
    stop: int
    step: int = 1

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.start, self.stop, self.step)

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of the published model.

    Attributes:
        matrices: pieces of each of its matrices, in their order: one list for [O, I], E of them for [E, O, I].
        is_stack: the tensor has an axis for the matrices.
        transposed: the matrices are [I, O].
    """

    matrices: tuple[tuple[Piece, ...], ...]
    is_stack: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Location:
    """Where a piece is in the published model.

    Attributes:
        tensor: published name.
        matrix: number of the matrix in a stack; None for [O, I].
        first_row: of the piece in this matrix.
        piece: which rows of the module in memory these are.
        transposed: the matrix is [I, O].
    """

    tensor: str
    matrix: int | None
    first_row: int
    piece: Piece
    transposed: bool


def published_layout(config: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, PublishedTensor]:
    """Return the tensors of a published model and where their rows are in memory.

    Args:
        config: transformers configuration.
        shapes: name of every quantized module in memory -> [O, I].

    Returns:
        Published name -> tensor. Tensors that are no weights of quantized modules have one piece with one row.

    Raises:
        ExportError: transformers cannot undo what it does when it loads the model, or it mixes columns.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = transformers_model(config, trust_remote_code=False)
    rows: list[tuple[str, int]] = []
    try:
        reverted = revert_weight_conversion(model, _numbered_state(model, shapes, rows))
        return {name: _decode(tensor, rows) for name, tensor in reverted.items()}
    except Exception as error:  # conversions of transformers have no common error
        raise ExportError(
            f"an export in the published layout needs a model that transformers saves as it loads it; "
            f"{config.model_type} is not ({describe_error(error)}); remove hf and vllm from --export"
        ) from error


def locate(layout: Mapping[str, PublishedTensor]) -> dict[str, list[Location]]:
    """Return where the rows of each module in memory are: module -> its pieces."""
    found: dict[str, list[Location]] = {}
    for name, tensor in layout.items():
        for i, pieces in enumerate(tensor.matrices):
            first_row = 0
            for piece in pieces:
                location = Location(name, i if tensor.is_stack else None, first_row, piece, tensor.transposed)
                found.setdefault(piece.module, []).append(location)
                first_row += len(piece)
    return found


def locate_modules(folder: Path) -> dict[str, list[Location]]:
    """Return where the rows of each module are in an export in the published layout; see `locate`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    model = empty_model(config, trust_remote_code=False)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in quantized_names(folder)}
    return locate(published_layout(config, shapes))


def tensor_layout(checkpoint: QuantizedCheckpoint, tensor: PublishedTensor) -> TensorLayout:
    """Dtype and shape of a published tensor: float16 where it holds quantized weights, else that of the model."""
    pieces = tensor.matrices[0]
    if pieces[0].module not in checkpoint.shapes:
        other = checkpoint.others[pieces[0].module]
        return TensorLayout(other.dtype, (len(pieces), *other.shape) if len(pieces) > 1 else tuple(other.shape))
    rows, columns = sum(map(len, pieces)), checkpoint.shapes[pieces[0].module][1]
    matrix = (columns, rows) if tensor.transposed else (rows, columns)
    return TensorLayout(torch.float16, (len(tensor.matrices), *matrix) if tensor.is_stack else matrix)


def float16_blocks(checkpoint: QuantizedCheckpoint, tensor: PublishedTensor) -> Iterator[Tensor]:
    """Yield the values of a published tensor as consecutive blocks, in the dtype of `tensor_layout`."""
    for pieces in tensor.matrices:
        for piece in pieces:
            if piece.module not in checkpoint.shapes:
                yield checkpoint.others[piece.module]
                continue
            blocks = (block.dequantize().half() for block in weight_blocks(rows_of(checkpoint.quantized, piece)))
            if tensor.transposed:
                assert len(pieces) == 1, "a transposed matrix is one module"
                yield torch.cat(list(blocks)).T
            else:
                yield from blocks


def rows_of(quantized: Mapping[str, QuantizedWeight], piece: Piece) -> QuantizedWeight:
    """The rows of a piece."""
    weight, rows = quantized[piece.module], piece.rows
    return QuantizedWeight(weight.codes_OI[rows], weight.scale_OG[rows], weight.zero_point_OG[rows], weight.scheme)


def read_rows(file: Any, locations: Sequence[Location]) -> Tensor:
    """Read the weight of a module back.

    Args:
        file: an open safetensors file.
        locations: of the module.

    Returns:
        [O, I] in the dtype of the file.
    """
    parts = []
    for location in locations:
        stored = file.get_slice(location.tensor)
        rows = slice(location.first_row, location.first_row + len(location.piece))
        index = (slice(None), rows) if location.transposed else (rows,)
        part = stored[index] if location.matrix is None else stored[(location.matrix, *index)]
        parts.append(part.T if location.transposed else part)
    if len(parts) == 1:
        return parts[0].clone()  # type: ignore[no-any-return]
    weight_OI = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
    for location, part in zip(locations, parts, strict=True):
        weight_OI[location.piece.rows] = part
    return weight_OI  # type: ignore[no-any-return]


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
    for name in model.state_dict():
        if name in tied:
            continue
        if name not in stacks:
            module = name.removesuffix(".weight")
            state[name] = _numbered(module, shapes[module][0], rows) if module in shapes else _numbered(name, 1, rows)
            if module in shapes and isinstance(model.get_submodule(module), Conv1D):
                state[name] = state[name].T
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


def _decode(tensor: Tensor, rows: list[tuple[str, int]]) -> PublishedTensor:
    """Find the rows of a published tensor. ValueError where it does not consist of whole rows."""
    is_stack = tensor.ndim == 3
    matrices = tensor if is_stack else tensor[None]
    columns = torch.arange(_COLUMNS)
    transposed = matrices.shape[-1] != _COLUMNS or not torch.equal(matrices[0, 0] % _COLUMNS, columns)
    if transposed:
        matrices = matrices.transpose(1, 2)
    if matrices.shape[-1] != _COLUMNS or not bool((matrices % _COLUMNS == columns).all()):
        raise ValueError("columns are mixed")
    pieces = tuple(_pieces([rows[i] for i in (matrix[:, 0] // _COLUMNS).tolist()]) for matrix in matrices)
    return PublishedTensor(pieces, is_stack, transposed)


def _pieces(rows: list[tuple[str, int]]) -> tuple[Piece, ...]:
    """Rows that follow each other, as few pieces."""
    pieces: list[Piece] = []
    i = 0
    while i < len(rows):
        module, start = rows[i]
        step = rows[i + 1][1] - start if i + 1 < len(rows) and rows[i + 1][0] == module else 1
        end = i + 1
        while step > 0 and end < len(rows) and rows[end] == (module, start + (end - i) * step):
            end += 1
        pieces.append(Piece(module, start, rows[end - 1][1] + 1, max(step, 1)))
        i = end
    return tuple(pieces)
