"""Which layers get 4-bit codes and which get 8-bit codes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DogeConfig, DogeForCausalLM, MambaConfig, MambaForCausalLM

from nybble.errors import ModelError
from nybble.models.selection import LayerSelection, select_layers, three_axis_parameters
from tests.helpers.tiny import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_except_the_head_gets_4_bits(family: str) -> None:
    model = make_model(family)
    selection = select_layers(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(selection.linears) == linears - {"lm_head"}
    assert selection.embeddings == (("model.embed_tokens",) if selection.tied else ("model.embed_tokens", "lm_head"))
    assert selection.tied == model.config.tie_word_embeddings


def test_names_are_in_the_order_of_the_modules() -> None:
    """Random draws and checkpoints follow this order."""
    qkv_o = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = tuple(f"model.layers.{i}.{name}" for i in (0, 1) for name in (*qkv_o, *mlp))
    assert select_layers(make_model("llama")) == LayerSelection(layers, ("model.embed_tokens", "lm_head"), tied=False)


@pytest.mark.parametrize(("embedding", "head"), [(None, nn.Linear(2, 2)), (nn.Embedding(2, 2), None)])
def test_a_model_without_embedding_or_head_is_refused(embedding: object, head: object) -> None:
    model = SimpleNamespace(
        named_modules=list, get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head
    )
    with pytest.raises(ModelError, match="must have an embedding and a language-model head; SimpleNamespace does not"):
        select_layers(model)


def test_time_steps_of_a_scan_stay_in_16_bits() -> None:
    """Mamba multiplies by their weights without a call of the layer; Doge's layers of this name are ordinary ones."""
    mamba = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=64, num_hidden_layers=1, state_size=16))
    names = [f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "x_proj", "out_proj")]
    assert list(select_layers(mamba).linears) == names
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    doge = DogeForCausalLM(DogeConfig(vocab_size=260, **sizes))
    assert "model.layers.0.self_attn.dt_proj" in select_layers(doge).linears


def test_three_axis_parameters_are_no_convolutions() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(4, 2, 3))
    model.block = nn.Module()
    model.block.gate_up = nn.Parameter(torch.zeros(4, 2, 6))
    model.block.conv = nn.Conv1d(2, 2, 3)
    model.block.linear = nn.Linear(2, 2)
    assert three_axis_parameters(model) == ["experts", "block.gate_up"]
