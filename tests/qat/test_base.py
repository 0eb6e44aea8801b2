"""The weight cache, and the trained scales of quantized layers."""

import pytest
import torch
from torch import nn

from nybble.qat.base import CachedWeightLinear, QuantizedLinear, cached_weights
from nybble.quant.grid import round_scale
from tests.helpers.qat_layers import SCHEME, fake_quant_layer, fixed_codes_layer, lora_layer

LAYERS = [fake_quant_layer, fixed_codes_layer, lora_layer]


def count_computed_weights(layer: CachedWeightLinear, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one whenever the layer computes its weight."""
    computed: list[int] = []
    original = layer.compute_weight
    monkeypatch.setattr(layer, "compute_weight", lambda: computed.append(1) or original())
    return computed


@pytest.mark.parametrize("make_layer", LAYERS)
def test_a_cached_weight_is_computed_once_and_gives_the_same_output(
    make_layer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, inputs = make_layer(), torch.randn(3, 64)
    expected = layer(inputs)
    computed = count_computed_weights(layer, monkeypatch)
    with cached_weights([layer]):
        for _ in range(2):
            output = layer(inputs)
            assert torch.equal(output, expected)
            output.sum().backward()
        assert len(computed) == 1
    assert layer.cached_weight is None


@pytest.mark.parametrize("make_layer", LAYERS)
def test_without_the_cache_forward_and_backward_compute_the_weight(
    make_layer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, inputs = make_layer(), torch.randn(3, 64, requires_grad=True)
    computed = count_computed_weights(layer, monkeypatch)
    layer(inputs).sum().backward()
    assert len(computed) == 2


@pytest.mark.parametrize("make_layer", LAYERS)
def test_an_evaluation_changes_no_gradient(make_layer: object) -> None:
    layer, inputs = make_layer(), torch.randn(3, 64)
    with torch.no_grad(), cached_weights([layer], flush=False):
        assert not layer(inputs).requires_grad
    assert layer.cached_weight is None
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_without_flush_the_gradient_of_the_cached_weight_is_discarded() -> None:
    layer = fake_quant_layer()
    with cached_weights([layer], flush=False):
        layer(torch.randn(3, 64)).sum().backward()
        assert layer.cached_weight.grad is not None
    assert layer.lora_b.grad is None


def test_an_error_empties_the_caches_and_propagates_no_gradient() -> None:
    layers = [fake_quant_layer(), fake_quant_layer()]
    with pytest.raises(ValueError, match="stop"), cached_weights(layers):
        layers[0](torch.randn(3, 64)).sum().backward()
        raise ValueError("stop")
    assert [layer.cached_weight for layer in layers] == [None, None]
    assert layers[0].lora_b.grad is None


def test_flushing_an_empty_cache_is_refused() -> None:
    with pytest.raises(AssertionError, match="call fill_weight_cache first"):
        fake_quant_layer().flush_weight_cache()


def test_a_frozen_bias_shares_the_memory_of_the_model() -> None:
    bias = nn.Parameter(torch.randn(4))
    layer = CachedWeightLinear(torch.Size((4, 8)), bias, torch.float32)
    assert layer.bias.data_ptr() == bias.data_ptr()
    assert not layer.bias.requires_grad
    assert (layer.out_features, layer.in_features) == (4, 8)


def test_base_classes_leave_the_weight_to_subclasses() -> None:
    qparams = torch.ones(4, 1), torch.full((4, 1), 8)
    layer = QuantizedLinear(torch.Size((4, 16)), qparams, SCHEME, None, torch.float32, None)
    for method in (layer.compute_weight, layer.absorb):
        with pytest.raises(NotImplementedError):
            method()


@pytest.mark.parametrize("make_layer", [fake_quant_layer, fixed_codes_layer])
def test_untrained_scales_are_those_of_compression(make_layer: object) -> None:
    layer = make_layer(trained=False)
    assert torch.equal(layer.scale_OG(), layer.init_scale)
    assert (layer.log_scale_shift != 0).any()


@pytest.mark.parametrize("make_layer", [fake_quant_layer, fixed_codes_layer])
def test_trained_scales_are_rounded_and_pass_their_gradient_straight_through(make_layer: object) -> None:
    layer = make_layer()
    scale = layer.scale_OG()
    exact = layer.init_scale * layer.log_scale_shift.detach().exp()
    assert torch.equal(scale, round_scale(exact))
    scale.sum().backward()
    assert torch.equal(layer.log_scale_shift.grad, exact)  # d exp(s) / ds = exp(s)


def test_repr_shows_sizes_scheme_and_ranks() -> None:
    layer = fake_quant_layer()
    layer.active_rank = 3
    assert repr(layer) == "FakeQuantizedLoRALinear(64, 24, uint4 asymmetric group 16, rank 3 of 8)"
    assert repr(lora_layer()) == "LoRALinear(64, 24, rank 8 of 8)"


@pytest.mark.parametrize("make_layer", LAYERS)
def test_a_model_may_change_outputs_in_place(make_layer: object) -> None:
    """RoCBert adds to the output of a layer with a bias."""
    layer = make_layer()
    if isinstance(layer, QuantizedLinear) and layer.rank:
        layer.log_scale_shift.requires_grad_(False)
    layer(torch.randn(2, 3, 64)).add_(1.0).square().sum().backward()
    trained = layer.lora_b if layer.rank else layer.log_scale_shift
    assert trained.grad is not None
    assert bool(trained.grad.abs().sum() > 0)
