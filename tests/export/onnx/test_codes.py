"""Codes as initializers: bytes, and values as onnxruntime's own operators compute them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nybble.export.onnx import codes as module
from nybble.export.onnx.codes import CODES, SCALES, ZERO_POINTS, Part, lazy_initializers, module_of
from nybble.export.places import take_rows
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.export.onnx.conftest import EXPORTER, Export
from tests.helpers.cases import fast_cases
from tests.helpers.exports import check_codes
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES

pytestmark = pytest.mark.usefixtures("needs_onnx")

WEIGHT = QuantizedWeight(
    torch.tensor([[1, 2, 15, 0] * 4 + [8, 7] * 8 + [3, 12] * 8], dtype=torch.uint8),
    torch.tensor([[0.5, 0.25, 2.0]]),
    torch.tensor([[3, 12, 9]], dtype=torch.uint8),
    QuantScheme(group_size=16),
)
ROW = QuantizedWeight(
    torch.arange(96, 128, dtype=torch.uint8)[None],
    torch.tensor([[0.5]]),
    torch.tensor([[128]]).byte(),
    QuantScheme(8, 32, symmetric=True),
)


def initializers(weight: QuantizedWeight, part: Part | None = None) -> dict[str, Any]:
    rows, columns = weight.codes_OI.shape
    part = part or Part("a.b", 0, rows)
    taken = take_rows(weight, slice(part.begin, part.end))
    return lazy_initializers(part.prefix, [part.end - part.begin], columns, weight.scheme, lambda: taken)


def test_golden_bytes_of_4_bits() -> None:
    tensors = initializers(WEIGHT)
    assert tensors[CODES].tobytes() == bytes.fromhex("210f" * 4 + "78" * 8 + "c3" * 8)
    assert tensors[SCALES].tobytes() == bytes.fromhex("0000003f 0000803e 00000040")
    assert tensors[ZERO_POINTS].tobytes() == bytes.fromhex("c3 09")
    assert {leaf: (tensor.name, list(tensor.shape)) for leaf, tensor in tensors.items()} == {
        CODES: ("a.b.codes", [1, 3, 8]),
        SCALES: ("a.b.scales", [1, 3]),
        ZERO_POINTS: ("a.b.zero_points", [1, 2]),
    }


def test_golden_bytes_of_8_bits() -> None:
    tensors = initializers(ROW)
    assert tensors[CODES].tobytes() == bytes(range(96, 128))
    assert tensors[SCALES].tobytes() == bytes.fromhex("0000003f")
    assert tensors.keys() == {CODES, SCALES}


def test_a_symmetric_scheme_needs_no_zero_points() -> None:
    symmetric = replace(WEIGHT.scheme, symmetric=True)
    weight = replace(WEIGHT, scheme=symmetric, zero_point_OG=torch.full((1, 3), 8, dtype=torch.uint8))
    assert initializers(weight).keys() == {CODES, SCALES}


@pytest.mark.parametrize(("columns", "block"), [(16, 16), (48, 16), (64, 64), (576, 64), (2048, 256), (2304, 256)])
def test_a_row_with_one_scale_has_the_largest_blocks_that_fit(columns: int, block: int) -> None:
    assert EXPORTER.container(INT8_PER_ROW, columns, embedding=True) == QuantScheme(8, block, symmetric=True)
    assert EXPORTER.container(QuantScheme(4, None), columns, embedding=False) == QuantScheme(4, block)
    assert EXPORTER.container(QuantScheme(4, 16), columns, embedding=False) == QuantScheme(4, 16)


def test_parts_have_the_name_of_their_rows() -> None:
    four_rows = QuantizedWeight(
        WEIGHT.codes_OI.expand(4, -1), WEIGHT.scale_OG.expand(4, -1), WEIGHT.zero_point_OG.expand(4, -1), WEIGHT.scheme
    )
    tensor = initializers(four_rows, Part("a.b", 1, 3, whole=False))[CODES]
    assert (tensor.name, list(tensor.shape)) == ("a.b[1:3].codes", [2, 3, 8])
    assert module_of("a.b[1:3].codes") == module_of("a.b.scales") == "a.b"


def random_weight(rows: int, columns: int, scheme: QuantScheme) -> QuantizedWeight:
    weight_OI = torch.randn(rows, columns)
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), scheme)


def run_node(op_type: str, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """Run one operator of onnxruntime with these inputs."""
    import onnx
    import onnxruntime as ort

    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    node = helper.make_node(op_type, list(inputs), ["y"], domain="com.microsoft", **options)
    graph = helper.make_graph(
        [node],
        "node",
        [],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 1
    # Folding the node would compute it once, by the same kernel, with a warning.
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {})[0])


def product_with_identity(tensors: dict[str, Any], columns: int, rows: int, bits: int, block: int) -> torch.Tensor:
    """The weight [O, I] as MatMulNBits in float32 computes it: its product with the identity."""
    inputs = {"x": np.eye(columns, dtype=np.float32), **tensors}
    return run_node("MatMulNBits", inputs, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=1).T


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_the_operator_computes_exactly_the_weights_of_the_codes(group_size: int, symmetric: bool) -> None:
    weight = random_weight(5, 3 * group_size, QuantScheme(group_size=group_size, symmetric=symmetric))
    tensors = {leaf: tensor.numpy() for leaf, tensor in initializers(weight).items()}
    computed_OI = product_with_identity(tensors, 3 * group_size, 5, 4, group_size)
    assert torch.equal(computed_OI, weight.dequantize())


@pytest.mark.parametrize("columns", [48, 96, 256])
def test_the_operators_compute_exactly_the_weights_of_embedding_and_head(columns: int) -> None:
    weight = random_weight(7, columns, INT8_PER_ROW)
    container = EXPORTER.container(INT8_PER_ROW, columns, embedding=True)
    weight, block = weight.recoded(container), container.group_size
    tensors = {leaf: tensor.numpy() for leaf, tensor in initializers(weight).items()}
    assert torch.equal(product_with_identity(tensors, columns, 7, 8, block), weight.dequantize())
    assert torch.equal(looked_up(tensors, 7, block), weight.dequantize())


def looked_up(tensors: dict[str, Any], rows: int, block: int) -> torch.Tensor:
    """The rows [V, D] as GatherBlockQuantized computes them."""
    inputs = {"codes": tensors[CODES], "ids": np.arange(rows), "scales": tensors[SCALES][..., None]}
    return run_node("GatherBlockQuantized", inputs, bits=8, block_size=block, gather_axis=0, quantize_axis=2).flatten(1)


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST_FAMILIES))
def test_the_operators_compute_the_weights_of_a_saved_model(family: str, export: Export) -> None:
    """onnxruntime reads every weight of every family from the files, and computes it to the bit."""
    import onnx

    exported = export(family)
    model = onnx.load(exported.folder / "model.onnx")  # with its external data, by onnx's reader
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    computed: dict[str, dict[int, torch.Tensor]] = {}
    for node in model.graph.node:
        options = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            tensors = {name: values[name] for name in node.input[1:]}
            rows_OI = product_with_identity(tensors, options["K"], options["N"], options["bits"], options["block_size"])
        elif node.op_type == "GatherBlockQuantized":
            name = node.input[0].removesuffix(CODES)
            tensors = {leaf: values[name + leaf] for leaf in (CODES, SCALES)}
            rows_OI = looked_up(tensors, len(tensors[CODES]), options["block_size"])
        else:
            continue
        prefix = next(name for name in node.input if name.endswith(CODES)).removesuffix(CODES)
        (place,) = module._places(prefix, rows_OI.shape)
        computed.setdefault(place.name, {})[place.rows.start] = rows_OI
    assert computed.keys() == exported.checkpoint.quantized.keys()
    for name, parts in computed.items():
        weight_OI = torch.cat([rows_OI for _, rows_OI in sorted(parts.items())])
        assert torch.equal(weight_OI, exported.checkpoint.quantized[name].dequantize()), name


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_codes_scales_and_zero_points_read_back(family: str, export: Export) -> None:
    check_codes(EXPORTER, export(family))


def test_scales_that_differ_within_a_row_are_not_read_as_one() -> None:
    codes, scales = torch.zeros(2, 2, 16, dtype=torch.uint8), torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    read = module._unpack({CODES: codes, SCALES: scales}, 8)
    assert read.scale_OG.tolist() == scales.tolist()
    assert read.scheme == QuantScheme(8, 16, symmetric=True)
