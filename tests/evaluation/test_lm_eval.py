"""nybble.evaluation.lm_eval: tasks on local files, names of results, and errors before a run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.errors import DataError, MissingExtraError, OptionError
from nybble.evaluation import lm_eval
from nybble.evaluation.lm_eval import LmEvalConfig, check_tasks, main_metric, open_task, result_columns, run_tasks
from nybble.export.openvino.exporter import OpenVINOExporter
from tests.evaluation.conftest import PAGE
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.tiny import make_model, make_tokenizer


def test_tasks_run_on_local_files(data_dir: Path) -> None:
    config = LmEvalConfig(("arc_easy", "wikitext"), batch_size=2, data_dir=str(data_dir))
    results = run_tasks(make_model("llama"), make_tokenizer(), config)
    assert {"acc", "acc_norm"} <= results["arc_easy"].keys()
    assert results["arc_easy"]["acc"] in (0.0, 1.0)
    assert results["arc_easy"]["right:acc"] == str(int(results["arc_easy"]["acc"])) * 5, "five times the same question"
    assert results["wikitext"]["word_perplexity"] > 1
    assert not any(key.startswith("right:") for key in results["wikitext"])


def test_limit_counts_documents(data_dir: Path) -> None:
    results = run_tasks(
        make_model("llama"), make_tokenizer(), LmEvalConfig(("arc_easy",), 2, limit=3, data_dir=str(data_dir))
    )
    assert len(results["arc_easy"]["right:acc"]) == 3


@pytest.mark.slow
def test_word_perplexity_does_not_depend_on_the_number_of_documents(data_dir: Path) -> None:
    config = LmEvalConfig(("wikitext",), 2, data_dir=str(data_dir))
    one = run_tasks(make_model("llama"), make_tokenizer(), config)
    (data_dir / "wikitext" / "document_level" / "test.jsonl").write_text(PAGE * 2)
    two = run_tasks(make_model("llama"), make_tokenizer(), config)
    assert two["wikitext"]["word_perplexity"] == pytest.approx(one["wikitext"]["word_perplexity"])


def test_nothing_is_printed_outside_a_git_repository(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data_dir)
    run_tasks(make_model("llama"), make_tokenizer(), LmEvalConfig(("wikitext",), 2, data_dir=str(data_dir)))
    assert "fatal" not in capfd.readouterr().err


def test_columns_keep_filters_apart_and_leave_out_standard_errors() -> None:
    results = {
        "gsm8k": {
            "exact_match,strict-match": 0.1,
            "exact_match,flexible-extract": 0.2,
            "exact_match_stderr,strict-match": 0.01,
            "right:exact_match,strict-match": "01",
            "sample_len": 2,
        },
        "wikitext": {"word_perplexity": 20.0, "bits_per_byte": 1.0, "sample_len": 62},
    }
    assert result_columns(results) == {
        "task:gsm8k exact_match,strict-match": 0.1,
        "task:gsm8k exact_match,flexible-extract": 0.2,
        "right:gsm8k exact_match,strict-match": "01",
        "documents:gsm8k": 2,
        "word_perplexity": 20.0,
    }


@pytest.mark.parametrize(
    ("metrics", "filters", "expected"),
    [
        (["acc", "acc_norm"], [], "acc_norm"),
        (["f1", "acc"], [], "acc"),
        (["exact_match", "f1"], ["strict-match", "flexible-extract"], "exact_match,strict-match"),
    ],
)
def test_the_main_metric_is_a_key_of_the_results(metrics: list[str], filters: list[str], expected: str) -> None:
    config = SimpleNamespace(
        metric_list=[{"metric": metric} for metric in metrics], filter_list=[{"name": name} for name in filters]
    )
    assert main_metric(SimpleNamespace(config=config)) == expected


def test_opened_tasks_have_their_rows(data_dir: Path) -> None:
    task = open_task("arc_easy", str(data_dir))
    assert (len(task.training_docs()), len(task.validation_docs()), len(task.test_docs())) == (3, 2, 5)
    assert main_metric(task) == "acc_norm"


@pytest.mark.slow  # tracing and compiling an export
@pytest.mark.usefixtures("needs_openvino")
def test_an_export_is_measured_by_the_same_call(data_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    checkpoint = save_checkpoint(tmp_path / "quantized", model)
    (tmp_path / "ov").mkdir()
    exporter = OpenVINOExporter()
    exporter.export(checkpoint, tmp_path / "ov")
    exported = exporter.open_model(tmp_path / "ov", model.config, strict=True)
    config = LmEvalConfig(("arc_easy", "wikitext"), 2, data_dir=str(data_dir))
    of_export, of_torch = (run_tasks(measured, tokenizer, config) for measured in (exported, model))
    assert of_export["wikitext"]["word_perplexity"] == pytest.approx(of_torch["wikitext"]["word_perplexity"], rel=1e-4)
    assert of_export["arc_easy"] == of_torch["arc_easy"]


def test_no_tasks_need_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tasks((), None)


def test_missing_lm_eval_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match='"eval" is needed for --eval_tasks wikitext; install it'):
        check_tasks(("wikitext",), None)


def test_unknown_tasks_are_refused_with_similar_names() -> None:
    with pytest.raises(
        OptionError, match="--eval_tasks must name tasks of lm-eval; got arc_esy; did you mean .*arc_easy"
    ):
        check_tasks(("arc_esy",), None)
    with pytest.raises(
        OptionError, match="--compare must name tasks of lm-eval; got 0000; list them with: lm-eval ls tasks"
    ):
        open_task("0000", None, "--compare")


def test_rows_of_ones_own_are_no_task_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.evaluation.lm_eval.task_manager", lambda: pytest.fail("this takes seconds"))
    with pytest.raises(OptionError, match=r"got mine\.jsonl; rows of your own are a --task of nybble eval"):
        check_tasks(("mine.jsonl",), None)


def test_packages_that_a_task_needs_are_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)  # otherwise the task could be there
    words = "must name tasks whose Python packages are installed; niah_single_1 needs one that is not .*wonderwords"
    for folder in (None, str(data_dir)):
        with pytest.raises(OptionError, match=f"--eval_tasks {words}"):
            check_tasks(("niah_single_1",), folder)
        with pytest.raises(OptionError, match=f"--task {words}"):
            open_task("niah_single_1", folder)


def test_groups_cannot_be_opened() -> None:
    with pytest.raises(OptionError, match="--task must name a single task; ai2_arc is a group of tasks; name one of"):
        open_task("ai2_arc", None)


def test_missing_local_data_are_found_before_a_run(data_dir: Path) -> None:
    check_tasks(("arc_easy", "wikitext"), str(data_dir))
    with pytest.raises(DataError, match="must hold the data of winogrande"):
        check_tasks(("winogrande",), str(data_dir))


@pytest.mark.parametrize("action", ["check", "run", "open"])
def test_data_without_hub_and_without_folder_name_the_places(action: str) -> None:
    """The tests run with HF_HUB_OFFLINE."""
    with pytest.raises(
        DataError,
        match="hub cannot be reached; put train.jsonl, .* into FOLDER/arc/ARC-Easy and add --data_dir FOLDER",
    ) as caught:
        if action == "check":
            check_tasks(("arc_easy",), None)
        elif action == "open":
            open_task("arc_easy", None)
        else:
            run_tasks(make_model("llama"), make_tokenizer(), LmEvalConfig(("arc_easy",)))
    assert ("--eval_tasks none" in str(caught.value)) == (action != "open"), "a task to train on cannot be left out"


def test_a_row_that_lm_eval_cannot_read_is_one_line(data_dir: Path) -> None:
    path = data_dir / "arc" / "ARC-Easy" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answerKey"] = "Z"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="every row in --data_dir must be one that lm-eval's tasks arc_easy can read"):
        run_tasks(make_model("llama"), make_tokenizer(), LmEvalConfig(("arc_easy",), data_dir=str(data_dir)))


def test_other_errors_of_lm_eval_are_not_hidden(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a mistake")

    monkeypatch.setattr(lm_eval, "wrap_model", broken)
    with pytest.raises(ValueError, match="a mistake"):
        run_tasks(make_model("llama"), make_tokenizer(), LmEvalConfig(("wikitext",), data_dir=str(data_dir)))
