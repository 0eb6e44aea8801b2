"""Conversion of trained layers to plain linear layers, and what training changed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nybble.qat.absorb import (
    absorb_layers,
    assert_absorbs_exactly,
    frozen_linear,
    merge_adapters,
    weight_changes,
)
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.qat_layers import DTYPES, fake_quant_layer, fixed_codes_layer, lora_layer


@pytest.mark.parametrize("make_layer", [fake_quant_layer, fixed_codes_layer])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_absorbed_layers_compute_the_same_outputs(make_layer: object, dtype: torch.dtype, bias: bool) -> None:
    layer, inputs = make_layer(dtype=dtype, bias=bias), torch.randn(5, 3, 64).to(dtype)
    layer.active_rank = min(3, layer.rank)
    expected, absorbed = layer(inputs), layer.absorb()
    model, layers = nn.Sequential(layer), {"0": layer}
    (quantized,) = absorb_layers(model, layers).values()
    assert type(model[0]) is nn.Linear
    assert model[0].weight.is_meta
    assert torch.equal(F.linear(inputs, quantized.dequantize().to(dtype), model[0].bias), expected)
    assert torch.equal(quantized.codes_OI, absorbed.codes_OI)
    assert torch.equal(quantized.scale_OG, absorbed.scale_OG)
    assert not layers, "layers must be released one by one"
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_layers_compute_the_same_outputs(dtype: torch.dtype) -> None:
    layer, inputs = lora_layer(dtype=dtype), torch.randn(5, 3, 64).to(dtype)
    layer.active_rank = 3
    expected, weight = layer(inputs), layer.compute_weight()
    model, layers = nn.Sequential(layer), {"0": layer}
    merge_adapters(model, layers)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(inputs), expected)
    assert not layers
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_stale_weight_cache_is_not_used() -> None:
    layer, lora = fake_quant_layer(), lora_layer()
    for trained in (layer, lora):
        trained.fill_weight_cache()
        nn.init.normal_(trained.lora_b)
    model = nn.Sequential(layer, lora)
    expected = layer.absorb().dequantize(), lora.compute_weight()
    absorbed = absorb_layers(model, {"0": layer})["0"]
    merge_adapters(model, {"1": lora})
    assert torch.equal(absorbed.dequantize(), expected[0])
    assert torch.equal(model[1].weight, expected[1])


@pytest.mark.parametrize("wrong_rank", [0, 8])
def test_a_wrong_absorbed_code_is_found(wrong_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fake_quant_layer()
    original = layer.absorb

    def absorb_wrongly() -> QuantizedWeight:
        quantized = original()
        if layer.active_rank == wrong_rank:
            quantized.codes_OI[0, 0] ^= 1
        return quantized

    monkeypatch.setattr(layer, "absorb", absorb_wrongly)
    message = f"must equal the forward: layer up_proj differs at rank {wrong_rank}"
    with pytest.raises(AssertionError, match=message):
        assert_absorbs_exactly("up_proj", layer)


def test_the_check_leaves_the_active_rank_as_it_was() -> None:
    layer = fake_quant_layer()
    layer.active_rank = 5
    assert_absorbs_exactly("up_proj", layer)
    assert layer.active_rank == 5


def test_a_wrong_merged_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lora_layer()
    weights: list[Tensor] = [torch.zeros(24, 64)]
    original = layer.compute_weight
    monkeypatch.setattr(layer, "compute_weight", lambda: weights.pop() if weights else original())
    with pytest.raises(AssertionError, match="must equal the forward: layer 0 differs at rank 8"):
        merge_adapters(nn.Sequential(layer), {"0": layer})


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_shares_weight_and_bias(bias: bool) -> None:
    weight, bias_O = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, dtype=torch.bfloat16) if bias else None
    linear = frozen_linear(weight, bias_O)
    assert (linear.out_features, linear.in_features, linear.bias is None) == (4, 8, not bias)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert linear.bias is None or linear.bias.data_ptr() == bias_O.data_ptr()
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_changes_are_counted_by_layer_and_in_all() -> None:
    def weight(codes: list[int], scales: list[float]) -> QuantizedWeight:
        zero_points = torch.ones(1, 2, dtype=torch.uint8)
        scheme = QuantScheme(group_size=2)
        return QuantizedWeight(torch.tensor([codes], dtype=torch.uint8), torch.tensor([scales]), zero_points, scheme)

    unchanged = weight([5, 6, 7, 8], [1.0, 1.0])
    before = {"a": weight([1, 2, 3, 4], [1.0, 2.0]), "b": unchanged, "embedding": unchanged}
    after = {"a": weight([1, 2, 3, 9], [1.5, 2.0]), "b": unchanged}
    assert dataclasses.asdict(weight_changes(before, after)) == {
        "codes_changed": 1 / 8,
        "scales_moved": pytest.approx((0.5**2 / 4) ** 0.5),
        "layer_codes_changed": {"a": 1 / 4, "b": 0.0},
        "layer_scales_moved": {"a": pytest.approx((0.5**2 / 2) ** 0.5), "b": 0.0},
    }
