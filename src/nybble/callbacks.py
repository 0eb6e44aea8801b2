"""Callbacks: what a program can implement to follow a command while it runs.

    class PrintLoss(Callback):
        def on_step(self, stage, step, total, metrics):
            print(f"{stage}: step {step} of {total}, loss {metrics['loss']:.4f}")

Callbacks only receive information. They run in the process of the command, and an exception in a callback stops it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nybble import processes


class Callback:
    """Base class for callbacks. Every method does nothing; a subclass overrides the ones that it needs.

    Calls of one stage come in this order: on_stage_start, then any number of on_step, on_validation and
    on_checkpoint, then on_stage_end. A training stage is called "train", and a second training of the same run "train
    NAME"; compression is "compress", whose steps are layers and have no metrics.
    """

    def on_stage_start(self, stage: str, total: int) -> None:
        """Receive that a stage starts.

        Args:
            stage: name of the stage.
            total: units of work that it has, for a training its optimizer steps.
        """

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Receive that a unit of work is done.

        Args:
            stage: name of the stage.
            step: units done so far, including those before an interruption.
            total: units in all.
            metrics: for a training "loss", "last_pass", "grad_norm", "lr" and "seconds", see `Trainer.run`.
        """

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Receive what a validation measured.

        Args:
            stage: name of the stage.
            step: optimizer steps done; 0 is the validation before training.
            metrics: metric -> value on held-out data.
        """

    def on_checkpoint(self, stage: str, step: int) -> None:
        """Receive that a checkpoint was written.

        Args:
            stage: name of the stage.
            step: a resumed run continues after this step.
        """

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Receive that a stage ended, also where an error ended it.

        Args:
            stage: name of the stage.
            seconds: seconds since on_stage_start.
        """


class CallbackList(Callback):
    """Forwards every call to several callbacks, in their order; of several processes, only the first one does.

    Args:
        callbacks: the callbacks to forward to.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks) if processes.is_first() else ()

    def on_stage_start(self, stage: str, total: int) -> None:
        """Forward the call."""
        for callback in self.callbacks:
            callback.on_stage_start(stage, total)

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Forward the call."""
        for callback in self.callbacks:
            callback.on_step(stage, step, total, metrics)

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Forward the call."""
        for callback in self.callbacks:
            callback.on_validation(stage, step, metrics)

    def on_checkpoint(self, stage: str, step: int) -> None:
        """Forward the call."""
        for callback in self.callbacks:
            callback.on_checkpoint(stage, step)

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Forward the call."""
        for callback in self.callbacks:
            callback.on_stage_end(stage, seconds)
