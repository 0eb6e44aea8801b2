"""Tiny models with elastic adapters, and scorers of rank configurations, for tests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nybble.compression.init import QuantizedInit
from nybble.models.selection import select_layers
from nybble.nls.ranks import RankConfiguration
from nybble.qat import insert
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from nybble.tasks.scoring import QuestionScores
from tests.helpers.tiny import make_model


def make_elastic_model(rank: int, trained: bool = True) -> tuple[Any, dict[str, FakeQuantizedLoRALinear]]:
    """A llama with two decoder layers, 4-bit weights and adapters; if `trained`, adapters that change codes."""
    model, scheme = make_model("llama"), QuantScheme()
    inits = {}
    for name in select_layers(model).linears:
        weight_OI = model.get_submodule(name).weight.detach()
        inits[name] = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))
    layers = insert.insert_fake_quant_layers(model, inits, dict.fromkeys(inits, scheme), rank, 0)
    if trained:
        generator = torch.Generator().manual_seed(0)
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_b, 0, 0.3, generator=generator)
    return model.requires_grad_(False), layers


class FakeScorer:
    """A scorer whose score of a configuration on a row is a given function; it records what it was asked for.

    Args:
        score: (configuration, row) -> log-likelihood, or with `alternatives` probability of the label.
        alternatives: whether the rows have alternatives; they are right where the probability is at least 0.5.
    """

    def __init__(self, score: Callable[[RankConfiguration, Any], float], alternatives: bool = False) -> None:
        self.function, self.alternatives = score, alternatives
        self.calls: list[tuple[RankConfiguration, tuple[Any, ...]]] = []

    def score(self, configuration: RankConfiguration, questions: Sequence[Any]) -> QuestionScores:
        self.calls.append((configuration, tuple(questions)))
        values = [self.function(configuration, row) for row in questions]
        if not self.alternatives:
            return QuestionScores(tuple(values), ())
        log_values = torch.tensor(values, dtype=torch.float64).log().tolist()
        return QuestionScores(tuple(log_values), tuple(value >= 0.5 for value in values))
