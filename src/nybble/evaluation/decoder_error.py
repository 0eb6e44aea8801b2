"""Error of hidden states after each decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decoder_outputs(model: Any, ids_T: Tensor) -> Tensor:
    """What comes out of every decoder layer of a torch model (of the last one after the final norm), on the CPU: [L, T, D]."""
    found = model.base_model(
        input_ids=ids_T[None].to(model.device), use_cache=False, output_hidden_states=True
    ).hidden_states
    return torch.cat(found[1:]).cpu()


def decoder_errors(model: Any, ids_T: Tensor, wanted_LTD: Tensor) -> list[float]:
    """By decoder layer the mean over tokens of |h - wanted|^2 / |wanted|^2, where h has come through the model's own layers before."""
    return [
        float(((ours.float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).mean())
        for ours, theirs in zip(decoder_outputs(model, ids_T), wanted_LTD, strict=True)
    ]
