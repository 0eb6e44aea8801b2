"""kill -9 at chosen renames of compress, distill and tune: the same command with --resume ends with the same bits."""

import os
from pathlib import Path

import pytest

from tests.helpers.compress import compress_command
from tests.helpers.kills import kills
from tests.helpers.tiny import save_model
from tests.helpers.tune import write_letters

DISTILL = [
    "--lora_rank", "2", "--num_train_samples", "8", "--epochs", "2", "--batch_size", "4", "--save_steps", "1",
    "--num_validation_samples", "4", "--report_to", "none",
]  # fmt: skip
TUNE = [
    "--seq_len", "32", "--epochs", "1", "--batch_size", "8", "--group_size", "32", "--lora_rank_space", "4", "2",
    "--num_min_loss_configs", "1", "--save_steps", "2", "--num_test_samples", "2", "--export", "none",
    "--report_to", "none",
]  # fmt: skip


@pytest.mark.slow  # some ten seconds each
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("command", "every"),
    [
        (["compress", "--method", "rtn"], 5),
        (["compress", "--method", "rtn", "--export", "openvino"], 8),
        (["compress", "--method", "awq+se+gptq"], 7),
        (["compress", "--method", "se+blockwise", "--blockwise_epochs", "1"], 8),
        (["distill", "--method", "rtn", *DISTILL], 9),
        (["distill", "--method", "rtn", *DISTILL, "--lora_rank", "0"], 13),
        (["tune", "--method", "rtn", "--quantize", "during", *TUNE], 11),
        (["tune", "--method", "rtn", "--quantize", "after", "--scale_epochs", "1", *TUNE], 11),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else None,
)
def test_a_killed_run_ends_with_the_same_bits(command: list[str], every: int, tmp_path: Path) -> None:
    model, run, start = save_model(tmp_path / "model", "llama"), tmp_path / "run", tmp_path / "start"
    start.mkdir()
    if command[0] == "tune":
        given = ["tune", "--pretrained", str(model), "--output_dir", str(run)]
        given += ["--task", str(write_letters(tmp_path / "letters.jsonl", 24))]
    else:
        given = [command[0], *compress_command(model, run)[1:-2]]
    found = kills(start, tmp_path, [*given, *command[1:], "--resume"], every)
    clean = found["clean"]
    assert clean["code"] == 0, clean["said"]
    if "openvino" in command:
        assert "openvino/openvino_model.bin" in clean["files"]
    assert len(found["kills"]) >= 3
    for left in found["kills"]:
        at = left.pop("at")
        assert left["code"] == 0, (at, left["said"])
        assert (left["files"], left["models"], left["names"]) == (clean["files"], clean["models"], clean["names"]), at
