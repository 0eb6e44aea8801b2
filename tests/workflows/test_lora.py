"""16-bit LoRA of nybble compare: interrupted and continued, and mixtures of experts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nybble import Callback, Run
from nybble.errors import RunError
from nybble.options.model import DeviceOptions
from nybble.run.results import read_results
from nybble.workflows.lora import tune_16bit
from nybble.workflows.target import open_target
from tests.helpers.distill import interrupt_after
from tests.helpers.mixtures import save_mixture
from tests.helpers.tune import tune_options


class Recorder(Callback):
    """Notes the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def on_stage_start(self, stage: str, total: int) -> None:
        self.stages.append(stage)


def merged(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "merged" / "model.safetensors")


def test_interrupted_in_its_training_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tune_options(tmp_path)
    other = options.replace(output_dir=str(tmp_path / "other"))
    callback = Recorder()
    tune_16bit(options, {}, [callback])
    assert callback.stages == ["train"]
    for open_it in (lambda run: Run(run).export(["hf"]), lambda run: open_target(str(run), DeviceOptions(), "--x")):
        with pytest.raises(RunError, match="must be a run with a 4-bit model; .* its model is .*merged"):
            open_it(tmp_path / "run")
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
