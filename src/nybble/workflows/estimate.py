"""What the estimate of a run's memory counts beside weights and training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nybble.errors import RunError
from nybble.evaluation.lm_eval_model import default_batch_size, max_window
from nybble.models.device import free_memory, total_memory
from nybble.models.loading import LoadedModel
from nybble.training import memory
from nybble.training.memory import ModelShapes
from nybble.workflows.plan import PlannedRun

log = logging.getLogger("nybble")

# Measured peaks were up to 13 % below their estimates, so a run is refused only where the estimate is this much above
# all memory there is.
_SURE = 1.2


def available_memory(loaded: LoadedModel) -> int:
    """Bytes that are free on the model's device, including those of the model itself."""
    held: int = sum(p.nbytes for p in loaded.model.parameters() if p.device.type != "meta")
    return free_memory(loaded.model.device) + held


def measured_logit_bytes(planned: PlannedRun, tasks: Sequence[str]) -> int:
    """Bytes of the logits that exist at once while a model is measured: of a sequence, or of lm-eval, and a copy."""
    model, tokens = planned.loaded.model, planned.text.test.ids.shape[1]
    if tasks:
        window = max_window(model.config)
        tokens = max(tokens, 2 * window * default_batch_size(model.config, window))
    return int(tokens * len(planned.head.weight_VD) * model.dtype.itemsize)


def calibration_memory(shapes: ModelShapes, planned: PlannedRun, wanted: int) -> int:
    """Bytes of memory that the compression takes; 0 where nothing is calibrated. Says how much text there is.

    Args:
        wanted: calibration sequences that were asked for.
    """
    if not planned.compression.calibrates:
        return 0
    count, length = planned.text.calibration_shape
    short = "" if count == wanted else f" (all there is; --num_calibration_samples is {wanted})"
    log.info("calibration: %d x %d tokens of the training text%s", count, length, short)
    return memory.compression_memory(shapes, count, length, planned.loaded.model.device.type != "cpu")


def calibration_disk(shapes: ModelShapes, planned: PlannedRun) -> int:
    """Bytes on disk that the compression takes; 0 where nothing is calibrated."""
    count, length = planned.text.calibration_shape
    return memory.compression_disk(shapes, count * length if planned.compression.calibrates else 0)


def check_memory(needed: int, planned: PlannedRun, remedy: str) -> None:
    """Warn where the estimate is above what is free, and refuse what is far above all there is.

    Args:
        needed: bytes, by the estimate.
        remedy: options that need less.

    Raises:
        RunError: it cannot fit, even if nothing else runs.
    """
    device = planned.loaded.model.device
    available, total = available_memory(planned.loaded), total_memory(device)
    if needed > _SURE * total:
        what = "this machine" if device.type == "cpu" else f"--device {device}"
        raise RunError(
            f"the run must fit into the memory of {what}; it needs {needed / 1e9:.1f} GB and there are "
            f"{total / 1e9:.1f} GB; {remedy}"
        )
    if needed > available:
        log.warning("the estimate is above the free memory (%.1f GB); %s", available / 1e9, remedy)
