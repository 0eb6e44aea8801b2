"""The arithmetic against slow float64 loops, finite differences and autograd of a plain reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import OptionError
from nybble.quant import fake_quant, scheme
from nybble.quant import grid as quant_grid
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.reference import quantizer as slow

GRIDS = [
    QuantScheme(),
    QuantScheme(group_size=16),
    QuantScheme(group_size=None),
    QuantScheme(symmetric=True, group_size=32),
    INT8_PER_ROW,
]


def random_weights(rows: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
    which=st.integers(0, len(GRIDS) - 1),
)
def test_equals_the_slow_loops(seed: int, spread: float, offset: float, which: int) -> None:
    scheme = GRIDS[which]
    weight = (random_weights(3, 64, seed) + offset) * spread
    scale, zero = quant_grid.min_max_qparams(weight, scheme)
    codes = quant_grid.quantize(weight, scale, zero, scheme)
    back = quant_grid.dequantize(codes, scale, zero)
    assert torch.equal(quant_grid.quantize_dequantize(weight, scale, zero, scheme), back)
    width = 64 // scale.shape[1]
    for o in range(3):
        for k in range(scale.shape[1]):
            row = weight[o, k * width : (k + 1) * width].tolist()
            expected_scale, expected_zero = slow.min_max(row, scheme.bits, scheme.symmetric)
            assert (scale[o, k].item(), zero[o, k].item()) == (expected_scale, expected_zero)
            for i, w in enumerate(row):
                c = slow.code(w, expected_scale, expected_zero, scheme.bits)
                assert codes[o, k * width + i].item() == c
                assert back[o, k * width + i].item() == expected_scale * (c - expected_zero)


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(1e-9, 1e9))
def test_scale_has_seven_bits_in_the_normal_fp16_range(scale: float) -> None:
    rounded = quant_grid.round_scale(torch.tensor([scale], dtype=torch.float64)).item()
    assert rounded == slow.round_scale(scale)
    mantissa, _ = torch.frexp(torch.tensor(rounded, dtype=torch.float64))
    assert (mantissa * 2**7).item().is_integer()
    assert 2.0**-14 <= rounded <= 65024.0


def test_the_worked_number_of_the_docstring() -> None:
    assert quant_grid.round_scale(torch.tensor(0.1)).item() == 0.099609375 == 102 / 1024


def test_scale_weight_and_minimum_are_exact_in_fp16() -> None:
    """Contract 2: every 7-bit mantissa, over exponents of real scales, times every code difference from -15 to 15."""
    mantissas = torch.arange(64, 128, dtype=torch.float64) / 128
    scale = (mantissas[:, None] * 2.0 ** torch.arange(-9, 6, dtype=torch.float64)).flatten()
    assert torch.equal(quant_grid.round_scale(scale), scale)
    products = scale[:, None] * torch.arange(-15, 16, dtype=torch.float64)
    assert torch.equal(products.half().double(), products)


def test_shifts_within_a_cell_change_no_scale_and_fill_the_cell() -> None:
    scale = quant_grid.round_scale(
        torch.cat([torch.logspace(-4, 2, 20_000), 2.0 ** torch.arange(-12, 8), torch.tensor([0.0])])
    )
    shift = quant_grid.shift_within_cell(scale, torch.Generator().manual_seed(0))
    assert torch.equal(quant_grid.round_scale(scale * shift.exp()), scale)
    place = (
        scale * shift.exp().sub(1) * 2.0**quant_grid.SCALE_BITS / torch.exp2(torch.frexp(scale).exponent)
    )  # -0.5 to 0.5 of a cell
    share = torch.histc(place, bins=10, min=-0.5, max=0.5) / len(place)
    assert share.min() > 0.08
    assert share.max() < 0.12
    assert torch.equal(shift, quant_grid.shift_within_cell(scale, torch.Generator().manual_seed(0)))


def test_zero_weights_give_zero_and_a_valid_scale() -> None:
    scale, zero = quant_grid.min_max_qparams(torch.zeros(2, 64), QuantScheme())
    assert torch.equal(
        quant_grid.dequantize(quant_grid.quantize(torch.zeros(2, 64), scale, zero, QuantScheme()), scale, zero),
        torch.zeros(2, 64),
    )
    assert (scale == 2.0**-14).all()


def test_rounding_error_is_at_most_half_a_step_and_the_scale_rounding() -> None:
    weight = random_weights(16, 256, 0)
    scale, zero = quant_grid.min_max_qparams(weight, QuantScheme())
    error = (quant_grid.dequantize(quant_grid.quantize(weight, scale, zero, QuantScheme()), scale, zero) - weight).abs()
    # 0.5 step of rounding, 0.5 of rounding the zero, 15 steps * 2**-7 relative of rounding the scale
    assert (quant_grid.to_groups(error, 4) / scale[..., None]).max() <= 0.5 + 0.5 + 15 * 2**-7


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_gradients_equal_autograd_of_the_plain_reference(scheme: QuantScheme) -> None:
    weight = random_weights(5, 64, 1)
    scale, zero = quant_grid.min_max_qparams(weight * 0.6, scheme)  # a narrower range, so that some codes are clipped
    ours = [t.clone().requires_grad_() for t in (weight, scale, zero)]
    theirs = [t.clone().requires_grad_() for t in (weight, scale, zero)]
    upstream = random_weights(5, 64, 2)
    out, expected = fake_quant.fake_quantize(*ours, scheme), slow.fake_quantize(*theirs, scheme.bits)
    assert torch.equal(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    clipped = (ours[0].grad == 0).sum()
    assert 0 < clipped < weight.numel()
    torch.testing.assert_close(
        ours[0].grad, theirs[0].grad, rtol=1e-15, atol=0
    )  # autograd multiplies and divides by scale: one rounding
    for mine, reference in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-12, atol=1e-12)  # sums in another order


def test_gradient_of_scale_equals_finite_differences_where_codes_are_clipped() -> None:
    scheme = QuantScheme(group_size=8)
    weight = torch.tensor(
        [[50.0, -50, 60, -60, 70, -70, 80, -80]], dtype=torch.float64
    )  # all clipped: no rounding between
    scale, zero = (
        torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[7.0]], dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda s: fake_quant.fake_quantize(weight, s, zero, scheme), (scale,))


def test_codes_move_across_a_rounding_boundary_only() -> None:
    scheme = QuantScheme(group_size=2)
    scale, zero = torch.tensor([[1.0]]), torch.tensor([[8.0]])
    assert quant_grid.quantize(torch.tensor([[0.49, 0.51]]), scale, zero, scheme).tolist() == [[8, 9]]
    assert quant_grid.quantize(torch.tensor([[0.5, 1.5]]), scale, zero, scheme).tolist() == [
        [8, 10]
    ]  # half to even, before zero is added
    assert quant_grid.quantize(torch.tensor([[-99.0, 99.0]]), scale, zero, scheme).tolist() == [[0, 15]]


@pytest.mark.parametrize(
    ("features", "size", "choices"),
    [
        (100, 48, "10, 20, 25, 50, 100"),
        (576, 128, "16, 32, 64"),
        (192, 0, "16, 32, 64"),
        (64, -4, "16, 32, 64"),
        (7, 2, "1, 7"),
        (4872, 64, "116, 168, 174, 203, 232"),
    ],
)
def test_group_size_error_names_layer_and_choices(features: int, size: int, choices: str) -> None:
    with pytest.raises(OptionError) as error:
        scheme.check_group_size("model.layers.0.mlp.up_proj", features, size)
    assert str(error.value) == (
        f"in_features must be a multiple of group_size: layer model.layers.0.mlp.up_proj has in_features={features}, got group_size={size}; choose {choices}"
    )
