"""Trace a transformers model to an OpenVINO graph whose past keys and values are state.

A wrapper gives the model its past keys and values, its own attention masks and beam_idx as plain inputs. OpenVINO
traces the wrapper once. Past keys and values then become state of the graph, which starts empty:

    past_key_values.LAYER.key and .value    [batch, key-value heads, past tokens, head size], f32

The graph needs no changes to attention, so every decoder that uses transformers' cache can be traced.

Side effect: `_fixed_rope` changes `rope_type` of rotary embeddings while the model is traced. Nothing else is patched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from nybble.errors import ExportError, describe_error

_INPUT_SHAPES = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
"""Name -> shape of the inputs before past keys and values; -1 is any size."""


def trace_model(model: Any) -> Any:
    """Trace a model.

    Args:
        model: transformers model on the CPU, float32, evaluation mode.

    Returns:
        openvino.Model with the inputs input_ids [B, T] (i64), attention_mask [B, past + T] (i64), position_ids [B, T]
        (i64) and beam_idx [B] (i32), and the output logits [B, T, V] (f32).

    Raises:
        ExportError: the model cannot be traced.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    heads, head_size = _heads(model.config)
    graph = _convert(model, heads, head_size)
    state_names = _name_ports(graph, heads, head_size)
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, state_names)
    _start_states_empty(graph, heads, head_size)
    return graph


def _heads(config: Any) -> tuple[int, int]:
    """Return the number of key-value heads and their size. Raises ExportError unless all layers have the same."""
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except (AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            "an export to OpenVINO needs key-value heads of one number and one size in all layers; "
            f"{config.model_type} has others ({describe_error(error)}); remove openvino from --export"
        ) from error
    return int(heads), int(head_size)


class _ModelWithPast(nn.Module):
    """The model with past keys and values as flat inputs and outputs: key 0, value 0, key 1, value 1, ..."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_layers = model.config.num_hidden_layers
        self.window = getattr(model.config, "sliding_window", None)
        self.layer_types = getattr(model.config, "layer_types", None)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        cache.layers = []
        for i in range(self.num_layers):
            layer = DynamicLayer()
            layer.keys, layer.values = past[2 * i].index_select(0, beam_idx), past[2 * i + 1].index_select(0, beam_idx)
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(input_ids, attention_mask),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        presents = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # type: ignore[union-attr]
        return output.logits, *presents

    def _masks(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return additive masks [B, 1, T, S], float32: one, or one per layer type where the configuration names types.

        OpenVINO accepts boolean masks too, but its attention is three times as slow with them on a prompt of 1024
        tokens.
        """
        keys, queries = attention_mask.shape[1], input_ids.shape[1]
        key_S = torch.arange(keys)
        query_T1 = (torch.arange(queries) + (keys - queries))[:, None]
        # A padded token may attend to itself: a row without any key would be NaN, and NaN spreads through the values.
        itself_TS = key_S == query_T1
        seen_BTS = (key_S <= query_T1) & attention_mask.bool()[:, None, :]
        full = (seen_BTS | itself_TS)[:, None]
        sliding = full if self.window is None else full & (key_S > query_T1 - self.window)
        full, sliding = (
            torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, torch.finfo(torch.float32).min)
            for m in (full, sliding)
        )
        if self.layer_types is not None:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding


def _convert(model: Any, heads: int, head_size: int) -> Any:
    """Trace the wrapped model with example inputs. Raises ExportError where that fails."""
    import openvino as ov

    batch, queries, past = 2, 3, 2  # all above 1: the tracer would take a size of 1 for a constant
    example = (
        torch.ones(batch, queries, dtype=torch.int64),
        torch.ones(batch, past + queries, dtype=torch.int64),
        torch.arange(past, past + queries).expand(batch, -1),
        torch.arange(batch, dtype=torch.int32),
    )
    states = [torch.zeros(batch, heads, past, head_size) for _ in range(2 * model.config.num_hidden_layers)]
    with torch.no_grad(), warnings.catch_warnings(), _fixed_rope(model):
        # The tracer warns of every branch on a shape. Wrong branches show in the comparison of logits.
        warnings.simplefilter("ignore")
        try:
            return ov.convert_model(_ModelWithPast(model).eval(), example_input=(*example, *states))
        except Exception as error:  # errors of the tracer, of OpenVINO and of the model
            raise ExportError(
                f"an export to OpenVINO traces the model with keys and values of past tokens; {type(model).__name__} "
                f"cannot be traced ({describe_error(error)}); remove openvino from --export"
            ) from error


def _name_ports(graph: Any, heads: int, head_size: int) -> dict[str, str]:
    """Name inputs and outputs and give inputs their dynamic shapes, in place.

    Returns:
        Name of each past tensor (input) -> name of the present tensor (output) that replaces it.
    """
    import openvino as ov

    for port, (name, shape) in zip(graph.inputs, _INPUT_SHAPES.items(), strict=False):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_node().set_friendly_name(name)
    graph.outputs[0].get_tensor().set_names({"logits"})
    state_names = {}
    for i, (source, sink) in enumerate(zip(graph.inputs[len(_INPUT_SHAPES) :], graph.outputs[1:], strict=True)):
        leaf = f"{i // 2}.{'value' if i % 2 else 'key'}"
        source.get_tensor().set_names({f"past_key_values.{leaf}"})
        source.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, head_size]))
        source.get_node().set_element_type(ov.Type.f32)
        source.get_node().set_friendly_name(f"past_key_values.{leaf}")
        sink.get_tensor().set_names({f"present.{leaf}"})
        state_names[f"past_key_values.{leaf}"] = f"present.{leaf}"
    return state_names


def _start_states_empty(graph: Any, heads: int, head_size: int) -> None:
    """Initialize every state as [batch, heads, 0, head_size] for the batch size of input_ids, in place."""
    from openvino import opset13 as op

    input_ids = graph.input("input_ids")
    batch = op.gather(op.shape_of(input_ids, output_type="i64"), op.constant(np.array([0])), op.constant(0))
    shape = op.concat([batch, op.constant(np.array([heads, 0, head_size]))], axis=0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), shape)])
    graph.validate_nodes_and_infer_types()


@contextmanager
def _fixed_rope(model: Any) -> Iterator[None]:
    """Keep the rotary frequencies of short contexts where they depend on the context length (longrope, dynamic NTK).

    A branch on the length cannot be traced. The exported model is right up to `original_max_position_embeddings`.
    """
    dynamic = [module for module in model.modules() if getattr(module, "rope_type", None) in ("longrope", "dynamic")]
    types = [module.rope_type for module in dynamic]
    try:
        for module in dynamic:
            module.rope_type = "default"  # transformers reads it only to decide whether to update the frequencies
        yield
    finally:
        for module, rope_type in zip(dynamic, types, strict=True):
            module.rope_type = rope_type
