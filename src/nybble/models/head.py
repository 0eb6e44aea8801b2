"""LMHead: the language-model head as a function, from the hidden states that it is called with to the logits.

    logits = cap * tanh(z / cap),        z = multiplier * (hidden @ weight^T + bias)

Without a cap, logits = z. Whatever a model does between its decoder and its head (a dense layer, a norm, a division)
belongs to the hidden states. What it does after its head is measured: known numbers take the place of the head's
outputs, and the model's logits show the multiplier, where the numbers are small, and the cap, where they are large.

Refused (ModelError): models whose head is not called once with a state for each token, or whose logits differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ModelError

_TOLERANCE_FLOAT32 = 1e-4
"""Allowed difference of logits, relative to the largest one, where everything is float32."""

_TOLERANCE_16_BIT = 2**-6
"""The same where the weight or the logits have 16 bits: two bf16 roundings of one sum differ by up to 2^-7 of it."""

_SMALL, _LARGE = 2.0**-12, 2.0**20
"""Head outputs whose logits are measured: tanh(x) is x to the last bit of float32, and 1, for every cap in use."""

_ROUNDING = 2.0**-20
"""Difference of a multiplier from 1 that is taken for rounding."""

_MEASURED_TOKENS = 8

_TRANSFORMS: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()
"""Model -> multiplier and cap, which are measured once for each model."""


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
        if model not in _TRANSFORMS:
            count = model.get_input_embeddings().num_embeddings
            measure_transform(model, torch.arange(_MEASURED_TOKENS, device=model.device)[None] % count)
        return LMHead(weight.clone() if copy else weight, bias, *_TRANSFORMS[model])

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: hidden states [..., D] -> float32 [..., V]."""
        logits = F.linear(hidden.to(self.weight_VD.dtype), self.weight_VD, self.bias_V).float()  # mamba: fp32 residuals
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def verify(self, model: Any, input_ids: Tensor) -> None:
        """Compare the logits with those of the model, in case it treats them in a way that the formula omits.

        Args:
            model: transformers.PreTrainedModel whose head this is.
            input_ids: real text, int64 [B, T].

        Raises:
            ModelError: the model's logits are not finite, or differ; or the head is not called with a state a token.
        """
        hidden, expected = states_and_logits(model, input_ids)
        if hidden.shape[:-1] != input_ids.shape:
            raise ModelError(
                f"the head of {model.config.model_type} must be called with one state for each token; for "
                f"{list(input_ids.shape)} tokens it is called with {list(hidden.shape)}; choose another model"
            )
        computed, expected = self.logits(hidden), expected.float()
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
                f"the logits of {model.config.model_type} must be head(hidden states) with a multiplier and a soft "
                f"cap; they differ by {difference:.3g} (allowed {tolerance:.3g}); choose another model"
            )


def last_hidden_states(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
    """Compute the last hidden states: what the head is called with. The forward of the model stops there.

    Args:
        model: transformers.PreTrainedModel.
        input_ids: int64 [B, T].
        arguments: further arguments of the forward, such as a cache.

    Returns:
        [B, T, D] in the dtype of the model; D is the input width of the head.

    Raises:
        ModelError: the model does not call its head.
    """
    caught: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _HeadReached

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(input_ids=input_ids, **{"use_cache": False} | arguments)
    except _HeadReached:
        return caught[0]
    finally:
        handle.remove()
    raise _uncalled_head(model)


def states_and_logits(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the last hidden states, as `last_hidden_states` does, and the logits in one forward.

    Raises:
        ModelError: the model does not call its head.
    """
    caught: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    if not caught:
        raise _uncalled_head(model)
    return caught[0], logits


class _HeadReached(Exception):
    """Ends a forward before its head."""


@torch.no_grad()
def measure_transform(model: Any, input_ids: Tensor) -> None:
    """Measure what a model does to the outputs of its head, multiplier and cap, and note it for `LMHead.of`.

    Args:
        model: transformers.PreTrainedModel.
        input_ids: [B, T], any tokens, at least two.

    Raises:
        ModelError: the model does not call its head.
    """
    called: list[bool] = []

    def replace_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        called.append(True)
        known = torch.full(output.shape, _SMALL, dtype=torch.float32, device=output.device)
        known[..., -1, :] = _LARGE
        return known

    handle = model.get_output_embeddings().register_forward_hook(replace_output)
    try:
        logits_TV = model(input_ids=input_ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    if not called:
        raise _uncalled_head(model)
    multiplier, largest = float(logits_TV[0, 0]) / _SMALL, float(logits_TV[-1, 0])
    cap = None if largest == multiplier * _LARGE else largest
    if cap is not None and abs(multiplier - 1) < _ROUNDING:  # tanh has rounded the small number
        multiplier = 1.0
    _TRANSFORMS[model] = multiplier, cap


def _uncalled_head(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} must call its language-model head; it computes logits without it; choose another model"
    )
