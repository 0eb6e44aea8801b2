"""Rank spaces and configurations, and that every configuration is a model of its own."""

import logging
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ModelError, OptionError
from nybble.nls import ranks
from tests.helpers.elastic import make_elastic_model
from tests.helpers.tiny import make_model

SPACES = st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True).map(
    lambda values: tuple(sorted(values, reverse=True))
)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_space_is_sorted_without_duplicates(values: list[int]) -> None:
    space = ranks.parse_rank_space(values)
    assert set(space) == set(values)
    assert all(larger > smaller for larger, smaller in pairwise(space))
    assert ranks.parse_rank_space(space) == space


def test_changes_of_the_space_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nybble"):
        ranks.parse_rank_space([32, 24, 16])
        assert not caplog.text
        ranks.parse_rank_space([16, 32, 16, 24])
    assert "--lora_rank_space: sorted 16 32 16 24 to 32 24 16" in caplog.text


@pytest.mark.parametrize(("wrong", "written"), [([], "none"), ([0], "0"), ([16, -1], "16 -1")])
def test_impossible_space_is_refused(wrong: list[int], written: str) -> None:
    with pytest.raises(OptionError, match=f"--lora_rank_space must be one or more ranks of at least 1; got {written};"):
        ranks.parse_rank_space(wrong)


def test_custom_configuration_is_checked() -> None:
    assert ranks.check_configuration([32, 16], (32, 24, 16), 2) == (32, 16)
    with pytest.raises(OptionError, match="one rank for each of the 30 decoder layers; got 2 ranks"):
        ranks.check_configuration([32, 16], (32, 24, 16), 30)
    with pytest.raises(OptionError, match="from --lora_rank_space 32 24 16; got 8 20"):
        ranks.check_configuration([20, 8, 20], (32, 24, 16), 3)


def test_decoder_layers_are_indexed_in_the_order_of_their_numbers() -> None:
    names = ["model.layers.11.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    assert ranks.decoder_layer_indices(names) == dict(zip(names, (1, 0, 0), strict=True))
    assert ranks.count_decoder_layers(names) == 2
    assert ranks.count_decoder_layers([]) == 0
    with pytest.raises(ModelError, match=r"the model has none \(first layer: model.mlp\); use nybble distill"):
        ranks.decoder_layer_indices(["model.mlp", "model.decoder"])


def test_layers_outside_of_the_decoder_layers_share_a_rank_with_the_first_or_last() -> None:
    names = ["embed.project_in", "model.layers.3.fc", "model.layers.4.fc", "model.layers.5.fc", "head.dense"]
    assert ranks.decoder_layer_indices(names) == dict(zip(names, (0, 0, 1, 2, 2), strict=True))


@settings(max_examples=40, deadline=None)
@given(SPACES, st.integers(1, 40), SEEDS, st.integers(0, 10**6))
def test_sample_depends_on_its_arguments_alone(space: tuple[int, ...], num_layers: int, seed: int, step: int) -> None:
    state = torch.get_rng_state()
    configuration = ranks.sample_configuration(space, num_layers, seed, step)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.rand(1)
    ranks.sample_configuration(space, num_layers, seed, step + 1)
    assert ranks.sample_configuration(space, num_layers, seed, step) == configuration
    assert len(configuration) == num_layers
    assert set(configuration) <= set(space)


def test_samples_of_a_seed_and_step_are_fixed() -> None:
    """Finished runs know their configurations by seed and step."""
    assert ranks.sample_configuration((32, 24, 16), 10, 5, 7) == (32, 32, 24, 24, 32, 24, 24, 24, 32, 32)


@pytest.mark.parametrize("space", [(32, 16), (32, 24, 16), (8, 6, 4, 2, 1)])
def test_samples_are_uniform(space: tuple[int, ...]) -> None:
    steps, num_layers = 600, 10
    samples = [ranks.sample_configuration(space, num_layers, 5, step) for step in range(steps)]
    share = 1 / len(space)
    for layer in range(num_layers):
        counts = Counter(configuration[layer] for configuration in samples)
        deviation = (steps * share * (1 - share)) ** 0.5
        assert all(abs(counts[rank] - steps * share) < 5 * deviation for rank in space)
    pairs = Counter((configuration[0], configuration[1]) for configuration in samples)
    deviation = (steps * share**2 * (1 - share**2)) ** 0.5
    assert all(abs(pairs[a, b] - steps * share**2) < 5 * deviation for a in space for b in space), (
        "layers are independent"
    )
    assert samples != [ranks.sample_configuration(space, num_layers, 6, step) for step in range(steps)]


@settings(max_examples=40, deadline=None)
@given(SPACES, st.integers(1, 5))
def test_median_is_the_rank_with_as_many_above_as_below(space: tuple[int, ...], num_layers: int) -> None:
    configuration = ranks.median_configuration(space, num_layers)
    (median,) = set(configuration)
    above, below = (sum(rank > median for rank in space), sum(rank < median for rank in space))
    assert len(configuration) == num_layers
    assert below - above in (0, 1), "of two medians the larger one"
    assert ranks.median_configuration(space[::-1], num_layers) == configuration


CONFIGURATIONS = st.lists(st.tuples(*[st.sampled_from((32, 24, 16))] * 3), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(CONFIGURATIONS)
def test_most_frequent_ranks_are_those_of_each_layer(trained: list[tuple[int, ...]]) -> None:
    for layer, rank in enumerate(ranks.most_frequent_configuration(trained)):
        column = [configuration[layer] for configuration in trained]
        assert all(column.count(other) <= column.count(rank) for other in column)
        assert all(other <= rank for other in column if column.count(other) == column.count(rank))


@settings(max_examples=40, deadline=None)
@given(CONFIGURATIONS, st.randoms(use_true_random=False), st.integers(0, 6))
def test_least_losses_are_those_of_distinct_configurations(
    trained: list[tuple[int, ...]], random: object, count: int
) -> None:
    losses = [random.random() for _ in trained]  # type: ignore[attr-defined]
    found = ranks.least_loss_configurations(trained, losses, count)
    least = {c: min(loss for d, loss in zip(trained, losses, strict=True) if c == d) for c in trained}
    assert found == sorted(dict.fromkeys(trained), key=lambda configuration: least[configuration])[:count]


def test_examples_of_candidates() -> None:
    trained = [(32, 16), (16, 16), (32, 24), (16, 24), (32, 16)]
    assert ranks.most_frequent_configuration(trained) == (32, 16)
    assert ranks.most_frequent_configuration([(16,), (32,)]) == (32,)
    assert ranks.least_loss_configurations(trained, [3.0, 1.0, 2.0, 5.0, 0.5], 3) == [(32, 16), (16, 16), (32, 24)]
    assert ranks.median_configuration((32, 24, 16), 2) == (24, 24)
    assert ranks.median_configuration((32, 16), 3) == (32, 32, 32)


@pytest.mark.parametrize("configuration", [(8, 8), (8, 2), (2, 8), (1, 5)])
def test_configuration_uses_the_first_ranks_of_each_adapter(configuration: tuple[int, int]) -> None:
    model, layers = make_elastic_model(8)
    ids = torch.randint(256, (2, 16))
    everything = model(ids).logits
    ranks.activate_ranks(layers, configuration)
    sliced = model(ids).logits
    # The same numbers as full-rank adapters whose other ranks are zero, and as the absorbed weights.
    plain = make_model("llama")
    for name, layer in layers.items():
        rank = configuration[int(name.split(".")[2])]
        assert layer.active_rank == rank
        plain.get_submodule(name).weight = torch.nn.Parameter(layer.absorb().dequantize(), requires_grad=False)
        layer.lora_b[:, rank:] = 0
    assert torch.equal(plain(ids).logits, sliced)
    ranks.activate_ranks(layers, (8, 8))
    torch.testing.assert_close(model(ids).logits, sliced, rtol=1e-4, atol=1e-4)
    assert torch.equal(everything, sliced) == (configuration == (8, 8))


def test_narrow_layers_use_all_their_ranks() -> None:
    _, layers = make_elastic_model(48, trained=False)
    ranks.activate_ranks(layers, (48, 40))
    assert layers["model.layers.0.self_attn.k_proj"].active_rank == 32
    assert layers["model.layers.1.self_attn.k_proj"].active_rank == 32
    assert layers["model.layers.1.mlp.up_proj"].active_rank == 40
