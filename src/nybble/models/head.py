"""LMHead: last hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.errors import ModelError
from nybble.models.families import logit_transform


@dataclass(frozen=True)
class LMHead:
    """Hidden states -> logits.

    Attributes:
        weight_VD, bias_V: of the language-model head; frozen.
        multiplier, cap: see the formula above.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    multiplier: float
    cap: float | None

    @staticmethod
    def of(model: Any, copy: bool = False) -> LMHead:
        """The head of a transformers model. `copy` keeps it as it is now, whatever happens to the model."""
        linear = model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        weight = linear.weight.detach()
        return LMHead(weight.clone() if copy else weight, bias, *logit_transform(model.config))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32 [..., V]."""
        logits = F.linear(hidden, self.weight_VD, self.bias_V).float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def verify(self, model: Any, input_ids: Tensor) -> None:
        """Raise ModelError unless these logits are the model's own on a real input: guards against families that do more to them."""
        ours, its = (
            self.logits(last_hidden_states(model, input_ids)),
            model(input_ids=input_ids, use_cache=False).logits.float(),
        )
        # Two bf16 roundings of the same sum may differ by 2**-7 of the largest logit.
        tolerance = its.abs().max().item() * (
            2**-6 if its.dtype != torch.float32 or self.weight_VD.dtype != torch.float32 else 1e-4
        )
        if not bool(its.isfinite().all()):
            remedy = "its weights are broken" if its.dtype == model.dtype else "use --dtype float32"
            raise ModelError(
                f"the logits of {model.config.model_type} must be finite numbers; they are not on the first test sequence; {remedy}"
            )
        difference = (ours - its).abs().max().item()
        if not difference <= tolerance:
            raise ModelError(
                f"the logits of {model.config.model_type} must be head(hidden states), scaled and soft-capped as families.py says; "
                f"they differ by {difference:.3g} (allowed {tolerance:.3g}); this family needs a row in families.py"
            )


def last_hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Last hidden states [B, T, D], after the final norm, before the head."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
