"""What a model keeps of the tokens that it has seen, as tensors that become state of a graph.

A layer keeps keys and values [B, H, tokens, D], states of a convolution [B, D, kernel], recurrent states [B, ...], or
several of these. The model itself says which: `find_states` runs it once on a few tokens and reads its cache.

Names are those of optimum-intel: past_key_values.LAYER.key and .value, or, in a model with convolutions or recurrences,
cache_params.past.KIND.N with the kinds conv, ssm, key, value, where N counts the states of a kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from nybble.errors import ExportError, describe_error

_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
_HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_KNOWN = {*_ATTENTION, *_HYBRID, LinearAttentionLayer, DummyLayer}


@dataclass(frozen=True)
class State:
    """A tensor that a layer keeps.

    Attributes:
        layer: index of the layer.
        kind: key, value, conv or ssm.
        index: of the state among those of its kind in the layer.
        shape: with -1 for the batch and, of keys and values, for the number of tokens.
        past, present: names before and after new tokens.
    """

    layer: int
    kind: str
    index: int
    shape: tuple[int, ...]
    past: str
    present: str

    def zeros(self, batch: int, tokens: int) -> Tensor:
        """Return a state of zeros, float32, for a batch that has seen some tokens."""
        return torch.zeros(batch, *(tokens if size < 0 else size for size in self.shape[1:]))


def check_cache(config: Any) -> None:
    """Check that every layer keeps what this file knows.

    Args:
        config: transformers configuration.

    Raises:
        ExportError: a layer keeps something else, or transformers has no cache for the model.
    """
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a configuration without what transformers needs for a cache
        raise ExportError(
            "an export to OpenVINO needs a model with a cache of transformers; transformers makes none for "
            f"{config.model_type} ({describe_error(error)}); remove openvino from --export"
        ) from error
    other = {type(layer).__name__ for layer in layers if type(layer) not in _KNOWN}
    if other:
        raise ExportError(
            "an export to OpenVINO needs layers that keep keys and values, convolution states or recurrent states; "
            f"{config.model_type} has {', '.join(sorted(other))}; remove openvino from --export"
        )


def find_states(model: Any, cache_argument: str) -> tuple[State, ...]:
    """Run a model on a few tokens and list what its layers keep.

    Args:
        model: transformers.PreTrainedModel.
        cache_argument: name of the argument of its forward that takes a cache.

    Returns:
        The states in the order of the layers.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.ones(2, 3, dtype=torch.int64)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_argument: cache})
    found = [found for i, layer in enumerate(cache.layers) for found in _tensors(i, layer)]
    is_hybrid, counts, states = any(kind in ("conv", "ssm") for _, kind, _, _ in found), Counter[str](), []
    for layer, kind, index, tensor in found:
        number, counts[kind] = counts[kind], counts[kind] + 1
        past, present = (
            (f"cache_params.{time}.{kind}.{number}" for time in ("past", "present"))
            if is_hybrid
            else (f"{time}.{layer}.{kind}" for time in ("past_key_values", "present"))
        )
        grows = kind in ("key", "value")
        shape = (-1, tensor.shape[1], -1, tensor.shape[3]) if grows else (-1, *tensor.shape[1:])
        states.append(State(layer, kind, index, shape, past, present))
    return tuple(states)


def _tensors(i: int, layer: Any) -> list[tuple[int, str, int, Any]]:
    """Layer, kind, index and tensor of all that a layer of a cache keeps."""
    kept: list[tuple[int, str, int, Any]] = []
    if isinstance(layer, LinearAttentionLayer):
        for kind, tensors in (("conv", layer.conv_states), ("ssm", layer.recurrent_states)):
            kept += [(i, kind, index, tensor) for index, tensor in tensors.items() if tensor is not None]
    if isinstance(layer, _ATTENTION) and layer.is_initialized:
        kept += [(i, "key", 0, layer.keys), (i, "value", 0, layer.values)]
    return kept


class TracedCache(DynamicCache):
    """A cache whose layers hold the given tensors and replace them without writing into them.

    Args:
        config: transformers configuration.
        states: what the layers keep.
        tensors: values of the states.
    """

    def __init__(self, config: Any, states: Sequence[State], tensors: Sequence[Tensor]) -> None:
        super().__init__(config=config)
        self.layers = [_traced(layer) for layer in self.layers]
        self.states = tuple(states)
        for state, tensor in zip(states, tensors, strict=True):
            _put(self.layers[state.layer], state, tensor)
        self.last_read: Tensor | None = None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state of a layer, and remember it: a scan that is not given the state needs it."""
        self.last_read = super().get_recurrent_state(layer_idx, state_idx)
        return self.last_read

    def tensors(self) -> list[Any]:
        """Return the values of the states."""
        return [_get(self.layers[state.layer], state) for state in self.states]


class _Linear(LinearAttentionLayer):
    """States of convolutions and recurrences. A state of zeros is that before the first token."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *_: Any, **__: Any) -> Tensor:
        """Return the past and the new inputs of a convolution [B, D, kernel + T]."""
        past: Any = self.conv_states[state_idx]
        full = torch.cat([past, conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -past.shape[-1] :]
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Replace a state."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _Hybrid(_Linear, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """The states of both kinds of layers."""


def _traced(layer: Any) -> Any:
    """An empty layer for tracing that keeps what `layer` keeps. All keys are kept; masks have the windows."""
    if isinstance(layer, _HYBRID):
        return _Hybrid(layer.number_of_states)
    if isinstance(layer, LinearAttentionLayer):
        return _Linear(layer.number_of_states)
    return DynamicLayer() if isinstance(layer, _ATTENTION) else layer


def _put(layer: Any, state: State, tensor: Tensor) -> None:
    layer.dtype, layer.device = tensor.dtype, tensor.device
    if state.kind in ("conv", "ssm"):
        name = "conv_states" if state.kind == "conv" else "recurrent_states"
        getattr(layer, name)[state.index] = tensor
        layer.has_previous_state[state.index] = True
        getattr(layer, f"is_{name}_initialized")[state.index] = True
    else:  # filled directly: `update` of an empty layer would concatenate with a tensor that OpenVINO rejects
        setattr(layer, f"{state.kind}s", tensor)
        layer.is_initialized = True


def _get(layer: Any, state: State) -> Any:
    if state.kind in ("conv", "ssm"):
        return (layer.conv_states if state.kind == "conv" else layer.recurrent_states)[state.index]
    return getattr(layer, f"{state.kind}s")
