"""The TrainingObjective of a task with elastic ranks.

Each step trains the configuration of its RankSampler. Validation scores the held-out rows at the median configuration:

    loss = 1 - mean share of the label              questions with alternatives
    loss = - mean log p per token                   questions without
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.nls import ranks
from nybble.nls.sampler import RankSampler
from nybble.nls.scorer import ConfigurationScorer
from nybble.qat.base import CachedWeightLinear
from nybble.tasks.objective import RowLoss, TaskBatches
from nybble.tasks.task_data import TaskData
from nybble.training.objective import TrainingObjective


def task_objective(
    data: TaskData,
    loss: RowLoss,
    batches: TaskBatches,
    sampler: RankSampler,
    layers: Mapping[str, CachedWeightLinear],
    scorer: ConfigurationScorer,
) -> TrainingObjective:
    """Objective of training adapters, scales or norms on a task.

    Args:
        data: rows of the task.
        loss: loss of training rows.
        batches: which rows each step uses.
        sampler: which ranks each pass uses.
        layers: layers whose ranks are set, by module name; empty for a model without elastic adapters.
        scorer: scores the model's held-out rows in validation.
    """
    has_adapters = any(layer.rank for layer in layers.values())

    def validate() -> dict[str, float]:
        scores = scorer.score(sampler.median_configuration(), data.held_out)
        metrics = {"loss": (1.0 if scores.correct else 0.0) - scores.score}
        return metrics if scores.accuracy is None else metrics | {"accuracy": scores.accuracy}

    def prepare_pass(step: int, number: int) -> None:
        ranks.activate_ranks(layers, sampler.configuration_at_step(step, number))

    return TrainingObjective(
        steps_per_epoch=batches.steps_per_epoch,
        draw=batches.draw,
        loss=loss.loss,
        weight=loss.weight,
        validate=validate,
        criterion="loss",
        describe=lambda metrics: "held-out " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()),
        throughput=lambda step, seconds: f"{batches.batch_size / seconds:.1f} rows/s",
        passes_per_step=sampler.passes_per_step if has_adapters else 1,
        prepare_pass=prepare_pass,
    )
