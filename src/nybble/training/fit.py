"""fit: train parameters with validation, checkpoints, early stopping and resume.

    validate, then for each step:  train -> (end of an epoch) validate -> (save_steps, end of an epoch) checkpoint

Files in the folder; the second training of a run has its name in front ("scales-last.safetensors"):

    last.safetensors   parameters, averages and optimizer state of the newest checkpoint
    best.safetensors   parameters with the lowest validation criterion, averaged where the schedule averages

Both have a `TrainingProgress` in their header. If last.safetensors exists, training continues from it and ends with
the same bits as undisturbed training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble import files, processes
from nybble.callbacks import Callback
from nybble.console import bar
from nybble.errors import TrainingError
from nybble.schema import SchemaError, check_tensors, from_json
from nybble.training.objective import TrainingObjective
from nybble.training.trainer import ParameterGroup, Trainer, TrainerConfig, TrainingProgress

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class FitConfig:
    """Configuration of `fit`.

    Attributes:
        trainer: configuration of the training loop.
        save_steps: optimizer steps between checkpoints.
        early_stopping_patience: stop after this many validations in a row without a new best; 0 = never.
        name: name of a second training in the same folder; "" for the first.
    """

    trainer: TrainerConfig
    save_steps: int
    early_stopping_patience: int = 0
    name: str = ""

    @property
    def stage(self) -> str:
        """Name of the stage for callbacks and progress bar: "train" or "train NAME"."""
        return f"train {self.name}".strip()


@dataclass(frozen=True)
class TrainingRecord:
    """What happened in a training.

    Attributes:
        steps: "step", "loss", "last_pass", "grad_norm", "lr" and "seconds" of each step, see `Trainer.run`.
        validation: "step" and the metrics of each validation. Step 0 is the one before training.
        best_step: the step whose parameters were kept.
    """

    steps: list[dict[str, float]]
    validation: list[dict[str, float]]
    best_step: int


def checkpoint_names(name: str = "") -> tuple[str, str]:
    """Return the file names of the newest and of the best checkpoint of a training, see `FitConfig.name`."""
    prefix = f"{name}-" if name else ""
    return f"{prefix}last.safetensors", f"{prefix}best.safetensors"


def fit(
    groups: Sequence[ParameterGroup],
    objective: TrainingObjective,
    config: FitConfig,
    folder: Path,
    callback: Callback,
    pass_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TrainingRecord:
    """Train parameters in place. Afterwards they hold the values with the lowest criterion on held-out data.

    The values before training take part in the comparison, so training never makes the criterion worse.

    Args:
        groups: the parameters to train.
        objective: data, loss and validation.
        config: see `FitConfig`.
        folder: existing folder for the checkpoints. Training continues from a checkpoint that is there.
        callback: follows the training.
        pass_context: makes a context that is held around all microbatches of one pass, such as a weight cache.

    Returns:
        The record of all steps, including those before an interruption.

    Raises:
        TrainingError: loss, gradient norm or the first validation are not finite, or the device is out of memory.
        RunError: a checkpoint cannot be read or written.
    """
    started = time.perf_counter()
    training = _Fit(Trainer(groups, objective, config.trainer, pass_context), objective, config, folder, callback)
    training.resume()
    callback.on_stage_start(config.stage, config.trainer.steps)
    try:
        training.train()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device must have memory for one microbatch; it ran out; continue with --resume and a smaller "
            "--microbatch_size, --weight_cache recompute or --gradient_checkpointing on"
        ) from error
    finally:
        callback.on_stage_end(config.stage, time.perf_counter() - started)
    training.load_best()
    progress = training.trainer.progress
    return TrainingRecord(progress.curve, progress.history, progress.best_step)


@torch.no_grad()
def load_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Give parameters, in place, the values in a checkpoint of the best validation.

    Raises:
        RunError: the checkpoint is missing or damaged, or has other parameters.
    """
    tensors, _ = files.load_tensors(path)
    try:
        check_tensors(tensors, {name: (p.dtype, tuple(p.shape)) for name, p in parameters.items()})
    except SchemaError as error:
        raise files.damaged(path, error) from error
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


@dataclass(frozen=True)
class _Fit:
    """The parts of `fit`, which share a trainer and its files."""

    trainer: Trainer
    objective: TrainingObjective
    config: FitConfig
    folder: Path
    callback: Callback

    @property
    def last(self) -> Path:
        return self.folder / checkpoint_names(self.config.name)[0]

    @property
    def best(self) -> Path:
        return self.folder / checkpoint_names(self.config.name)[1]

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one. Without the best one, training begins again."""
        if self.last.exists() and self.best.exists():
            tensors, note = files.load_tensors(self.last)
            try:
                progress = from_json(TrainingProgress, note)
                check_tensors(tensors, self.trainer.state_layout(tensors))
                progress.check(self.config.trainer.steps)
            except SchemaError as error:
                raise files.damaged(self.last, error) from error
            self.trainer.load_state(tensors)
            self.trainer.progress = progress
            log.info("resumed at step %d of %d", self.trainer.progress.step, self.config.trainer.steps)

    def train(self) -> None:
        """Run all remaining steps, or stop early."""
        stage, total, progress = self.config.stage, self.config.trainer.steps, self.trainer.progress
        with bar(stage, total, "loss") as advance:
            advance(progress.step)
            if not progress.history:
                self.validate()
            if self.should_stop():  # an earlier process stopped early after this checkpoint
                return
            for record in self.trainer.run():
                progress.curve.append(record)
                self.callback.on_step(
                    stage, progress.step, total, {name: value for name, value in record.items() if name != "step"}
                )
                throughput = self.objective.throughput(progress.step, record["seconds"])
                advance(1, loss=f"loss {record['loss']:.4f}, {throughput}")
                end_of_epoch = progress.step % self.objective.steps_per_epoch == 0
                if end_of_epoch:
                    self.validate()
                if end_of_epoch or progress.step % self.config.save_steps == 0:
                    files.save_tensors(self.last, self.trainer.state(), vars(progress))
                    self.callback.on_checkpoint(stage, progress.step)
                if self.should_stop():
                    log.info(
                        "stopped early at step %d: the last %d validations were no better than that of step %d",
                        progress.step,
                        self.config.early_stopping_patience,
                        progress.best_step,
                    )
                    break

    def validate(self) -> None:
        """Measure the averaged weights on held-out data, and save them if they are the best so far."""
        progress, criterion = self.trainer.progress, self.objective.criterion
        with self.trainer.averaged_weights():
            trained = processes.checksum(self.trainer.parameters.values())
            processes.check_same({f"trained parameters after step {progress.step}": trained})
            metrics = self.objective.validate()
            progress.history.append({"step": progress.step} | metrics)
            log.info("step %d of %d: %s", progress.step, self.config.trainer.steps, self.objective.describe(metrics))
            if progress.step == 0 and not math.isfinite(metrics[criterion]):
                raise TrainingError(
                    f"the {criterion} on held-out data must be finite before training; it is {metrics[criterion]}; "
                    "use --dtype float32, or another --method if the model computes in float32 already"
                )
            if metrics[criterion] < progress.best_loss:
                progress.best_loss, progress.best_step = metrics[criterion], progress.step
                files.save_tensors(self.best, dict(self.trainer.parameters), vars(progress))
        self.callback.on_validation(self.config.stage, progress.step, metrics)

    def should_stop(self) -> bool:
        """Return whether as many validations as early_stopping_patience came after the best one."""
        progress, patience = self.trainer.progress, self.config.early_stopping_patience
        return 0 < patience <= sum(validation["step"] > progress.best_step for validation in progress.history)

    def load_best(self) -> None:
        """Give the parameters the values of the best validation."""
        processes.wait()  # until the first one has written them
        load_parameters(self.best, self.trainer.parameters)
