"""Ctrl-C, SIGTERM and SIGHUP at any moment: what is done is kept, one line, exit code 128 + signal."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.run.results import read_results
from nybble.training.trainer import Trainer
from nybble.workflows import measure
from tests.helpers.compress import compress_command
from tests.helpers.distill import shipped_bytes
from tests.helpers.tiny import save_model

LINES = {
    signal.SIGINT: "interrupted; the same command",
    signal.SIGTERM: "interrupted by SIGTERM; the same command",
    signal.SIGHUP: "interrupted by SIGHUP; the same command",
}
DISTILL = [
    "--lora_rank", "2", "--num_train_samples", "8", "--epochs", "2", "--batch_size", "4", "--save_steps", "1",
    "--num_validation_samples", "4", "--report_to", "none",
]  # fmt: skip


def distill_command(model: Path, run: Path) -> list[str]:
    return ["distill", *compress_command(model, run)[1:], *DISTILL]


def send_during_training(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.run

    def run(self: Trainer) -> Iterator[dict[str, float]]:
        for record in original(self):
            yield record
            if record["step"] == 2:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "run", run)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
@pytest.mark.slow
def test_training_that_was_interrupted_ends_with_the_same_bits(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "llama")
    assert main(distill_command(model, tmp_path / "undisturbed")) == 0
    with monkeypatch.context() as patch:
        send_during_training(number, patch)
        assert main(distill_command(model, tmp_path / "run")) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"nybble: {LINES[number]}")
    assert main([*distill_command(model, tmp_path / "run"), "--resume"]) == 0
    assert shipped_bytes(tmp_path / "run") == shipped_bytes(tmp_path / "undisturbed")


def raises_something_else(*_: Any, **__: Any) -> None:
    """What a library does that turns an interruption into an error of its own."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        raise RuntimeError("something happened") from None


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("function", ["convert_model", pytest.param("save_model", marks=pytest.mark.slow)])
def test_an_export_that_was_interrupted_is_no_failed_export(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino

    run = tmp_path / "run"
    monkeypatch.setattr(openvino, function, raises_something_else)
    assert main(compress_command(save_model(tmp_path / "model", "llama"), run, "--export", "openvino")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("nybble: interrupted; the same command")
    assert not read_results(run).finished
    assert not list(run.glob("openvino*"))


def test_lm_eval_that_was_interrupted_is_no_error_of_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "run_tasks", raises_something_else)
    monkeypatch.setattr("nybble.workflows.text.check_tasks", lambda *_: None)
    command = compress_command(save_model(tmp_path / "model", "llama"), tmp_path / "run", "--eval_tasks", "wikitext")
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("nybble: interrupted; the same command")


def test_a_library_that_goes_on_regardless_is_stopped_after_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallows(*_: Any) -> dict[str, Any]:
        try:
            raises_something_else()
        except RuntimeError:
            return {}
        return {}

    monkeypatch.setattr(measure, "run_tasks", swallows)
    monkeypatch.setattr("nybble.workflows.text.check_tasks", lambda *_: None)
    command = compress_command(save_model(tmp_path / "model", "llama"), tmp_path / "run", "--eval_tasks", "wikitext")
    assert main(command) == 130
    assert read_results(tmp_path / "run").models == {}


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup starts a process with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_during_training(signal.SIGHUP, monkeypatch)
        assert main(distill_command(save_model(tmp_path / "model", "llama"), tmp_path / "run")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_results(tmp_path / "run").finished


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in LINES]
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in LINES] == before
