"""Five columns: each a run of its own, gone on with where the last sitting stopped; errors."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GraniteConfig

from nybble import files
from nybble.cli.main import main
from nybble.errors import OptionError, RunError, TrainingError
from nybble.evaluation import lm_eval
from nybble.models import selection
from nybble.options.commands import CompressOptions, TuneOptions, to_toml
from nybble.report import five_columns
from nybble.report.five_columns import COLUMNS, Figure
from nybble.run import results, resume
from nybble.workflows import compare as comparing
from nybble.workflows.compare import compare

from .tiny import make_model, save_model


def options(folder: Path, data: Path, **changes: object) -> TuneOptions:
    base: dict[str, object] = {
        "pretrained": str(folder / "model"), "output_dir": str(folder / "runs"), "compare": ("openbookqa",), "data_dir": str(data), "train_rows": 48,
        "epochs": 1, "batch_size": 8, "microbatch": 4, "lora_rank_space": (4, 2), "select_rows": 10, "task_limit": 12,
        "export": (), "start": "se", "tensorboard": False, "test_samples": 1, "num_min_loss_configs": 4, "seq_len": 128, "fast_eval": True,
    }  # fmt: skip
    return TuneOptions(**base | changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_five_columns_of_a_task(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", "smollm", max_position_embeddings=512)
    original, run_tasks, scored = comparing.tune_16bit, lm_eval.run_tasks, []
    monkeypatch.setattr(lm_eval, "run_tasks", lambda *given: scored.append(given) or run_tasks(*given))

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
    assert (folder / "openbookqa" / "qat-nls" / "results.json").stat().st_mtime_ns == before, (
        "what is finished is not made again"
    )
    values = five_columns.read(folder).figures["openbookqa"]
    assert list(values) == list(COLUMNS)
    assert all(figure.documents == 12 for figure in values.values())
    found = {
        name: json.loads((folder / "openbookqa" / name / "results.json").read_text())
        for name in ("qat-nls", "qat-lora", "lora", "ptwc")
    }
    assert values["BF16"].value == found["qat-lora"]["models"]["16bit"]["task:openbookqa acc_norm"]
    assert values["BF16 + LoRA"].value == found["lora"]["models"]["lora16"]["task:openbookqa acc_norm"]
    assert values["INT4, LoRA + PTWC"].value == found["ptwc"]["models"]["compressed"]["task:openbookqa acc_norm"]
    assert resume.read_options(folder / "openbookqa" / "ptwc")["pretrained"] == str(
        folder / "openbookqa" / "lora" / "merged"
    )
    assert (found["ptwc"]["method"], found["qat-nls"]["method"]) == ("awq+se+gptq", "se")
    assert found["ptwc"]["models"]["16bit"]["task:openbookqa acc_norm"] == values["BF16 + LoRA"].value
    assert len(scored) == 9, (
        "one measurement for each column, and two of both tuned models on their way, in 16 bit and compressed"
    )
    steps = {
        name: [len(found[name]["training"]), len(found[name].get("scales", {}).get("training", []))]
        for name in ("qat-nls", "qat-lora", "lora")
    }
    assert steps == {"qat-nls": [6, 6], "qat-lora": [6, 6], "lora": [12, 0]}, "as many steps in all"
    assert found["lora"]["training"][-1]["loss"] != found["qat-lora"]["training"][-1]["loss"]
    rights = [
        found[run]["models"][row]["right:openbookqa acc_norm"]
        for run, row in (("qat-nls", "16bit"), ("qat-nls", "tuned"), ("ptwc", "compressed"))
    ]
    for right, column in zip(rights, ("BF16", "INT4, QAT + NLS", "INT4, LoRA + PTWC"), strict=True):
        assert right.count("1") / len(right) == values[column].value
        assert values[column].right == tuple(map(float, right))
    text = (folder / "compare.md").read_text()
    assert "| openbookqa |" in text
    assert "INT4, QAT + NLS, less" in text
    assert "held-out rows" in text
    html = (folder / "compare.html").read_text()
    assert "INT4, QAT + NLS" in html
    assert ("decoder layer" in html) == (len(found["qat-nls"]["candidates"]) > 1), (
        "one alone, where the start was best, has no map"
    )
    assert "openbookqa" in capsys.readouterr().out


def test_16_bit_adapters_are_as_wide_and_scaled_as_those_in_4_bits(tmp_path: Path) -> None:
    import peft

    model = make_model("smollm")
    layers = list(selection.select_layers(model).int4)
    widths = {name: min(model.get_submodule(name).weight.shape) for name in layers}
    assert len(set(widths.values())) > 1
    rank = max(widths.values())
    peft.get_peft_model(model, comparing.peft_config(model, layers, rank))
    made = {
        name: (model.get_submodule(name).r["default"], model.get_submodule(name).scaling["default"]) for name in layers
    }
    assert made == {name: (width, 2.0) for name, width in widths.items()}


def test_a_task_without_training_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        lm_eval, "open_task", lambda name, data_dir, flag: SimpleNamespace(has_training_docs=lambda: False)
    )
    monkeypatch.setattr(lm_eval, "metric_of", lambda task: "acc")
    assert main(["tune", "--pretrained", "x", "--output_dir", str(tmp_path), "--compare", "lambada"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--compare takes tasks with a training split; lambada has none" in line


def test_a_training_that_cannot_go_on_ends_its_task_alone(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def diverged(options: TuneOptions) -> Path:
        tried.append(options.task)
        raise TrainingError("the loss must stay finite: it was not")

    monkeypatch.setattr(comparing.tune, "tune", diverged)
    given = [
        "tune",
        "--pretrained",
        "x",
        "--output_dir",
        str(tmp_path / "runs"),
        "--data_dir",
        str(shared_data),
        "--compare",
        "openbookqa",
        "winogrande",
    ]
    assert main(given) == 2
    assert tried == ["openbookqa", "winogrande"]
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "all 2 tasks must be tuned; 2 could not" in line
    assert all(f"{Path('runs') / task / 'qat-nls'}: the loss must stay finite" in line for task in tried)


def test_finished_tasks_are_shown_once_and_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def five(options: TuneOptions, task: str, folder: Path) -> dict[str, Figure]:
        (folder / "qat-nls").mkdir(parents=True, exist_ok=True)
        files.write_text(
            folder / "qat-nls" / results.RESULTS, json.dumps({"models": {}, "dtype": "float32", "task": {}})
        )
        return dict.fromkeys(COLUMNS, Figure(0.5, 2, (1.0, 0.0)))

    monkeypatch.setattr(comparing, "_check_task", lambda task, options: None)
    monkeypatch.setattr(comparing, "_five", five)
    monkeypatch.setattr(comparing, "_show", lambda found: shown.append(list(found.figures)))
    for _ in range(2):
        compare(options(tmp_path, tmp_path, compare=("openbookqa", "winogrande")))
    assert shown == [["openbookqa"], ["openbookqa", "winogrande"], ["openbookqa", "winogrande"]]
    with pytest.raises(
        RunError,
        match="has a comparison of openbookqa, winogrande with --epochs 1; got 2; give each its own --output_dir, or --overwrite",
    ):
        compare(options(tmp_path, tmp_path, compare=("arc_easy",), epochs=2))
    compare(options(tmp_path, tmp_path, compare=("arc_easy",), epochs=2, overwrite=True))
    assert shown[3:] == [["arc_easy"]]


def test_a_loss_that_a_task_does_not_have_is_refused_at_once(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(OptionError, match="--loss_on choices needs tasks with choices; gsm8k"):
        compare(options(tmp_path, shared_data, compare=("openbookqa", "gsm8k"), loss_on="choices"))


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="two or more ranks"):
        compare(options(tmp_path, tmp_path, lora_rank_space=(4,)))
    with pytest.raises(OptionError, match="takes tasks that lm-eval knows"):
        compare(options(tmp_path, tmp_path, compare=("own.jsonl",)))
    assert main(["tune", "--pretrained", "x", "--task", "arc_easy", "--compare", "arc_easy"]) == 2
    assert "--task and --compare contradict each other" in capsys.readouterr().err


def test_a_family_without_awq_has_another_third_column(tmp_path: Path) -> None:
    assert comparing._ptwc(save_model(tmp_path / "known", "smollm"), False) == "awq+se+gptq"
    GraniteConfig(hidden_size=64).save_pretrained(tmp_path / "other")
    assert comparing._ptwc(tmp_path / "other", False) == "se+gptq"


def test_a_finished_column_is_the_same_wherever_the_comparison_lies(tmp_path: Path) -> None:
    """What was automatic, and the paths inside the comparison, are those of the run."""

    def finished(folder: Path, options: Any) -> Any:
        folder.mkdir()
        files.write_text(folder / "nybble-run.json", '{"format": "nybble-run-1"}')
        files.write_text(folder / "config.toml", to_toml(options))
        files.write_text(folder / "results.json", json.dumps({"models": {"tuned": {}, "compressed": {}}}))
        return replace(options, output_dir=str(folder))

    def never(options: Any) -> None:
        raise AssertionError("made again")

    tuned = finished(
        tmp_path / "qat-nls",
        TuneOptions(pretrained="m", task="openbookqa", tasks=("openbookqa",), start="awq+se+blockwise"),
    )
    comparing._unless_done(replace(tuned, start="auto"), never, "tuned")
    with pytest.raises(RunError, match="--start was awq"):
        comparing._unless_done(replace(tuned, start="se"), never, "tuned")
    ptwc = finished(tmp_path / "ptwc", CompressOptions(pretrained="runs/lora/merged", data=("runs/lora/texts",)))
    comparing._unless_done(
        replace(ptwc, pretrained="/moved/lora/merged", data=("/moved/lora/texts",)), never, "compressed"
    )
    with pytest.raises(RunError, match="--method was"):
        comparing._unless_done(replace(ptwc, method="rtn"), never, "compressed")
