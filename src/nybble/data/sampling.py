"""Seeded choice of sequences."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger("nybble")


def distinct_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the different ones of the rows [S, T] first stand [U], in their order, and which of those each row is [S]."""
    if ids.device.type == "meta":  # not written yet
        return torch.arange(len(ids)), torch.arange(len(ids))
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(row.numpy().tobytes(), len(numbers)) for row in ids]
    first = {number: i for i, number in reversed(list(enumerate(which)))}
    return torch.tensor([first[number] for number in range(len(numbers))], dtype=torch.int64), torch.tensor(
        which, dtype=torch.int64
    )


def draw_order(available: int, wanted: int, seed: int) -> Tensor:
    """Which sequence to train on at each of `wanted` draws: all `available` ones in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(available, generator=generator) for _ in range(-(-wanted // available))]
    return torch.cat(passes)[:wanted]
