"""TensorBoardCallback: writes the curves of a training as TensorBoard scalars.

The events are written in this thread. The writer in torch has its own, where a full disk ends in a traceback.

Tags are "loss", "grad_norm" and "lr" for every optimizer step, and "validation_METRIC" for every validation. Those of
a second training in a run have its name in front ("scales loss").
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from nybble.callbacks import Callback
from nybble.files import reporting_full_disk

log = logging.getLogger("nybble")

_VERSION = "brain.Event:2"  # of the file format; the first event of every file names it
_STEP_METRICS = ("loss", "grad_norm", "lr")


class TensorBoardCallback(Callback):
    """Writes scalars into event files. Without the package tensorboard, it says so in the log and writes nothing.

    Args:
        folder: folder of the event files; it is created with the first scalar.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._available = True

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Write loss, gradient norm and learning rate, as far as the stage has them."""
        self._write(stage, step, {name: metrics[name] for name in _STEP_METRICS if name in metrics})

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics. The validation before training is left out, as it belongs to no optimizer step."""
        if step:
            self._write(stage, step, {f"validation_{name}": value for name, value in metrics.items()})

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Close the event file."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written was an error before
                self._file.close()
            self._file = None

    def _write(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        if not (scalars and self._available):
            return
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            self._available = False
            log.info(
                "no TensorBoard curves are written: the package tensorboard is not installed; "
                'install it with: pip install -c constraints.txt -e ".[tensorboard]"'
            )
            return
        prefix = stage.removeprefix("train")
        values = [Summary.Value(tag=f"{prefix} {name}".strip(), simple_value=value) for name, value in scalars.items()]
        with reporting_full_disk(self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = (self._folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("ab")
                RecordWriter(self._file).write(Event(wall_time=time.time(), file_version=_VERSION).SerializeToString())
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()
