"""Rank spaces, configurations, and that every prefix is a model of its own."""

import logging
from collections import Counter

import pytest
import torch

from nybble.compress.pipeline import compress
from nybble.errors import ModelError, OptionError
from nybble.models.selection import select_layers
from nybble.nls import ranks
from nybble.qat import insert
from nybble.qat.layers import FakeQuantizedLoRALinear
from nybble.quant.scheme import QuantScheme

from .tiny import make_model


def test_space_is_put_in_order_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nybble"):
        assert ranks.parse_rank_space([32, 24, 16]) == (32, 24, 16)
        assert caplog.text == ""
        assert ranks.parse_rank_space([16, 32, 16, 24]) == (32, 24, 16)
    assert "16 32 16 24 taken as 32 24 16" in caplog.text
    for wrong in ([], [0], [16, -1]):
        with pytest.raises(OptionError, match="--lora_rank_space must be one or more ranks of at least 1"):
            ranks.parse_rank_space(wrong)


def test_configuration_of_a_person() -> None:
    assert ranks.check_configuration([32, 16], (32, 24, 16), 2) == (32, 16)
    with pytest.raises(OptionError, match="one rank for each of the 30 decoder layers; got 2"):
        ranks.check_configuration([32, 16], (32, 24, 16), 30)
    with pytest.raises(OptionError, match="from the space 32 24 16; got 8 20"):
        ranks.check_configuration([20, 8], (32, 24, 16), 2)


def test_samples_are_uniform_and_known_from_seed_and_step() -> None:
    space = (32, 24, 16)
    seen = [ranks.sample_configuration(space, 10, 5, step) for step in range(600)]
    assert seen[7] == ranks.sample_configuration(space, 10, 5, 7)
    assert seen[7] != ranks.sample_configuration(space, 10, 6, 7)
    counts = Counter(rank for configuration in seen for rank in configuration)
    assert all(abs(counts[rank] - 2000) < 5 * (6000 * 2 / 9) ** 0.5 for rank in space)  # five standard deviations
    assert len(set(seen)) > 590


def test_candidates() -> None:
    seen = [(32, 16), (16, 16), (32, 24), (16, 24), (32, 16)]
    assert ranks.most_frequent_configuration(seen) == (32, 16)
    assert ranks.most_frequent_configuration([(16,), (32,)]) == (32,)
    assert ranks.least_loss_configurations(seen, [3.0, 1.0, 2.0, 5.0, 0.5], 3) == [(32, 16), (16, 16), (32, 24)]
    assert ranks.median_configuration((32, 24, 16), 2) == (24, 24)
    assert ranks.median_configuration((32, 16), 3) == (32, 32, 32)


def test_every_prefix_is_absorbed_as_it_computes() -> None:
    model = make_model("llama")
    layers = insert.insert(model, compress(model, select_layers(model).int4, QuantScheme()).starts, QuantScheme(), 8, 0)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.copy_(torch.randn_like(layer.lora_b) * 0.3)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    ids = torch.randint(256, (2, 16))
    outputs = {}
    for configuration in ((8, 8), (8, 2), (2, 8)):
        ranks.activate_ranks(layers, configuration)
        assert {name: layer.active_rank for name, layer in layers.items() if name.endswith("q_proj")} == {
            f"model.layers.{i}.self_attn.q_proj": rank for i, rank in enumerate(configuration)
        }
        outputs[configuration] = model(ids).logits
        plain = make_model("llama")
        for name, layer in layers.items():
            assert isinstance(layer, FakeQuantizedLoRALinear)
            plain.get_submodule(name).weight = torch.nn.Parameter(layer.absorb().dequantize(), requires_grad=False)
        assert torch.equal(plain(ids).logits, outputs[configuration])
    assert len({float(logits.sum()) for logits in outputs.values()}) == 3


def test_a_narrow_layer_keeps_its_largest_rank() -> None:
    model = make_model("llama")
    layers = insert.insert(
        model, compress(model, select_layers(model).int4, QuantScheme()).starts, QuantScheme(), 48, 0
    )
    ranks.activate_ranks(layers, (48, 40))
    assert layers["model.layers.0.self_attn.k_proj"].active_rank == 32
    assert layers["model.layers.1.self_attn.k_proj"].active_rank == 32
    assert layers["model.layers.1.mlp.up_proj"].active_rank == 40


def test_layers_outside_of_the_decoder_have_no_rank() -> None:
    with pytest.raises(ModelError, match="outside of them: model.decoder.project_in; use nybble distill"):
        ranks.decoder_layers(["model.decoder.layers.0.fc1", "model.decoder.project_in"])
