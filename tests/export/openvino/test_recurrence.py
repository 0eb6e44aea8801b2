"""Loops over tokens in OpenVINO, compared with slow loops in float64, for any number of tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("openvino", reason="the extra openvino")
from nybble.export.openvino.recurrence import GatedDeltaRule, Recurrence, SelectiveScan
from nybble.export.openvino.runtime import core
from nybble.export.openvino.substitutes import _gated_delta_rule

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated and warns of sizes
H, K, V = 2, 4, 6


def delta_inputs(tokens: int, by_channel: bool = False) -> list[Tensor]:
    g = -torch.rand(2, H, tokens, *([K] if by_channel else []))
    query, key = torch.randn(2, H, tokens, K), torch.randn(2, H, tokens, K) / 2
    return [query, key, torch.randn(2, H, tokens, V), g, torch.rand(2, H, tokens), torch.randn(2, H, K, V)]


def scan_inputs(tokens: int, by_channel: bool = False) -> list[Tensor]:
    dt = torch.rand(2, H, tokens, V if by_channel else 1)
    b, c = torch.randn(2, 1, tokens, K), torch.randn(2, 1, tokens, K)
    a = -torch.rand(1, H, V, K) if by_channel else -torch.rand(1, H, 1, 1)
    return [torch.randn(2, H, tokens, V), dt, b, c, a, torch.randn(2, H, V, K)]


def slow_delta(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
    output, state = torch.zeros_like(value), state.clone()
    for b, h, t in np.ndindex(2, H, value.shape[2]):
        s = state[b, h] * (g[b, h, t].exp()[:, None] if g.ndim == 4 else g[b, h, t].exp())
        s = s + torch.outer(key[b, h, t], (value[b, h, t] - key[b, h, t] @ s) * beta[b, h, t])
        state[b, h], output[b, h, t] = s, query[b, h, t] @ s
    return output, state


def slow_scan(x: Tensor, dt: Tensor, b_: Tensor, c: Tensor, a: Tensor, state: Tensor) -> Any:
    output, state = torch.zeros_like(x), state.clone()
    for b, h, t in np.ndindex(2, H, x.shape[2]):
        s = state[b, h] * (a[0, h] * dt[b, h, t][:, None]).exp() + torch.outer(x[b, h, t], b_[b, 0, t])
        state[b, h], output[b, h, t] = s, s @ c[b, 0, t]
    return output, state


KINDS: dict[str, tuple[type[Recurrence], Any, Any, bool]] = {
    "gated delta rule": (GatedDeltaRule, delta_inputs, slow_delta, False),
    "decay for each channel": (GatedDeltaRule, delta_inputs, slow_delta, True),
    "mamba2": (SelectiveScan, scan_inputs, slow_scan, False),
    "mamba": (SelectiveScan, scan_inputs, slow_scan, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_right_for_any_number_of_tokens(kind: str) -> None:
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    recurrence, inputs_of, slow, by_channel = KINDS[kind]
    example = tuple(inputs_of(3, by_channel))
    traced = torch.jit.trace(lambda *inputs: recurrence.apply(*inputs), example, check_trace=False)
    graph = ov.convert_model(TorchScriptPythonDecoder(traced, example_input=example), example_input=example)
    for port in graph.inputs[: 5 - recurrence.constants]:
        shape = port.get_partial_shape()
        shape[2] = -1
        port.get_node().set_partial_shape(shape)
    graph.validate_nodes_and_infer_types()
    compiled = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for tokens in (1, 3, 40):
        inputs = inputs_of(tokens, by_channel)
        expected = slow(*(tensor.double() for tensor in inputs))
        in_openvino = compiled([tensor.numpy() for tensor in inputs])
        for i, result in enumerate(recurrence.apply(*inputs)):
            torch.testing.assert_close(result.double(), expected[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(in_openvino[i]).double(), expected[i], rtol=1e-4, atol=1e-5)


def test_openvino_has_a_kernel_for_the_gated_delta_rule() -> None:
    """Its plugin knows the rule by the operations of the loop and of the inputs; a loop is 2 to 3 times as slow."""
    import openvino as ov
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    def rule(*inputs: Tensor) -> Any:
        query, key, value, g, beta, state = inputs
        options = {"initial_state": state, "use_qk_l2norm_in_kernel": True}
        return _gated_delta_rule(query, key, value, g, beta, **options)

    channels = [torch.randn(2, 3, H, 16) for _ in range(3)]
    example = (*channels, -torch.rand(2, 3, H), torch.rand(2, 3, H), torch.randn(2, H, 16, 16))
    traced = torch.jit.trace(rule, example, check_trace=False)
    graph = ov.convert_model(TorchScriptPythonDecoder(traced, example_input=example), example_input=example)
    for i, (port, tensor) in enumerate(zip(graph.inputs, example, strict=True)):
        sizes = tensor.shape[1:] if i == 5 else (-1, *tensor.shape[2:])
        port.get_node().set_partial_shape(ov.PartialShape([-1, *sizes]))
    graph.validate_nodes_and_infer_types()
    compiled = core().compile_model(graph, "CPU", {})
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
    assert "GatedDeltaNet" in kinds
    assert "TensorIterator" not in kinds
