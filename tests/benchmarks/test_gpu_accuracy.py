"""benchmarks/gpu_accuracy.py: what it runs, and that a call ends with its time and the next one continues."""

import argparse
import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nybble.cli.parse import parse
from nybble.run.results import Phase, RunResults, Training, read_results
from nybble.training.trainer import Trainer
from tests.helpers.tiny import save_model

pytestmark = pytest.mark.slow  # whole runs
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_accuracy.py"


@pytest.fixture
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_accuracy", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gpu_accuracy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_accuracy"]


def finish(run: Path, kl: float = 0.5) -> None:
    """A run folder as far as the script looks at it."""
    run.mkdir(exist_ok=True)
    validation = [{"step": 0, "kl_to_teacher": 0.9}, {"step": 1, "kl_to_teacher": kl}]
    RunResults(phase=Phase.FINISHED, trainings=[Training(validation=validation)]).save(run)


def test_every_run_is_a_command_that_nybble_takes_once_what_it_follows_from_is_there(
    tmp_path: Path, script: ModuleType
) -> None:
    options = argparse.Namespace(out=tmp_path, budget="full", pretrained="smollm2", data_dir="data", winner=None)
    plan = script.Plan(options)

    def check(stage: str) -> list[str]:
        experiments = plan.experiments(stage)
        for experiment in experiments:
            parse(experiment.arguments(tmp_path)).check()
        return [experiment.name for experiment in experiments]

    assert check("text") == ["text"]
    assert check("start") == check("combinations") == check("winner") == []
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "self.safetensors").touch()
    assert check("start") == ["start-blockwise"]
    assert check("combinations") == []
    finish(tmp_path / "start-blockwise")
    assert check("combinations") == list(script.COMBINATIONS)
    for name in script.COMBINATIONS:
        assert check("winner") == []
        finish(tmp_path / name, kl=0.1 if name == "rank64" else 0.2)
    assert check("winner") == ["rank64-x3-seed0", "rank64-x3-seed1", "rank64-x3-seed2"]


def test_a_run_is_stopped_when_the_time_is_over_and_continues_from_its_checkpoint(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", "smollm")
    values = {
        "pretrained": tmp_path / "model", "data": "python-docs", "other_data": "none", "method": "rtn", "seq_len": 32,
        "num_train_samples": 8, "epochs": 2, "batch_size": 4, "save_steps": 1, "lora_rank": 4,
        "num_validation_samples": 4, "num_test_samples": 4, "eval_tasks": "none", "export": "none", "report_to": "none",
    }  # fmt: skip
    experiment = script.Experiment("run", "distill", values)
    trained: list[int] = []
    original = Trainer.run

    def run(self: Trainer) -> Iterator[dict[str, float]]:
        for record in original(self):
            trained.append(int(record["step"]))
            yield record
            if trained == [1, 2]:  # the time is over now, and step 3 never ends
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                time.sleep(60)

    monkeypatch.setattr(Trainer, "run", run)
    assert not script.execute(experiment, tmp_path, time.perf_counter() + 600)
    assert not read_results(tmp_path / "run").finished
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not script.execute(experiment, tmp_path, time.perf_counter() + 1)  # too little to begin
    assert script.execute(experiment, tmp_path, time.perf_counter() + 600)
    assert read_results(tmp_path / "run").finished
    assert trained == [1, 2, 3, 4]
    script.write_lines(tmp_path)
    assert len((tmp_path / "accuracy.jsonl").read_text().splitlines()) == 1


def test_a_run_that_fails_is_noted_and_does_not_hold_up_the_others(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = script.Experiment("run", "distill", {"pretrained": tmp_path / "nothing"})
    assert script.execute(experiment, tmp_path, time.perf_counter() + 600)
    assert "exit code 2" in (tmp_path / "run.failed").read_text()
    monkeypatch.setattr(script, "nybble", lambda arguments: pytest.fail("it was tried again"))
    assert script.execute(experiment, tmp_path, time.perf_counter() + 600)
