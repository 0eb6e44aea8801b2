"""A run that exports to GGUF, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.errors import OptionError
from nybble.workflows.export import remedies_of_this_command
from tests.helpers.tiny import make_model, save_model
from tests.helpers.tokenizers import BYTE_LEVEL, byte_level_tokenizer

pytestmark = pytest.mark.usefixtures("needs_llama_cpp")

FLAGS = [
    "--data", "python-docs", "--seq_len", "32", "--group_size", "32", "--num_test_samples", "2", "--eval_tasks", "none",
    "--method", "rtn", "--export", "gguf", "--dtype", "float32",
]  # fmt: skip


def test_a_run_exports_measures_and_inspects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The vocabulary of 602 tokens is larger than that of the twin which is exported before the work."""
    model, run = tmp_path / "model", tmp_path / "run"
    make_model("gemma3", vocab_size=602).save_pretrained(model)
    byte_level_tokenizer(*BYTE_LEVEL["gpt-2"]).save_pretrained(model)
    assert main(["compress", "--pretrained", str(model), "--output_dir", str(run), *FLAGS]) == 0
    results = json.loads((run / "results.json").read_text())
    export, rows = results["exports"]["gguf"], results["models"]
    assert (export["linear_weights"], export["embedding_weights"], export["rounded"]) == (14, 1, {})
    assert export["bytes"] == (run / "gguf" / "model.gguf").stat().st_size
    assert rows["gguf"]["token_perplexity"] == pytest.approx(rows["compressed"]["token_perplexity"], rel=0.05)
    capsys.readouterr()
    assert main(["inspect", str(run / "gguf")]) == 0
    assert "15 quantized layers" in capsys.readouterr().out


def test_a_run_refuses_what_the_format_cannot_hold_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "mistral")
    assert main(["compress", "--pretrained", str(model), "--output_dir", str(tmp_path / "run"), *FLAGS]) == 2
    assert "this model has a sliding window of 8 tokens; remove gguf from --export" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_exporting_a_run_again_names_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "mistral"), tmp_path / "run"
    flags = [*FLAGS[: FLAGS.index("--export")], "--export", "none", "--dtype", "float32"]
    assert main(["compress", "--pretrained", str(model), "--output_dir", str(run), *flags]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--to", "gguf"]) == 2
    assert "this model has a sliding window of 8 tokens; remove gguf from --to\n" in capsys.readouterr().err
    message = "an export needs groups; there are none; change --bits or --layer, or remove a and b from --export"
    expected = "^an export needs groups; there are none; remove a and b from --to$"
    with pytest.raises(OptionError, match=expected), remedies_of_this_command(tmp_path):
        raise OptionError(message)
