"""Trace a transformers model to an OpenVINO graph that keeps the state of earlier tokens.

A wrapper gives the model its past keys and values (and states of convolutions and recurrences, see states.py), its
attention mask and beam_idx as plain inputs. torch traces the wrapper once, and OpenVINO converts the trace. What the
model keeps then becomes state of the graph, which starts empty or, where it has no tokens, as zeros.

The weights of quantized layers are inputs of the traced function as well. Their examples are one zero, expanded to the
shape of the weight, so that no float copy of a weight exists. constants.py replaces these inputs by codes.

Functions that cannot be traced are replaced meanwhile (substitutes.py); attention needs no changes, so every decoder
that uses transformers' cache can be traced.

Side effect: `_fixed_rope` changes `rope_type` of rotary embeddings while the model is traced.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nybble.errors import ExportError, describe_error
from nybble.export.openvino.experts import graph_weights, trace_experts
from nybble.export.openvino.states import State, TracedCache, find_states
from nybble.export.openvino.substitutes import attention_mask as additive_mask
from nybble.export.openvino.substitutes import substituted
from nybble.export.places import Place, stored_shape
from nybble.models.checkpoint import QuantizedCheckpoint

_INPUT_SHAPES = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
"""Name -> shape of the inputs before past keys and values; -1 is any size."""


class TracedModel(NamedTuple):
    """A traced model whose quantized weights are still inputs.

    Attributes:
        graph: openvino.Model with the inputs input_ids [B, T] (i64), attention_mask [B, past + T] (i64), position_ids
            [B, T] (i64), beam_idx [B] (i32) and `weights`, and the output logits [B, T, V] (f32).
        weights: name -> Parameter of the graph for a weight (f32).
        sources: name -> where the rows of the weight are in memory.
    """

    graph: Any
    weights: dict[str, Any]
    sources: dict[str, list[Place]]


def trace_model(checkpoint: QuantizedCheckpoint) -> TracedModel:
    """Trace a quantized model.

    Args:
        checkpoint: the model. Only the shapes of its quantized weights are read.

    Raises:
        ExportError: the model cannot be traced.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    graph, sources, states = _convert(checkpoint)
    first, count = len(_INPUT_SHAPES), len(sources)
    ports = graph.inputs[first : first + count]
    weights = {name: port.get_node() for name, port in zip(sources, ports, strict=True)}
    _name_ports(graph, count, states)
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {state.past: state.present for state in states})
    _start_states_empty(graph, states)
    return TracedModel(graph, weights, sources)


class _ModelWithPast:
    """The model as a function of tensors alone: weights, and what it keeps of earlier tokens.

    Args:
        config: transformers configuration.
        names: of the quantized modules, in the order of the inputs.
    """

    def __init__(self, config: Any, names: Sequence[str]) -> None:
        self.config, self.names = config, tuple(names)
        self.weights: dict[str, Tensor] = {}
        self.model: Any = None
        self.states: tuple[State, ...] = ()
        self.cache: TracedCache
        self.makes_masks = True

    @property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments of the model."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def cache_argument(self) -> str:
        """The argument that takes the cache."""
        return "past_key_values" if "past_key_values" in self.arguments else "cache_params"

    def read_state(self) -> Tensor:
        """Return the recurrent state that the model read last."""
        assert self.cache.last_read is not None
        return self.cache.last_read

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        self.weights, past = dict(zip(self.names, tensors, strict=False)), tensors[len(self.names) :]
        self.cache = TracedCache(self.config, self.states, [tensor.index_select(0, beam_idx) for tensor in past])
        arguments = {"position_ids": position_ids} if "position_ids" in self.arguments else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._mask(input_ids, attention_mask),
            use_cache=True,
            **arguments,
            **{self.cache_argument: self.cache},
        )
        return output.logits, *self.cache.tensors()

    def _mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mask that the model takes: of all tokens, of the new ones, or, for attention, additive."""
        if self.makes_masks:
            return attention_mask
        if all(state.kind in ("conv", "ssm") for state in self.states):
            return attention_mask[:, -input_ids.shape[1] :]
        window = getattr(self.config, "sliding_window", None)
        return additive_mask(attention_mask, input_ids.shape[1], window)


def _convert(checkpoint: QuantizedCheckpoint) -> tuple[Any, dict[str, list[Place]], tuple[State, ...]]:
    """Trace the wrapped model with example inputs. Raises ExportError where that fails.

    Returns:
        openvino.Model, the weights among its inputs, and its states.
    """
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    batch, queries, past = 2, 3, 2  # all above 1: the tracer would take a size of 1 for a constant
    wrapped = _ModelWithPast(checkpoint.config, ())
    wrapped.model = checkpoint.build(lambda name: wrapped.weights[name])
    sources = graph_weights(wrapped.model, checkpoint.shapes, checkpoint.selection.schemes)
    trace_experts(wrapped.model, lambda name: wrapped.weights[name], sources)
    shapes = (stored_shape(places, checkpoint.shapes.__getitem__) for places in sources.values())
    weights = [torch.zeros(1).expand(shape) for shape in shapes]
    wrapped.names = tuple(sources)
    wrapped.weights = dict(zip(sources, weights, strict=True))
    with torch.no_grad(), warnings.catch_warnings(), _fixed_rope(wrapped.model):
        # The tracer warns of every branch on a shape. Wrong branches show in the comparison of logits.
        warnings.simplefilter("ignore")
        try:
            wrapped.states = find_states(wrapped.model, wrapped.cache_argument)
            example = (
                torch.ones(batch, queries, dtype=torch.int64),
                torch.ones(batch, past + queries, dtype=torch.int64),
                torch.arange(past, past + queries).expand(batch, -1),
                torch.arange(batch, dtype=torch.int32),
                *weights,
                *(state.zeros(batch, past) for state in wrapped.states),
            )
            with substituted(wrapped.model, wrapped.read_state) as names:
                wrapped.makes_masks = any(name.endswith("mask") for name in names)
                traced = torch.jit.trace(wrapped.forward, example, strict=False, check_trace=False)
            decoder = TorchScriptPythonDecoder(traced, example_input=example)
            return ov.convert_model(decoder, example_input=example), sources, wrapped.states
        except Exception as error:  # errors of the tracer, of OpenVINO and of the model
            raise ExportError(
                f"an export to OpenVINO traces the model with its past states; "
                f"{type(wrapped.model).__name__} cannot be traced ({describe_error(error)}); remove openvino from "
                "--export"
            ) from error


def _name_ports(graph: Any, num_weights: int, states: Sequence[State]) -> None:
    """Name inputs and outputs and give inputs their dynamic shapes, in place.

    Args:
        graph: openvino.Model with the inputs of _INPUT_SHAPES, weights, and states.
        num_weights: number of the weights, which stay as they are.
        states: the states, in the order of the inputs and of the outputs after the logits.
    """
    import openvino as ov

    for port, (name, shape) in zip(graph.inputs, _INPUT_SHAPES.items(), strict=False):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_node().set_friendly_name(name)
    graph.outputs[0].get_tensor().set_names({"logits"})
    sources, sinks = graph.inputs[len(_INPUT_SHAPES) + num_weights :], graph.outputs[1:]
    for state, source, sink in zip(states, sources, sinks, strict=True):
        source.get_tensor().set_names({state.past})
        source.get_node().set_partial_shape(ov.PartialShape(list(state.shape)))
        source.get_node().set_element_type(ov.Type.f32)
        source.get_node().set_friendly_name(state.past)
        sink.get_tensor().set_names({state.present})


def _start_states_empty(graph: Any, states: Sequence[State]) -> None:
    """Initialize every state without tokens, or with zeros, for the batch size of input_ids, in place."""
    from openvino import opset13 as op

    input_ids = graph.input("input_ids")
    batch = op.gather(op.shape_of(input_ids, output_type="i64"), op.constant(np.array([0])), op.constant(0))
    shapes = {state.past + state.present: [max(size, 0) for size in state.shape[1:]] for state in states}
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = op.concat([batch, op.constant(np.array(shapes[node.get_variable_id()]))], axis=0)
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
