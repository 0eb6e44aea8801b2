"""QuantizedWeight, and packing compared with bytes written by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import BITS, CODES_PER_UNIT, INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes


def quantized(scheme: QuantScheme) -> QuantizedWeight:
    weight = torch.randn(64, 128)
    scale, zero_point = min_max_qparams(weight, scheme)
    return QuantizedWeight(quantize(weight, scale, zero_point, scheme), scale, zero_point.byte(), scheme)


def slow_bytes(codes: list[int], bits: int) -> list[int]:
    """The codes as one long number, the first in its lowest bits, in bytes from the lowest."""
    number = sum(code << bits * i for i, code in enumerate(codes))
    return list(number.to_bytes(len(codes) * bits // 8, "little"))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0], [0x39]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
        (4, [1, 2, 15, 0, 8, 7, 3, 12], [0x21, 0x0F, 0x78, 0xC3]),
        (8, [1, 255], [1, 255]),
    ],
)
def test_packed_bytes_have_the_first_code_in_the_lowest_bits(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed == slow_bytes(codes, bits)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    leading=st.lists(st.integers(0, 4), max_size=2),
    units=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_packing_round_trips_for_any_shape(bits: int, leading: list[int], units: int, seed: int) -> None:
    width = units * CODES_PER_UNIT[bits]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*leading, width), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*leading, width * bits // 8))
    assert torch.equal(unpack_codes(packed, bits), codes)
    by_row = codes.reshape(-1, width or 1), packed.reshape(-1, max(1, width * bits // 8))
    for row, row_bytes in zip(*by_row, strict=True):
        assert row_bytes.tolist() == slow_bytes(row.tolist(), bits)


def test_every_unit_of_codes_has_bytes_of_its_own() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(pairs, 4), 4), pairs)
    assert len(pack_codes(pairs, 4).unique()) == 256


@pytest.mark.parametrize(("bits", "width", "unit"), [(4, 1, 2), (4, 7, 2), (2, 6, 4), (3, 12, 8)])
def test_codes_that_do_not_fill_their_bytes_are_refused(bits: int, width: int, unit: int) -> None:
    with pytest.raises(AssertionError, match=f"needs a multiple of {unit} {bits}-bit codes per row, got {width}"):
        pack_codes(torch.zeros(2, width, dtype=torch.uint8), bits)


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        (QuantScheme(3, 64), QuantScheme(4, 64, symmetric=True)),
        (QuantScheme(2, 32), QuantScheme(4, 32, symmetric=True)),
        (QuantScheme(2, 32, symmetric=True), QuantScheme(3, 32, symmetric=True)),
        (QuantScheme(3, None), QuantScheme(4, 32)),
        (QuantScheme(4, 64), QuantScheme(8, 32, symmetric=True)),
        (QuantScheme(4, 64), QuantScheme(4, 16)),
        (INT8_PER_ROW, QuantScheme(8, 64, symmetric=True)),
    ],
    ids=str,
)
def test_a_scheme_that_is_wider_holds_the_same_weights(scheme: QuantScheme, target: QuantScheme) -> None:
    weight = quantized(scheme)
    recoded = weight.recoded(target)
    assert recoded.scheme == target
    assert recoded.scale_OG.shape == recoded.zero_point_OG.shape == (64, target.num_groups(128))
    assert recoded.codes_OI.dtype == recoded.zero_point_OG.dtype == torch.uint8
    assert int(recoded.codes_OI.max()) <= target.max_code
    assert torch.equal(recoded.dequantize(), weight.dequantize())
    assert weight.recoded(scheme) is weight


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        (QuantScheme(4, 64), QuantScheme(4, 64, symmetric=True)),  # code - zero point reaches 15
        (QuantScheme(4, 64), QuantScheme(3, 64)),
        (QuantScheme(4, 64), QuantScheme(4, 128)),
        (QuantScheme(4, 64), QuantScheme(4, None)),
        (QuantScheme(3, 64, symmetric=True), QuantScheme(4, 64)),
    ],
    ids=str,
)
def test_a_scheme_that_cannot_hold_the_weights_is_refused(scheme: QuantScheme, target: QuantScheme) -> None:
    weight = quantized(scheme)
    weight.codes_OI[0, 0], weight.zero_point_OG[0, 0] = scheme.max_code, 0
    with pytest.raises(AssertionError, match="must"):
        weight.recoded(target)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (QuantScheme(), 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2),
        (QuantScheme(symmetric=True), 64 * 128 // 2 + 64 * 2 * 2),
        (INT8_PER_ROW, 64 * 128 + 64 * 2),
        (QuantScheme(3, 32), 64 * 128 * 3 // 8 + 64 * 4 * 2 + 64 * 4 * 3 // 8),
        (QuantScheme(2, 32, symmetric=True), 64 * 128 // 4 + 64 * 4 * 2),
    ],
    ids=str,
)
def test_exported_bytes_are_codes_scales_and_zero_points(scheme: QuantScheme, expected: int) -> None:
    assert quantized(scheme).nbytes == expected


def test_dequantized_weight_is_scale_times_centered_code() -> None:
    weight = QuantizedWeight(
        torch.tensor([[0, 15, 7, 8]], dtype=torch.uint8),
        torch.tensor([[0.5, 2.0]]),
        torch.tensor([[8, 7]], dtype=torch.uint8),
        QuantScheme(group_size=2),
    )
    assert weight.dequantize().tolist() == [[-4.0, 3.5, 0.0, 2.0]]
    assert weight.dequantize().dtype == torch.float32


def test_moving_to_a_device_moves_all_tensors_and_copies_none_that_is_there() -> None:
    weight = quantized(QuantScheme())
    moved = weight.to("meta")
    assert {moved.codes_OI.device.type, moved.scale_OG.device.type, moved.zero_point_OG.device.type} == {"meta"}
    assert moved.scheme == weight.scheme
    assert weight.to("cpu").codes_OI is weight.codes_OI
