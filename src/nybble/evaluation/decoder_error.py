"""Relative error of the hidden states after each decoder layer, for tracing where a quantized model deviates.

    error_l = mean over tokens of  |h_l - h_ref_l|^2 / |h_ref_l|^2

h_l went through all layers of the model up to l, so errors accumulate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def decoder_outputs(model: Any, ids_T: Tensor) -> Tensor:
    """Return the output of every decoder layer of a transformers model; of the last one after the final norm.

    Args:
        model: a torch model.
        ids_T: token ids of one sequence, int64.

    Returns:
        [L, T, D] on the CPU, in the dtype of the model. Where a projection makes the last outputs narrower (OPT), zeros
        fill them up, which leaves the errors as they are.
    """
    output = model.base_model(input_ids=ids_T[None].to(model.device), use_cache=False, output_hidden_states=True)
    states = [_side_by_side(state, len(ids_T)) for state in output.hidden_states[1:]]  # the first are embeddings
    width = max(state.shape[-1] for state in states)
    return torch.cat([F.pad(state, (0, width - state.shape[-1])) for state in states]).cpu()


def _side_by_side(state: Tensor, num_tokens: int) -> Tensor:
    """Put the S streams of each token, if a model has several (hyper-connections), side by side: [1, T, S * D].

    Args:
        state: [1, T, D], [1, T, S, D] (DeepSeek V4) or [S, 1, T, D] (Gemma 3n).
        num_tokens: T.
    """
    return (state if state.shape[1] == num_tokens else state.movedim(0, 2)).flatten(2)


def decoder_errors(model: Any, ids_T: Tensor, reference_LTD: Tensor) -> list[float]:
    """Return the relative error after each decoder layer.

    Args:
        model: a torch model.
        ids_T: token ids of one sequence, int64.
        reference_LTD: outputs of the reference model for the same tokens, see `decoder_outputs`.
    """
    return [
        float(((h_TD.float() - ref_TD.float()).square().sum(-1) / ref_TD.float().square().sum(-1)).mean())
        for h_TD, ref_TD in zip(decoder_outputs(model, ids_T), reference_LTD, strict=True)
    ]
