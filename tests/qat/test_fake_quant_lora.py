"""FakeQuantizedLoRALinear: absorption to the last bit, and gradients compared with float64 autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.compression.init import QuantizedInit
from nybble.qat.base import cached_weights
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from tests.helpers import reference_quantizer as slow
from tests.helpers.qat_layers import DTYPES, SCHEME, fake_quant_layer, saved_tensor_sizes


def test_a_base_weight_of_one_byte_keeps_codes_and_adapters_move_it_from_its_position() -> None:
    exact, fixed = fake_quant_layer(trained=False), fake_quant_layer(trained=False)
    weight_OI, quantized = exact.base_OI(), exact.absorb()
    fixed.to_fixed_point()
    assert fixed.weight.dtype == torch.uint8
    assert fixed.weight.numel() == exact.weight.numel()
    assert torch.equal(fixed.absorb().codes_OI, quantized.codes_OI)
    distance = (fixed.base_OI() - weight_OI).abs() / quantized.scale_OG.repeat_interleave(SCHEME.group_size, 1)
    assert 0 < distance.median() < 1 / 50
    assert (distance < 1 / 32 + 1e-4).float().mean() > 0.99  # clipped codes may be further
    slow = fake_quant_layer(trained=False)
    slow.weight.data.copy_(fixed.base_OI())  # exact in float32
    inputs, upstream = torch.randn(7, slow.in_features), torch.randn(7, slow.out_features)
    for layer in (fixed, slow):
        torch.nn.init.normal_(layer.lora_b, 0, 0.1, generator=torch.Generator().manual_seed(1))
        (layer(inputs) * upstream).sum().backward()
    assert not torch.equal(fixed.absorb().codes_OI, quantized.codes_OI)
    for name, parameter in slow.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, fixed.get_parameter(name).grad), name


def test_codes_of_8_bits_leave_no_room_for_a_position() -> None:
    scheme, weight_OI = QuantScheme(8, 16, symmetric=True), torch.randn(24, 64)
    init = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))
    layer = FakeQuantizedLoRALinear(init, scheme, None, 8, torch.float32)
    layer.to_fixed_point()
    assert torch.equal(layer.base_OI(), weight_OI)


@settings(max_examples=25, deadline=None)
@given(
    outputs=st.integers(1, 20),
    groups=st.integers(1, 4),
    rank=st.integers(0, 6),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_absorbed_weight_is_that_of_the_forward_at_every_rank(
    outputs: int, groups: int, rank: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    layer = fake_quant_layer((outputs, 16 * groups), rank, dtype, bias, seed=seed)
    inputs = torch.randn(5, 3, 16 * groups).to(dtype)
    for active_rank in range(layer.rank + 1):
        layer.active_rank = active_rank
        absorbed = F.linear(inputs, layer.absorb().dequantize().to(dtype), layer.bias)
        assert torch.equal(layer(inputs), absorbed)
        with cached_weights([layer], flush=False):
            assert torch.equal(layer(inputs), absorbed)
        with torch.no_grad():
            assert torch.equal(layer(inputs), absorbed)
        layer.log_scale_shift.requires_grad_(False)
        assert torch.equal(layer(inputs), absorbed)
        layer.log_scale_shift.requires_grad_()


def test_adapters_change_codes() -> None:
    layer = fake_quant_layer()
    codes = []
    for active_rank in (0, 4, 8):
        layer.active_rank = active_rank
        codes.append(layer.absorb().codes_OI)
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[1], codes[2])


def test_a_trained_scale_changes_no_code() -> None:
    layer = fake_quant_layer()
    before = layer.absorb()
    with torch.no_grad():
        layer.log_scale_shift.add_(0.3)
    after = layer.absorb()
    assert torch.equal(after.codes_OI, before.codes_OI)
    assert (after.scale_OG > before.scale_OG).all()
    assert torch.equal(layer.fake_quantized_OI(), after.dequantize())


def test_an_untrained_layer_computes_with_the_compressed_weight() -> None:
    layer = fake_quant_layer(trained=False)
    scale, zero_point = min_max_qparams(layer.weight, SCHEME)
    expected = slow.fake_quantize(layer.weight.double(), scale.double(), zero_point.double(), SCHEME.bits)
    assert torch.equal(layer.fake_quantized_OI().double(), expected)
    assert layer.lora_a.detach().any(), "lora_a must not start at zero, else lora_b gets no gradient"


def test_adapters_and_scales_stay_in_float32() -> None:
    layer = fake_quant_layer(dtype=torch.bfloat16)
    trained = {name: parameter.dtype for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == dict.fromkeys(("log_scale_shift", "lora_a", "lora_b"), torch.float32)
    assert layer.weight.dtype == torch.bfloat16


def reference_gradients(layer: FakeQuantizedLoRALinear, inputs: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """float64 autograd of the formulas at the top of fake_quant_lora.py."""
    a, b, shift = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.log_scale_shift))
    init_scale, zero_point, rank = layer.init_scale.double(), layer.zero_point.double(), layer.active_rank
    exact_scale = init_scale * shift.exp()
    scale = exact_scale + (layer.scale_OG().detach().double() - exact_scale).detach()
    merged = layer.weight.double() + b[:, :rank] @ a[:rank]
    rounded = slow.fake_quantize(merged, init_scale, zero_point, SCHEME.bits)
    weight = (rounded.unflatten(1, (init_scale.shape[1], -1)) * (scale / init_scale)[..., None]).flatten(1)
    (F.linear(inputs.double(), weight) * upstream.double()).sum().backward()
    return {"lora_a": a.grad, "lora_b": b.grad, "log_scale_shift": shift.grad}


@pytest.mark.parametrize("active_rank", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_equal_the_float64_reference(active_rank: int, cached: bool) -> None:
    layer = fake_quant_layer()
    layer.active_rank = active_rank
    inputs, upstream = torch.randn(7, 64), torch.randn(7, 24)
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in (slice(0, 2), slice(2, 7)):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    for name, expected in reference_gradients(layer, inputs, upstream).items():
        gradient = getattr(layer, name).grad
        if active_rank == 0 and name != "log_scale_shift":
            assert gradient is None or not gradient.any()
        else:
            # float32 sums of 7 * 64 products
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_inactive_ranks_get_no_gradient() -> None:
    layer = fake_quant_layer()
    layer.active_rank = 3
    layer(torch.randn(2, 64)).sum().backward()
    assert not layer.lora_a.grad[3:].any()
    assert layer.lora_a.grad[:3].any()


@pytest.mark.parametrize("scales_trained", [True, False])
def test_the_input_gets_the_gradient_of_the_quantized_weight(scales_trained: bool) -> None:
    layer = fake_quant_layer()
    layer.log_scale_shift.requires_grad_(scales_trained)
    inputs, upstream = torch.randn(3, 64, requires_grad=True), torch.randn(3, 24)
    (layer(inputs) * upstream).sum().backward()
    torch.testing.assert_close(inputs.grad, upstream @ layer.fake_quantized_OI().detach())


@pytest.mark.parametrize("active_rank", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_with_frozen_scales_adapters_get_the_gradient_of_the_unrounded_weight(active_rank: int, cached: bool) -> None:
    layer = fake_quant_layer()
    layer.active_rank = active_rank
    layer.log_scale_shift.requires_grad_(False)
    inputs, upstream = torch.randn(2, 7, 64), torch.randn(2, 7, 24)
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in range(2):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    a, b = (parameter.detach().double().requires_grad_() for parameter in (layer.lora_a, layer.lora_b))
    weight = layer.weight.double() + b[:, :active_rank] @ a[:active_rank]
    (F.linear(inputs.double(), weight) * upstream.double()).sum().backward()
    # float32 sums of 14 * 64 products
    torch.testing.assert_close(layer.lora_a.grad.double(), a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_b.grad.double(), b.grad, rtol=1e-4, atol=1e-5)
    assert layer.log_scale_shift.grad is None


def test_with_frozen_scales_adapters_get_the_full_gradient_if_no_code_is_clipped() -> None:
    inputs, upstream = torch.randn(7, 64), torch.randn(7, 24)
    gradients = []
    for scales_trained in (True, False):
        layer = fake_quant_layer(trained=False)
        layer.log_scale_shift.requires_grad_(scales_trained)
        with torch.no_grad():
            layer.init_scale.mul_(2)  # every code is far from the ends of its range
            layer.lora_b.normal_(0, 1e-4, generator=torch.Generator().manual_seed(1))
        with cached_weights([layer]):
            (layer(inputs) * upstream).sum().backward()
        gradients.append((layer.lora_a.grad, layer.lora_b.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert gradients[0][0].any()


@pytest.mark.parametrize("scales_trained", [True, False])
def test_forward_saves_nothing_of_the_size_of_a_weight(scales_trained: bool) -> None:
    layer = fake_quant_layer((64, 128))
    layer.log_scale_shift.requires_grad_(scales_trained)
    sizes = saved_tensor_sizes(layer, torch.randn(2, 128, requires_grad=True))
    assert max(sizes, default=0) <= layer.rank * 128


def test_with_frozen_scales_the_cached_weight_accumulates_no_gradient() -> None:
    layer = fake_quant_layer((64, 128))
    layer.log_scale_shift.requires_grad_(False)
    with cached_weights([layer]):
        layer(torch.randn(2, 128, requires_grad=True)).sum().backward()
        assert layer.cached_weight is not None
        assert not layer.cached_weight.requires_grad
        assert layer.cached_weight.grad is None
