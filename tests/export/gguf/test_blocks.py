"""Bytes and values of blocks, compared with a slow loop and with the package gguf."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from nybble.export.base import EXPORTERS
from nybble.export.gguf.blocks import block_type, from_blocks, row_bytes, to_blocks
from nybble.quant.grid import min_max_qparams, quantize, round_scale
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight

SCHEMES = [
    *(QuantScheme(4, size, symmetric) for size in (32, 64, 128, None) for symmetric in (False, True)),
    *(QuantScheme(bits, size, symmetric) for bits in (2, 3) for size in (32, None) for symmetric in (False, True)),
    QuantScheme(8, 64, symmetric=True),
    INT8_PER_ROW,
]


def in_blocks(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight as the format holds it."""
    container = EXPORTERS["gguf"].container(weight.scheme, weight.codes_OI.shape[1], embedding=False)
    assert container is not None
    return weight.recoded(container)


def make_weight(scheme: QuantScheme, rows: int = 5, columns: int = 256) -> QuantizedWeight:
    """A weight with all codes, zero points and signs of scales that the scheme allows."""
    groups = scheme.num_groups(columns)
    sign_OG = 1 - 2 * torch.randint(0, 2, (rows, groups)) if scheme.signed_scales else 1
    zero_point_OG = torch.randint(0, scheme.max_code + 1, (rows, groups), dtype=torch.uint8)
    return QuantizedWeight(
        torch.randint(0, scheme.max_code + 1, (rows, columns), dtype=torch.uint8),
        round_scale(torch.rand(rows, groups) * 0.3 + 1e-3) * sign_OG,
        torch.full_like(zero_point_OG, scheme.middle_code) if scheme.symmetric else zero_point_OG,
        scheme,
    )


def slow_values(data: bytes, kind: str) -> list[float]:
    """Weights of a row in float64, by the formulas of ggml."""
    size, values = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind], []
    for start in range(0, len(data), size):
        block = data[start : start + size]
        if kind == "Q8_0":
            (d,) = struct.unpack_from("<e", block)
            values += [d * code for code in struct.unpack_from("<32b", block, 2)]
            continue
        d, m = struct.unpack_from("<ee", block) if kind == "Q4_1" else (*struct.unpack_from("<e", block), None)
        codes = [byte & 15 for byte in block[-16:]] + [byte >> 4 for byte in block[-16:]]
        values += [d * code + m if m is not None else d * (code - 8) for code in codes]
    return values


def test_golden_bytes() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    scale, zero = torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8)
    both = " ".join(f"{i}{i}" for i in "0123456789abcdef")  # codes i and i + 16 are equal
    asymmetric = to_blocks(QuantizedWeight(codes, scale, zero, QuantScheme(4, 32)))
    assert asymmetric.tobytes() == bytes.fromhex(f"00 38 00 be {both}")  # f16: 0.5, -1.5
    symmetric = to_blocks(QuantizedWeight(codes, scale, zero * 0 + 8, QuantScheme(4, 32, symmetric=True)))
    assert symmetric.tobytes() == bytes.fromhex(f"00 38 {both}")
    negative = to_blocks(QuantizedWeight(codes, -scale, zero * 0 + 8, QuantScheme(4, 32, symmetric=True)))
    assert negative.tobytes() == bytes.fromhex(f"00 b8 {both}")
    eight = QuantizedWeight(
        torch.arange(112, 144, dtype=torch.uint8)[None], scale, zero * 0 + 128, QuantScheme(8, 32, symmetric=True)
    )
    assert to_blocks(eight).tobytes() == b"\x00\x38" + bytes(range(240, 256)) + bytes(range(16))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_exact_and_codes_come_back(scheme: QuantScheme) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf")
    from gguf.quants import dequantize

    weight = make_weight(scheme)
    held = in_blocks(weight)
    kind, data = block_type(held.scheme), to_blocks(held)
    assert data.shape == (5, row_bytes(kind, 256))
    assert [slow_values(row.tobytes(), kind) for row in data] == weight.dequantize().double().tolist()
    numbers = dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(numbers, weight.dequantize().numpy())
    read = from_blocks(data, kind)
    assert read.scheme == held.scheme
    for name in ("codes_OI", "scale_OG", "zero_point_OG"):
        assert torch.equal(getattr(read, name), getattr(held, name)), name


def test_smallest_and_largest_scales() -> None:
    scale = torch.tensor([[2.0**-14, 4096.0]])
    weight = QuantizedWeight(
        torch.full((1, 64), 15, dtype=torch.uint8), scale, torch.tensor([[1, 15]]).byte(), QuantScheme(4, 32)
    )
    assert slow_values(to_blocks(weight).tobytes(), "Q4_1") == weight.dequantize()[0].double().tolist()


def test_weights_of_a_real_distribution() -> None:
    weight_OI, scheme = torch.randn(8, 128) * 0.02, QuantScheme(4, 64)
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
    weight = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), scheme)
    values = [slow_values(row.tobytes(), "Q4_1") for row in to_blocks(in_blocks(weight))]
    assert torch.equal(torch.tensor(values), weight.dequantize())
