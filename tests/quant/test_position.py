"""Positions of weights in their cells, compared with a slow float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.position import from_bytes, pack_positions, to_bytes, weight_at_positions
from nybble.quant.scheme import BITS, QuantScheme
from nybble.quant.weight import QuantizedWeight, unpack_codes


def quantized(weight_OI: Tensor, scheme: QuantScheme, shrink: float) -> QuantizedWeight:
    """`shrink` below 1 makes scales too small for the largest weights, whose codes are then clipped."""
    scale_OG, zero_point_OG = min_max_qparams(weight_OI * shrink, scheme)
    codes_OI = quantize(weight_OI.float(), scale_OG, zero_point_OG, scheme)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), scheme)


def slow_position(weight: float, scale: float, zero_point: int, code: int) -> int:
    return min(max(math.floor(16 * (weight / scale + zero_point - code + 0.5)), 0), 15)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 16]),
    shrink=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 1000),
)
def test_positions_are_those_of_the_reference_and_keep_codes_and_themselves(
    bits: int, symmetric: bool, groups: int, size: int, shrink: float, seed: int
) -> None:
    scheme = QuantScheme(bits, size, symmetric or bits == 8)
    weight_OI = torch.randn(5, groups * size, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight = quantized(weight_OI, scheme, shrink)
    packed = pack_positions(weight_OI, weight)
    found = unpack_codes(packed, 4)
    scales, zero_points = (part.repeat_interleave(size, 1) for part in (weight.scale_OG, weight.zero_point_OG))
    columns = (weight_OI.double(), scales.double(), zero_points, weight.codes_OI)
    for w, scale, zero_point, code, position in zip(
        *(part.flatten().tolist() for part in (*columns, found)), strict=True
    ):
        exact = 16 * (w / scale + zero_point - code + 0.5)
        if abs(exact - round(exact)) > 1e-3:  # nearer to an edge, float32 may come to lie on the other side
            assert position == slow_position(w, scale, zero_point, code)
    again_OI = weight_at_positions(packed, weight)
    assert torch.equal(quantize(again_OI, weight.scale_OG, weight.zero_point_OG.float(), scheme), weight.codes_OI)
    assert torch.equal(pack_positions(again_OI, weight), packed)
    if bits <= 4:  # code and position in one byte are the same weights
        bytes_OI, zero_points_OG = to_bytes(weight_OI, weight), weight.zero_point_OG.float()
        assert torch.equal(bytes_OI >> 4, weight.codes_OI)
        assert torch.equal(from_bytes(bytes_OI, weight.scale_OG, zero_points_OG), again_OI)
    moved_OI = ((again_OI.double() - weight_OI.double()) / scales).abs()
    inside = (weight_OI / scales - (weight.codes_OI.float() - zero_points)).abs() <= 0.5
    assert moved_OI[inside].max() <= 1 / 32 + 1e-4


def test_the_positions_of_one_row_by_hand() -> None:
    """Scale 1, zero point 4: 0.26 lies 12 whole sixteenths above the lower edge of the cell of code 4."""
    weight_OI = torch.tensor([[0.26, -0.5, -1.49, 0.0, -9.0, 20.0]])
    codes_OI = torch.tensor([[4, 4, 3, 4, 0, 15]], dtype=torch.uint8)
    weight = QuantizedWeight(codes_OI, torch.ones(1, 1), torch.tensor([[4]], dtype=torch.uint8), QuantScheme(4, None))
    packed = pack_positions(weight_OI, weight)
    assert packed.tolist() == [[0x0C, 0x80, 0xF0]]
    assert weight_at_positions(packed, weight).tolist() == [[0.28125, -0.46875, -1.46875, 0.03125, -4.46875, 11.46875]]


@pytest.mark.parametrize("columns", [1, 3])
def test_rows_of_an_odd_length_are_padded(columns: int) -> None:
    weight_OI = torch.linspace(-1, 1, 2 * columns).view(2, columns)
    weight = quantized(weight_OI, QuantScheme(8, None, symmetric=True), 1.0)
    packed = pack_positions(weight_OI, weight)
    assert packed.shape == (2, (columns + 1) // 2)
    assert (weight_at_positions(packed, weight) - weight_OI).abs().max() <= weight.scale_OG.max() / 32 + 1e-6
