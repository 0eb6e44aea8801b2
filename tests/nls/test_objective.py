"""The training objective of a task with elastic ranks."""

from typing import Any

import pytest
import torch

from nybble.nls.objective import task_objective
from nybble.nls.sampler import RankSampler
from nybble.tasks.objective import RowLoss, TaskBatches
from nybble.training.objective import TrainingObjective
from tests.helpers.elastic import FakeScorer, make_elastic_model
from tests.helpers.questions import MIXED_QUESTIONS, make_task_data
from tests.helpers.tiny import make_tokenizer

BATCHES = TaskBatches([3, 5, 4, 6, 5, 3, 4], 2, 1, 0)


def make_objective(layers: Any, scorer: FakeScorer, sampling: Any = "sandwich") -> TrainingObjective:
    data = make_task_data(make_tokenizer(), MIXED_QUESTIONS, "choices")
    loss = RowLoss(lambda rows: rows.float().mean(), len)
    return task_objective(data, loss, BATCHES, RankSampler((8, 4, 2), 2, sampling, 0), layers, scorer)


def test_validation_loss_is_one_minus_the_share_at_the_median_ranks() -> None:
    scorer = FakeScorer(lambda configuration, row: 0.75 if row is MIXED_QUESTIONS[0] else 0.25, alternatives=True)
    objective = make_objective({}, scorer)
    metrics = objective.validate()
    assert metrics == {"loss": pytest.approx(1 - 1.5 / 4), "accuracy": 0.25}
    assert objective.criterion in metrics
    assert scorer.calls == [((4, 4), MIXED_QUESTIONS)]
    assert objective.describe(metrics) == "held-out loss 0.6250, accuracy 0.2500"


def test_validation_loss_of_completions_is_their_negative_log_likelihood() -> None:
    metrics = make_objective({}, FakeScorer(lambda configuration, row: -1.5)).validate()
    assert metrics == {"loss": 1.5}


def test_passes_set_the_ranks_of_the_layers() -> None:
    _, layers = make_elastic_model(8, trained=False)
    objective = make_objective(layers, FakeScorer(lambda *_: 0.0))
    assert objective.passes_per_step == 3
    for number, rank in ((0, 8), (1, 2)):
        objective.prepare_pass(0, number)
        assert {layer.active_rank for layer in layers.values()} == {rank}
    assert make_objective(layers, FakeScorer(lambda *_: 0.0), "half").passes_per_step == 1


def test_model_without_adapters_needs_one_pass() -> None:
    objective = make_objective({}, FakeScorer(lambda *_: 0.0))
    assert objective.passes_per_step == 1
    objective.prepare_pass(0, 0)
    _, layers = make_elastic_model(8, trained=False)
    for layer in layers.values():
        layer.rank = 0
    assert make_objective(layers, FakeScorer(lambda *_: 0.0)).passes_per_step == 1


def test_batches_and_loss_are_passed_on() -> None:
    objective = make_objective({}, FakeScorer(lambda *_: 0.0))
    assert objective.steps_per_epoch == 3
    assert torch.equal(objective.draw(1), BATCHES.draw(1))
    assert float(objective.loss(torch.tensor([1, 4]))) == 2.5
    assert objective.weight(torch.tensor([1, 4])) == 2
    assert objective.throughput(0, 0.5) == "4.0 rows/s"
