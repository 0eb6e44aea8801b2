"""Mixtures of experts from the command to the run folder: compressed, distilled, tuned, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.models.loading import load
from nybble.models.quantized_model import load_quantized
from nybble.run.results import read_results
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.cases import fast_cases
from tests.helpers.distill import distill_options
from tests.helpers.mixtures import FAMILIES, save_mixture
from tests.helpers.tune import task_of, tune_options

# Not phimoe: its routing weights jump at a threshold, and those of a random model do so all the time.
DISTILLED = fast_cases([family for family in FAMILIES if family != "phimoe"], ["gpt_oss"])
# Enough for a random mixture to get closer to its 16-bit self.
TRAINING: dict[str, Any] = {"group_size": 32, "lr": 1e-3, "scale_lr": 1e-3, "num_train_samples": 64, "save_steps": 100}
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", DISTILLED)
def test_a_mixture_is_distilled_and_loaded_again(family: str, tmp_path: Path) -> None:
    folder, run = save_mixture(tmp_path / "model", family), tmp_path / "run"
    distill(distill_options(folder, run, **TRAINING))
    results = read_results(run)
    changes = results.changes
    assert changes is not None
    trained = {name: share for name, share in changes.layer_codes_changed.items() if ".experts." in name}
    assert trained
    assert sum(share > 0 for share in trained.values()) >= len(trained) // 2, "adapters move the codes of experts"
    before, after = (results.models[row]["kl_to_teacher"] for row in ("compressed", "tuned"))
    assert after < before

    model = load_quantized(run / "quantized", torch.float32).model
    original = load(str(folder), torch.float32, CPU).model
    assert model.state_dict().keys() == original.state_dict().keys()
    ids = torch.arange(40)[None]
    expected = original(input_ids=ids).logits
    difference = (model(input_ids=ids).logits - expected).abs().mean() / expected.abs().mean()
    assert 0 < difference < 0.7, "a few tokens go to other experts"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_tuned_with_elastic_ranks(family: str, tmp_path: Path) -> None:
    options = tune_options(tmp_path, group_size=32)
    model = Path(options.model.pretrained)
    for file in model.iterdir():
        file.unlink()
    save_mixture(model, family)
    tune(options)
    configuration = task_of(tmp_path / "run").configuration
    assert configuration is not None
    assert any(".experts." in name for name in read_results(tmp_path / "run").changes.layer_codes_changed)  # type: ignore[union-attr]
