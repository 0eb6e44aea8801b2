"""How distill and tune compute: the choice by memory, which changes no bit."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.errors import RunError
from nybble.models.quantized_file import load_weights
from nybble.run.results import read_results
from nybble.run.resume import saved_options
from nybble.workflows import estimate, plan
from nybble.workflows.compress import compress
from nybble.workflows.distill import distill
from tests.helpers.compress import compress_options
from tests.helpers.distill import distill_options
from tests.helpers.tiny import save_model


def assert_equal_weights(*runs: Path) -> None:
    (first, _), (second, _) = (load_weights(run / "quantized") for run in runs)
    for name, weight in first.items():
        assert torch.equal(weight.codes_OI, second[name].codes_OI)
        assert torch.equal(weight.scale_OG, second[name].scale_OG)


def test_gradient_checkpointing_is_chosen_where_memory_asks_for_it_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, roomy, small = save_model(tmp_path / "model", "llama"), tmp_path / "roomy", tmp_path / "small"
    changes = {"weight_cache": "recompute", "microbatch_size": 4, "epochs": 1, "base_weights": "exact"}
    distill(distill_options(model, roomy, **changes))
    assert saved_options(roomy)["gradient_checkpointing"] == "off"
    monkeypatch.setattr(estimate, "available_memory", lambda loaded: 900_000_000)
    with caplog.at_level(logging.INFO, "nybble"):
        distill(distill_options(model, small, **changes))
    assert saved_options(small)["gradient_checkpointing"] == "on"
    assert "(microbatches of 4, recompute cache, gradient checkpointing; 0.9 GB free)" in caplog.text
    assert re.search(r"GB of disk; no checkpointing would need 0\.\d GB", caplog.text)
    assert_equal_weights(roomy, small)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "rounding"])
def test_base_weights_of_one_byte_train_as_a_run_does_from_its_kept_positions(train: str, tmp_path: Path) -> None:
    model, at_once, first, second = save_model(tmp_path / "model", "llama"), *(tmp_path / name for name in "abc")
    shared: dict[str, Any] = {"dtype": "float32", "group_size": 32}
    changes = {"lr": 5e-3, "train": train, "lora_rank": 4 if train == "lora" else 256} | shared
    distill(distill_options(model, at_once, base_weights="fixed", **changes))
    compress(compress_options(model, first, keep_positions="fixed", **shared))
    distill(distill_options(model, second, init_from=str(first), base_weights="exact", **changes))
    assert_equal_weights(at_once, second)
    changed = read_results(at_once).changes
    assert changed is not None
    assert changed.codes_changed > 0


def test_base_weights_take_one_byte_where_memory_asks_for_it_and_a_resumed_run_keeps_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    options = distill_options(model, run, epochs=1, lora_rank=4)
    monkeypatch.setattr(estimate, "available_memory", lambda loaded: 800_000_000)
    with caplog.at_level(logging.INFO, "nybble"):
        distill(options)
    chosen = "microbatches of 2, recompute cache, gradient checkpointing, base weights in one byte"
    assert f"({chosen}; 0.8 GB free)" in caplog.text
    assert re.search(
        r"GB of disk; a step cache would need 0\.8 GB; no checkpointing .* 0\.8 GB; base weights in 16 bits .* 0\.8 GB",
        caplog.text,
    )
    remedy = (
        r"with --microbatch_size 1 --optim adamw_8bit the training needs 0\.\d GB; "
        "a shorter --seq_len or a smaller rank needs less"
    )
    assert re.search(rf"the estimate is above the free memory \(0\.8 GB\); {remedy}", caplog.text)
    monkeypatch.undo()
    assert saved_options(run)["base_weights"] == "fixed"
    assert plan.keep_saved_choices(options.replace(resume=True)).training.base_weights == "fixed"


@pytest.mark.parametrize("command", ["compress", "distill"])
def test_what_cannot_fit_is_refused_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = save_model(tmp_path / "model", "llama"), tmp_path / "run"
    monkeypatch.setattr(estimate, "total_memory", lambda device: 600_000_000)
    start = r"the run must fit into the memory of this machine; it needs 0\.\d GB and there are 0\.6 GB; "
    if command == "compress":
        words = "a smaller --seq_len needs less, and --offload disk holds one decoder block at a time"
        with pytest.raises(RunError, match=start + words):
            compress(compress_options(model, run))
    else:
        flags = "--microbatch_size 1 --weight_cache recompute --gradient_checkpointing on --base_weights fixed"
        with pytest.raises(RunError, match=start + rf"with {flags} --optim adamw_8bit the training needs 0\.\d GB; "):
            distill(distill_options(model, run, lora_rank=4))
    assert not run.exists()
    monkeypatch.setattr(estimate, "total_memory", lambda device: 700_000_000)  # a tenth below the estimate
    if command == "compress":
        assert read_results(compress(compress_options(model, run))).finished


@pytest.mark.slow
def test_base_weights_are_said_to_have_no_effect_where_none_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model", "llama")
    distill(distill_options(model, tmp_path / "run", epochs=1, lora_rank=0, base_weights="fixed"))
    assert "--base_weights has no effect: no frozen weights are kept without adapters" in caplog.text
    assert saved_options(tmp_path / "run")["base_weights"] == "exact"
