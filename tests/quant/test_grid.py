"""The arithmetic of quantized weights, compared with slow float64 loops and with fp16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.grid import (
    SCALE_BITS,
    at_least_float32,
    dequantize,
    min_max_qparams,
    qparams_from_range,
    quantize,
    quantize_dequantize,
    random_log_shift,
    round_scale,
    to_groups,
)
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.helpers import reference_quantizer as slow

SCHEMES = [
    QuantScheme(),
    QuantScheme(group_size=16),
    QuantScheme(group_size=None),
    QuantScheme(symmetric=True, group_size=32),
    INT8_PER_ROW,
    QuantScheme(2, 32),
    QuantScheme(2, 32, symmetric=True),
    QuantScheme(3, 64),
    QuantScheme(3, None, symmetric=True),
    QuantScheme(8, 32, symmetric=True),
]


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    factor=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
    scheme=st.sampled_from(SCHEMES),
)
def test_quantizer_equals_the_slow_loops(seed: int, factor: float, offset: float, scheme: QuantScheme) -> None:
    weight = (random_weight(2, 64, seed) + offset) * factor
    scale, zero_point = min_max_qparams(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    weight_back = dequantize(codes, scale, zero_point)
    assert codes.dtype == torch.uint8
    assert torch.equal(quantize_dequantize(weight, scale, zero_point, scheme), weight_back)
    for o, row in enumerate(weight.reshape(2, scale.shape[1], -1).tolist()):
        for g, group in enumerate(row):
            expected_scale, expected_zero_point = slow.min_max(group, scheme.bits, scheme.symmetric)
            assert (scale[o, g].item(), zero_point[o, g].item()) == (expected_scale, expected_zero_point)
            expected_codes = [slow.code(w, expected_scale, expected_zero_point, scheme.bits) for w in group]
            assert to_groups(codes, scale.shape[1])[o, g].tolist() == expected_codes
            expected_weight = [expected_scale * (c - expected_zero_point) for c in expected_codes]
            assert to_groups(weight_back, scale.shape[1])[o, g].tolist() == expected_weight


@settings(max_examples=100, deadline=None)
@given(size=st.floats(1e-9, 1e9), sign=st.sampled_from([1, -1]))
def test_rounded_scale_has_seven_bits_in_the_normal_range_of_fp16(size: float, sign: int) -> None:
    rounded = round_scale(torch.tensor([sign * size], dtype=torch.float64))
    assert rounded.item() == slow.round_scale(sign * size) == sign * slow.round_scale(size)
    assert (torch.frexp(rounded).mantissa * 2**7).item().is_integer()
    assert 2.0**-14 <= abs(rounded.item()) <= 65024.0


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-9, 1e9), sign=st.sampled_from([1, -1]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rounding_a_scale_is_idempotent(scale: float, sign: int, dtype: torch.dtype) -> None:
    rounded = round_scale(torch.tensor([sign * scale], dtype=dtype))
    assert torch.equal(round_scale(rounded), rounded)
    assert rounded.dtype == dtype


def test_round_scale_computes_the_example_of_its_docstring() -> None:
    assert round_scale(torch.tensor(0.1)).item() == 0.099609375 == 102 / 1024


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-9, 4000.0))  # 4000 * 15 is below the largest fp16 number
def test_products_of_scales_and_4_bit_codes_are_exact_in_fp16(scale: float) -> None:
    rounded = round_scale(torch.tensor(scale, dtype=torch.float64))
    products = rounded * torch.arange(-15, 16, dtype=torch.float64)
    assert torch.equal(products.half().double(), products)


def test_products_of_every_mantissa_are_exact_in_fp16() -> None:
    mantissas = torch.arange(64, 128, dtype=torch.float64) / 128
    scales = (mantissas[:, None] * 2.0 ** torch.arange(-13, 13, dtype=torch.float64)).flatten()
    assert torch.equal(round_scale(scales), scales)
    products = scales[:, None] * torch.arange(-15, 16, dtype=torch.float64)
    assert torch.equal(products.half().double(), products)


def test_products_of_8_bits_are_exact_in_float32_and_keep_their_codes_in_bfloat16() -> None:
    """Training and --init_from hold weights in 16 bits; a code that rounding moved would not be that of the run."""
    codes = torch.arange(256)
    for mantissa in range(64, 128):
        scale = torch.tensor([[mantissa / 2**12]], dtype=torch.float64)
        zero_point = torch.full_like(scale, 128)
        products = dequantize(codes[None].to(torch.uint8), scale, zero_point)
        assert torch.equal(products.float().double(), products)
        for dtype in (torch.bfloat16, torch.float16):
            again = quantize(products.to(dtype).double(), scale, zero_point, INT8_PER_ROW)
            assert torch.equal(again[0].long(), codes)


def test_random_log_shifts_change_no_scale_and_are_uniform() -> None:
    scale = round_scale(torch.cat([torch.logspace(-4, 2, 20_000), 2.0 ** torch.arange(-12, 8), torch.tensor([0.0])]))
    shift = random_log_shift(scale, torch.Generator().manual_seed(0))
    assert torch.equal(round_scale(scale * shift.exp()), scale)
    mirrored = random_log_shift(-scale, torch.Generator().manual_seed(0))
    assert torch.equal(round_scale(-scale * mirrored.exp()), -scale)
    assert mirrored.ne(0).float().mean() > 0.99
    interval = 2.0 ** (torch.frexp(scale).exponent - SCALE_BITS)
    position = scale * (shift.exp() - 1) / interval  # -0.5 to 0.5
    share = torch.histc(position, bins=10, min=-0.5, max=0.5) / len(position)
    assert share.min() > 0.08  # 0.1 expected, with a standard deviation of 0.002
    assert share.max() < 0.12


def test_random_log_shifts_depend_on_the_generator_only() -> None:
    scale = torch.ones(3, 4)
    shift = random_log_shift(scale, torch.Generator().manual_seed(0))
    assert torch.equal(shift, random_log_shift(scale, torch.Generator().manual_seed(0)))
    assert not torch.equal(shift, random_log_shift(scale, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_weight_farthest_from_zero_gets_the_outermost_symmetric_code(bits: int) -> None:
    """4 bits have -8 .. 7 steps: a negative scale turns them over where the largest weight is positive."""
    scheme = QuantScheme(bits, 4, symmetric=True)
    weight = torch.tensor([[-1.0, 0.25, 0.5, 0.75, 1.0, -0.25, -0.5, -0.75]])
    scale, zero_point = min_max_qparams(weight, scheme)
    assert scale.tolist() == [[1 / scheme.middle_code, -1 / scheme.middle_code]]
    codes = to_groups(quantize(weight, scale, zero_point, scheme), 2)
    assert torch.equal(codes[:, 0], codes[:, 1]), "a group and its mirror image have the same codes"
    rounded = quantize_dequantize(weight, scale, zero_point, scheme)
    assert rounded[0, [0, 4]].tolist() == [-1.0, 1.0]


def test_symmetric_codes_of_8_bits_have_positive_scales() -> None:
    scale, _ = min_max_qparams(torch.tensor([[0.5, 1.0], [-1.0, 0.5]]), INT8_PER_ROW)
    assert scale.flatten().tolist() == [slow.round_scale(1 / 127)] * 2


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(symmetric=True)], ids=str)
def test_zero_weights_stay_zero_and_get_the_smallest_scale(scheme: QuantScheme) -> None:
    weight = torch.zeros(2, 64)
    scale, zero_point = min_max_qparams(weight, scheme)
    assert (scale == 2.0**-14).all()
    assert torch.equal(quantize_dequantize(weight, scale, zero_point, scheme), weight)


def test_rounding_error_is_bounded() -> None:
    weight, scheme = random_weight(16, 256, 0), QuantScheme()
    scale, zero_point = min_max_qparams(weight, scheme)
    error = (quantize_dequantize(weight, scale, zero_point, scheme) - weight).abs()
    # In units of a scale: 0.5 from rounding the weight and, at the ends of the range, 0.5 from rounding the zero point
    # and 15 * 2^-7 from rounding the scale.
    assert (to_groups(error, 4) / scale[..., None]).max() <= 0.5 + 0.5 + 15 * 2**-7


def test_codes_are_rounded_half_to_even_before_the_zero_point_is_added() -> None:
    scheme, scale, zero_point = QuantScheme(group_size=2), torch.tensor([[1.0]]), torch.tensor([[7.0]])
    assert quantize(torch.tensor([[0.49, 0.51]]), scale, zero_point, scheme).tolist() == [[7, 8]]
    assert quantize(torch.tensor([[0.5, 1.5]]), scale, zero_point, scheme).tolist() == [[7, 9]]


def test_codes_are_clamped_to_the_scheme() -> None:
    scheme, scale, zero_point = QuantScheme(group_size=2), torch.tensor([[1.0]]), torch.tensor([[8.0]])
    assert quantize(torch.tensor([[-99.0, 99.0]]), scale, zero_point, scheme).tolist() == [[0, 15]]


@pytest.mark.parametrize(("low", "high", "zero_point"), [(1.0, 3.0, 0), (-3.0, -1.0, 15), (-1.0, 2.0, 5)])
def test_a_range_is_extended_to_contain_zero(low: float, high: float, zero_point: int) -> None:
    scale, found = qparams_from_range(torch.tensor([[low]]), torch.tensor([[high]]), QuantScheme())
    assert found.item() == zero_point
    assert scale.item() == slow.round_scale((max(high, 0) - min(low, 0)) / 15)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_computed_in_at_least_float32(dtype: torch.dtype, computed: torch.dtype) -> None:
    weight = random_weight(2, 64, 0).to(dtype)
    assert at_least_float32(weight).dtype == computed
    scale, zero_point = min_max_qparams(weight, QuantScheme())
    assert scale.dtype == zero_point.dtype == computed
