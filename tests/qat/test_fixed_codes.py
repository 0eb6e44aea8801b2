"""FixedCodesLinear: absorption to the last bit, and the gradient of the scales compared with float64 autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.qat.base import cached_weights
from nybble.qat.fixed_codes import FixedCodesLinear
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.qat_layers import DTYPES, fixed_codes_layer, saved_tensor_sizes


@settings(max_examples=20, deadline=None)
@given(
    outputs=st.integers(1, 20),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_absorbed_weight_is_that_of_the_forward(
    outputs: int, groups: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    layer = fixed_codes_layer((outputs, 16 * groups), dtype, bias, seed=seed)
    inputs = torch.randn(5, 3, 16 * groups).to(dtype)
    absorbed = F.linear(inputs, layer.absorb().dequantize().to(dtype), layer.bias)
    assert torch.equal(layer(inputs), absorbed)
    with cached_weights([layer], flush=False):
        assert torch.equal(layer(inputs), absorbed)
    with torch.no_grad():
        assert torch.equal(layer(inputs), absorbed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_computed_in_16_bits_equals_the_cast_from_float32(dtype: torch.dtype) -> None:
    """Every code with every zero point, and scales of all mantissas over the whole range."""
    mantissas = torch.arange(64, 128) / 128
    scales = torch.cat([mantissas * 2.0**exponent for exponent in (-13, -8, -5, 0, 11)])
    scale, zero_point = (part.reshape(-1, 1) for part in torch.meshgrid(scales, torch.arange(16.0), indexing="ij"))
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scale), 1)
    quantized = QuantizedWeight(codes, scale, zero_point.to(torch.uint8), QuantScheme(group_size=16))
    layer = FixedCodesLinear(quantized, None, dtype, None)
    assert torch.equal(layer.compute_weight(), layer.absorb().dequantize().to(dtype))


def test_codes_are_shared_with_the_compressed_weight() -> None:
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    quantized = QuantizedWeight(codes, torch.ones(4, 1), codes[:, :1], QuantScheme(group_size=16))
    assert FixedCodesLinear(quantized, None, torch.float32, None).codes.data_ptr() == codes.data_ptr()


def reference_gradient(layer: FixedCodesLinear, inputs: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of log_scale_shift by float64 autograd of the formulas at the top of fixed_codes.py."""
    shift = layer.log_scale_shift.detach().double().requires_grad_()
    exact_scale = layer.init_scale.double() * shift.exp()
    scale = exact_scale + (layer.scale_OG().detach().double() - exact_scale).detach()
    centered = layer.codes.double().unflatten(1, (scale.shape[1], -1)) - layer.zero_point.double()[..., None]
    (F.linear(inputs.double(), (centered * scale[..., None]).flatten(1)) * upstream.double()).sum().backward()
    return shift.grad


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("dtype", "upstream_size", "tolerance"),
    [
        (torch.float32, 1.0, 1e-5),
        (torch.bfloat16, 1.0, 2e-2),  # 8 significant bits: each product is off by up to 0.4 %
        (torch.float16, 1e-6, 3e-2),  # the products with weights would underflow in float16
    ],
)
def test_gradient_of_scales_equals_the_float64_reference(
    dtype: torch.dtype, upstream_size: float, tolerance: float, cached: bool
) -> None:
    layer = fixed_codes_layer(dtype=dtype)
    inputs, upstream = torch.randn(2, 7, 64).to(dtype), (upstream_size * torch.randn(2, 7, 24)).to(dtype)
    inputs.requires_grad_()
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in range(2):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    expected = reference_gradient(layer, inputs.detach().flatten(0, 1), upstream.flatten(0, 1))
    assert (layer.log_scale_shift.grad.double() - expected).norm() < tolerance * expected.norm()
    expected_inputs = torch.stack([part @ layer.compute_weight() for part in upstream])
    assert torch.equal(inputs.grad, expected_inputs)


def test_the_cached_weight_accumulates_no_gradient() -> None:
    layer = fixed_codes_layer((64, 128))
    with cached_weights([layer]):
        layer(torch.randn(2, 128, requires_grad=True)).sum().backward()
        assert layer.cached_weight is not None
        assert layer.cached_weight.grad is None


def test_neither_parameters_nor_saved_tensors_have_the_size_of_a_weight() -> None:
    layer = fixed_codes_layer((64, 128))
    assert max(saved_tensor_sizes(layer, torch.randn(2, 128, requires_grad=True))) < 64 * 128
    assert max(parameter.numel() for parameter in layer.parameters()) < 64 * 128


def test_frozen_scales_get_no_gradient() -> None:
    layer = fixed_codes_layer()
    layer.log_scale_shift.requires_grad_(False)
    inputs = torch.randn(2, 64, requires_grad=True)
    layer(inputs).sum().backward()
    assert layer.log_scale_shift.grad is None
    assert inputs.grad is not None
