"""nybble.training.tensorboard: scalars that TensorBoard's own reader finds in the event files."""

import logging
import sys
from pathlib import Path

import pytest

from nybble.training.tensorboard import TensorBoardCallback

METRICS = {"loss": 2.0, "last_pass": 2.0, "grad_norm": 3.0, "lr": 1e-3, "seconds": 0.5}


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_of_two_trainings(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path)
    for stage in ("train", "train scales"):
        callback.on_stage_start(stage, 1)
        callback.on_validation(stage, 0, {"kl_to_teacher": 9.0})
        callback.on_step(stage, 1, 1, METRICS)
        callback.on_validation(stage, 1, {"kl_to_teacher": 0.25})
        callback.on_stage_end(stage, 0.1)
    first = {"loss": [(1, 2.0)], "grad_norm": [(1, 3.0)], "lr": [(1, pytest.approx(1e-3))]}
    first["validation_kl_to_teacher"] = [(1, 0.25)]  # nothing of step 0
    assert read_scalars(tmp_path) == first | {f"scales {tag}": values for tag, values in first.items()}


def test_stages_without_curves_leave_no_event_file(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path / "tensorboard")
    callback.on_stage_start("teacher", 2)
    callback.on_step("teacher", 1, 2, {})
    callback.on_stage_end("teacher", 0.1)
    assert not (tmp_path / "tensorboard").exists()


def test_without_tensorboard_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)  # importing it raises ImportError
    callback = TensorBoardCallback(tmp_path / "tensorboard")
    with caplog.at_level(logging.INFO, logger="nybble"):
        callback.on_step("train", 1, 2, METRICS)
        callback.on_step("train", 2, 2, METRICS)
        callback.on_stage_end("train", 0.1)
    assert caplog.text.count("the package tensorboard is not installed; install it with: pip install") == 1
    assert not (tmp_path / "tensorboard").exists()
