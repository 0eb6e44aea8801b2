"""Scores of rank configurations of a real tiny model."""

from collections import Counter

import pytest
import torch

from nybble.models.loading import LoadedModel
from nybble.nls import ranks
from nybble.nls.scorer import AdapterScorer, evaluation_weights
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.tasks import scoring
from tests.helpers.elastic import make_elastic_model
from tests.helpers.questions import MIXED_QUESTIONS, make_task_data
from tests.helpers.tiny import make_tokenizer


@pytest.fixture
def scorers() -> tuple[AdapterScorer, AdapterScorer]:
    """The same model, with weights computed in every forward and once a call."""
    model, layers = make_elastic_model(8)
    data = make_task_data(make_tokenizer(), MIXED_QUESTIONS, "choices", "acc_norm")
    loaded = LoadedModel(model, make_tokenizer(), "tiny")
    return AdapterScorer(loaded, layers, data, 64, False), AdapterScorer(loaded, layers, data, 64, True)


def test_cached_weights_give_the_same_scores(
    scorers: tuple[AdapterScorer, AdapterScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: Counter[int] = Counter()
    original = FakeQuantizedLoRALinear.compute_weight

    def compute_weight(layer: FakeQuantizedLoRALinear) -> torch.Tensor:
        computed[layer.active_rank] += 1
        return original(layer)

    monkeypatch.setattr(FakeQuantizedLoRALinear, "compute_weight", compute_weight)
    slow, fast = scorers
    scores = fast.score((8, 2), MIXED_QUESTIONS)
    assert computed == {8: 7, 2: 7}, "each of the 7 linear layers of a decoder layer once"
    assert all(layer.cached_weight is None for layer in fast.layers.values())
    computed.clear()
    assert slow.score((8, 2), MIXED_QUESTIONS) == scores
    assert fast.score((2, 8), MIXED_QUESTIONS) != scores


def test_scores_are_those_of_the_absorbed_model(scorers: tuple[AdapterScorer, AdapterScorer]) -> None:
    scorer = scorers[1]
    scores = scorer.score((4, 2), MIXED_QUESTIONS)
    model, layers = make_elastic_model(8)
    ranks.activate_ranks(layers, (4, 2))
    for name, layer in layers.items():
        weight_OI = layer.absorb().dequantize()
        linear = torch.nn.Linear(*weight_OI.T.shape, bias=False)
        linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
        model.set_submodule(name, linear)
    expected = scoring.score_questions(model, make_tokenizer(), MIXED_QUESTIONS, True, 64)
    assert scores.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)


def test_short_texts_are_scored_with_plain_attention(scorers: tuple[AdapterScorer, AdapterScorer]) -> None:
    scorer = scorers[0]
    model = scorer.loaded.model.to("cpu")
    with scorer.activate((4, 2)):
        assert model.config._attn_implementation == "eager"
        assert {layer.active_rank for layer in scorer.layers.values()} == {4, 2}
    assert model.config._attn_implementation == "sdpa"
    assert {layer.active_rank for layer in scorer.layers.values()} == {4, 2}, "the ranks stay active"


@pytest.mark.parametrize("cache", [False, True])
def test_evaluation_weights_are_cached_without_gradients(cache: bool) -> None:
    _, layers = make_elastic_model(2)
    with evaluation_weights(layers, cache):
        assert all((layer.cached_weight is not None) == cache for layer in layers.values())
    assert all(layer.cached_weight is None for layer in layers.values())
