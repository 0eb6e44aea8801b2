"""The inverse of linearize.py: a model in its own class of transformers, with stacked experts and Conv1D layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from nybble.models.checkpoint import transformers_model
from nybble.models.experts import Stack, find_stacks


def delinearize(model: Any, trust_remote_code: bool = False) -> Any:
    """Build the model that `linearize` was given, with the present weights; what it saves, transformers loads.

    Args:
        model: transformers.PreTrainedModel that is linearized.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        A model that shares all tensors with the first one but those of experts and of Conv1D layers.
    """
    own, state = transformers_model(model.config, trust_remote_code), model.state_dict()
    stacks = find_stacks(own)
    restored = {}
    for name, tensor in own.state_dict().items():
        module = name.rpartition(".")[0]
        if name in stacks:
            restored[name] = _stack(stacks[name], state, len(tensor))
        elif name.endswith(".weight") and isinstance(own.get_submodule(module), Conv1D):
            restored[name] = state[name].T.contiguous()
        else:
            restored[name] = state[name]
    own.load_state_dict(restored, assign=True)
    own.tie_weights()
    own.generation_config = model.generation_config
    return own.eval()


def _stack(stack: Stack, state: dict[str, Tensor], entries: int) -> Tensor:
    """The parameter of all experts; entries that belong to none are zero."""
    leaf = "bias" if len(stack.shape) == 1 else "weight"
    parts = [state[f"{stack.module(i)}.{leaf}"] for i in range(stack.count)]
    if stack.transposed:
        parts = [part.T for part in parts]
    return torch.stack([*parts, *[torch.zeros_like(parts[0])] * (entries - stack.count)])
