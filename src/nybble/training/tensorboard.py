"""TensorBoardCallback: writes the curves of a training as TensorBoard scalars.

Tags are "loss", "grad_norm" and "lr" for every optimizer step, and "validation_METRIC" for every validation. Those of
a second training in a run have its name in front ("scales loss").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.callbacks import Callback

log = logging.getLogger("nybble")

_STEP_METRICS = ("loss", "grad_norm", "lr")


class TensorBoardCallback(Callback):
    """Writes scalars into event files. Without the package tensorboard, it says so in the log and writes nothing.

    Args:
        folder: folder of the event files; it is created with the first scalar.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None  # torch.utils.tensorboard.SummaryWriter, which imports without type information
        self._available = True

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Write loss, gradient norm and learning rate, as far as the stage has them."""
        self._write(stage, step, {name: metrics[name] for name in _STEP_METRICS if name in metrics})

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics. The validation before training is left out, as it belongs to no optimizer step."""
        if step:
            self._write(stage, step, {f"validation_{name}": value for name, value in metrics.items()})

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Write out what is buffered and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, stage: str, step: int, scalars: Mapping[str, float]) -> None:
        if not (scalars and self._open()):
            return
        for name, value in scalars.items():
            self._writer.add_scalar(f"{stage.removeprefix('train')} {name}".strip(), value, step)

    def _open(self) -> bool:
        """Open the event file if necessary. Returns whether TensorBoard is installed."""
        if self._writer is None and self._available:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._available = False
                log.info(
                    "no TensorBoard curves are written: the package tensorboard is not installed; "
                    'install it with: pip install -c constraints.txt -e ".[tensorboard]"'
                )
            else:
                self._writer = SummaryWriter(str(self._folder))
        return self._available
