"""Put the codes of quantized layers into a graph, and read codes back from a saved graph.

    4 bits: u4 codes [O, G, K] -> f16,  minus u4 zero point [O, G, 1] -> f16,  times f16 scale [O, G, 1],
            reshaped to [O, I] -> f32                                              (linear layers)
    8 bits: u8 codes [O, I] -> f32,  minus u8 zero point [O, 1] -> f32,  times f32 scale [O, 1]
                                                                                   (embedding, lm_head)

Linear layers with a symmetric scheme have signed codes, code - middle code, as i4 or i8, and no zero point. The
plugin for NPUs computes with these only; embedding and head are unsigned for it too. A layer with one scale for each
row has no axis of groups, except unsigned 4-bit codes.

A stack of experts has one more axis in front: u4 codes [E, O, G, K].

The CPU plugin of OpenVINO recognizes these patterns and runs compressed matrix products. For 4-bit codes,
scale * (code - zero_point) has at most 11 significant bits, so the product is exact in f16.

Constants hold bytes in row-major order. u4 stores two codes per byte, the first in the low nibble; an odd number of
codes is padded with a zero.

The constants of a layer are named NAME.codes, NAME.zero_point and NAME.scale. `read_constants` finds them by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.containers import exact_dtype
from nybble.export.openvino.experts import stack_places
from nybble.export.openvino.trace import TracedModel
from nybble.export.places import by_name, join_weights, stack_rows, take_rows
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes

_LEAVES = ("codes", "scale", "zero_point")
_READERS = frozenset({"MatMul", "Gather"})
"""Operations that read the weights of linear layers and embeddings."""

# Element type -> (bits of a code, whether codes are signed).
_TYPES = {"u4": (4, False), "u8": (8, False), "i4": (4, True), "i8": (8, True)}


def insert_codes(
    traced: TracedModel, quantized: Mapping[str, QuantizedWeight], embeddings: Collection[str] = ()
) -> None:
    """Replace the inputs for quantized weights by codes, in place.

    Args:
        traced: the graph and its inputs.
        quantized: module name -> quantized weight.
        embeddings: names of embedding and head.

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
        places = traced.sources[name]
        weight = stack_rows([take_rows(quantized[place.name], place.rows) for place in places])
        experts = 0 if places[0].matrix is None else len(places)
        replacement = _dequantize_node(name, weight, experts, name in embeddings)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(replacement.output(0))
        traced.graph.remove_parameter(node)


def shrink_constants(graph: Any) -> None:
    """Hold the weights of layers that stay in 16 bits in float16 or bfloat16, whichever has the same values, in place.

    Args:
        graph: openvino.Model with these weights as float32 constants.
    """
    import openvino as ov
    from openvino import opset13 as op

    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32 or len(node.shape) < 2:
            continue
        users = node.output(0).get_target_inputs()
        if not any(user.get_node().get_type_name() in _READERS for user in users):
            continue
        values = torch.from_numpy(node.data.copy())
        dtype = exact_dtype([values])
        if dtype == torch.float32:
            continue
        kind = ov.Type.f16 if dtype == torch.float16 else ov.Type.bf16
        array = values.to(dtype).view(torch.uint8).flatten().numpy()
        tensor = ov.Tensor(array, ov.Shape(list(node.shape)), kind)
        wide = op.convert(ov.op.Constant(tensor, shared_memory=False), "f32")
        for user in users:
            user.replace_source_output(wide.output(0))


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
    places = by_name(place for name, leaves in nodes.items() for place in stack_places(name, leaves["codes"].shape))

    def read(name: str) -> QuantizedWeight:
        return join_weights(places[name], [_read_weight(nodes[place.tensor], place.matrix) for place in places[name]])

    return LazyMapping(places, read)


def _read_weight(leaves: Mapping[str, Any], expert: int | None = None) -> QuantizedWeight:
    """Read the constants of a weight, or of one expert of a stack."""
    codes_OI, scale_OG = _read_rows(leaves["codes"], expert), _read_rows(leaves["scale"], expert).float()
    bits, signed = _TYPES[leaves["codes"].get_element_type().get_type_name()]
    shape = list(leaves["codes"].shape)[0 if expert is None else 1 :]
    scheme = QuantScheme(bits, None if len(shape) == 2 else shape[2], signed or bits == 8)
    zero_point_OG = torch.full_like(scale_OG, scheme.middle_code, dtype=torch.uint8)
    if not signed:
        zero_point_OG = _read_rows(leaves["zero_point"], expert)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)


def _dequantize_node(name: str, weight: QuantizedWeight, experts: int, embedding: bool) -> Any:
    """Return the node that computes a float32 weight; the patterns are at the top of this file.

    Args:
        name: of the constants.
        weight: [O, I], or [E * O, I] of E experts.
        experts: E; 0 for a matrix.
        embedding: whether it is the weight of the embedding or of the head.
    """
    from openvino import opset13 as op

    (count, columns), groups, bits = weight.codes_OI.shape, weight.scale_OG.shape[1], weight.scheme.bits
    rows = [experts, count // experts] if experts else [count]
    signed = weight.scheme.symmetric and not embedding
    flat = groups == 1 and (signed or bits == 8)
    shape = [*rows, columns] if flat else [*rows, groups, columns // groups]
    per_group = [*shape[:-1], 1]
    compute_type, numpy_type = ("f16", "float16") if bits == 4 else ("f32", "float32")

    scale = op.constant(weight.scale_OG.cpu().numpy().astype(numpy_type).reshape(per_group))
    scale.set_friendly_name(f"{name}.scale")
    node = op.convert(_integer_constant(f"{name}.codes", weight.codes_OI, shape, bits, signed), compute_type)
    if not signed:
        zero_point = _integer_constant(f"{name}.zero_point", weight.zero_point_OG, per_group, bits, signed)
        node = op.subtract(node, op.convert(zero_point, compute_type))
    node = op.multiply(node, scale)
    if not flat:
        node = op.reshape(node, op.constant(np.array([*rows, columns])), special_zero=False)
    return op.convert(node, "f32") if bits == 4 else node


def _integer_constant(name: str, values: Tensor, shape: list[int], bits: int, signed: bool) -> Any:
    """Return a named constant of `shape` with the uint8 values; signed: with values - middle code."""
    import openvino as ov

    kind = next(kind for kind, found in _TYPES.items() if found == (bits, signed))
    tensor = ov.Tensor(_constant_bytes(values, bits, signed), ov.Shape(shape), getattr(ov.Type, kind))
    node = ov.op.Constant(tensor, shared_memory=False)  # the array does not live longer than this function
    node.set_friendly_name(name)
    return node


def _constant_bytes(values: Tensor, bits: int, signed: bool) -> np.ndarray:
    """Return the bytes of a constant: uint8 values in row-major order, two per byte for 4 bits.

    Flipping the highest bit of a code gives code - middle code in two's complement.
    """
    flat = values.cpu().flatten()
    if signed:
        flat = flat ^ (1 << (bits - 1))
    if bits == 4:
        flat = pack_codes(torch.cat([flat, flat.new_zeros(len(flat) % 2)]), bits)
    array = np.ascontiguousarray(flat.numpy())
    return array.view(np.int8) if signed and bits == 8 else array


def _read_rows(node: Any, expert: int | None) -> Tensor:
    """Return the values of a constant [O, ...], or of one expert of a constant [E, O, ...], as [O, all other axes].

    Signed codes get the middle code added.
    """
    shape, kind = list(node.shape), node.get_element_type().get_type_name()
    bits, signed = _TYPES.get(kind, (0, False))
    count = int(np.prod(shape[1:] if expert is not None else shape))
    first = count * (expert or 0)
    values, rows = node.data.reshape(-1), shape[0 if expert is None else 1]
    if bits == 4:
        packed = values.view(np.uint8)[first // 2 : (first + count + 1) // 2].copy()
        array = unpack_codes(torch.from_numpy(packed), bits)[first % 2 :][:count]
    else:
        array = torch.from_numpy(values[first : first + count].copy())
    if signed:
        array = array.view(torch.uint8) ^ (1 << (bits - 1))
    return array.reshape(rows, -1)
