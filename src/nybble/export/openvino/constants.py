"""Put the codes of quantized layers into a graph, and read codes back from a saved graph.

    4 bits: u4 codes [O, G, K] -> f16,  minus u4 zero point [O, G, 1] -> f16,  times f16 scale [O, G, 1],
            reshaped to [O, I] -> f32                                              (linear layers)
    8 bits: u8 codes [O, I] -> f32,  minus u8 zero point [O, 1] -> f32,  times f32 scale [O, 1]
                                                                                   (embedding, lm_head)

The CPU plugin of OpenVINO recognizes these patterns and runs compressed matrix products. For 4-bit codes,
scale * (code - zero_point) has at most 11 significant bits, so the product is exact in f16.

Constants hold bytes in row-major order. u4 stores two codes per byte, the first in the low nibble; an odd number of
codes is padded with a zero.

The constants of a layer are named NAME.codes, NAME.zero_point and NAME.scale. `read_constants` finds them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.openvino.trace import TracedModel
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes

_LEAVES = ("codes", "scale", "zero_point")


def insert_codes(traced: TracedModel, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Replace the inputs for quantized weights by codes, in place.

    Args:
        traced: the graph and its inputs.
        quantized: module name -> quantized weight.

    Raises:
        ExportError: the graph does not use a weight.
    """
    unused = [name for name, node in traced.weights.items() if not node.output(0).get_target_inputs()]
    if unused:
        raise ExportError(
            f"the traced graph must use the weight of every quantized layer; it does not use {len(unused)} of "
            f"{len(traced.weights)} (first: {unused[0]}); this architecture cannot be exported to OpenVINO yet"
        )
    for name, node in traced.weights.items():
        replacement = _dequantize_node(name, quantized[name])
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(replacement.output(0))
        traced.graph.remove_parameter(node)


def read_constants(graph: Any) -> Mapping[str, QuantizedWeight]:
    """Find the quantized weights of a graph.

    Args:
        graph: openvino.Model, as read from its files.

    Returns:
        Module name -> quantized weight, read at each access.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for node in graph.get_ops():
        name, _, leaf = node.get_friendly_name().rpartition(".")
        if node.get_type_name() == "Constant" and leaf in _LEAVES:
            nodes.setdefault(name, {})[leaf] = node
    return LazyMapping(nodes, lambda name: _read_weight(nodes[name]))


def _read_weight(leaves: Mapping[str, Any]) -> QuantizedWeight:
    codes_OI, scale_OG, zero_point_OG = (_read_rows(leaves[leaf]) for leaf in _LEAVES)
    four_bits = leaves["codes"].get_element_type().get_type_name() == "u4"
    scheme = QuantScheme(4, codes_OI.shape[1] // scale_OG.shape[1]) if four_bits else INT8_PER_ROW
    return QuantizedWeight(codes_OI, scale_OG.float(), zero_point_OG, scheme)


def _dequantize_node(name: str, weight: QuantizedWeight) -> Any:
    """Return the node that computes the float32 weight [O, I]; the patterns are at the top of this file."""
    from openvino import opset13 as op

    four_bits = weight.scheme.bits == 4
    (rows, columns), groups = weight.codes_OI.shape, weight.scale_OG.shape[1]
    shape = [rows, groups, columns // groups] if four_bits else [rows, columns]
    per_group = [*shape[:-1], 1]
    compute_type, numpy_type = ("f16", "float16") if four_bits else ("f32", "float32")

    scale = op.constant(weight.scale_OG.cpu().numpy().astype(numpy_type).reshape(per_group))
    scale.set_friendly_name(f"{name}.scale")
    codes = op.convert(_integer_constant(f"{name}.codes", weight.codes_OI, shape, four_bits), compute_type)
    zero_point = op.convert(
        _integer_constant(f"{name}.zero_point", weight.zero_point_OG, per_group, four_bits), compute_type
    )
    product = op.multiply(op.subtract(codes, zero_point), scale)
    if not four_bits:
        return product
    return op.convert(op.reshape(product, op.constant(np.array([rows, columns])), special_zero=False), "f32")


def _integer_constant(name: str, values: Tensor, shape: list[int], four_bits: bool) -> Any:
    """Return a named u4 or u8 constant of `shape` with the uint8 values."""
    import openvino as ov

    tensor = ov.Tensor(_constant_bytes(values, four_bits), ov.Shape(shape), ov.Type.u4 if four_bits else ov.Type.u8)
    node = ov.op.Constant(tensor, shared_memory=False)  # the array does not live longer than this function
    node.set_friendly_name(name)
    return node


def _constant_bytes(values: Tensor, four_bits: bool) -> np.ndarray:
    """Return the bytes of a constant: uint8 values in row-major order, two per byte for 4 bits."""
    flat = values.cpu().flatten()
    if four_bits:
        flat = pack_codes(torch.cat([flat, flat.new_zeros(len(flat) % 2)]), 4)
    return np.ascontiguousarray(flat.numpy())


def _read_rows(node: Any) -> Tensor:
    """Return the values of a constant [O, ...] as [O, all other axes]."""
    shape = list(node.shape)
    array = torch.from_numpy(np.array(node.data))
    if node.get_element_type().get_type_name() == "u4":
        array = unpack_codes(array.flatten().view(torch.uint8), 4)[: int(np.prod(shape))]
    return array.reshape(shape[0], -1)
