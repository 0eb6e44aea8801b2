"""One training loop, on accelerate. Takes a loss; knows of quantization only "parameters with requires_grad".

AdamW, linear warm-up, then cosine decay to zero or a constant rate, at which the weights may be averaged over steps, gradient clipping, gradient
accumulation over microbatches. Several processes (accelerate launch) share the sequences of each batch and add up their gradients; the commands run in
one process so far.

What a step does depends on its number alone: stopped anywhere and started again from its last saved state, training gives the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import TrainingError


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        microbatch: sequences in one forward and backward of one process.
        warmup: share of the steps with a rising rate.
        max_grad_norm: gradients are scaled down to this norm.
        schedule: see `rate`; "mean" is a constant rate too, and the weights that count are their means over all steps but the first third
            (arXiv 1803.05407).
    """

    steps: int
    microbatch: int
    warmup: float
    max_grad_norm: float
    schedule: str = "cosine"


@dataclass
class TrainingProgress:
    """Where training is; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        best_loss, best_step: the least validation loss, and when.
        history: what validation measured.
        curve: what `Trainer.run` yielded.
    """

    step: int = 0
    best_loss: float = math.inf
    best_step: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


def lr_multiplier(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """Multiplier of the peak learning rate at a step: linear warm-up, then half a cosine down to 0 or, with "constant" and "mean", 1."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if schedule != "cosine":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


class Trainer:
    """Optimizer, schedule and state of one training run.

    Args:
        groups: parameter groups for AdamW: {"params": {name: parameter}, "lr": peak rate, "weight_decay": ...}.
        recipe: see Recipe.
        loss: indices of sequences [M] -> mean loss over their tokens.
        draw: step -> indices of the sequences of that step [batch_size].
        step_context: what to hold around all microbatches of a step (the step cache).
        passes: forwards and backwards of the whole batch in a step, whose mean is the loss.
        enter: called with the step and the number of the pass before each.
        tokens: indices of sequences [M] -> how many tokens their mean loss is of, by which it counts in that of the batch; default: M.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        recipe: TrainerConfig,
        loss: Callable[[Tensor], Tensor],
        draw: Callable[[int], Tensor],
        step_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        tokens: Callable[[Tensor], int] = len,
        passes: int = 1,
        enter: Callable[[int, int], None] = lambda step, number: None,
    ) -> None:
        from accelerate import Accelerator

        # The device is the model's business; accelerate moves nothing here.
        self.accelerator = Accelerator(cpu=not any(p.is_cuda for group in groups for p in group["params"].values()))
        self.recipe, self.loss, self.draw, self.step_context, self.tokens = recipe, loss, draw, step_context, tokens
        self.passes, self.enter = passes, enter
        self.parameters: dict[str, nn.Parameter] = {name: p for group in groups for name, p in group["params"].items()}
        plain = [group | {"params": list(group["params"].values())} for group in groups]
        self.optimizer = torch.optim.AdamW(plain, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = TrainingProgress()
        self.means: dict[str, Tensor] = {}  # of parameters over steps, from the first that counts

    def run(self) -> Iterator[dict[str, float]]:
        """Train from the current step to the last; after each step yields step, loss, loss of the last pass, grad_norm, lr, seconds."""
        while self.progress.step < self.recipe.steps:
            started = time.perf_counter()
            step = self.progress.step
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * lr_multiplier(step, self.recipe.steps, self.recipe.warmup, self.recipe.schedule)
            loss, last = self._gradients(step)
            norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"the loss must stay finite: step {step + 1} gave loss {loss:.4g}, gradient norm {norm:.4g}; start again (--overwrite) with "
                    "learning rates of a tenth, or with --dtype float32"
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self._average()
            yield {
                "step": self.progress.step,
                "loss": loss,
                "last_pass": last,
                "grad_norm": norm,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
            }

    def _gradients(self, step: int) -> tuple[float, float]:
        """Fill the gradients of one step; returns its mean loss, and that of the last pass, over all processes."""
        accelerator, batch = self.accelerator, self.draw(step)
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        whole = self.tokens(batch)
        losses = torch.zeros(self.passes, device=next(iter(self.parameters.values())).device)
        for number in range(self.passes):
            self.enter(step, number)
            with self.step_context():
                for micro in mine.split(self.recipe.microbatch):
                    loss = self.loss(micro) * (self.tokens(micro) / (whole * self.passes))
                    accelerator.backward(loss)
                    losses[number] += loss.detach()
        if accelerator.num_processes > 1:
            losses = accelerator.reduce(losses, "sum")
            for parameter in self.parameters.values():
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
        return float(losses.sum()), float(losses[-1]) * self.passes

    @torch.no_grad()
    def _average(self) -> None:
        first = self.recipe.steps // 3 + 1
        if self.recipe.schedule != "mean" or self.progress.step < first:
            return
        for name, parameter in self.parameters.items():
            if self.progress.step == first:
                self.means[name] = parameter.detach().clone()
            else:
                self.means[name].lerp_(parameter, 1 / (self.progress.step - first + 1))

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Within, the parameters are their means over steps, where the schedule is "mean" and a third of the steps is done; else as they are."""
        kept = {name: self.parameters[name].clone() for name in self.means}
        for name, mean in self.means.items():
            self.parameters[name].copy_(mean)
        try:
            yield
        finally:
            for name, own in kept.items():
                self.parameters[name].copy_(own)

    def state(self) -> dict[str, Tensor]:
        """Parameters, their means and optimizer moments by name; what `load_state` takes."""
        tensors = {f"mean:{name}": mean for name, mean in self.means.items()}
        for name, parameter in self.parameters.items():
            tensors[f"{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                if parameter in self.optimizer.state:
                    tensors[f"{moment}:{name}"] = self.optimizer.state[parameter][moment]
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
            if f"mean:{name}" in tensors:
                self.means[name] = tensors[f"mean:{name}"].to(parameter.device, copy=True)
            if f"step:{name}" in tensors:
                moments = ("exp_avg", "exp_avg_sq", "step")
                self.optimizer.state[parameter] = {
                    moment: tensors[f"{moment}:{name}"].to(parameter.device, copy=True) for moment in moments
                }
