"""Tasks from .jsonl files."""

from pathlib import Path
from typing import Any

import pytest

from nybble.errors import DataError
from nybble.tasks.dataset import TaskDataset
from nybble.tasks.jsonl_source import JsonlSource
from tests.helpers.questions import numbered_rows, request, write_rows


def load(path: Path, rows: list[Any], seed: int = 0, num_train_samples: int = 0) -> TaskDataset:
    return JsonlSource().load(request(write_rows(path, rows), seed, num_train_samples))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.jsonl"


def test_matches_by_suffix() -> None:
    assert JsonlSource().matches("folder/own.jsonl")
    assert not JsonlSource().matches("openbookqa")


def test_choices_of_a_csv_file_are_json(tmp_path: Path) -> None:
    lines = [f'{i} + 1 =,"[""{i}"", ""{i + 1}""]",1' for i in range(20)]
    (tmp_path / "own.csv").write_text("\n".join(["prompt,choices,answer", *lines]) + "\n")
    dataset = JsonlSource().load(request(tmp_path / "own.csv"))
    assert (dataset.metric, len(dataset.train)) == ("acc", 16)
    assert all(question.label == 1 and len(question.choices) == 2 for question in dataset.train)
    rows = [{"prompt": f"{i} =", "choices": ["1", "0"], "answer": "0"} for i in range(20)]
    with pytest.raises(DataError, match="row 1 must have prompt, choices"):  # which of them is meant is not sure
        load(tmp_path / "own.jsonl", rows)


def test_rows_are_split_without_overlap(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = load(path, numbered_rows(60))
    parts = [{question.prompts[0] for question in part} for part in (dataset.train, dataset.held_out, dataset.scored)]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert len(set().union(*parts)) == 60
    assert (dataset.name, dataset.metric) == (str(path), "acc")
    for part in (dataset.train, dataset.held_out, dataset.scored):
        assert {question.label for question in part} == {0, 1}, "rows whose labels alternate are in every part"
    assert not caplog.text


def test_training_rows_are_drawn_by_the_seed(path: Path) -> None:
    rows = numbered_rows(60)
    everything = load(path, rows)
    assert load(path, rows, num_train_samples=5).train == everything.train[:5]
    assert load(path, rows, seed=1).train != everything.train
    assert sorted(load(path, rows, seed=1).train, key=str) == sorted(everything.train, key=str)
    assert load(path, rows, seed=1).held_out == everything.held_out


def test_choices_become_a_question(path: Path) -> None:
    rows = numbered_rows(20)
    rows[0] = {"prompt": "a line\u2028and a half\u0085", "choices": [1, 2.5, " c"], "answer": 2}
    rows[1] = {"prompt": "colon:", "choices": [1, 2.5, " c"], "answer": 0}
    dataset = load(path, rows)
    by_prompt = {q.prompts[0]: q for part in (dataset.train, dataset.held_out, dataset.scored) for q in part}
    first, second = by_prompt["a line\u2028and a half\u0085"], by_prompt["colon:"]
    assert first.choices == ("1", "2.5", " c"), "no second space after white space"
    assert second.choices == (" 1", " 2.5", " c"), "no second space before white space"
    assert (first.label, first.prompts, first.choice_lengths) == (2, first.prompts[:1] * 3, (1, 3, 2))


def test_completions_become_questions_without_alternatives(path: Path) -> None:
    dataset = load(path, [{"prompt": f"row {i}", "completion": "yes"} for i in range(10)])
    assert dataset.metric == "log_likelihood"
    assert dataset.train[0].choices == (" yes",)
    assert not dataset.train[0].has_alternatives


def test_training_rows_that_repeat_held_out_rows_are_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(path, [row | {"prompt": f"row {i % 30}", "answer": 0} for i, row in enumerate(numbered_rows(60))])
    assert "12 of 48 training rows repeat rows that are held out or scored" in caplog.text


def test_rows_of_both_kinds_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match="must have choices in all rows or in none"):
        load(path, [*numbered_rows(19), {"prompt": "x", "completion": "y"}])


def test_few_rows_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match="must have at least 10 rows; it has 9"):
        load(path, numbered_rows(9))
    assert load(path, numbered_rows(10)).held_out


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": " "},
        {"prompt": 3},
        {"answer": True},
        {"answer": -1},
        {"answer": 2, "completion": "c"},
        {"choices": [None, "b"]},
        {"choices": [True, "b"]},
        {"choices": ["a"]},
        {"choices": "ab"},
        {"choices": None, "completion": " "},
    ],
)
def test_malformed_row_is_refused(wrong: dict[str, Any], path: Path) -> None:
    rows = numbered_rows(20)
    with pytest.raises(DataError, match="row 4 must have prompt, choices"):
        load(path, [*rows[:3], rows[3] | wrong, *rows[4:]])


def test_blank_choice_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="row 1 must have text in every choice"):
        load(path, numbered_rows(20, choices=["a", " "]))


def test_repeated_choices_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 must have choices that differ; got \['a', 'b', 'a'\]"):
        load(path, numbered_rows(20, choices=["a", "b", "a"]))


def test_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match=r"--task .*own.jsonl"):
        JsonlSource().load(request(path))
