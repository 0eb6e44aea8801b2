"""Recurrences over tokens (linear attention, state space models) as loops of an OpenVINO graph.

torch.jit.trace would unroll a loop over tokens for the length of its example. Each class here stands for such a loop
while a model is traced: torch computes it token by token, and OpenVINO's converter asks the class for a Loop, which is
right for any number of tokens and continues the state of earlier tokens.

    gated delta rule     s = s * exp(g),   s = s + key (beta * (value - key^T s)),   output = query^T s
    selective scan       s = s * exp(a * dt) + x b^T,                                output = s c

H heads, K channels of keys or of the state, V channels of values; all tensors are float32 and have heads first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openvino.frontend.pytorch.inlined_extension import InlineConversionExtension
from torch import Tensor

TOKENS = 2
"""Axis of the tokens."""


class Recurrence(torch.autograd.Function):
    """A loop over tokens. The last input is the state, those before it have tokens on axis TOKENS or are constant."""

    target_extension = InlineConversionExtension()
    constants = 0
    """Number of inputs, before the state, that are the same for all tokens."""
    values = 0
    """Which input has the shape of the output."""

    @classmethod
    @abstractmethod
    def step(cls, parts: Sequence[Any], state: Any) -> tuple[Any, Any]:
        """Return the nodes for the output [B, H, 1, V] of one token and for the state after it.

        Args:
            parts: nodes of the inputs of this token, whose axis TOKENS has size 1.
            state: node of the state before it.
        """

    @classmethod
    def convert(cls, context: Any) -> Any:
        """Return the outputs of a Loop over the inputs of `forward`; OpenVINO's converter calls this."""
        *inputs, state = (context.get_input(i) for i in range(context.get_input_size()))
        return _loop(cls, inputs, state)


class GatedDeltaRule(Recurrence):
    """The gated delta rule: linear attention with a decay and a correction.

    Inputs: query (scaled) and key [B, H, T, K], value [B, H, T, V], g [B, H, T] or [B, H, T, K], beta [B, H, T], and
    the state [B, H, K, V]. Outputs: [B, H, T, V] and the new state.

    OpenVINO's CPU plugin replaces the loop by a kernel where g is [B, H, T]. It knows the loop by its operations: their
    order here must stay.
    """

    values = 2

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Compute in torch what `step` describes."""
        query, key, value, g, beta, state = inputs
        outputs, g = [], g[..., None] if g.ndim == 3 else g
        for i in range(query.shape[TOKENS]):
            state = state * g[:, :, i, :, None].exp()
            delta = (value[:, :, i] - (state * key[:, :, i, :, None]).sum(-2)) * beta[:, :, i, None]
            state = state + key[:, :, i, :, None] * delta[..., None, :]
            outputs.append((state * query[:, :, i, :, None]).sum(-2))
        return torch.stack(outputs, dim=TOKENS), state

    @classmethod
    def step(cls, parts: Sequence[Any], state: Any) -> tuple[Any, Any]:
        """See `Recurrence.step`."""
        from openvino import opset13 as op

        query, key, value, g, beta = parts
        token, last, before = (op.constant(np.int32(axis)) for axis in (TOKENS, -1, -2))
        query, key = (op.unsqueeze(op.squeeze(x, token), last) for x in (query, key))
        decay = op.exp(g) if g.get_partial_shape().rank.get_length() == 3 else op.squeeze(op.exp(g), token)
        decayed = op.multiply(state, op.unsqueeze(decay, last))
        known = op.reduce_sum(op.multiply(decayed, key), before, keep_dims=False)
        delta = op.multiply(op.subtract(op.squeeze(value, token), known), beta)
        new = op.add(decayed, op.multiply(key, op.unsqueeze(delta, before)))
        return op.reduce_sum(op.multiply(new, query), before, keep_dims=True), new


class SelectiveScan(Recurrence):
    """The scan of Mamba: a state that decays by a factor that depends on the token.

    Inputs: x [B, H, T, V] (times dt), dt [B, H, T, 1 or V], b and c [B, 1 or H, T, K], a [1, H, 1 or V, 1 or K], and
    the state [B, H, V, K]. Outputs: [B, H, T, V] and the new state.
    """

    constants = 1

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Compute in torch what `step` describes."""
        x, dt, b, c, a, state = inputs
        outputs = []
        for i in range(x.shape[TOKENS]):
            state = state * (a * dt[:, :, i, :, None]).exp() + x[:, :, i, :, None] * b[:, :, i, None, :]
            outputs.append((state * c[:, :, i, None, :]).sum(-1))
        return torch.stack(outputs, dim=TOKENS), state

    @classmethod
    def step(cls, parts: Sequence[Any], state: Any) -> tuple[Any, Any]:
        """See `Recurrence.step`."""
        from openvino import opset13 as op

        x, dt, b, c, a = parts
        token, last = op.constant(np.int32(TOKENS)), op.constant(np.int32(-1))
        x, dt = (op.unsqueeze(op.squeeze(part, token), last) for part in (x, dt))  # [B, H, V, 1]; b, c: [B, H, 1, K]
        new = op.add(op.multiply(state, op.exp(op.multiply(a, dt))), op.multiply(x, b))
        return op.unsqueeze(op.reduce_sum(op.multiply(new, c), last, keep_dims=False), token), new


def _loop(recurrence: type[Recurrence], inputs: Sequence[Any], state: Any) -> list[Any]:
    """Return the outputs of a Loop: those of all tokens, stacked on axis TOKENS, and the state after the last."""
    import openvino as ov
    from openvino import opset13 as op

    true, axis, zero = (
        op.constant(np.array([True])),
        op.constant(np.int32(TOKENS)),
        op.constant(np.array([0], np.int32)),
    )
    index, buffer, before = op.parameter([], ov.Type.i32), _parameter(4), _parameter(4)
    sliced = len(inputs) - recurrence.constants
    parts = [_parameter(source.get_partial_shape().rank.get_length(), i < sliced) for i, source in enumerate(inputs)]
    output, after = recurrence.step(parts, before)
    stacked = op.scatter_update(buffer, op.unsqueeze(index, zero), output, axis)

    shape = op.shape_of(inputs[recurrence.values])
    tokens = op.convert(op.gather(shape, op.constant(np.array([TOKENS])), op.constant(np.int64(0))), "i32")
    loop = op.loop(tokens.output(0), true.output(0))
    body = ov.Model([op.constant(np.array([True])), after, stacked], [index, *parts, before, buffer], "token")
    for i, node in enumerate(body.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{i}")  # equal models have equal files
    loop.set_function(body)
    for i, (part, source) in enumerate(zip(parts, inputs, strict=True)):
        if i < sliced:
            loop.set_sliced_input(part, source, 0, 1, 1, -1, TOKENS)
        else:
            loop.set_invariant_input(part, source)
    loop.set_merged_input(before, state, after.output(0))
    loop.set_merged_input(buffer, op.broadcast(op.constant(np.float32(0)), shape).output(0), stacked.output(0))
    loop.set_special_body_ports([0, 0])
    outputs = [loop.get_iter_value(stacked.output(0), -1), loop.get_iter_value(after.output(0), -1)]
    loop.get_rt_info()["__torch_tuple_unpackable__"] = True  # the converter takes the outputs for those of a tuple
    return outputs


def _parameter(rank: int, one_token: bool = False) -> Any:
    """Return a parameter of a body, float32, of any size; with `one_token` its axis TOKENS has size 1."""
    import openvino as ov
    from openvino import opset13 as op

    return op.parameter([1 if one_token and axis == TOKENS else -1 for axis in range(rank)], ov.Type.f32)
