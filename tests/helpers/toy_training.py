"""A linear regression as a TrainingObjective: small enough to train in milliseconds, with two parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.training.objective import TrainingObjective
from nybble.training.trainer import LRSchedulerType, ParameterGroup, Trainer, TrainerConfig

ROWS = 32
BATCH_SIZE = 4
DATA = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Toy:
    """Parameters "a" [8, 8] and "b" [8] that are trained to map every row of DATA to zero.

    Attributes:
        groups: "a" with weight decay and "b" with three times its learning rate.
        objective: mean squared output; validation measures it on all rows as "loss".
    """

    groups: list[ParameterGroup]
    objective: TrainingObjective

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter."""
        return {name: parameter for group in self.groups for name, parameter in group.parameters.items()}


def make_toy(
    weights: Tensor | None = None,
    outputs: int = 8,
    nan_at_step: int | None = None,
    nan_in: Literal["loss", "gradient"] = "loss",
    validate: Callable[[], dict[str, float]] | None = None,
) -> Toy:
    """Return a new toy with the same initial parameters every time.

    Args:
        weights: [ROWS] number of loss terms in each row; None = one each.
        outputs: columns of "a", and size of "b".
        nan_at_step: this step, counted from 0, gives a NaN.
        nan_in: whether the loss is NaN with finite gradients, or the other way round.
        validate: replaces the validation.
    """
    generator = torch.Generator().manual_seed(1)
    a = nn.Parameter(torch.randn(8, outputs, generator=generator))
    b = nn.Parameter(torch.randn(outputs, generator=generator))
    steps: list[int] = []  # the step of each pass so far

    def loss_of_rows(indices: Tensor) -> Tensor:
        return ((DATA[indices] @ a + b) ** 2).mean(1)

    def loss(indices: Tensor) -> Tensor:
        losses = loss_of_rows(indices)
        mean = losses.mean() if weights is None else (losses * weights[indices]).sum() / weights[indices].sum()
        if steps[-1] != nan_at_step:
            return mean
        return mean + (math.nan if nan_in == "loss" else (0 * b.sum()).sqrt())  # sqrt(0) has the gradient inf * 0

    def measure() -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(loss_of_rows(torch.arange(ROWS)).mean())}

    objective = TrainingObjective(
        steps_per_epoch=4,
        draw=lambda step: torch.arange(step, step + BATCH_SIZE) % ROWS,
        loss=loss,
        weight=len if weights is None else lambda indices: int(weights[indices].sum()),
        validate=validate or measure,
        criterion="loss",
        describe=lambda metrics: f"validation loss {metrics['loss']:.4f}",
        throughput=lambda step, seconds: f"{BATCH_SIZE / seconds:.0f} rows/s",
        prepare_pass=lambda step, number: steps.append(step),
    )
    groups = [ParameterGroup({"a": a}, 1e-2, 0.1), ParameterGroup({"b": b}, 3e-2, 0.0)]
    return Toy(groups, objective)


def trainer_config(
    steps: int = 12, microbatch_size: int = 2, lr_scheduler_type: LRSchedulerType = "cosine"
) -> TrainerConfig:
    """Return a configuration with a warmup of a quarter of the steps."""
    return TrainerConfig(steps, microbatch_size, 0.25, 1.0, lr_scheduler_type)


def make_trainer(toy: Toy, config: TrainerConfig | None = None, **changes: object) -> Trainer:
    """Return a trainer of a toy, with attributes of its objective changed."""
    return Trainer(toy.groups, replace(toy.objective, **changes), config or trainer_config())
