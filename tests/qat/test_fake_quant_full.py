"""FakeQuantizedFullLinear: absorption to the last bit, and gradients compared with float64 autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nybble.compression.init import QuantizedInit
from nybble.qat.base import cached_weights
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers import reference_quantizer as slow
from tests.helpers.qat_layers import DTYPES, INPUTS, OUTPUTS, SCHEME, saved_tensor_sizes, weight_and_bias


def full_layer(
    dtype: torch.dtype = torch.float32, trained: bool = True, seed: int = 0, scheme: QuantScheme = SCHEME
) -> tuple[FakeQuantizedFullLinear, QuantizedInit]:
    """A layer compressed by round-to-nearest, and its start; `trained` moves weights by 0.3 codes, scales by 10 %."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI, bias_O = weight_and_bias((OUTPUTS, INPUTS), dtype, True, generator)
    init = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))
    layer = FakeQuantizedFullLinear(init, scheme, bias_O, dtype, generator)
    if trained:
        with torch.no_grad():
            layer.latent += torch.randn(layer.latent.shape, generator=generator) * 0.3
        nn.init.normal_(layer.log_scale_shift, 0, 0.1, generator=generator)
    return layer, init


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), dtype=st.sampled_from(DTYPES), trained=st.booleans(), seed=st.integers(0, 1000)
)
def test_the_absorbed_weight_is_that_of_the_forward(bits: int, dtype: torch.dtype, trained: bool, seed: int) -> None:
    scheme = QuantScheme(bits, 16, symmetric=bits == 8)
    layer, init = full_layer(dtype, trained, seed, scheme)
    inputs = torch.randn(5, 3, INPUTS).to(dtype)
    absorbed = layer.absorb()
    expected = F.linear(inputs, absorbed.dequantize().to(dtype), layer.bias)
    assert torch.equal(layer(inputs), expected)
    with cached_weights([layer], flush=False):
        assert torch.equal(layer(inputs), expected)
    with torch.no_grad():
        assert torch.equal(layer(inputs), expected)
    if not trained:
        assert torch.equal(absorbed.codes_OI, init.quantized(scheme).codes_OI)
        assert torch.equal(absorbed.scale_OG, init.scale_OG)


def test_a_trained_scale_changes_no_code_and_a_trained_weight_does() -> None:
    before, after = (full_layer(trained=trained)[0].absorb() for trained in (False, True))
    changed = (before.codes_OI != after.codes_OI).float().mean()
    assert 0.1 < changed < 0.4
    layer, _ = full_layer(trained=False)
    with torch.no_grad():
        layer.log_scale_shift.add_(0.3)
    assert torch.equal(layer.absorb().codes_OI, before.codes_OI)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("scales_trained", [True, False])
def test_gradients_equal_the_float64_reference(cached: bool, scales_trained: bool) -> None:
    layer, _ = full_layer()
    layer.log_scale_shift.requires_grad_(scales_trained)
    inputs, upstream = torch.randn(7, INPUTS), torch.randn(7, OUTPUTS)
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in (slice(0, 2), slice(2, 7)):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    latent, shift = (p.detach().double().requires_grad_() for p in (layer.latent, layer.log_scale_shift))
    exact_scale = layer.init_scale.double() * shift.exp()
    scale = exact_scale + (layer.scale_OG().detach().double() - exact_scale).detach()
    unit = torch.ones_like(scale)
    rounded = slow.fake_quantize(latent, unit.detach(), layer.zero_point.double(), SCHEME.bits)
    weight = (rounded.unflatten(1, (unit.shape[1], -1)) * (scale / unit.detach())[..., None]).flatten(1)
    (F.linear(inputs.double(), weight) * upstream.double()).sum().backward()
    assert (latent.grad == 0).any(), "some codes are clipped"
    # float32 sums of 7 * 64 products
    torch.testing.assert_close(layer.latent.grad.double(), latent.grad, rtol=1e-4, atol=1e-5)
    if scales_trained:
        torch.testing.assert_close(layer.log_scale_shift.grad.double(), shift.grad, rtol=1e-4, atol=1e-5)
    else:
        assert layer.log_scale_shift.grad is None


def test_the_pull_moves_weights_towards_the_values_of_their_codes() -> None:
    layer, _ = full_layer()
    before, codes = layer.latent.detach().double(), layer.absorb().codes_OI
    zero_points = layer.zero_point.repeat_interleave(SCHEME.group_size or 1, 1)
    targets = codes.double() - zero_points
    layer.pull_to_codes(0.25)
    torch.testing.assert_close(layer.latent.detach().double(), before + 0.25 * (targets - before), rtol=1e-6, atol=1e-7)
    assert torch.equal(layer.absorb().codes_OI, codes)
    layer.pull_to_codes(1.0)
    torch.testing.assert_close(layer.latent.detach().double(), targets, rtol=1e-6, atol=1e-7)


def test_without_cache_the_forward_saves_nothing_of_the_size_of_a_weight() -> None:
    layer, _ = full_layer()
    assert max(saved_tensor_sizes(layer, torch.randn(2, INPUTS, requires_grad=True)), default=0) <= 2 * INPUTS


def test_the_latent_weight_in_units_of_the_scale_has_the_codes_of_the_layer() -> None:
    layer, init = full_layer()
    quantized = layer.absorb()
    assert torch.equal(QuantizedInit.with_codes(quantized, layer.latent_OI(), torch.float32).quantized(SCHEME).codes_OI,
                       quantized.codes_OI)  # fmt: skip
    untrained, init = full_layer(trained=False)
    torch.testing.assert_close(untrained.latent_OI(), init.weight_OI, rtol=1e-6, atol=0)
