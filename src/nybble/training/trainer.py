"""The training loop: AdamW, learning rate schedule, gradient accumulation, gradient clipping, weight averaging.

The trainer minimizes the loss of a `TrainingObjective` over named parameters. It knows nothing about quantization.

    gradient of a step = sum over passes and microbatches m of  weight_m / (sum_m weight_m * passes) * grad loss_m
    learning rate      = peak * lr_multiplier(step)        one peak for each parameter group

Of several processes (nybble.processes), each takes a share of the sequences of a batch. Its gradients of the trained
parameters are added up once per step, after those of cached weights went through the quantizer.

A step depends on its number and on the saved state alone. Training that is stopped after any step and continued from
its saved state ends with the same bits as undisturbed training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nybble import processes
from nybble.errors import TrainingError
from nybble.schema import SchemaError
from nybble.training import optimizer
from nybble.training.objective import TrainingObjective
from nybble.training.optimizer import Optim

LRSchedulerType = Literal["cosine", "constant", "constant_with_averaging"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: name -> parameter. Names are unique over all groups and identify the parameters in checkpoints.
        lr: peak learning rate.
        weight_decay: decoupled weight decay of AdamW.
    """

    parameters: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class TrainerConfig:
    """Configuration of the training loop.

    Attributes:
        steps: optimizer steps in total.
        microbatch_size: sequences per forward and backward in one process.
        warmup_ratio: share of the steps in which the learning rate rises.
        max_grad_norm: gradients with a larger L2 norm are scaled down to this norm.
        lr_scheduler_type: see `lr_multiplier`. With "constant_with_averaging", validation and the final model use the
            average of the weights over all steps but the first third (SWA, https://arxiv.org/abs/1803.05407).
        optim: see training/optimizer.py.
    """

    steps: int
    microbatch_size: int
    warmup_ratio: float
    max_grad_norm: float
    lr_scheduler_type: LRSchedulerType
    optim: Optim = "adamw"


@dataclass
class TrainingProgress:
    """How far a training is. It is stored in the header of every checkpoint, under the names of these attributes.

    Attributes:
        step: optimizer steps done.
        best_loss: lowest value so far of the criterion on held-out data.
        best_step: step after which that value was measured; -1 before the first validation.
        history: "step" and the metrics of each validation.
        curve: what `Trainer.run` yielded for each step.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def check(self, steps: int) -> None:
        """Raise SchemaError for a progress that no training of so many steps has."""
        at = [record.get("step") for record in self.curve]
        if not 0 <= self.step <= steps or at != list(range(1, self.step + 1)):
            raise SchemaError(f"step must be from 0 to {steps}, after a record of every step; it is {self.step}")
        if not self.history or any("step" not in record for record in self.history):
            raise SchemaError("history must hold a validation with its step; it does not")


def lr_multiplier(step: int, steps: int, warmup_ratio: float, lr_scheduler_type: LRSchedulerType) -> float:
    """Return the learning rate of a step as a multiple of the peak learning rate.

    With W = max(1, round(warmup_ratio * steps)) warmup steps, counting steps from 0:
        warmup, step < W:                     (step + 1) / W
        "cosine":                             (1 + cos(pi * (step - W + 1) / (steps - W + 1))) / 2
        "constant", "constant_with_averaging": 1
    """
    warmup_steps = max(1, round(warmup_ratio * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if lr_scheduler_type != "cosine":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps + 1) / (steps - warmup_steps + 1)))


def _add_up_gradients(parameters: Sequence[nn.Parameter], losses: Tensor) -> None:
    """Add up the gradients of all processes, and their losses, in place.

    A parameter that no process has a gradient of keeps none, so that AdamW leaves it alone as in one process.
    """
    found = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=losses.device)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([losses, found, *(parameter.grad for parameter in parameters)], "gradients")  # type: ignore[list-item]
    for parameter, number in zip(parameters, found.tolist(), strict=True):
        if not number:
            parameter.grad = None


class Trainer:
    """Optimizer and state of one training.

    Args:
        groups: the parameters to train.
        objective: the data and the loss.
        config: see `TrainerConfig`.
        pass_context: makes a context that is held around all microbatches of one pass, such as a weight cache.

    Attributes:
        parameters: name -> parameter, over all groups.
        averages: name -> average of that parameter over the steps so far; empty until averaging starts.
        progress: how far the training is.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        objective: TrainingObjective,
        config: TrainerConfig,
        pass_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.objective, self.config, self._pass_context = objective, config, pass_context
        self.parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        torch_groups: list[dict[str, Any]] = [
            {"params": list(group.parameters.values()), "lr": group.lr, "weight_decay": group.weight_decay}
            for group in groups
        ]
        self.optimizer = optimizer.make_optimizer(torch_groups, config.optim)
        self._peak_lrs = [group.lr for group in groups]
        self.averages: dict[str, Tensor] = {}
        self.progress = TrainingProgress()

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the current step to the last one.

        Yields:
            After each step: "step" (from 1), "loss" (mean over the passes), "last_pass" (loss of the last pass),
            "grad_norm" (before clipping), "lr" (of the first group), "seconds".

        Raises:
            TrainingError: the loss or the gradient norm is not finite. The parameters keep their last finite values.
        """
        config = self.config
        while self.progress.step < config.steps:
            started = time.perf_counter()
            step = self.progress.step
            multiplier = lr_multiplier(step, config.steps, config.warmup_ratio, config.lr_scheduler_type)
            rates = [peak_lr * multiplier for peak_lr in self._peak_lrs]
            optimizer.set_learning_rates(self.optimizer, rates)
            loss, last_pass = self._accumulate_gradients(step)
            grad_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm))
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise TrainingError(
                    f"the loss must stay finite: step {step + 1} gave loss {loss:.4g} and gradient norm "
                    f"{grad_norm:.4g}; start again with --overwrite and a tenth of the learning rates, "
                    "or with --dtype float32"
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self.objective.after_step(self.progress.step / config.steps, multiplier)
            self._update_averages()
            yield {
                "step": self.progress.step,
                "loss": loss,
                "last_pass": last_pass,
                "grad_norm": grad_norm,
                "lr": rates[0],
                "seconds": time.perf_counter() - started,
            }

    def _accumulate_gradients(self, step: int) -> tuple[float, float]:
        """Fill the gradients of one step. Returns the losses of the step and of its last pass, over all processes."""
        objective = self.objective
        batch, passes = objective.draw(step), objective.passes_per_step
        local_batch = batch[list(processes.share(len(batch)))]
        total_weight = objective.weight(batch)
        losses = torch.zeros(passes, device=next(iter(self.parameters.values())).device)
        for number in range(passes):
            objective.prepare_pass(step, number)
            with self._pass_context():
                for microbatch in local_batch.split(self.config.microbatch_size):
                    loss = objective.loss(microbatch) * (objective.weight(microbatch) / (total_weight * passes))
                    loss.backward()
                    losses[number] += loss.detach()
        if processes.count() > 1:
            _add_up_gradients(list(self.parameters.values()), losses)
        return float(losses.sum()), float(losses[-1]) * passes

    @torch.no_grad()
    def _update_averages(self) -> None:
        """Add the parameters after this step to their averages, once the first third of the steps is done."""
        first = self.config.steps // 3 + 1
        if self.config.lr_scheduler_type != "constant_with_averaging" or self.progress.step < first:
            return
        for name, parameter in self.parameters.items():
            if self.progress.step == first:
                self.averages[name] = parameter.detach().clone()
            else:
                self.averages[name].lerp_(parameter, 1 / (self.progress.step - first + 1))

    @contextmanager
    @torch.no_grad()
    def averaged_weights(self) -> Iterator[None]:
        """Let the parameters hold their averages inside the context. Without averages they stay as they are."""
        trained = {name: self.parameters[name].clone() for name in self.averages}
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)
        try:
            yield
        finally:
            for name, values in trained.items():
                self.parameters[name].copy_(values)

    def state(self) -> dict[str, Tensor]:
        """Return parameters ("NAME"), averages ("mean:NAME") and the state of AdamW ("exp_avg:NAME", ...)."""
        tensors = {f"mean:{name}": average for name, average in self.averages.items()}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach()
            state = optimizer.state_of(self.optimizer, parameter)
            tensors |= {f"{key}:{name}": tensor for key, tensor in state.items()}
        return tensors

    def state_layout(self, names: Container[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a state with these `names`; averages and the optimizer's are optional."""
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, parameter in self.parameters.items():
            whole = (parameter.dtype, tuple(parameter.shape))
            layout[name] = whole
            if f"mean:{name}" in names:
                layout[f"mean:{name}"] = whole
            if f"step:{name}" in names:
                state = optimizer.state_layout(self.optimizer, parameter)
                layout |= {f"{key}:{name}": found for key, found in state.items()}
        return layout

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore parameters, averages and optimizer from what `state` returned, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            if f"mean:{name}" in tensors:
                self.averages[name] = tensors[f"mean:{name}"].to(parameter.device, copy=True)
            if f"step:{name}" in tensors:
                keys = optimizer.state_layout(self.optimizer, parameter)
                optimizer.load_state(self.optimizer, parameter, {key: tensors[f"{key}:{name}"] for key in keys})
