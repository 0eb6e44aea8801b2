"""Mixed precision: which linear layers get more bits than the others.

    gain(layer) = sum over weights of  dKL/dw * (w_low - w_high)

KL is the divergence between the 16-bit model and the model whose linear layers all have the low bits, and its gradient
is taken at w_low, the rounded weights; w_high are the same weights rounded to the high bits. To first order, the gain
is what KL falls by if this layer gets the high bits. One backward pass on a little text gives it for all layers.
mlx-lm's dynamic_quant ranks layers by the same product, NNCF's ratio by errors of weights or of outputs.

Layers are chosen by gain for each additional bit, the best first, as long as they fit. Gains add up to first order, so
this is a knapsack of many items that are small beside it: greedy choice loses at most the gain of one item against the
best choice, less than the first order does. Where an item does not fit, smaller ones after it still may.

Layers that runtimes compute as one (models/fused.py) are one item.

Memory: weights are rounded in each forward and each backward and dropped again. Instead of the gradient G^T x of a
weight, with inputs x [N, I] and output gradients G [N, O], the backward computes the sum of G * (x (w_low - w_high)^T),
which is the same number and needs [N, O] for one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.errors import ModelError, NybbleError, describe_error
from nybble.models.fused import fused_layers
from nybble.models.head import LMHead, last_hidden_states
from nybble.quant.grid import at_least_float32, min_max_qparams, quantize_dequantize
from nybble.quant.scheme import QuantScheme
from nybble.training.losses import kl_to_teacher

TOKENS_PER_BACKWARD = 1024
"""Tokens whose activations are kept at once: about 6 GB for 7 B parameters. Fewer would round weights more often."""


def layer_gains(
    model: Any, low: Mapping[str, QuantScheme], high: Mapping[str, QuantScheme], input_ids: Tensor
) -> dict[str, float]:
    """Estimate by how much the KL divergence to the 16-bit model falls if a layer gets its high bits.

    Args:
        model: transformers.PreTrainedModel in 16 or 32 bits, frozen; it is as before afterwards.
        low: name of each quantized linear layer -> scheme in the low bits.
        high: name of each layer that can get the high bits -> scheme in these.
        input_ids: [S, T] token ids, int64.

    Returns:
        Name -> gain, in nats a token, for the layers in `high`; 0 for experts that no token reaches.

    Raises:
        ModelError: the model has no gradients, or they are not finite.
    """
    layers = {name: _Layer(cast(nn.Linear, model.get_submodule(name)), low[name], high.get(name)) for name in low}
    head, batch = LMHead.of(model), max(1, TOKENS_PER_BACKWARD // input_ids.shape[1])
    for ids in input_ids.split(batch):
        ids = ids.to(model.device)
        with torch.no_grad():
            taught = last_hidden_states(model, ids).flatten(0, 1)
        with _low_bits(layers.values()), torch.enable_grad():
            try:
                hidden = last_hidden_states(model, ids).flatten(0, 1)
                (kl_to_teacher(hidden, taught, head, head) * (len(ids) / len(input_ids))).backward()
            except (NybbleError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the model's own code
                raise _no_gradients(model, describe_error(error)) from error
    if not all(math.isfinite(layers[name].gain) for name in high):
        raise _no_gradients(model, "they are not finite on this text")
    return {name: layers[name].gain for name in high}


def choose_layers(
    gains: Mapping[str, float], costs: Mapping[str, int], groups: Sequence[Sequence[str]], budget: float
) -> set[str]:
    """Choose the layers that get the high bits: those with the largest gain for each additional bit that fit.

    Args:
        gains: layer -> gain.
        costs: layer -> additional bits of all its weights.
        groups: layers that are chosen together; see `choice_groups`.
        budget: additional bits that may be spent.

    Returns:
        Names of the chosen layers. No other group fits into what is left of the budget.
    """
    items = [(sum(gains[name] for name in names), sum(costs[name] for name in names), names) for names in groups]
    chosen: set[str] = set()
    for _, cost, names in sorted(items, key=lambda item: item[0] / item[1], reverse=True):  # a stable order
        if cost <= budget:
            budget -= cost
            chosen.update(names)
    return chosen


def choice_groups(model: Any, names: Sequence[str]) -> list[list[str]]:
    """Group layers that runtimes compute as one; each layer is in one group.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
        names: layers to choose from.
    """
    left, groups = dict.fromkeys(names), []
    for fused in (*fused_layers(model), *([name] for name in names)):  # mixtures stand before what is inside of them
        group = [name for name in fused if name in left]
        for name in group:
            del left[name]
        groups += [group] if group else []
    return groups


@dataclass
class _Layer:
    """A linear layer, its schemes, and its gain so far."""

    linear: nn.Linear
    low: QuantScheme
    high: QuantScheme | None
    gain: float = 0.0

    def rounded(self, scheme: QuantScheme) -> Tensor:
        """The weight rounded to nearest, float32 [O, I]."""
        weight_OI = at_least_float32(self.linear.weight.detach())
        return quantize_dequantize(weight_OI, *min_max_qparams(weight_OI, scheme), scheme)


class _LowBitLinear(torch.autograd.Function):
    """A linear layer with its low bits, whose backward adds to the gain of the layer.

    `anchor` is a number that requires a gradient, so that the backward reaches the first layer too: its inputs, the
    embeddings, are frozen.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, anchor: Tensor, layer: _Layer) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        output = F.linear(inputs, layer.rounded(layer.low).to(inputs.dtype), layer.linear.bias)
        return output.clone() if output._is_view() else output  # a model may change it in place (RoCBert)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        (inputs,), layer = ctx.saved_tensors, ctx.layer
        low_OI = layer.rounded(layer.low)
        if layer.high is not None:
            moved = F.linear(inputs, (low_OI - layer.rounded(layer.high)).to(inputs.dtype))
            layer.gain += float((grad.float() * moved.float()).sum(dtype=torch.float64))
        return grad @ low_OI.to(grad.dtype), None, None


@contextmanager
def _low_bits(layers: Collection[_Layer]) -> Iterator[None]:
    """Let layers compute with their low bits."""
    anchor = torch.zeros((), requires_grad=True)

    def forward_of(layer: _Layer) -> Callable[[Tensor], Tensor]:
        return lambda inputs: _LowBitLinear.apply(inputs, anchor, layer)  # type: ignore[no-any-return]

    try:
        for layer in layers:
            layer.linear.forward = forward_of(layer)  # type: ignore[assignment,method-assign]
        yield
    finally:
        for layer in layers:
            layer.linear.__dict__.pop("forward", None)


def _no_gradients(model: Any, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} must have gradients, by which an average of --bits chooses layers; {why}; use "
        "--bits 2, 3, 4 or 8"
    )
