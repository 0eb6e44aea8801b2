"""nybble distill --train full and --train rounding, and ingredients of the loss."""

from pathlib import Path
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.run.results import read_results
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from tests.helpers.distill import distill_options, interrupt_after, shipped_bytes
from tests.helpers.tiny import save_model
from tests.workflows.test_positions import compress_options, losses

FULL: dict[str, Any] = {"train": "full", "lora_rank": 256, "lr": 1.6e-2}


def test_all_weights_are_trained_and_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run, other = save_model(tmp_path / "model", "llama"), tmp_path / "run", tmp_path / "other"
    distill(distill_options(model, run, weight_cache="step", **FULL))
    results = read_results(run)
    assert (results.train, results.lora_rank) == ("full", 0)
    assert results.changes is not None
    assert results.changes.codes_changed > 0.01
    assert results.models["compressed"]["bytes"] == results.models["tuned"]["bytes"]
    assert results.models["tuned"]["kl_to_teacher"] < results.models["compressed"]["kl_to_teacher"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        distill(distill_options(model, other, weight_cache="step", **FULL))
    distill(distill_options(model, other, weight_cache="step", resume=True, **FULL))
    assert shipped_bytes(other) == shipped_bytes(run)
    assert losses(other) == losses(run)


@pytest.mark.slow
def test_the_ingredients_of_the_loss_reach_the_training(tmp_path: Path) -> None:
    model, found = save_model(tmp_path / "model", "llama"), []
    for name, changes in {"kl": {}, "warm": {"kl_temperature": 2.0}, "labels": {"cross_entropy_share": 0.1}}.items():
        distill(distill_options(model, tmp_path / name, lora_rank=0, epochs=1, **changes))
        found.append(losses(tmp_path / name)[0])
    kl, warm, mixed = found
    assert warm != kl
    assert mixed == pytest.approx(0.9 * kl + 0.1 * 5.6, abs=0.1), "log 260 for an untrained model is 5.6"


@pytest.mark.slow
def test_the_scales_that_round_are_trained_and_do_not_ship(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    changes = {"train": "rounding", "lora_rank": 256, "lr": 1e-2}
    distill(distill_options(model, tmp_path / "run", **changes))
    results = read_results(tmp_path / "run")
    assert (results.train, results.lora_rank) == ("rounding", 0)
    assert results.changes is not None
    assert results.changes.codes_changed > 0.005
    assert results.models["tuned"]["kl_to_teacher"] < results.models["compressed"]["kl_to_teacher"]


@pytest.mark.slow
def test_weights_are_pulled_in_the_last_fifth_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(FakeQuantizedFullLinear, "pull_to_codes", lambda layer, share: shares.append(share))
    model = save_model(tmp_path / "model", "llama")
    changes = {"cage_lambda": 6.25, "epochs": 5, "lr_scheduler_type": "constant", "num_train_samples": 8} | FULL
    distill(distill_options(model, tmp_path / "run", **changes))
    assert sorted(set(shares)) == pytest.approx([0.05, 0.1]), "steps 9 and 10 of 10: lr x lambda is 0.1"
    assert len(shares) == 2 * 14


@pytest.mark.slow
def test_it_goes_on_from_exact_positions_as_in_one_run(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    shared: dict[str, Any] = {
        "num_calibration_samples": 8,
        "group_size": 32,
        "dtype": "bfloat16",
        "keep_positions": "exact",
    }
    compress(compress_options(model, tmp_path / "first", method="se+blockwise", **shared))
    distill(distill_options(model, tmp_path / "second", init_from=str(tmp_path / "first"), **shared, **FULL))
    distill(distill_options(model, tmp_path / "one", method="se+blockwise", **shared, **FULL))
    assert losses(tmp_path / "second") == losses(tmp_path / "one")
    assert shipped_bytes(tmp_path / "second") == shipped_bytes(tmp_path / "one")


def test_tune_does_not_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--pretrained", "m", "--task", "t", "--train", "full"]) == 2
    assert "--train" in capsys.readouterr().err
