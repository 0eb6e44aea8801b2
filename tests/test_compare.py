"""Five columns: each a run of its own, gone on with where the last sitting stopped; errors; what people read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble import checkpoint, evaluate
from nybble import compare as comparing
from nybble.cli import main
from nybble.compare import COLUMNS, Figure, compare, differences, mean, rows
from nybble.config import TuneOptions
from nybble.errors import OptionError, RunError

from .tiny import save_model


def options(folder: Path, data: Path, **changes: object) -> TuneOptions:
    base: dict[str, object] = {
        "pretrained": str(folder / "model"), "output_dir": str(folder / "runs"), "compare": ("openbookqa",), "data_dir": str(data), "train_rows": 48,
        "epochs": 1, "batch_size": 8, "microbatch": 4, "lora_rank_space": (4, 2), "select_rows": 10, "task_limit": 12,
        "export": (), "start": "se", "tensorboard": False, "test_samples": 1, "num_min_loss_configs": 4, "seq_len": 128, "fast_eval": True,
    }  # fmt: skip
    return TuneOptions(**base | changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_five_columns_of_a_task(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", "smollm", max_position_embeddings=512)
    original, run_tasks, scored = comparing.tune_16bit, evaluate.run_tasks, []
    monkeypatch.setattr(evaluate, "run_tasks", lambda *given: scored.append(given) or run_tasks(*given))

    def stop(given: TuneOptions, before: dict[str, Any]) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "tune_16bit", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(options(tmp_path, shared_data))
    before = (tmp_path / "runs" / "openbookqa" / "qat-nls" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(comparing, "tune_16bit", original)
    with pytest.raises(RunError, match=r"qat-nls: --seed was 0, got 7"):
        compare(options(tmp_path, shared_data, seed=7))
    folder = compare(options(tmp_path, shared_data))
    assert (folder / "openbookqa" / "qat-nls" / "results.json").stat().st_mtime_ns == before, "what is finished is not made again"
    values = json.loads((folder / "compare.json").read_text())["openbookqa"]
    assert list(values) == list(COLUMNS)
    assert all(documents == 12 for _, documents in values.values())
    found = {name: json.loads((folder / "openbookqa" / name / "results.json").read_text()) for name in ("qat-nls", "qat-lora", "lora", "ptwc")}
    assert values["BF16"][0] == found["qat-lora"]["models"]["16bit"]["task:openbookqa acc_norm"]
    assert values["BF16 + LoRA"][0] == found["lora"]["models"]["lora16"]["task:openbookqa acc_norm"]
    assert values["INT4, LoRA + PTWC"][0] == found["ptwc"]["models"]["compressed"]["task:openbookqa acc_norm"]
    assert checkpoint.read_options(folder / "openbookqa" / "ptwc")["pretrained"] == str(folder / "openbookqa" / "lora" / "merged")
    assert found["ptwc"]["models"]["16bit"]["task:openbookqa acc_norm"] == values["BF16 + LoRA"][0]
    assert len(scored) == 6, "one measurement for each column, and one of the start"
    assert found["lora"]["training"][-1]["loss"] != found["qat-lora"]["training"][-1]["loss"]
    rights = [found[run]["models"][row]["right:openbookqa acc_norm"] for run, row in (("qat-nls", "16bit"), ("qat-nls", "tuned"), ("ptwc", "compressed"))]
    for right, column in zip(rights, ("BF16", "INT4, QAT + NLS", "INT4, LoRA + PTWC"), strict=True):
        assert right.count("1") / len(right) == values[column][0]
    text = (folder / "compare.md").read_text()
    assert "| openbookqa |" in text
    assert "INT4, QAT + NLS, less" in text
    assert "held-out rows" in text
    html = (folder / "compare.html").read_text()
    assert "INT4, QAT + NLS" in html
    assert ("decoder layer" in html) == (len(found["qat-nls"]["candidates"]) > 1), "one alone, where the start was best, has no map"
    assert "openbookqa" in capsys.readouterr().out


def test_errors_and_mean() -> None:
    half = Figure(0.5, 101)
    assert half.error == pytest.approx(0.05)
    assert mean([(0.5, 0.05), (1.0, 0.0)]) == (0.75, pytest.approx(0.025))
    headings, lines = rows({"one": dict.fromkeys(COLUMNS, half), "two": dict.fromkeys(COLUMNS, Figure(1.0, 101))})
    assert headings == ["task", *COLUMNS]
    assert [line[0] for line in lines] == ["one", "two", "mean"]
    assert lines[0][1] == "50.0 +- 5.0"
    assert lines[2][5] == "75.0 +- 2.5"


def test_what_a_column_is_better_by_is_known_row_by_row() -> None:
    one, other = "1" * 30 + "1" * 6 + "0" * 4 + "0" * 60, "1" * 30 + "0" * 6 + "1" * 4 + "0" * 60
    better, worse = Figure(0.36, 100, one), Figure(0.34, 100, other)
    each = torch.tensor([int(a) - int(b) for a, b in zip(one, other, strict=True)], dtype=torch.float64)
    assert better.less(worse) == (pytest.approx(0.02), pytest.approx(each.std().item() / 10))
    assert worse.less(better)[0] == pytest.approx(-0.02)
    figures = {task: dict.fromkeys(COLUMNS, worse) | {COLUMNS[-1]: better} for task in ("a", "b")}
    headings, lines = differences(figures)
    assert headings == ["INT4, QAT + NLS, less", *COLUMNS[:-1]]
    assert lines[0] == ["a", *["+2.0 +- 3.2"] * 4]
    assert lines[-1] == ["mean", *["+2.0 +- 2.2"] * 4]
    known, unknown = dict.fromkeys(COLUMNS, better), dict.fromkeys(COLUMNS, Figure(0.3, 100))
    assert differences({"a": unknown | {COLUMNS[-1]: known[COLUMNS[-1]]}})[1] == [["a", *["+6.0"] * 4]], "rows of an older run are not known"


@pytest.mark.parametrize(
    ("select_on", "said"),
    [
        ("held_out", "chosen on held-out rows, ranks too."),
        ("test", "ranks on the TEST rows, as published results do: the last column is not one on unseen rows."),
    ],
)
def test_the_note_says_what_ranks_were_chosen_on(
    select_on: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("qat-nls", "qat-lora"):
        (tmp_path / "one" / name).mkdir(parents=True)
        (tmp_path / "one" / name / checkpoint.RESULTS).write_text(json.dumps({"models": {}, "task": {"loss_on": "choices"}, "dtype": "float32"}))
    monkeypatch.setattr("nybble.page.available", lambda: False)
    comparing._write({"one": dict.fromkeys(COLUMNS, Figure(0.5, 101))}, tmp_path, options(tmp_path, tmp_path, select_on=select_on))
    assert said in (tmp_path / "compare.md").read_text()
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_task_without_training_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluate, "open_task", lambda name, data_dir, flag: SimpleNamespace(has_training_docs=lambda: False))
    monkeypatch.setattr(evaluate, "metric_of", lambda task: "acc")
    assert main(["tune", "--pretrained", "x", "--output_dir", str(tmp_path), "--compare", "lambada"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--compare takes tasks with a training split; lambada has none" in line


def test_a_loss_that_a_task_does_not_have_is_refused_at_once(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(OptionError, match="--loss_on choices needs tasks with choices; gsm8k"):
        compare(options(tmp_path, shared_data, compare=("openbookqa", "gsm8k"), loss_on="choices"))


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="two or more ranks"):
        compare(options(tmp_path, tmp_path, lora_rank_space=(4,)))
    with pytest.raises(OptionError, match="takes tasks that lm-eval knows"):
        compare(options(tmp_path, tmp_path, compare=("own.jsonl",)))
    (tmp_path / "config.toml").touch()
    with pytest.raises(OptionError, match="--start must be rtn, or one or more of"):
        compare(options(tmp_path, tmp_path, start=str(tmp_path)))
    assert main(["tune", "--pretrained", "x", "--task", "arc_easy", "--compare", "arc_easy"]) == 2
    assert "--task and --compare contradict each other" in capsys.readouterr().err
