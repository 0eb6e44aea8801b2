"""Straight-through gradients, compared with autograd of a plain reference and with finite differences."""

import pytest
import torch
from torch import Tensor

from nybble.quant.fake_quant import centered_codes, fake_quantize, round_scale_ste
from nybble.quant.grid import SCALE_MAX, SCALE_MIN, dequantize, min_max_qparams, quantize, round_scale, to_groups
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.helpers import reference_quantizer as slow

SCHEMES = [
    QuantScheme(group_size=16),
    QuantScheme(group_size=None),
    QuantScheme(symmetric=True, group_size=32),  # about half of its scales are negative
    QuantScheme(2, 16, symmetric=True),
    INT8_PER_ROW,
]


def partly_clipped(scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [5, 64], scales and zero points of a narrower range, so that some codes are clipped; float64."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return weight, *min_max_qparams(weight * 0.6, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_of_fake_quantize_equal_autograd_of_the_reference(scheme: QuantScheme) -> None:
    ours = [tensor.clone().requires_grad_() for tensor in partly_clipped(scheme)]
    reference = [tensor.clone().requires_grad_() for tensor in partly_clipped(scheme)]
    output, expected = fake_quantize(*ours, scheme), slow.fake_quantize(*reference, scheme.bits)
    assert torch.equal(output, expected)
    upstream = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output.backward(upstream)
    expected.backward(upstream)
    weight, scale, zero_point = (tensor.grad for tensor in ours)
    assert 0 < (weight == 0).sum() < weight.numel(), "some codes must be clipped and some not"
    # Autograd multiplies with the scale and divides by it, which costs one rounding.
    torch.testing.assert_close(weight, reference[0].grad, rtol=1e-15, atol=0)
    # The order of the sums over a group differs.
    torch.testing.assert_close(scale, reference[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(zero_point, reference[2].grad, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_scale_equals_finite_differences_where_codes_are_clipped() -> None:
    scheme = QuantScheme(group_size=8)
    # Every code is clipped, so no rounding makes the function piecewise constant.
    weight = torch.tensor([[50.0, -50, 60, -60, 70, -70, 80, -80]], dtype=torch.float64)
    scale = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([[7.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: fake_quantize(weight, s, zero_point, scheme), (scale,))


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_requires_a_gradient_gets_one(trained: int) -> None:
    scheme = QuantScheme(group_size=16)
    tensors = list(partly_clipped(scheme))
    tensors[trained].requires_grad_()
    fake_quantize(*tensors, scheme).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == trained for place in range(3)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_centered_codes_are_the_codes_minus_the_zero_point(scheme: QuantScheme) -> None:
    weight, scale, zero_point = partly_clipped(scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    centered = centered_codes(weight, scale, zero_point, scheme)
    assert torch.equal(centered, to_groups(codes, scale.shape[1]) - zero_point[..., None])
    assert torch.equal((centered * scale[..., None]).flatten(1), dequantize(codes, scale, zero_point))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradient_of_centered_codes_passes_where_codes_are_not_clipped(scheme: QuantScheme) -> None:
    weight, scale, zero_point = partly_clipped(scheme)
    upstream = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, reference = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    centered_codes(ours, scale, zero_point, scheme).flatten(1).backward(upstream)
    unscaled = slow.fake_quantize(reference, scale, zero_point, scheme.bits).unflatten(1, (scale.shape[1], -1))
    (unscaled / scale[..., None]).flatten(1).backward(upstream)
    assert 0 < (ours.grad == 0).sum() < weight.numel(), "some codes must be clipped and some not"
    # The reference multiplies with the scale and divides by it, which costs a few roundings.
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-14, atol=0)


def test_rounded_scale_passes_its_gradient_straight_through() -> None:
    scale = torch.rand(4, 3, requires_grad=True)
    rounded, upstream = round_scale_ste(scale), torch.randn(4, 3)
    assert torch.equal(rounded, round_scale(scale.detach()))
    assert not torch.equal(rounded, scale)
    rounded.backward(upstream)
    assert torch.equal(scale.grad, upstream)


def test_a_scale_is_not_taken_further_beyond_the_grid() -> None:
    sizes = torch.tensor([SCALE_MIN / 2, SCALE_MIN / 2, 1.0, 1.0, SCALE_MAX * 2, SCALE_MAX * 2])
    upstream, expected = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]), [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]
    for sign in (1.0, -1.0):
        scale = (sign * sizes).requires_grad_()
        round_scale_ste(scale).backward(sign * upstream)
        assert scale.grad is not None
        assert (sign * scale.grad).tolist() == expected
