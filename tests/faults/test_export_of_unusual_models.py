"""Exports of models that differ from a Llama in one respect: right, or refused before the work."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nybble.cli.main import main
from nybble.run.results import read_results
from tests.helpers.compress import compress_command
from tests.helpers.tiny import make_tokenizer, save_model

COMMON: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"], "num_global_key_value_heads": 2,
}  # fmt: skip


def save(folder: Path, kind: str, **options: Any) -> Path:
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON | options)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow  # an export each
@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize(("kind", "options"), [("gemma4_text", GEMMA4), ("flint", {})])
def test_configurations_that_know_experts_are_opened(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, run = save(tmp_path / "model", kind, **options), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "openvino")) == 0
    models = read_results(run).models
    assert models["openvino"]["kl_to_teacher"] == pytest.approx(models["compressed"]["kl_to_teacher"], abs=0.01)
    assert main(["eval", str(run / "openvino"), "--data", "python-docs", "--num_samples", "2", "--seq_len", "32"]) == 0


@pytest.mark.slow  # an export
@pytest.mark.usefixtures("needs_openvino")
def test_a_limit_of_the_export_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model, run = save_model(tmp_path / "model", "llama", rope_parameters=rope), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "openvino")) == 0
    assert "the OpenVINO export is right up to 256 tokens" in " ".join(capsys.readouterr().out.split())
    assert "**Warning:** the OpenVINO export is right up to 256 tokens" in (run / "report.md").read_text()


@pytest.mark.usefixtures("needs_openvino")
def test_an_odd_group_size_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 120}
    model, run = save_model(tmp_path / "model", "llama", **shape), tmp_path / "run"
    assert main(compress_command(model, run, "--export", "openvino", "--group_size", "15")) == 2
    assert (
        "needs an even number of weights in a group; model.layers.0.self_attn.q_proj has uint4 asym"
        in capsys.readouterr().err
    )
    assert not run.exists()
    assert main(compress_command(model, run, "--group_size", "15")) == 0
    assert main(["export", str(run), "--to", "openvino"]) == 2
    assert (
        "needs an even number of weights in a group; model.layers.0.self_attn.q_proj has uint4 asym"
        in capsys.readouterr().err
    )
