"""--shard: what is refused, before the work."""

from pathlib import Path

import pytest

from nybble import processes
from nybble.cli.main import main
from nybble.errors import ModelError, OptionError
from nybble.models.loading import load
from nybble.models.selection import select_layers
from nybble.options.commands import DistillOptions
from nybble.workflows.launch import check_processes
from nybble.workflows.shard import check_shardable
from tests.helpers.composites import composite_model
from tests.helpers.mixtures import save_mixture
from tests.helpers.tiny import make_model, save_model


def test_one_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "llama")
    capsys.readouterr()
    assert main(["distill", "--pretrained", str(model), "--output_dir", str(tmp_path / "run"), "--shard"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--shard divides the weights among several processes; there is one; start them with torchrun" in said
    assert not (tmp_path / "run").exists()


def test_the_weights_themselves_are_not_trained_in_shards() -> None:
    with pytest.raises(OptionError, match="--shard needs --train lora.*got --train full"):
        DistillOptions.of(pretrained="x", shard=True, train="full").check()


def test_a_batch_is_divided_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "check_same", lambda facts: None)
    check_processes(DistillOptions.of(pretrained="x", batch_size=4))
    check_processes(DistillOptions.of(pretrained="x", batch_size=6, shard=True))
    with pytest.raises(OptionError, match="divisible by the number of processes with --shard"):
        check_processes(DistillOptions.of(pretrained="x", batch_size=4, shard=True))


def test_models_whose_text_chooses_layers_are_refused(tmp_path: Path) -> None:
    plain = make_model("llama")
    check_shardable(plain, select_layers(plain))
    mixture = load(str(save_mixture(tmp_path, "qwen3_moe")), plain.dtype, plain.device, trust_remote_code=False).model
    with pytest.raises(ModelError, match="mixture of experts"):
        check_shardable(mixture, select_layers(mixture))
    composite = composite_model("gemma3")
    with pytest.raises(ModelError, match="other parts beside its text decoder"):
        check_shardable(composite, select_layers(composite))
