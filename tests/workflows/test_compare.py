"""compare: the five columns, each a run of its own, continued where the last session stopped; errors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.compression import methods
from nybble.errors import OptionError, RunError, TrainingError
from nybble.evaluation import lm_eval
from nybble.models.selection import select_layers
from nybble.options.commands import CompareOptions, TuneOptions
from nybble.report import five_columns
from nybble.report.five_columns import COLUMNS
from nybble.run.claims import claimed
from nybble.run.results import RunResults, TaskResults, read_results
from nybble.run.resume import saved_options
from nybble.workflows import compare as compare_module
from nybble.workflows import lora
from nybble.workflows import measure as measure_module
from nybble.workflows.compare import compare
from nybble.workflows.tune import tune
from tests.helpers.tiny import make_model, save_model
from tests.helpers.tune import tune_options


def options(folder: Path, data: Path, **changes: object) -> CompareOptions:
    base: dict[str, object] = {
        "pretrained": str(folder / "model"), "output_dir": str(folder / "runs"), "tasks": ("openbookqa",),
        "data_dir": str(data), "num_train_samples": 48, "epochs": 1, "batch_size": 8, "microbatch_size": 4,
        "lora_rank_space": (4, 2), "num_selection_samples": 10, "limit": 12, "export": (), "method": "se",
        "report_to": (), "num_test_samples": 1, "num_min_loss_configs": 4, "seq_len": 128, "fast_eval": True,
    }  # fmt: skip
    return CompareOptions.of(**base | changes)


@pytest.mark.slow
def test_five_columns_of_a_task(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", "smollm", max_position_embeddings=512)
    scored, run_tasks, task = [], lm_eval.run_tasks, tmp_path / "runs" / "openbookqa"
    monkeypatch.setattr(measure_module, "run_tasks", lambda *given: scored.append(given) or run_tasks(*given))

    def stop(*_: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora, "tune_16bit", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(options(tmp_path, shared_data))
    before = (task / "qat-nls" / "results.json").stat().st_mtime_ns
    with pytest.raises(RunError, match=r"it holds one that was begun with --seed 0, got 7"):
        compare(options(tmp_path, shared_data, seed=7))
    folder = compare(options(tmp_path, shared_data))
    assert (task / "qat-nls" / "results.json").stat().st_mtime_ns == before, "what is finished is not made again"
    values = five_columns.read_comparison(folder).figures["openbookqa"]
    assert list(values) == list(COLUMNS)
    assert all(figure.documents == 12 for figure in values.values())
    found = {name: read_results(task / name) for name in ("qat-nls", "qat-lora", "lora", "ptwc")}
    metric = "task:openbookqa acc_norm"
    assert values["BF16"].value == found["qat-lora"].models["16bit"][metric]
    assert values["BF16 + LoRA"].value == found["lora"].models["lora16"][metric]
    assert values["INT4, LoRA + PTWC"].value == found["ptwc"].models["compressed"][metric]
    assert saved_options(task / "ptwc")["pretrained"] == str(task / "lora" / "merged")
    assert (found["ptwc"].method, found["qat-nls"].method) == ("awq+se+gptq", "se")
    assert found["ptwc"].models["16bit"][metric] == values["BF16 + LoRA"].value
    # One measurement for each column, and two of both tuned models on their way: in 16 bit, and compressed.
    assert len(scored) == 9
    steps = {name: [len(training.steps) for training in found[name].trainings] for name in found}
    assert steps["qat-nls"] == steps["qat-lora"] == [6, 6]
    assert steps["lora"] == [12], "as many steps in 16 bit as nybble tune has in all"
    assert [set(read_results(task / name).models) for name in ("qat-nls", "lora")] == [
        {"16bit", "tuned16", "compressed", "tuned"},
        {"16bit", "lora16"},
    ]
    printed = capsys.readouterr().out
    assert "BF16 + LoRA" in printed
    assert (folder / "compare.md").read_text().startswith("# ")
    compare(options(tmp_path, shared_data))
    with pytest.raises(RunError, match="with --epochs 1, got 2; choose another folder, or add --overwrite"):
        compare(options(tmp_path, shared_data, epochs=2))
    assert main(["report", str(folder), "--table"]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("mine.jsonl",)}, "--tasks takes tasks that lm-eval knows"),
        ({"lora_rank_space": (4,)}, "--lora_rank_space must have two or more ranks for a comparison"),
    ],
)
def test_impossible_comparisons_are_refused_at_once(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        compare(options(tmp_path, tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


def test_tasks_must_be_scored_by_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(has_training_docs=lambda: True, OUTPUT_TYPE="generate_until")
    monkeypatch.setattr(compare_module, "open_task", lambda *given: task)
    monkeypatch.setattr(compare_module, "main_metric", lambda task: "bleu")
    with pytest.raises(OptionError, match="openbookqa is scored by bleu"):
        compare(options(tmp_path, tmp_path))
    with pytest.raises(OptionError, match="--objective choices needs tasks with choices; openbookqa has none"):
        compare(options(tmp_path, tmp_path, objective="choices"))
    task.has_training_docs = lambda: False
    with pytest.raises(OptionError, match="--tasks takes tasks with a training split; openbookqa has none"):
        compare(options(tmp_path, tmp_path))


def test_a_training_that_cannot_continue_ends_its_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def diverged(given: TuneOptions, *_: Any) -> Path:
        tried.append(given.task.task)
        raise TrainingError("the loss must stay finite: it was not")

    monkeypatch.setattr(compare_module, "tune", diverged)
    monkeypatch.setattr(compare_module, "_check", lambda options: None)
    given = ["compare", "--pretrained", "x", "--output_dir", str(tmp_path / "runs")]
    given += ["--tasks", "openbookqa", "arc_easy"]
    assert main(given) == 2
    assert tried == ["openbookqa", "arc_easy"]
    said = capsys.readouterr().err
    assert "all 2 tasks must be tuned; 2 could not" in said
    assert "arc_easy/qat-nls: the loss must stay finite" in said


def columns_of(folder: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, **changes: object) -> Any:
    """The columns of one task, of which only the names are noted when they are made."""
    names = {"_nls": "qat-nls", "_plain_lora": "qat-lora", "_lora16": "lora", "_ptwc": "ptwc"}
    for method, name in names.items():
        monkeypatch.setattr(compare_module._TaskComparison, method, lambda self, name=name: made.append(name))
    return compare_module._TaskComparison(options(folder, folder, **changes), "t", folder / "t", ())


def test_a_finished_column_keeps_the_method_that_was_chosen(tmp_path: Path) -> None:
    given = tune_options(tmp_path, method="auto", epochs=1)
    tune(given)
    columns = compare_module._TaskComparison(options(tmp_path, tmp_path), "letters", tmp_path, ())
    columns._unless_done(given.replace(resume=True), "tuned", lambda: pytest.fail("made again"))


def test_a_process_makes_the_columns_that_no_other_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    columns = columns_of(tmp_path, made, monkeypatch)
    with claimed(tmp_path / "t" / "qat-nls"), claimed(tmp_path / "t" / "lora"):
        columns.make_free_columns()
        assert made == ["qat-lora"], "what is compressed comes from lora"
        assert columns.missing == ["t/qat-nls", "t/lora", "t/ptwc"]
    columns.make_free_columns()
    assert made == ["qat-lora", "qat-nls", "lora", "ptwc"]
    assert columns.missing == []


def test_what_others_make_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    columns_of(tmp_path, made, monkeypatch)
    monkeypatch.setattr(compare_module, "_check", lambda options: None)
    path = tmp_path / "runs" / "openbookqa" / "ptwc"
    with claimed(path), pytest.raises(RunError, match="--overwrite must be given to one process alone"):
        compare(options(tmp_path, tmp_path, overwrite=True))
    assert made == []


def test_16_bit_adapters_are_as_wide_and_scaled_as_those_in_4_bits() -> None:
    peft = pytest.importorskip("peft", reason="the extra compare")
    model = make_model("smollm")
    layers = select_layers(model).linears
    wrapped = peft.get_peft_model(model, lora.peft_config(model, layers, 48))
    ranks = {name: parameter.shape[0] for name, parameter in wrapped.named_parameters() if "lora_A" in name}
    assert set(ranks.values()) == {32, 48}, "keys and values are 32 wide"
    assert len(ranks) == len(layers)
    assert {
        module.scaling["default"] for module in wrapped.modules() if isinstance(getattr(module, "scaling", None), dict)
    } == {2.0}


def test_the_method_without_training_has_awq_where_awq_finds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = save_model(tmp_path / "lora" / "merged", "smollm")
    task = TaskResults("t", "acc", [4], "choices", "share", 32)
    lora_run = RunResults(command="lora", task=task, models={"lora16": {"task:t acc": 1.0}})
    lora_run.save(merged.parent)
    (merged.parent / "texts").mkdir()

    def method(**changes: object) -> str:
        given = options(tmp_path, tmp_path, method="se", **changes)
        columns = compare_module._TaskComparison(given, "t", tmp_path, ())
        compress_options, known_figures = columns._compress_options(merged.parent)
        assert known_figures == {"task:t acc": 1.0}
        return compress_options.compression.method

    assert method() == "awq+se+gptq"
    monkeypatch.setattr(methods, "has_mapping", lambda model, names: False)
    assert method() == "se+gptq"
    # A comparison that continues asks its run, not the model.
    run = tmp_path / "ptwc"
    run.mkdir()
    lora_run.save(run)
    monkeypatch.setattr(compare_module, "saved_options", lambda folder: {"method": f"of {folder.name}"})
    assert method() == "of ptwc"
    assert method(overwrite=True) == "se+gptq"
