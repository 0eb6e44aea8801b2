"""QuantizedWeight, and packing compared with bytes written by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_nibbles, unpack_nibbles


def quantized(scheme: QuantScheme) -> QuantizedWeight:
    weight = torch.randn(64, 128)
    scale, zero_point = min_max_qparams(weight, scheme)
    return QuantizedWeight(quantize(weight, scale, zero_point, scheme), scale, zero_point.byte(), scheme)


def test_packed_bytes_have_the_even_position_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 3, 12]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F], [0x78, 0xC3]]


@settings(max_examples=30, deadline=None)
@given(leading=st.lists(st.integers(0, 4), max_size=3), pairs=st.integers(0, 9), seed=st.integers(0, 1000))
def test_packing_round_trips_for_any_even_shape(leading: list[int], pairs: int, seed: int) -> None:
    shape = (*leading, 2 * pairs)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*leading, pairs))
    assert torch.equal(unpack_nibbles(packed), codes)


def test_every_pair_of_codes_has_a_byte_of_its_own() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(pairs)), pairs)
    assert len(pack_nibbles(pairs).unique()) == 256


@pytest.mark.parametrize("width", [1, 3, 7])
def test_an_odd_number_of_codes_is_refused(width: int) -> None:
    with pytest.raises(AssertionError, match=f"needs an even number of codes per row, got {width}"):
        pack_nibbles(torch.zeros(2, width, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (QuantScheme(), 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2),
        (QuantScheme(symmetric=True), 64 * 128 // 2 + 64 * 2 * 2),
        (INT8_PER_ROW, 64 * 128 + 64 * 2),
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
