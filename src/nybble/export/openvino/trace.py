"""Trace a transformers model to an OpenVINO graph whose past keys and values are state.

A wrapper gives the model its past keys and values, its own attention masks and beam_idx as plain inputs. torch traces
the wrapper once, and OpenVINO converts the trace. Past keys and values then become state of the graph, which starts
empty:

    past_key_values.LAYER.key and .value    [batch, key-value heads, past tokens, head size], f32

The weights of quantized layers are inputs of the traced function as well. Their examples are one zero, expanded to the
shape of the weight, so that no float copy of a weight exists. constants.py replaces these inputs by codes.

The graph needs no changes to attention, so every decoder that uses transformers' cache can be traced.

Side effect: `_fixed_rope` changes `rope_type` of rotary embeddings while the model is traced. Nothing else is patched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from nybble.errors import ExportError, describe_error
from nybble.export.openvino.experts import GraphWeight, graph_weights, trace_experts
from nybble.models.checkpoint import QuantizedCheckpoint

_INPUT_SHAPES = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
"""Name -> shape of the inputs before past keys and values; -1 is any size."""


class TracedModel(NamedTuple):
    """A traced model whose quantized weights are still inputs.

    Attributes:
        graph: openvino.Model with the inputs input_ids [B, T] (i64), attention_mask [B, past + T] (i64), position_ids
            [B, T] (i64), beam_idx [B] (i32) and `weights`, and the output logits [B, T, V] (f32).
        weights: name -> Parameter of the graph for a weight (f32).
        sources: name -> what the weight is made of.
    """

    graph: Any
    weights: dict[str, Any]
    sources: dict[str, GraphWeight]


def trace_model(checkpoint: QuantizedCheckpoint) -> TracedModel:
    """Trace a quantized model.

    Args:
        checkpoint: the model. Only the shapes of its quantized weights are read.

    Raises:
        ExportError: the model cannot be traced.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    heads, head_size = _heads(checkpoint.config)
    graph, sources = _convert(checkpoint, heads, head_size)
    first, count = len(_INPUT_SHAPES), len(sources)
    ports = graph.inputs[first : first + count]
    weights = {name: port.get_node() for name, port in zip(sources, ports, strict=True)}
    state_names = _name_ports(graph, count, heads, head_size)
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, state_names)
    _start_states_empty(graph, heads, head_size)
    return TracedModel(graph, weights, sources)


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


class _ModelWithPast:
    """The model as a function of tensors alone: weights, and past keys and values as key 0, value 0, key 1, value 1.

    Args:
        config: transformers configuration.
        names: of the quantized modules, in the order of the inputs.
    """

    def __init__(self, config: Any, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.num_layers = config.num_hidden_layers
        self.window = getattr(config, "sliding_window", None)
        self.layer_types = getattr(config, "layer_types", None)
        self.weights: dict[str, Tensor] = {}
        self.model: Any = None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        self.weights, past = dict(zip(self.names, tensors, strict=False)), tensors[len(self.names) :]
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


def _convert(checkpoint: QuantizedCheckpoint, heads: int, head_size: int) -> tuple[Any, dict[str, GraphWeight]]:
    """Trace the wrapped model with example inputs. Raises ExportError where that fails.

    Returns:
        openvino.Model, and the weights among its inputs.
    """
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    batch, queries, past = 2, 3, 2  # all above 1: the tracer would take a size of 1 for a constant
    config = checkpoint.config
    wrapped = _ModelWithPast(config, ())
    wrapped.model = checkpoint.build(lambda name: wrapped.weights[name])
    trace_experts(wrapped.model, lambda name: wrapped.weights[name])
    sources = graph_weights(wrapped.model, checkpoint.shapes)
    wrapped.names = tuple(sources)
    example = (
        torch.ones(batch, queries, dtype=torch.int64),
        torch.ones(batch, past + queries, dtype=torch.int64),
        torch.arange(past, past + queries).expand(batch, -1),
        torch.arange(batch, dtype=torch.int32),
        *(torch.zeros(1).expand(weight.shape) for weight in sources.values()),
        *(torch.zeros(batch, heads, past, head_size) for _ in range(2 * config.num_hidden_layers)),
    )
    with torch.no_grad(), warnings.catch_warnings(), _fixed_rope(wrapped.model):
        # The tracer warns of every branch on a shape. Wrong branches show in the comparison of logits.
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(wrapped.forward, example, strict=False, check_trace=False)
            decoder = TorchScriptPythonDecoder(traced, example_input=example)
            return ov.convert_model(decoder, example_input=example), sources
        except Exception as error:  # errors of the tracer, of OpenVINO and of the model
            raise ExportError(
                f"an export to OpenVINO traces the model with keys and values of past tokens; "
                f"{type(wrapped.model).__name__} cannot be traced ({describe_error(error)}); remove openvino from "
                "--export"
            ) from error


def _name_ports(graph: Any, num_weights: int, heads: int, head_size: int) -> dict[str, str]:
    """Name inputs and outputs and give inputs their dynamic shapes, in place.

    Args:
        graph: openvino.Model with the inputs of _INPUT_SHAPES, weights, and past keys and values.
        num_weights: number of the weights, which stay as they are.
        heads, head_size: of keys and values.

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
    for i, (source, sink) in enumerate(
        zip(graph.inputs[len(_INPUT_SHAPES) + num_weights :], graph.outputs[1:], strict=True)
    ):
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
