"""distill and tune in two processes: the curve and the codes of one process."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.cli.main import main
from nybble.run.results import RunResults, read_results
from tests.helpers.compress import compress_command
from tests.helpers.mixtures import save_mixture
from tests.helpers.several import Launcher, lines_of
from tests.helpers.tiny import save_model
from tests.helpers.tune import write_letters, write_words

pytestmark = pytest.mark.slow  # every process imports transformers
DISTILL = [
    "--lora_rank", "2", "--num_train_samples", "40", "--epochs", "2", "--batch_size", "4", "--save_steps", "4",
    "--num_validation_samples", "5", "--report_to", "none", "--dtype", "float32",
]  # fmt: skip
TUNE = [
    "--seq_len", "32", "--epochs", "2", "--batch_size", "5", "--lr", "1e-2", "--lora_rank_space", "8", "4", "2",
    "--num_min_loss_configs", "2", "--export", "none", "--save_steps", "2", "--report_to", "none",
    "--num_test_samples", "2", "--num_calibration_samples", "8", "--group_size", "32", "--dtype", "float32",
]  # fmt: skip


def distill_command(model: Path, run: Path, *more: str) -> list[str]:
    return ["distill", *compress_command(model, run)[1:], *DISTILL, *more]


def in_one_and_in_two(
    launcher: Launcher, folder: Path, command: Sequence[str], code: str = ""
) -> tuple[RunResults, RunResults]:
    """The results of a command in one process (folder/one) and in two (folder/two), which run `code` first."""
    assert main([*command, "--output_dir", str(folder / "one")]) == 0
    ended = launcher.run([*command, "--output_dir", str(folder / "two")], 2, code)
    assert [process.code for process in ended] == [0, 0], ended
    assert "Everything is in" in ended[0].out
    assert (ended[1].out, ended[1].err) == ("", "")
    return read_results(folder / "one"), read_results(folder / "two")


def assert_same_curves(one: RunResults, two: RunResults) -> None:
    """Equal up to the order of sums in float32."""
    assert len(one.trainings) == len(two.trainings) > 0
    for alone, divided in zip(one.trainings, two.trainings, strict=True):
        for a, b in zip(alone.steps, divided.steps, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for a, b in zip(alone.validation, divided.validation, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert alone.best_step == divided.best_step
    for row, metrics in one.models.items():
        assert metrics == pytest.approx(two.models[row], rel=1e-4, abs=1e-5), row


def changed_codes(folder: Path) -> float:
    """Share of the codes that differ between one and two."""
    one, two = (load_file(folder / name / "quantized" / "weights.safetensors") for name in ("one", "two"))
    codes = [name for name, tensor in one.items() if tensor.dtype == torch.uint8]
    assert codes
    different = sum(int((one[name] != two[name]).sum()) for name in codes)
    return different / sum(one[name].numel() for name in codes)


def files_of(run: Path) -> set[str]:
    return {str(file.relative_to(run)) for file in run.rglob("*")}


@pytest.mark.parametrize("more", [[], ["--weight_cache", "recompute", "--scale_lr", "0"], ["--lora_rank", "0"]])
def test_distill_in_two_processes(more: list[str], tmp_path: Path, launcher: Launcher) -> None:
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, *more)
    one, two = in_one_and_in_two(launcher, tmp_path, command)
    assert len(one.trainings[0].steps) == 20
    assert_same_curves(one, two)
    assert changed_codes(tmp_path) < 1e-4
    assert (one.machine["processes"], two.machine["processes"]) == (1, 2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    states = [(tmp_path / name / "teacher" / "test.bin").read_bytes() for name in ("one", "two")]
    assert states[0] == states[1]
    megabytes = re.search(r"2 processes add up ([0-9.]+) MB of gradients", (tmp_path / "two" / "log.txt").read_text())
    assert megabytes is not None
    # In a step, beside the gradients: the loss, and for each parameter whether there is one. The log rounds.
    beside = two.machine["bytes_sent"]["gradients"] / 20 - 1e6 * float(megabytes[1])
    assert -500 <= beside <= 2000
    assert "bytes_sent" not in one.machine


def test_a_mixture_of_experts_in_two_processes(tmp_path: Path, launcher: Launcher) -> None:
    """Experts that get tokens in one process only have a gradient there only."""
    command = distill_command(save_mixture(tmp_path / "model", "qwen3_moe"), tmp_path, "--batch_size", "2")
    one, two = in_one_and_in_two(launcher, tmp_path, command)
    assert_same_curves(one, two)
    assert changed_codes(tmp_path) < 1e-4


_FLOAT64 = "import torch\nfrom nybble.workflows import plan\nplan.pick_dtype = lambda *_: torch.float64"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_compress_in_two_processes_gives_the_same_codes_in_float64(
    family: str, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.workflows.plan.pick_dtype", lambda *_: torch.float64)
    save = save_model if family == "llama" else save_mixture
    command = compress_command(save(tmp_path / "model", family), tmp_path, "--method", "awq+se+gptq")
    in_one_and_in_two(launcher, tmp_path, command, _FLOAT64)
    assert changed_codes(tmp_path) == 0
    one, two = (load_file(tmp_path / name / "quantized" / "weights.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-9, atol=1e-12)  # norms into which scales were folded


_STOP_AFTER_A_BLOCK = """
from nybble.compression.store import BlockStore
original = BlockStore.save
def save(self, block, *rest):
    original(self, block, *rest)
    raise KeyboardInterrupt
BlockStore.save = save
"""


def test_compress_continues_with_other_numbers_of_processes(tmp_path: Path, launcher: Launcher) -> None:
    model = save_model(tmp_path / "model", "llama")
    command = compress_command(model, tmp_path / "two", "--method", "awq+se+gptq", "--dtype", "float32")
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    ended = launcher.run(command, 2, _STOP_AFTER_A_BLOCK)
    assert [process.code for process in ended] == [130, 130]
    assert len(lines_of(ended)) == 1
    assert [file.name for file in (tmp_path / "two" / "compress").iterdir()] == ["model.layers.0.safetensors"]
    ended = launcher.run([*command, "--resume"], 3)
    assert [process.code for process in ended] == [0, 0, 0], ended
    assert changed_codes(tmp_path) < 1e-3


@pytest.mark.parametrize("method", ["se+gptq", "awq+se+gptq", "blockwise"])
def test_compress_in_two_processes(method: str, tmp_path: Path, launcher: Launcher) -> None:
    model = save_model(tmp_path / "model", "llama")
    more = ["--method", method, "--dtype", "float32", "--num_calibration_samples", "9"]
    one, two = in_one_and_in_two(launcher, tmp_path, compress_command(model, tmp_path, *more))
    assert changed_codes(tmp_path) < 1e-3  # sums in another order: a weight halfway between two codes
    assert one.models["compressed"] == pytest.approx(two.models["compressed"], rel=1e-2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("method", ["rtn", "awq+se+gptq", "blockwise"])
def test_compress_from_disk_in_two_processes(method: str, tmp_path: Path, launcher: Launcher) -> None:
    """The same bits as two processes have with the model in memory."""
    write_tasks(tmp_path / "data")
    command = compress_command(save_model(tmp_path / "model", "llama"), tmp_path, "--method", method)
    command += ["--dtype", "float32", "--num_calibration_samples", "9", "--num_test_samples", "5"]
    command += ["--eval_tasks", "arc_easy", "wikitext", "--data_dir", str(tmp_path / "data")]
    for name, offload in (("one", "none"), ("two", "disk")):
        ended = launcher.run([*command, "--output_dir", str(tmp_path / name), "--offload", offload])
        assert [process.code for process in ended] == [0, 0], ended
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert changed_codes(tmp_path) == 0
    for row, metrics in one.models.items():
        assert metrics == two.models[row], row
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_lm_eval_in_two_processes(tmp_path: Path, launcher: Launcher) -> None:
    write_tasks(tmp_path / "data")
    tasks = ["--eval_tasks", "arc_easy", "wikitext", "--data_dir", str(tmp_path / "data"), "--dtype", "float32"]
    command = compress_command(save_model(tmp_path / "model", "llama"), tmp_path, *tasks)
    one, two = in_one_and_in_two(launcher, tmp_path, command)
    assert set(one.models["16bit"]) >= {"task:arc_easy acc", "word_perplexity", "right:arc_easy acc"}
    for row, metrics in one.models.items():
        for name, value in metrics.items():
            expected = two.models[row][name]
            assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-5)), (row, name)


def write_tasks(folder: Path) -> None:
    """Five questions and three pages."""
    choices = {"label": ["A", "B"], "text": ["blue", "green"]}
    rows = [{"id": str(i), "question": f"what is {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(5)]
    pages = [{"page": f"one page about {i} and more"} for i in range(3)]
    for name, content in (("arc/ARC-Easy", rows), ("wikitext/document_level", pages)):
        (folder / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in content)
            (folder / name / f"{split}.jsonl").write_text(lines)


@pytest.mark.parametrize("quantize", ["during", "after"])
@pytest.mark.parametrize("write", [write_letters, write_words])
def test_tune_in_two_processes(write: Any, quantize: str, tmp_path: Path, launcher: Launcher) -> None:
    task = write(tmp_path / "task.jsonl")
    model = save_model(tmp_path / "model", "smollm")
    command = ["tune", "--pretrained", str(model), "--task", str(task), "--quantize", quantize, *TUNE, "--method"]
    one, two = in_one_and_in_two(launcher, tmp_path, [*command, "rtn"])
    assert_same_curves(one, two)
    assert changed_codes(tmp_path) < 1e-4
    assert one.task is not None
    assert two.task is not None
    assert one.task.chosen == two.task.chosen
    ended = launcher.run([*command, "rtn", "--output_dir", str(tmp_path / "two"), "--resume", "--eval_only"])
    assert [process.code for process in ended] == [0, 0], ended
    assert len(read_results(tmp_path / "two").task.tested) == 1  # type: ignore[union-attr]


def test_data_that_the_model_writes_are_written_once(tmp_path: Path, launcher: Launcher) -> None:
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, "--data", "self")
    one, two = in_one_and_in_two(launcher, tmp_path, command)
    assert_same_curves(one, two)


def test_four_processes_continue_what_two_began_and_one_ends_it(tmp_path: Path, launcher: Launcher) -> None:
    command = distill_command(save_model(tmp_path / "model", "llama"), tmp_path, "--output_dir", str(tmp_path / "two"))
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    for number, step in ((2, 6), (4, 13)):
        ended = launcher.run([*command, "--resume"], number, STOP_AFTER.format(step=step))
        assert {process.code for process in ended} == {130}
    assert main([*command, "--resume"]) == 0
    assert_same_curves(read_results(tmp_path / "one"), read_results(tmp_path / "two"))
    assert changed_codes(tmp_path) < 1e-4
    log = (tmp_path / "two" / "log.txt").read_text()
    assert "resumed at step 4 of 20" in log
    assert "resumed at step 12 of 20" in log


STOP_AFTER = """
from nybble.training.trainer import Trainer
original = Trainer.run
def run(self):
    for record in original(self):
        yield record
        if record["step"] == {step}:
            raise KeyboardInterrupt
Trainer.run = run
"""
