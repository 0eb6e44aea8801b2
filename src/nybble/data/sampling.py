"""Seeded order of sequences, and duplicates among them."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_order(available: int, wanted: int, seed: int) -> Tensor:
    """Indices of the sequences to use at each of `wanted` draws.

    Each pass over the `available` sequences is a new random permutation, so every sequence is drawn once per pass.
    The first n draws do not depend on `wanted`.

    Args:
        available: number of sequences, at least 1.
        wanted: number of draws.
        seed: of the permutations.

    Returns: [wanted], int64.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(passes)[:wanted]


def distinct_rows(ids_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Find equal sequences.

    Args:
        ids_ST: token ids.

    Returns: (first_U, index_S), int64: the row where each of the U distinct sequences occurs first, in order of
        occurrence; and for every row the number of its distinct sequence, so that ids_ST[first_U][index_S] == ids_ST.
    """
    if ids_ST.device.type == "meta":  # without values: sequences that have not been generated yet
        return torch.arange(len(ids_ST)), torch.arange(len(ids_ST))
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    index: list[int] = []
    for i, row in enumerate(ids_ST):
        number = numbers.setdefault(row.numpy().tobytes(), len(numbers))
        if number == len(first):
            first.append(i)
        index.append(number)
    return torch.tensor(first, dtype=torch.int64), torch.tensor(index, dtype=torch.int64)
