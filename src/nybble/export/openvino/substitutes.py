"""Functions of transformers that cannot be traced, and what stands for them while a model is traced.

Masks of attention are float32 [B, 1, T, S]: OpenVINO accepts boolean masks too, but its attention is three times as
slow with them on a prompt of 1024 tokens. Loops over tokens are those of recurrence.py.

Side effect: `substituted` replaces functions in the modules of a model while it is traced.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nybble.errors import ExportError

LOWEST = torch.finfo(torch.float32).min

_OWN_MODULES = re.compile(r"torch\.|transformers\.(?!models\.)")
"""Modules of libraries that define no models."""


@contextmanager
def substituted(model: Any, read_state: Callable[[], Tensor]) -> Iterator[frozenset[str]]:
    """Replace functions in the modules that define the layers of a model.

    Args:
        model: transformers.PreTrainedModel.
        read_state: returns the recurrent state that the model read last, for a scan that is not given the state.

    Yields:
        Names of the functions that were replaced.
    """

    def mamba_selective_scan(*args: Any, **kwargs: Any) -> Any:
        return _mamba_scan(*args, state=read_state(), **kwargs)

    substitutes: dict[str, Callable[..., Any]] = _SUBSTITUTES | {"mamba_selective_scan": mamba_selective_scan}
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    modules = [sys.modules[name] for name in sorted(names) if not _OWN_MODULES.match(name)]
    found = [(module, name) for module in modules for name in substitutes if name in vars(module)]
    if getattr(model.config, "alibi", False) or getattr(model.config, "attention_chunk_size", None):
        # The paged attention of openvino-genai ignores masks that it does not know. It takes fused attention only.
        substitutes["scaled_dot_product_attention"] = _plain_attention
        found.append((F, "scaled_dot_product_attention"))
    originals = [getattr(module, name) for module, name in found]
    try:
        for module, name in found:
            setattr(module, name, substitutes[name])
        yield frozenset(name for _, name in found)
    finally:
        for (module, name), original in zip(found, originals, strict=True):
            setattr(module, name, original)


def attention_mask(mask_BS: Tensor, queries: Any, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Return an additive mask [B, 1, T, S], float32.

    Args:
        mask_BS: 0 for padding.
        queries: number T of the last tokens that attend.
        window: tokens to which one attends at most, itself included.
        chunk: tokens attend within chunks of this size, counted from the first token that is not padding.
    """
    keys = mask_BS.shape[1]
    key_S = torch.arange(keys)
    query_T1 = (torch.arange(queries) + (keys - queries))[None, None, :, None]
    causal_TS = key_S <= query_T1
    # A padded token may attend to itself: a row without any key would be NaN, and NaN spreads through the values.
    real_BTS = mask_BS.bool()[:, None, None, :] | (key_S == query_T1)
    if window is not None:
        # The paged attention of openvino-genai ignores masks. It finds a window by these operations in this order,
        # with the window as a constant; what they repeat changes nothing.
        seen_BTS = (causal_TS & (causal_TS & (key_S > query_T1 + -window) & causal_TS)) & real_BTS
        return torch.where(seen_BTS.expand(mask_BS.shape[0], 1, -1, -1), 0.0, LOWEST)[:, :, :, :keys]
    seen_BTS = causal_TS & real_BTS
    if chunk is not None:
        padding_B = (mask_BS.cumsum(-1) == 0).sum(-1)[:, None, None, None]
        seen_BTS = seen_BTS & ((key_S - padding_B) // chunk == (query_T1 - padding_B) // chunk)
    return torch.zeros_like(seen_BTS, dtype=torch.float32).masked_fill(~seen_BTS, LOWEST)


def _causal(config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **options: Any) -> Tensor:
    return _mask(inputs_embeds, attention_mask, options)


def _sliding(config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **options: Any) -> Tensor:
    return _mask(inputs_embeds, attention_mask, options, window=config.sliding_window)


def _chunked(config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **options: Any) -> Tensor:
    return _mask(inputs_embeds, attention_mask, options, chunk=config.attention_chunk_size)


def _mask(inputs_embeds: Tensor, mask: Tensor, options: dict[str, Any], **limits: int | None) -> Tensor:
    """Raises ExportError for a mask that depends on more than positions and padding."""
    other = [name for name in ("or_mask_function", "and_mask_function", "block_sequence_ids") if options.get(name)]
    if other:
        raise ExportError(f"its attention has a mask of its own ({', '.join(other)})")
    return mask if mask.ndim == 4 else attention_mask(mask, inputs_embeds.shape[1], **limits)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
    """The function scaled_dot_product_attention, in single operations."""
    scale = options.get("scale") or query.shape[-1] ** -0.5
    if options.get("enable_gqa"):
        groups = int(query.shape[1]) // int(key.shape[1])
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return torch.softmax(query @ key.transpose(-1, -2) * scale + attn_mask, dim=-1) @ value


def _gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The functions torch_chunk_gated_delta_rule and chunk_kimi_delta_attention; tensors have tokens before heads."""
    from nybble.export.openvino.recurrence import GatedDeltaRule

    heads = int(value.shape[2])
    scale = torch.as_tensor(query.shape[-1]).float().pow(0.5)  # OpenVINO's kernel needs it computed from the shape
    if options.get("use_qk_l2norm_in_kernel"):
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, key, value = (_repeated(x, heads) for x in (query, key, value))
    query, key, value, g, beta = (x.transpose(1, 2) for x in (query, key, value, g, beta))
    output, state = GatedDeltaRule.apply(query / scale, key, value, g, beta, options["initial_state"])
    return output.transpose(1, 2).contiguous(), state


def _mamba2_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The function mamba2_chunk_scan: hidden_states [B, T, H, V], dt [B, T, H], A [H], B and C [B, T, groups, K]."""
    from nybble.export.openvino.recurrence import SelectiveScan

    skip, (least, most) = options.get("D"), options.get("dt_limit", (0.0, math.inf))
    dt = _time_steps(dt, options.get("dt_bias"), options.get("dt_softplus", False)).clamp(min=least)
    dt = (dt if most == math.inf else dt.clamp(max=most))[..., None]
    b, c = (_repeated(x, int(hidden_states.shape[2])) for x in (B, C))
    x, dt, b, c = (tensor.transpose(1, 2) for tensor in (hidden_states * dt, dt, b, c))
    output, state = SelectiveScan.apply(x, dt, b, c, A[None, :, None, None], options["initial_states"])
    output = output.transpose(1, 2).contiguous()
    return output if skip is None else output + skip[:, None] * hidden_states, state


def _mamba_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The function mamba_selective_scan: hidden_states, dt and z [B, V, T], A [V, K], B and C [B, K, T].

    The option `state` is not one of that function.
    """
    from nybble.export.openvino.recurrence import SelectiveScan

    bias, skip, gate = options.get("delta_bias"), options.get("D"), options.get("z")
    dt = _time_steps(dt, None if bias is None else bias[:, None], options.get("delta_softplus", False))
    x, dt, b, c = (tensor.transpose(1, 2)[:, None] for tensor in (hidden_states * dt, dt, B, C))
    output, state = SelectiveScan.apply(x, dt, b, c, A[None, None], options["state"][:, None])
    output = output[:, 0].transpose(1, 2)
    output = output if skip is None else output + hidden_states * skip[:, None]
    return output if gate is None else output * F.silu(gate), state[:, 0]


def _time_steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias
    return F.softplus(dt) if softplus else dt


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads (axis 2) of [B, T, groups, K] so that there are `heads` of them."""
    batch, tokens, groups, size = x.shape
    groups, size = int(groups), int(size)
    if groups == heads:
        return x.reshape(batch, tokens, groups, size)
    return x[:, :, :, None].expand(-1, -1, -1, heads // groups, -1).reshape(batch, tokens, heads, size)


_SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "create_causal_mask": _causal,
    "create_sliding_window_causal_mask": _sliding,
    "create_chunked_causal_mask": _chunked,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
}
