"""nybble eval: what it prints, and what it says when it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nybble.cli.main import main
from nybble.models.quantized_model import load_quantized
from nybble.tasks.jsonl_source import JsonlSource
from nybble.tasks.scoring import score_questions
from tests.helpers.causal_types import save_tiny
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.questions import numbered_rows, request, write_rows
from tests.helpers.tiny import make_model

FLAGS = ["--seq_len", "32", "--num_samples", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "quantized"
    save_checkpoint(path, make_model("smollm", num_hidden_layers=1))
    return path


def test_rows_of_ones_own_are_scored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "mine.jsonl", numbered_rows(60))
    model, tokenizer, _ = load_quantized(folder, torch.float32)
    questions = JsonlSource().load(request(rows)).scored
    expected = score_questions(model, tokenizer, questions, False, 32)
    assert main(["eval", str(folder), "--task", str(rows), "--data", "none", *FLAGS]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["task:mine acc"] == expected.accuracy
    assert measured["task:mine log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-6)
    assert (measured["documents:mine"], measured["task"]) == (6, str(rows))
    assert main(["eval", str(folder), "--task", "openbookqa", *FLAGS]) == 2
    assert "--task must be a file of rows; openbookqa is a task of lm-eval" in capsys.readouterr().err
    assert main(["eval", str(folder), "--task", str(tmp_path / "no.jsonl"), *FLAGS]) == 2
    assert "no.jsonl must be an existing file" in capsys.readouterr().err


def test_stdout_is_one_json_object_that_says_what_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folder), "--data", "python-docs", "--teacher", str(folder), *FLAGS]) == 0
    printed = capsys.readouterr()
    measured = json.loads(printed.out)
    assert measured.pop("token_perplexity") > 1
    assert measured.pop("kl_to_teacher") == pytest.approx(0, abs=1e-6)
    assert {key: measured[key] for key in ("model", "data", "split", "num_samples", "seq_len", "teacher")} == {
        "model": str(folder), "data": ["python-docs"], "split": "test", "num_samples": 2, "seq_len": 32,
        "teacher": str(folder),
    }  # fmt: skip
    table = " ".join(printed.err.split())
    assert "on the test split of python-docs (2 sequences of 32 tokens)" in table
    assert "token perplexity" in table


def test_more_tokens_than_learned_positions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_tiny(tmp_path / "gpt2", "gpt2"))
    assert main(["eval", model, "--data", "python-docs", "--seq_len", "512", "--num_samples", "1"]) == 2
    assert "--seq_len must be at most 256, the learned positions of gpt2; got 512" in capsys.readouterr().err


def test_strict_is_float32(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nybble.models.device.has_bfloat16", lambda device: True)
    found = []
    for more in (["--strict"], ["--dtype", "float32"], []):
        flags = ["--seq_len", "32", "--num_samples", "2", "--device", "cpu"]
        assert main(["eval", str(folder), "--data", "python-docs", *flags, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["token_perplexity"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("text", ["", "one line"])
def test_too_little_text_names_an_option_that_exists(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.txt").write_text(text)
    assert main(["eval", str(folder), "--data", str(tmp_path / "tiny.txt"), *FLAGS]) == 2
    assert capsys.readouterr().err.endswith("; use more text, or name another to measure on with --data\n")
