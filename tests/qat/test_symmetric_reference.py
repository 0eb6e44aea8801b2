"""Symmetric layers with adapters against the reference, NNCF's FQ_LORA in symmetric mode: where they agree or differ.

The weights, the adapters and the scales are multiples of powers of two, so that their sums are exact and both sides see
the same numbers.
"""

import pytest
import torch
from torch import Tensor

from nybble.compression.init import QuantizedInit
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.quant.fake_quant import fake_quantize
from nybble.quant.scheme import QuantScheme
from tests.helpers.reference_quantizer import SymmetricLoRA

BITS = [4, 8]
OUTPUTS, GROUPS, SIZE, RANK = 6, 2, 16, 4


def symmetric_layer(bits: int) -> FakeQuantizedLoRALinear:
    """A layer with trained adapters and scales as they were initialized, in every second row negative ones of 4 bits.
    Some weights are outside of their range."""
    scheme, generator = QuantScheme(bits, SIZE, symmetric=True), torch.Generator().manual_seed(bits)
    step = 2.0 ** (1 - bits)  # of weights between about -1 and 1
    weight_OI = torch.randint(-320, 321, (OUTPUTS, GROUPS * SIZE), generator=generator) / 256
    scale_OG = step * torch.randint(64, 128, (OUTPUTS, GROUPS), generator=generator) / 128
    if scheme.signed_scales:
        scale_OG[::2] *= -1
    zero_point_OG = torch.full_like(scale_OG, scheme.middle_code)
    layer = FakeQuantizedLoRALinear(
        QuantizedInit(weight_OI, scale_OG, zero_point_OG), scheme, None, RANK, torch.float32
    )
    for adapter in (layer.lora_a, layer.lora_b):
        adapter.data = torch.randint(-4, 5, adapter.shape, generator=generator) / 32
    return layer


def reference(layer: FakeQuantizedLoRALinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference on the layer's merged weights: outputs, gradients of weights and of scales, all [O, I], and the
    merged weights in steps of their scale."""
    r, quantizer = layer.active_rank, SymmetricLoRA(layer.scheme.bits)
    merged_OI = layer.weight.double() + layer.lora_b[:, :r].double() @ layer.lora_a[:r].double()
    step_OI = layer.init_scale.double().repeat_interleave(SIZE, 1)
    scale_OI = -quantizer.levels[0] * step_OI
    pairs = list(zip(merged_OI.flatten().tolist(), scale_OI.flatten().tolist(), strict=True))
    outputs = torch.tensor([quantizer.output(*pair) for pair in pairs], dtype=torch.float64)
    gradients = torch.tensor([quantizer.gradients(*pair) for pair in pairs], dtype=torch.float64)
    return (*(t.view_as(merged_OI) for t in (outputs, *gradients.T)), (merged_OI / step_OI).detach())


@pytest.mark.parametrize("bits", BITS)
def test_the_function_is_that_of_the_reference_at_every_rank(bits: int) -> None:
    """Prefixes of the adapters are the active ranks of SymmetricLoraNLSQuantizer too."""
    layer = symmetric_layer(bits)
    codes = []
    for rank in range(RANK + 1):
        layer.active_rank = rank
        expected_OI, *_ = reference(layer)
        assert torch.equal(layer.fake_quantized_OI().double(), expected_OI)
        assert torch.equal(layer.absorb().dequantize().double(), expected_OI)
        codes.append(layer.absorb().codes_OI)
    assert not torch.equal(codes[0], codes[-1])
    assert {0, layer.scheme.max_code} <= set(codes[-1].flatten().tolist()), "both ends of the codes are used"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rank", [2, RANK])
def test_adapters_get_the_gradient_of_the_reference_but_for_half_a_step_beyond_the_range(bits: int, rank: int) -> None:
    """The reference clips before it rounds. Weights that round to the outermost code still get a gradient here."""
    layer = symmetric_layer(bits)
    layer.active_rank = rank
    output_OI, passes_OI, _, steps_OI = reference(layer)
    low, high = SymmetricLoRA(bits).levels
    # Half to even: -8.5 rounds to -8, and 7.5 to 8, which is clipped.
    beyond_OI = ((steps_OI < low) & (steps_OI >= low - 0.5)) | ((steps_OI > high) & (steps_OI < high + 0.5))
    assert beyond_OI.any() or bits == 8
    assert (steps_OI > high + 0.5).any()
    assert (steps_OI < low - 0.5).any()
    grad_OI = torch.randint(-8, 9, output_OI.shape).double()
    layer.fake_quantized_OI().backward(grad_OI.float())
    merged_grad_OI = grad_OI * (passes_OI + beyond_OI)
    expected_a = layer.lora_b[:, :rank].double().T @ merged_grad_OI
    expected_b = merged_grad_OI @ layer.lora_a[:rank].double().T
    # scale / scale is rounded once in float32, and sums have up to 32 terms.
    torch.testing.assert_close(layer.lora_a.grad[:rank].double(), expected_a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_b.grad[:, :rank].double(), expected_b, rtol=1e-5, atol=1e-5)
    assert not layer.lora_a.grad[rank:].any()


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_of_the_reference_has_another_gradient_than_its_derivative(bits: int) -> None:
    """8/15 of the derivative inside of the range, and 8/7 outside; `fake_quantize` has the derivative. For a negative
    scale the reference has the opposite sign, and outside 1 of the derivative above and (8/7)^2 below."""
    layer = symmetric_layer(bits)
    _, _, reference_OI, steps_OI = reference(layer)
    low, high = SymmetricLoRA(bits).levels
    outside_OI = (steps_OI < low - 0.5) | (steps_OI >= high + 0.5)
    inside_OI = (steps_OI >= low) & (steps_OI <= high)
    derivative_OI = torch.zeros_like(reference_OI)
    for i in range(GROUPS * SIZE):  # one weight of each row at a time: scales sum over their group
        scale_OG = layer.init_scale.double().requires_grad_()
        fake_quantize(layer.merged_OI().double().detach(), scale_OG, layer.zero_point.double(), layer.scheme)[
            :, i
        ].sum().backward()
        derivative_OI[:, i] = scale_OG.grad.sum(1) / -low  # of the scale of the reference, which is -low steps
    sign_OI = layer.init_scale.double().sign().repeat_interleave(SIZE, 1)
    ratio = torch.tensor(-low / high, dtype=torch.float64)
    mirrored_OI = torch.where(layer.merged_OI() > 0, ratio**0, ratio**2)
    outside_factor_OI = torch.where(sign_OI > 0, ratio, mirrored_OI)
    factor = sign_OI * torch.where(inside_OI, ratio * high / (high - low), outside_factor_OI)
    known_OI = inside_OI | outside_OI
    torch.testing.assert_close(reference_OI[known_OI], (factor * derivative_OI)[known_OI], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_trained_scale_moves_values_and_not_codes_unlike_the_reference(bits: int) -> None:
    layer = symmetric_layer(bits)
    codes_OI = layer.absorb().codes_OI
    layer.log_scale_shift.data += 0.25
    assert torch.equal(layer.absorb().codes_OI, codes_OI)
    grad_OI = torch.randint(-8, 9, codes_OI.shape).float()
    layer.fake_quantized_OI().backward(grad_OI)
    centered_OI = codes_OI.double() - layer.scheme.middle_code
    of_scale_OG = (grad_OI.double() * centered_OI).unflatten(1, (GROUPS, SIZE)).sum(-1)
    expected_OG = of_scale_OG * layer.init_scale.double() * layer.log_scale_shift.double().exp()
    torch.testing.assert_close(layer.log_scale_shift.grad.double(), expected_OG, rtol=1e-5, atol=1e-5)


def test_a_negative_scale_of_the_reference_mirrors_its_levels_and_moves_against_its_gradient() -> None:
    """output(w, -s) = -output(-w, s), whose derivative in -s is that of output(-w, s) in s."""
    quantizer = SymmetricLoRA(4)
    for i in range(-48, 49):
        weight, scale = i / 32, 1.0
        assert quantizer.output(weight, -scale) == -quantizer.output(-weight, scale)
        assert quantizer.gradients(weight, -scale)[1] * quantizer.gradients(-weight, scale)[1] <= 0
    assert quantizer.output(2.0, -1.0) == 1.0, "the level 8"
    assert quantizer.output(2.0, 1.0) == 0.875
