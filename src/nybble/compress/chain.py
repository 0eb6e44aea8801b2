"""Whether decoder blocks are a chain that exchanges hidden states alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.compress.blocks import block_gives, find_block_list, no_chain_error, record_blocks


@torch.no_grad()
def check_chain(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Raise ModelError, before the expensive part, unless the blocks are a chain that takes nothing from the tokens but hidden states.

    Args:
        input_ids: [2, T], two different sequences.
    """
    modules = list(model.get_submodule(find_block_list(model, names)))
    one, two = (record_blocks(model, modules, row[None].to(model.device)) for row in input_ids)
    for i, (first, second) in enumerate(zip(one[0], two[0], strict=True)):
        before, after = (torch.cat([states[j] for _, states in (one, two)]) for j in (i, i + 1))
        try:
            chained = _equal(first, second) and block_gives(modules[i], first, before, after)
        except RuntimeError:  # what came with one sequence does not fit two
            chained = False
        if not chained:
            raise no_chain_error(model, i)


def _equal(one: Any, two: Any) -> bool:
    """Whether two nests of tuples, lists and dictionaries hold equal tensors; whatever else is in them has no say."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))
    return True
