"""16-bit LoRA of nybble compare: interrupted and continued, and mixtures of experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble.run.results import read_results
from nybble.workflows.lora import tune_16bit
from tests.helpers.distill import interrupt_after
from tests.helpers.mixtures import save_mixture
from tests.helpers.tune import tune_options


def merged(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "merged" / "model.safetensors")


def test_interrupted_in_its_training_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tune_options(tmp_path)
    other = options.replace(output_dir=str(tmp_path / "other"))
    tune_16bit(options, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(7, patch)
        tune_16bit(other, {})
    tune_16bit(other.replace(resume=True), {})
    assert "resumed at step" in (tmp_path / "other" / "log.txt").read_text()
    one, two = merged(tmp_path / "run"), merged(tmp_path / "other")
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("family", ["mixtral", pytest.param("llama4", marks=pytest.mark.slow)])
def test_experts_are_saved_as_transformers_loads_them(family: str, tmp_path: Path) -> None:
    save_mixture(tmp_path / "model", family)
    tune_16bit(tune_options(tmp_path, epochs=1), {})
    models = read_results(tmp_path / "run").models
    assert models["lora16"]["token_perplexity"] != models["16bit"]["token_perplexity"]
