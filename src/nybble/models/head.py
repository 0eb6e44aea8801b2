"""LMHead: the language-model head as a function, from the last hidden states to logits.

    logits = cap * tanh(z / cap),        z = multiplier * (hidden @ weight^T + bias)

Without a cap, logits = z. families.py states multiplier and cap of every family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import ModelError
from nybble.models.families import logit_transform

_TOLERANCE_FLOAT32 = 1e-4
"""Allowed difference of logits, relative to the largest one, where everything is float32."""

_TOLERANCE_16_BIT = 2**-6
"""The same where the weight or the logits have 16 bits: two bf16 roundings of one sum differ by up to 2^-7 of it."""


@dataclass(frozen=True)
class LMHead:
    """Language-model head.

    Attributes:
        weight_VD: frozen.
        bias_V: frozen; None if the head has no bias.
        multiplier: of the logits.
        cap: soft cap of the logits; None if there is none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    multiplier: float
    cap: float | None

    @staticmethod
    def of(model: Any, copy: bool = False) -> LMHead:
        """Return the head of a model.

        Args:
            model: transformers.PreTrainedModel.
            copy: copy the weight, so that later changes of the model do not change the head.

        Returns:
            The head, on the device and in the dtype of the model.
        """
        linear = model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        weight = linear.weight.detach()
        return LMHead(weight.clone() if copy else weight, bias, *logit_transform(model.config))

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: hidden states [..., D] -> float32 [..., V]."""
        logits = F.linear(hidden.to(self.weight_VD.dtype), self.weight_VD, self.bias_V).float()  # mamba: fp32 residuals
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def verify(self, model: Any, input_ids: Tensor) -> None:
        """Compare the logits with those of the model, in case its family treats them in a way that families.py omits.

        Args:
            model: transformers.PreTrainedModel whose head this is.
            input_ids: real text, int64 [B, T].

        Raises:
            ModelError: the model's logits are not finite, or differ; or layers stand between hidden states and head.
        """
        hidden = last_hidden_states(model, input_ids)
        if hidden.shape[-1] != self.weight_VD.shape[1]:
            raise ModelError(
                f"the head of {model.config.model_type} must read the last hidden states, which have "
                f"{hidden.shape[-1]} channels; it reads {self.weight_VD.shape[1]}, so layers between them transform "
                "the states, which is not supported; choose a Llama-like model"
            )
        computed = self.logits(hidden)
        expected = model(input_ids=input_ids, use_cache=False).logits.float()
        if not bool(expected.isfinite().all()):
            remedy = "download the model again" if model.dtype == torch.float32 else "use --dtype float32"
            raise ModelError(
                f"the logits of {model.config.model_type} must be finite numbers; they are not on the first test "
                f"sequence; {remedy}"
            )
        in_float32 = self.weight_VD.dtype == torch.float32
        tolerance = expected.abs().max().item() * (_TOLERANCE_FLOAT32 if in_float32 else _TOLERANCE_16_BIT)
        difference = (computed - expected).abs().max().item()
        if not difference <= tolerance:  # also true for NaN
            raise ModelError(
                f"the logits of {model.config.model_type} must be head(hidden states) with the multiplier and soft cap "
                f"of families.py; they differ by {difference:.3g} (allowed {tolerance:.3g}); "
                "this family needs a row in families.py"
            )


def last_hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Compute the last hidden states, after the final norm and before the head.

    Args:
        model: transformers.PreTrainedModel.
        input_ids: int64 [B, T].

    Returns:
        [B, T, D] in the dtype of the model.
    """
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
