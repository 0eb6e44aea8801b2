"""Layers that stay in 16 bits are held in 16 bits where that is exact, and computed as torch does in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nybble.export.base import EXPORTERS
from nybble.export.containers import exact_dtype
from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_model, make_tokenizer

LAYER = "model.layers.0.self_attn.o_proj.weight"
TOO_SMALL = 1e-9
"""For float16, not for bfloat16."""


def checkpoint_of(folder: Path, dtype: torch.dtype) -> QuantizedCheckpoint:
    """A model of one layer, in float32, whose output projection stays as it is, with values that fit `dtype`."""
    model = make_model("llama", num_hidden_layers=1)
    weight = model.get_parameter(LAYER)
    with torch.no_grad():
        weight.copy_(weight.to(dtype))
        if dtype == torch.bfloat16:
            weight[3, 5] = torch.tensor(TOO_SMALL, dtype=dtype).float()
    selection = assign_schemes(select_layers(model), model, SchemeOptions(group_size=32, ignore=("*.o_proj",)))
    quantized = round_model_to_nearest(model, schemes=selection.schemes)
    save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    return open_checkpoint(folder)


def kind_in_gguf(folder: Path, weight: torch.Tensor) -> str:
    """Type of the tensor, whose values are those of `weight` by the reader of the package gguf."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / "model.gguf").tensors}
    found = tensors["blk.0.attn_output.weight"]
    assert torch.equal(torch.tensor(dequantize(found.data, found.tensor_type)), weight)
    return str(found.tensor_type.name).lower()


def kind_in_onnx(folder: Path, weight: torch.Tensor) -> str:
    import onnx

    model = onnx.load(folder / "model.onnx")
    product = next(node for node in model.graph.node if node.op_type == "MatMul" and "o_proj" in node.name)
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    name = casts.get(product.input[1], product.input[1])
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    assert torch.equal(torch.tensor(onnx.numpy_helper.to_array(tensor).astype("float32")), weight.T)
    return {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16"}[onnx.TensorProto.DataType.Name(tensor.data_type)]


def kind_in_openvino(folder: Path, weight: torch.Tensor) -> str:
    import openvino as ov

    graph = ov.Core().read_model(folder / "openvino_model.xml")
    found = [
        node
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
        and list(node.shape) == list(weight.shape)
        and "codes" not in node.get_friendly_name()
    ]
    (constant,) = (node for node in found if node.get_element_type().is_real())
    values = torch.from_numpy(constant.data.copy())  # bfloat16 comes as bytes of another type
    if constant.get_element_type() == ov.Type.bf16:
        values = values.view(torch.bfloat16)
    assert torch.equal(values.float(), weight)
    return str(constant.get_element_type().get_type_name())


READERS = {"gguf": kind_in_gguf, "onnx": kind_in_onnx, "openvino": kind_in_openvino}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32))],
    ids=str,
)
@pytest.mark.parametrize("name", READERS)
def test_a_layer_has_the_type_that_is_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exporter = EXPORTERS[name]
    for module in exporter.modules:
        pytest.importorskip(module, reason=f"the extra {exporter.extra}")
    checkpoint = checkpoint_of(tmp_path / "quantized", dtype)
    (tmp_path / name).mkdir()
    assert exporter.export(checkpoint, tmp_path / name).logit_difference < 2e-5  # type: ignore[operator]
    kind = READERS[name](tmp_path / name, checkpoint.others[LAYER].float())
    assert kind == {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]


def test_float16_is_taken_where_both_types_are_exact() -> None:
    one = torch.tensor([1.0, -0.5])
    assert exact_dtype([one]) == torch.float16
    assert exact_dtype([one, torch.tensor([2.0**-30])]) == torch.bfloat16
    assert exact_dtype([one, torch.tensor([70000.0])]) == torch.float32  # neither range nor precision
    assert exact_dtype([torch.tensor([2.0**-30]), torch.tensor([1 + 2.0**-10])]) == torch.float32
    assert exact_dtype([torch.tensor([torch.nan])]) == torch.float32
