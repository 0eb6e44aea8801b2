"""linearize compared with transformers' own layers."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nybble.models.linearize import linearize, transposed_layers
from tests.helpers.causal_types import tiny_config, tiny_model
from tests.helpers.tiny import make_model

IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt-sw3", "openai-gpt"])
def test_the_model_computes_the_same(model_type: str) -> None:
    model = tiny_model(model_type)
    conv1d = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
    linear = linearize(copy.deepcopy(model))
    assert len(conv1d) == 8
    assert transposed_layers(linear) == conv1d.keys()
    for name, module in conv1d.items():
        layer = linear.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == module.weight.shape
        assert torch.equal(layer.weight, module.weight.T)
        assert layer.weight.is_contiguous()
        assert torch.equal(layer.bias, module.bias)
        assert not layer.weight.requires_grad
        assert not layer.training
    torch.testing.assert_close(linear(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert linear.state_dict().keys() == model.state_dict().keys()


def test_it_needs_no_memory_for_weights() -> None:
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = linearize(GPT2LMHeadModel(tiny_config("gpt2")))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.transformer.h[0].attn.c_attn.weight.shape == (192, 64)


def test_linear_layers_stay() -> None:
    model = make_model("llama")
    before = dict(model.named_modules())
    assert linearize(model) is model
    assert dict(model.named_modules()) == before
    assert not transposed_layers(model)
