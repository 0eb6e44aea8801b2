"""FakeQuantizedRoundingLinear: absorption to the last bit, and gradients compared with float64 autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nybble.compression.init import QuantizedInit
from nybble.qat.base import cached_weights
from nybble.qat.fake_quant_rounding import FakeQuantizedRoundingLinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers import reference_quantizer as slow
from tests.helpers.qat_layers import DTYPES, INPUTS, OUTPUTS, SCHEME, weight_and_bias


def rounding_layer(
    dtype: torch.dtype = torch.float32, trained: bool = True, columns: int = INPUTS, scheme: QuantScheme = SCHEME
) -> tuple[FakeQuantizedRoundingLinear, QuantizedInit]:
    """A layer compressed by round-to-nearest, and its start; `trained` moves the scales that round by 10 %."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, bias_O = weight_and_bias((OUTPUTS, columns), dtype, True, generator)
    init = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))
    layer = FakeQuantizedRoundingLinear(init, scheme, bias_O, dtype, generator)
    if trained:
        nn.init.normal_(layer.rho, 0, 0.1, generator=generator)
        nn.init.normal_(layer.log_scale_shift, 0, 0.1, generator=generator)
    return layer, init


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_absorbed_weight_is_that_of_the_forward(dtype: torch.dtype) -> None:
    untrained, init = rounding_layer(dtype, trained=False)
    assert torch.equal(untrained.absorb().codes_OI, init.quantized(SCHEME).codes_OI)
    layer, _ = rounding_layer(dtype)
    changed = (layer.absorb().codes_OI != untrained.absorb().codes_OI).float().mean()
    assert 0.05 < changed < 0.5
    inputs = torch.randn(5, INPUTS).to(dtype)
    expected = F.linear(inputs, layer.absorb().dequantize().to(dtype), layer.bias)
    assert torch.equal(layer(inputs), expected)
    with cached_weights([layer], flush=False):
        assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize(("columns", "scheme"), [(INPUTS, SCHEME), (12, QuantScheme(4, 12))])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_equal_the_float64_reference(cached: bool, columns: int, scheme: QuantScheme) -> None:
    """12 columns: the last scale that rounds has four weights."""
    layer, _ = rounding_layer(columns=columns, scheme=scheme)
    inputs, upstream = torch.randn(7, columns), torch.randn(7, OUTPUTS)
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in (slice(0, 2), slice(2, 7)):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    rho, shift = (p.detach().double().requires_grad_() for p in (layer.rho, layer.log_scale_shift))
    init_scale = layer.init_scale.double()
    exact_scale = init_scale * shift.exp()
    scale = exact_scale + (layer.scale_OG().detach().double() - exact_scale).detach()
    factors = torch.stack([(-rho[:, i // 8]).exp() for i in range(columns)], dim=1)
    rounded = slow.fake_quantize(layer.weight.double() * factors, init_scale, layer.zero_point.double(), scheme.bits)
    weight = (rounded.unflatten(1, (init_scale.shape[1], -1)) * (scale / init_scale)[..., None]).flatten(1)
    (F.linear(inputs.double(), weight) * upstream.double()).sum().backward()
    # float32 sums of 7 * 64 products
    torch.testing.assert_close(layer.rho.grad.double(), rho.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.log_scale_shift.grad.double(), shift.grad, rtol=1e-4, atol=1e-5)
