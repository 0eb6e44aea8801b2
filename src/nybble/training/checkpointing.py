"""Gradient checkpointing: a decoder block keeps its inputs alone, and is computed again in the backward.

The activations of one block exist at a time, for one more forward of each. Nothing random is in a block, so gradients
have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nybble.models.shards import find_blocks


@contextmanager
def checkpointed_blocks(model: Any) -> Iterator[None]:
    """Checkpoint the decoder blocks of a model inside the context; a model without a list of blocks stays as it is.

    Args:
        model: transformers.PreTrainedModel in evaluation mode.
    """
    path = find_blocks(model)
    blocks = [] if path is None else list(model.get_submodule(path))
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the method of the class is left


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward`. A cache of keys and values, which a second forward would fill twice, is not checkpointed."""
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
