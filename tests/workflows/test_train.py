"""How distill and tune compute: the choice by memory, which changes no bit."""

import logging
from pathlib import Path

import pytest
import torch

from nybble.models.quantized_file import load_weights
from nybble.run.resume import saved_options
from nybble.workflows import plan
from nybble.workflows.distill import distill
from tests.helpers.distill import distill_options
from tests.helpers.tiny import save_model


def test_gradient_checkpointing_is_chosen_where_memory_asks_for_it_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, roomy, small = save_model(tmp_path / "model", "llama"), tmp_path / "roomy", tmp_path / "small"
    changes = {"weight_cache": "recompute", "microbatch_size": 4, "epochs": 1}
    distill(distill_options(model, roomy, **changes))
    assert saved_options(roomy)["gradient_checkpointing"] == "off"
    monkeypatch.setattr(plan, "available_memory", lambda loaded: 900_000_000)
    with caplog.at_level(logging.INFO, "nybble"):
        distill(distill_options(model, small, **changes))
    assert saved_options(small)["gradient_checkpointing"] == "on"
    assert "(recompute cache, gradient checkpointing; 0.9 GB free)" in caplog.text
    (first, _), (second, _) = (load_weights(run / "quantized") for run in (roomy, small))
    for name, weight in first.items():
        assert torch.equal(weight.codes_OI, second[name].codes_OI)
        assert torch.equal(weight.scale_OG, second[name].scale_OG)
