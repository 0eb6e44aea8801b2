"""Facts about families, compared with the models of transformers, and a family that is registered from outside."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.models.families import DEFAULT, FAMILIES, AWQMapping, ModelFamily, family_of
from tests.helpers.tiny import FAMILIES as TINY
from tests.helpers.tiny import make_config, make_model


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "vaultgemma"])
def test_norm_offset_is_that_of_the_norms_of_the_model(family: str) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    norm = AutoModelForCausalLM.from_config(config).base_model.norm
    inputs = torch.randn(4, 64)
    with torch.no_grad():
        norm.weight.fill_(1.0)
        one = norm(inputs)
        norm.weight.fill_(2.0)
        ratio = float((norm(inputs) / one).mean())
    offset = family_of(config).norm_offset
    assert ratio == pytest.approx((2 + offset) / (1 + offset), rel=1e-4)


def double_output(source: nn.Module, channels: int, offset: float) -> None:
    """Double the output of a norm, or the last channels of a linear layer."""
    if isinstance(source, nn.Linear):
        source.weight[-channels:] *= 2
        if source.bias is not None:
            source.bias[-channels:] *= 2
    else:
        source.weight.copy_(2 * (source.weight + offset) - offset)


@pytest.mark.parametrize("family", TINY)
def test_awq_mappings_name_the_source_of_every_linear_layer(family: str) -> None:
    """If the output of the source doubles, the input of its layers doubles. Each layer has exactly one source."""
    model, ids, mapped, inputs = make_model(family), torch.arange(12).view(1, 12), [], {}
    block, facts = model.model.layers[0], family_of(model.config)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda module, x, name=name: inputs.update({name: x[0]}))
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for mapping in facts.awq_mappings:
        source = block.get_submodule(mapping.source)
        kept = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        with torch.no_grad():
            model(ids)
            before = {name: inputs[name] for name in mapping.layers}
            columns = linears[mapping.layers[0]].in_features
            double_output(source, columns // (groups if mapping.value_projection else 1), facts.norm_offset)
            model(ids)
        for name in mapping.layers:
            torch.testing.assert_close(inputs[name], 2 * before[name], rtol=1e-4, atol=1e-4)
        source.load_state_dict(kept)
        mapped += mapping.layers
    assert sorted(mapped) == sorted(linears)


def test_an_unregistered_model_type_gets_the_default() -> None:
    config = make_config("llama")
    config.model_type = "no_such_family"
    assert family_of(config) is DEFAULT
    assert ModelFamily((), 0.0) == DEFAULT


@pytest.fixture
def toy_family() -> Iterator[str]:
    """A family as another package would add it."""
    facts = ModelFamily(
        norm_offset=0.5,
        awq_mappings=(AWQMapping("input_layernorm", tuple(f"self_attn.{name}_proj" for name in "qkv")),),
    )
    FAMILIES.register("toy_llama", facts)
    yield "toy_llama"
    FAMILIES.unregister("toy_llama")


def test_a_family_can_be_registered_from_outside(toy_family: str) -> None:
    config = make_config("llama")
    config.model_type = toy_family
    assert family_of(config).norm_offset == 0.5
    assert [mapping.source for mapping in family_of(config).awq_mappings] == ["input_layernorm"]
