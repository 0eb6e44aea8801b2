"""nybble.training.fit: what is kept, when it stops, what callbacks hear, and that an interruption changes no bit."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nybble import files
from nybble.callbacks import Callback
from nybble.errors import TrainingError
from nybble.training.fit import FitConfig, TrainingRecord, checkpoint_names, fit
from nybble.training.trainer import TrainerConfig
from tests.helpers.cases import first_fast
from tests.helpers.toy_training import Toy, make_toy, trainer_config

CONFIG = FitConfig(trainer_config(steps=12), save_steps=3)  # an epoch has 4 steps
AVERAGING = replace(CONFIG, trainer=trainer_config(steps=12, lr_scheduler_type="constant_with_averaging"))


class Recorder(Callback):
    """Keeps what happened, without the numbers that were measured."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.metrics: Mapping[str, float] = {}

    def on_stage_start(self, stage: str, total: int) -> None:
        self.events.append(f"start {stage} {total}")

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.events.append(f"step {step} of {total}")
        self.metrics = metrics

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(f"validation {step}")

    def on_checkpoint(self, stage: str, step: int) -> None:
        self.events.append(f"checkpoint {step}")

    def on_stage_end(self, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self.events.append(f"end {stage}")


class Interrupt(Callback):
    """Stops the process, as far as fit can tell, at one call."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_step(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._stop("step", step)

    def on_validation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._stop("validation", step)

    def on_checkpoint(self, stage: str, step: int) -> None:
        self._stop("checkpoint", step)

    def _stop(self, event: str, step: int) -> None:
        if (event, step) == (self.event, self.step):
            raise KeyboardInterrupt


def run_fit(toy: Toy, folder: Path, config: FitConfig = CONFIG, callback: Callback | None = None) -> TrainingRecord:
    return fit(toy.groups, toy.objective, config, folder, callback or Callback())


def scripted(*values: float) -> Callable[[], dict[str, float]]:
    """A validation that measures these values one after the other."""
    remaining = iter(values)
    return lambda: {"loss": next(remaining)}


def without_seconds(record: TrainingRecord) -> list[dict[str, float]]:
    return [{name: value for name, value in step.items() if name != "seconds"} for step in record.steps]


def test_training_lowers_the_criterion_and_keeps_the_best_step(tmp_path: Path) -> None:
    toy = make_toy()
    record = run_fit(toy, tmp_path)
    losses = [validation["loss"] for validation in record.validation]
    assert [validation["step"] for validation in record.validation] == [0, 4, 8, 12]
    assert [step["step"] for step in record.steps] == list(range(1, 13))
    assert record.best_step == 12
    assert losses[-1] < 0.95 * losses[0]
    assert toy.objective.validate()["loss"] == losses[-1]


def test_callbacks_are_called_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    run_fit(make_toy(), tmp_path, replace(CONFIG, trainer=trainer_config(steps=5)), recorder)
    assert recorder.events == [
        "start train 5", "validation 0", "step 1 of 5", "step 2 of 5", "step 3 of 5", "checkpoint 3",
        "step 4 of 5", "validation 4", "checkpoint 4", "step 5 of 5", "end train",
    ]  # fmt: skip
    assert recorder.metrics.keys() == {"loss", "last_pass", "grad_norm", "lr", "seconds"}


@pytest.mark.parametrize("config", [CONFIG, AVERAGING], ids=["cosine", "averaging"])
@pytest.mark.parametrize(
    ("event", "step"),
    first_fast(
        3, [("step", 2), ("checkpoint", 3), ("validation", 4), ("validation", 0), ("checkpoint", 8), ("step", 11)]
    ),
)
def test_resumed_training_ends_with_the_same_bits(event: str, step: int, config: FitConfig, tmp_path: Path) -> None:
    undisturbed, resumed = make_toy(), make_toy()
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "resumed").mkdir()
    expected = run_fit(undisturbed, tmp_path / "undisturbed", config)
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_fit(make_toy(), tmp_path / "resumed", config, Interrupt(event, step))
    record = run_fit(resumed, tmp_path / "resumed", config, recorder)
    assert without_seconds(record) == without_seconds(expected)
    assert (record.validation, record.best_step) == (expected.validation, expected.best_step)
    for name, parameter in resumed.parameters.items():
        assert torch.equal(parameter, undisturbed.parameters[name])
    for name in checkpoint_names():
        tensors, _ = files.load_tensors(tmp_path / "resumed" / name)
        others, _ = files.load_tensors(tmp_path / "undisturbed" / name)
        assert all(torch.equal(tensors[key], others[key]) for key in tensors | others)
    saved = max((s for s in (3, 4, 6, 8, 9) if s < step or (s, event) == (step, "checkpoint")), default=0)
    assert recorder.events[1 if saved else 2] == f"step {saved + 1} of 12", "what is saved is not trained again"


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first, second, recorder = make_toy(), make_toy(), Recorder()
    expected = run_fit(first, tmp_path)
    assert run_fit(second, tmp_path, callback=recorder) == expected
    assert recorder.events == ["start train 12", "end train"]
    assert torch.equal(second.parameters["a"], first.parameters["a"])


def test_the_best_validation_is_kept_and_not_the_last(tmp_path: Path) -> None:
    toy, reference = make_toy(validate=scripted(1.0, 0.5, 0.7, 0.6)), make_toy()
    record = run_fit(toy, tmp_path)
    assert record.best_step == 4
    (tmp_path / "reference").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_fit(reference, tmp_path / "reference", callback=Interrupt("step", 4))
    assert torch.equal(toy.parameters["a"], reference.parameters["a"])


def test_parameters_before_training_are_kept_if_nothing_is_better(tmp_path: Path) -> None:
    toy, initial = make_toy(validate=scripted(0.5, 0.6, 0.7, 0.5)), make_toy()
    assert run_fit(toy, tmp_path).best_step == 0
    assert torch.equal(toy.parameters["a"], initial.parameters["a"])


def test_early_stopping_counts_validations_since_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = make_toy(validate=scripted(1.0, 0.5, 0.7, 0.6, 0.9))
    config = FitConfig(trainer_config(steps=40), save_steps=3, early_stopping_patience=2)
    with caplog.at_level(logging.INFO, logger="nybble"):
        record = run_fit(toy, tmp_path, config)
    assert [validation["step"] for validation in record.validation] == [0, 4, 8, 12]
    assert len(record.steps) == 12
    assert "stopped early at step 12: the last 2 validations were no better than that of step 4" in caplog.text
    recorder = Recorder()
    assert run_fit(make_toy(), tmp_path, config, recorder).best_step == 4
    assert recorder.events == ["start train 40", "end train"], "a resumed training that had stopped stays stopped"


def test_averaged_weights_are_validated_and_kept(tmp_path: Path) -> None:
    measured: list[torch.Tensor] = []

    def validate() -> dict[str, float]:
        measured.append(toy.parameters["a"].detach().clone())
        return {"loss": 1.0 - len(measured) / 10}

    toy = make_toy(validate=validate)
    run_fit(toy, tmp_path, AVERAGING)
    last, best = (files.load_tensors(tmp_path / name)[0] for name in checkpoint_names())
    assert torch.equal(best["a"], last["mean:a"])
    assert not torch.equal(best["a"], last["a"])
    assert torch.equal(measured[-1], best["a"])
    assert torch.equal(toy.parameters["a"], best["a"])


def test_checkpoints_hold_state_and_progress(tmp_path: Path) -> None:
    run_fit(make_toy(), tmp_path)
    state, progress = files.load_tensors(tmp_path / "last.safetensors")
    assert state.keys() == {f"{key}{name}" for key in ("", "exp_avg:", "exp_avg_sq:", "step:") for name in "ab"}
    assert progress.keys() == {"step", "best_loss", "best_step", "history", "curve"}
    assert (progress["step"], len(progress["curve"]), len(progress["history"])) == (12, 12, 4)
    assert files.load_tensors(tmp_path / "best.safetensors")[0].keys() == {"a", "b"}


def test_a_second_training_has_files_and_a_stage_of_its_own(tmp_path: Path) -> None:
    run_fit(make_toy(), tmp_path)
    first = (tmp_path / "last.safetensors").read_bytes()
    recorder = Recorder()
    record = run_fit(make_toy(), tmp_path, replace(CONFIG, name="scales"), recorder)
    assert recorder.events[0] == "start train scales 12"
    assert len(record.steps) == 12
    assert {path.name for path in tmp_path.iterdir()} == {*checkpoint_names(), *checkpoint_names("scales")}
    assert checkpoint_names("scales") == ("scales-last.safetensors", "scales-best.safetensors")
    assert (tmp_path / "last.safetensors").read_bytes() == first


def test_a_nonfinite_loss_stops_with_the_remedy(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(TrainingError, match="step 6 gave loss nan .* start again with --overwrite"):
        run_fit(make_toy(nan_at_step=5), tmp_path, callback=recorder)
    assert recorder.events[-2:] == ["step 5 of 12", "end train"]


def test_a_nonfinite_criterion_before_training_stops_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match="the loss on held-out data must be finite before training; it is nan; use --dtype float32, or another",
    ):
        run_fit(make_toy(validate=scripted(math.nan)), tmp_path)


def test_a_nonfinite_criterion_during_training_is_no_new_best(tmp_path: Path) -> None:
    assert run_fit(make_toy(validate=scripted(1.0, 0.5, math.nan, math.inf)), tmp_path).best_step == 4


def test_out_of_memory_names_the_options_that_need_less(tmp_path: Path) -> None:
    def loss(indices: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    toy = make_toy()
    with pytest.raises(
        TrainingError, match="--microbatch_size, --weight_cache recompute or --gradient_checkpointing on"
    ):
        fit(toy.groups, replace(toy.objective, loss=loss), CONFIG, tmp_path, Callback())


def test_the_pass_context_is_held_around_every_pass(tmp_path: Path) -> None:
    entered: list[int] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append(len(drawn))
        yield

    toy, drawn = make_toy(), []
    objective = replace(
        toy.objective, draw=lambda step: drawn.append(step) or toy.objective.draw(step), passes_per_step=2
    )
    config = FitConfig(TrainerConfig(3, 2, 0.0, 1.0, "cosine"), save_steps=10)
    fit(toy.groups, objective, config, tmp_path, Callback(), context)
    assert entered == [1, 1, 2, 2, 3, 3]
