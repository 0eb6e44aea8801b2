"""TrainingObjective: everything about a training that depends on its data and its loss.

The trainer knows parameters, steps and microbatches. An objective supplies the batches, the loss and the validation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _no_preparation(step: int, number: int) -> None:
    """Prepare nothing before a pass."""


def _no_change(done: float, multiplier: float) -> None:
    """Change nothing after a step."""


@dataclass(frozen=True)
class TrainingObjective:
    """What is trained on, which loss is minimized, and how the result is validated.

    The loss of an optimizer step is the mean over its passes. The loss of a pass is the mean of its microbatch losses,
    weighted with `weight`.

    Attributes:
        steps_per_epoch: optimizer steps between two validations.
        draw: step -> indices [batch_size] of the training sequences of that step. It depends on the step alone, so that
            a resumed training draws what an undisturbed one would have drawn.
        loss: indices [M] of a microbatch -> its mean loss, a scalar.
        weight: indices [M] -> weight of their mean loss, which is the number of terms that the mean is taken over:
            predicted tokens, or sequences.
        validate: measures the current parameters on held-out data; name of the metric -> value.
        criterion: the metric that has to fall. The parameters with its lowest value are kept.
        describe: metrics that `validate` returned -> text for the log.
        throughput: (step, seconds that it took) -> text for the progress bar.
        passes_per_step: forward and backward passes over the whole batch in one step. More than one pass is needed
            where a step trains several configurations of the model.
        prepare_pass: called as prepare_pass(step, number of the pass) before each pass.
        after_step: called as after_step(share of the steps that are done, learning rate as a multiple of its peak)
            after the optimizer has changed the parameters. It may change them further, by nothing but these numbers
            and the parameters, so that a resumed training ends with the same bits.
    """

    steps_per_epoch: int
    draw: Callable[[int], Tensor]
    loss: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], int]
    validate: Callable[[], dict[str, float]]
    criterion: str
    describe: Callable[[dict[str, float]], str]
    throughput: Callable[[int, float], str]
    passes_per_step: int = 1
    prepare_pass: Callable[[int, int], None] = _no_preparation
    after_step: Callable[[float, float], None] = _no_change
