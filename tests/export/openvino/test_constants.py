"""Codes in OpenVINO graphs: bytes, values and round trips."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.openvino.constants import insert_codes, read_constants
from nybble.export.openvino.runtime import core
from nybble.export.openvino.trace import TracedModel
from nybble.export.places import Place
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.export.openvino.conftest import Exported

pytestmark = pytest.mark.usefixtures("needs_openvino")


def traced_with(**weights: Tensor) -> TracedModel:
    """A graph as the tracer makes it: weights are inputs; here they are the outputs too."""
    import openvino as ov
    from openvino import opset13 as op

    parameters = {name: op.parameter(list(weight_OI.shape), ov.Type.f32) for name, weight_OI in weights.items()}
    results = [op.result(parameter) for parameter in parameters.values()]
    sources = {name: [Place(name, name)] for name in weights}
    return TracedModel(ov.Model(results, list(parameters.values()), "test"), parameters, sources)


def quantize_to_nearest(weight_OI: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), scheme)


def saved_bytes(weight: QuantizedWeight, folder: Path) -> bytes:
    """The .bin file of a graph that holds nothing but this weight."""
    import openvino as ov

    traced = traced_with(a=torch.zeros(weight.codes_OI.shape))
    insert_codes(traced, {"a": weight}, ["a"])
    ov.save_model(traced.graph, folder / "model.xml", compress_to_fp16=False)
    return (folder / "model.bin").read_bytes()


def test_golden_bytes_of_4_bits(tmp_path: Path) -> None:
    weight = QuantizedWeight(
        torch.tensor([[1, 2, 15, 0], [8, 7, 3, 12]], dtype=torch.uint8),
        torch.tensor([[0.5], [0.25]]),
        torch.tensor([[3], [12]], dtype=torch.uint8),
        QuantScheme(group_size=4),
    )
    codes, zero_points, scales = "21 0f 78 c3", "c3", "00 38 00 34"  # f16, little endian
    shape = "02 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00"  # i64 [2, 4] of the reshape
    assert saved_bytes(weight, tmp_path) == bytes.fromhex(codes + zero_points + scales + shape)


def test_golden_bytes_of_8_bits(tmp_path: Path) -> None:
    weight = QuantizedWeight(
        torch.tensor([[0, 128, 255]], dtype=torch.uint8),
        torch.tensor([[2.0]]),
        torch.tensor([[128]], dtype=torch.uint8),
        INT8_PER_ROW,
    )
    codes, zero_point, scale = "00 80 ff", "80", "00 00 00 40"  # f32, little endian
    assert saved_bytes(weight, tmp_path) == bytes.fromhex(codes + zero_point + scale)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([2, 4, 6, 16]),
    seed=st.integers(0, 2**16),
)
def test_4_bit_weights_round_trip_and_have_their_values(rows: int, groups: int, group_size: int, seed: int) -> None:
    weight_OI = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    check_round_trip(weight_OI, QuantScheme(group_size=group_size))


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([2, 6, 16]),
    seed=st.integers(0, 2**16),
)
def test_symmetric_weights_are_signed_and_have_no_zero_points(
    rows: int, bits: int, groups: int, group_size: int, seed: int
) -> None:
    weight_OI = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    scheme = QuantScheme(bits, None if groups == 1 else group_size, symmetric=True)
    graph = check_round_trip(weight_OI, scheme, embeddings=())
    constants = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    assert constants["a.codes"].get_element_type().get_type_name() == f"i{bits}"
    assert "a.zero_point" not in constants
    assert [node.get_type_name() for node in graph.get_ops()].count("Subtract") == 0


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_8_bit_weights_round_trip_and_have_their_values(rows: int, columns: int, seed: int) -> None:
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    check_round_trip(weight_OI, INT8_PER_ROW)


def check_round_trip(weight_OI: Tensor, scheme: QuantScheme, embeddings: Sequence[str] = ("a",)) -> Any:
    """Read the codes back, and let OpenVINO compute the dequantized weight, which must be equal to the bit."""

    quantized = {"a": quantize_to_nearest(weight_OI, scheme)}
    traced = traced_with(a=weight_OI)
    insert_codes(traced, quantized, embeddings)
    assert traced.graph.inputs == []
    read = read_constants(traced.graph)
    for field in fields(QuantizedWeight):
        written_field, read_field = (getattr(weight, field.name) for weight in (quantized["a"], read["a"]))
        assert torch.equal(written_field, read_field) if field.name != "scheme" else written_field == read_field
    outputs = core().compile_model(traced.graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})
    assert torch.equal(torch.from_numpy(outputs[0]), quantized["a"].dequantize())
    return traced.graph


def test_the_graph_of_a_model_has_compressed_types(exported: Exported) -> None:
    """OpenVINO runs compressed matrix products on constants of these types and shapes."""

    nodes = {
        node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.shape))
        for node in core().read_model(exported.folder / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant"
    }
    name = "model.layers.1.mlp.down_proj"
    assert nodes[f"{name}.codes"] == ("u4", [64, 4, 32])
    assert nodes[f"{name}.zero_point"] == ("u4", [64, 4, 1])
    assert nodes[f"{name}.scale"] == ("f16", [64, 4, 1])
    assert nodes["model.embed_tokens.codes"] == ("u8", [260, 64])
    assert nodes["model.embed_tokens.zero_point"] == ("u8", [260, 1])
    assert nodes["model.embed_tokens.scale"] == ("f32", [260, 1])


def test_a_weight_that_the_graph_does_not_use_is_refused() -> None:
    import openvino as ov
    from openvino import opset13 as op

    weight = quantize_to_nearest(torch.randn(2, 4), QuantScheme(group_size=4))
    traced = traced_with(a=torch.zeros(2, 4))
    traced.weights["b"] = op.parameter([2, 4], ov.Type.f32)
    with pytest.raises(ExportError, match=r"it does not use 1 of 2 \(first: b\); this architecture cannot"):
        insert_codes(traced, {"a": weight, "b": weight})
