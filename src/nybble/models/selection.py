"""Which layer gets which precision."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError


def expert_parameters(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters of three dimensions outside of convolutions: experts of a mixture stored as one tensor."""
    return [
        (f"{name}.{leaf}" if name else leaf, parameter)
        for name, module in model.named_modules()
        if not isinstance(module, torch.nn.modules.conv._ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


log = logging.getLogger("nybble")


@dataclass(frozen=True)
class LayerSelection:
    """Names of modules by the precision that they get.

    Attributes:
        int4: nn.Linear layers of the decoder.
        int8: embedding, and lm_head where it is not tied to it.
        tied: lm_head shares the embedding's weight.
    """

    int4: tuple[str, ...]
    int8: tuple[str, ...]
    tied: bool


def select_layers(model: Any) -> LayerSelection:
    """Name the layers by precision: every nn.Linear but the head gets 4 bits; embedding and head get 8."""
    modules = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise ModelError(
            f"{type(model).__name__} must have an embedding and a language-model head; choose a causal language model"
        )
    tied = head.weight is embedding.weight
    int8 = [modules[id(embedding)]] + ([] if tied else [modules[id(head)]])
    int4 = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return LayerSelection(tuple(int4), tuple(int8), tied)
