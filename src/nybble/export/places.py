"""Where the rows of each weight in memory are in the files of an export.

A format may have other matrices than the model in memory: rows of one weight in several tensors, of several weights in
one, stacked along a first axis, or transposed. Each of its layouts is a list of places; by tensor they say what to
write, by name what to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nybble.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Place:
    """Rows of one weight in memory that follow each other in a tensor of a file.

    Attributes:
        tensor: name in the file.
        name: of the weight's module, or of any other tensor in memory.
        rows: which of its rows.
        matrix: number of the matrix in a stack [E, O, I]; None where the tensor is a matrix.
        first_row: of these rows in the matrix.
        transposed: the matrix is [I, O].
    """

    tensor: str
    name: str
    rows: slice = field(default_factory=lambda: slice(None))
    matrix: int | None = None
    first_row: int = 0
    transposed: bool = False

    def count(self, rows: int) -> int:
        """Return how many rows of a weight with `rows` rows these are."""
        return len(range(*self.rows.indices(rows)))


def by_tensor(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Return the places that each tensor of a file consists of, in their order in the file."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.tensor, []).append(place)
    for parts in found.values():
        parts.sort(key=lambda place: (place.matrix or 0, place.first_row))
    return found


def by_name(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Return the places at which the rows of each weight are."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.name, []).append(place)
    return found


def stored_shape(places: Sequence[Place], shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the tensor that consists of these places.

    Args:
        places: an entry of `by_tensor`.
        shape_of: name of a weight or other tensor in memory -> its shape.
    """
    first, shape = places[0], shape_of(places[0].name)
    if not shape:
        return ()
    rows = sum(place.count(shape_of(place.name)[0]) for place in places if place.matrix == first.matrix)
    matrix = (*shape[1:], rows) if first.transposed else (rows, *shape[1:])
    return matrix if first.matrix is None else (len({place.matrix for place in places}), *matrix)


def take_rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Return some rows of a weight."""
    return QuantizedWeight(weight.codes_OI[rows], weight.scale_OG[rows], weight.zero_point_OG[rows], weight.scheme)


def stack_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put weights with one scheme and one width below each other."""
    return _combined(weights, torch.cat)


def join_weights(places: Sequence[Place], parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put the rows at the places of one weight together again; `parts` are what was read there."""
    return _combined(parts, lambda tensors: join_tensors(places, tensors))


def join_tensors(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """Put rows of a matrix together again; see `join_weights`."""
    if len(parts) == 1:
        return parts[0]
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for place, part in zip(places, parts, strict=True):
        joined[place.rows] = part
    return joined


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


def _combined(weights: Sequence[QuantizedWeight], combine: Callable[[list[Tensor]], Tensor]) -> QuantizedWeight:
    codes_OI, scale_OG, zero_point_OG = (
        combine([getattr(weight, leaf) for weight in weights]) for leaf in ("codes_OI", "scale_OG", "zero_point_OG")
    )
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, weights[0].scheme)
