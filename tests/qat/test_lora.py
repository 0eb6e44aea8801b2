"""LoRALinear: gradients compared with float64 autograd, and adapters that start as those of peft."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from nybble.qat.base import cached_weights
from nybble.qat.lora import LoRALinear, add_adapters, init_adapters
from tests.helpers.qat_layers import DTYPES, lora_layer, saved_tensor_sizes


@pytest.mark.parametrize(("shape", "rank"), [((8, 64), 8), ((200, 16), 16), ((1, 64), 1), ((48, 64), 32)])
def test_rank_is_clamped_to_the_smaller_side(shape: tuple[int, int], rank: int) -> None:
    lora_a, lora_b = init_adapters(torch.zeros(shape), 32, 1.0, None)
    assert lora_a.shape == (rank, shape[1])
    assert lora_b.shape == (shape[0], rank)


@pytest.mark.parametrize("variance", [1.0, 1 / 3])
def test_adapters_start_uniform_and_zero(variance: float) -> None:
    lora_a, lora_b = init_adapters(torch.zeros(96, 256), 64, variance, torch.Generator().manual_seed(0))
    # 16384 entries: the standard errors of mean and variance are below 1 %.
    assert float(lora_a.detach().var()) == pytest.approx(variance / 256, rel=0.05)
    assert abs(float(lora_a.detach().mean())) < 0.05 * (variance / 256) ** 0.5
    assert float(lora_a.detach().abs().max()) <= (3 * variance / 256) ** 0.5
    assert not lora_b.detach().any()


def test_adapters_start_and_scale_as_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    layer = LoRALinear(torch.zeros(96, 256), None, 64, torch.float32, torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(256, 96))
    config = peft.LoraConfig(r=64, lora_alpha=128, target_modules=["0"])
    reference = peft.get_peft_model(model, config).base_model.model[0]
    assert reference.scaling["default"] == layer.SCALING
    reference_a = reference.lora_A["default"].weight.detach()
    # 16384 entries: the standard error of a standard deviation is below 1 %.
    assert float(layer.lora_a.detach().std()) == pytest.approx(float(reference_a.std()), rel=0.05)
    assert float(layer.lora_a.detach().abs().max()) == pytest.approx(float(reference_a.abs().max()), rel=0.05)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_leading_ranks_are_added(rank: int) -> None:
    weight, a, b = torch.randn(5, 6, dtype=torch.bfloat16), torch.randn(3, 6), torch.randn(5, 3)
    added = add_adapters(weight, a, b, rank)
    assert added.dtype == torch.float32
    torch.testing.assert_close(added, weight.float() + sum(torch.outer(b[:, r], a[r]) for r in range(rank)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untrained_layer_computes_as_the_linear_layer(dtype: torch.dtype) -> None:
    layer, inputs = lora_layer(dtype=dtype, trained=False), torch.randn(5, 3, 64).to(dtype)
    assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("active_rank", [8, 3])
def test_forward_uses_the_weight_plus_twice_the_adapters(dtype: torch.dtype, active_rank: int) -> None:
    layer = lora_layer(dtype=dtype)
    layer.active_rank = active_rank
    a, b = layer.lora_a[:active_rank].double(), layer.lora_b[:, :active_rank].double()
    exact = layer.weight.double() + 2 * b @ a
    # One rounding to the dtype; in float32 also the rounding of the sum over ranks.
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(layer.compute_weight().double(), exact, rtol=tolerance, atol=1e-6)
    inputs = torch.randn(5, 3, 64).to(dtype)
    assert torch.equal(layer(inputs), F.linear(inputs, layer.compute_weight(), layer.bias))


@pytest.mark.parametrize("active_rank", [8, 3, 0])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_equal_float64_autograd(active_rank: int, cached: bool) -> None:
    layer = lora_layer()
    layer.active_rank = active_rank
    inputs, upstream = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 24)
    with cached_weights([layer]) if cached else contextlib.nullcontext():
        for microbatch in range(2):
            (layer(inputs[microbatch]) * upstream[microbatch]).sum().backward()
    a, b, x = (tensor.detach().double().requires_grad_() for tensor in (layer.lora_a, layer.lora_b, inputs))
    weight = layer.weight.double() + 2 * b[:, :active_rank] @ a[:active_rank]
    (F.linear(x, weight, layer.bias.double()) * upstream.double()).sum().backward()
    for ours, expected in ((layer.lora_a, a), (layer.lora_b, b), (inputs, x)):
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_and_their_gradients_stay_in_float32(dtype: torch.dtype) -> None:
    layer = lora_layer(dtype=dtype)
    layer(torch.randn(5, 64).to(dtype)).sum().backward()
    trained = {name: parameter.dtype for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == dict.fromkeys(("lora_a", "lora_b"), torch.float32)
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == torch.float32
    assert layer.weight.dtype == dtype


def test_forward_saves_nothing_of_the_size_of_a_weight() -> None:
    layer = lora_layer((64, 128))
    assert max(saved_tensor_sizes(layer, torch.randn(2, 128, requires_grad=True))) <= layer.rank * 128
