"""Task data: objective, encoded rows, held-out rows."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from nybble.errors import DataError, OptionError
from nybble.tasks import encoding, task_data
from nybble.tasks.dataset import Question, TaskDataset
from nybble.tasks.sources import load_task
from nybble.tasks.task_data import TaskData, TaskDataConfig, encode_task
from tests.helpers.questions import choice_question, make_task_data, numbered_rows, request, write_rows
from tests.helpers.tiny import make_tokenizer

CONFIG = TaskDataConfig(objective="auto", seq_len=32, batch_size=8, num_selection_samples=0, seed=0)


def load(path: Path, seed: int = 0, **changes: Any) -> TaskData:
    config = dataclasses.replace(CONFIG, seed=seed, **changes)
    return encode_task(load_task(request(path, seed)), config, make_tokenizer())


@pytest.fixture
def choices_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "choices.jsonl", numbered_rows(60))


def test_objective_choices_encodes_all_choices(choices_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nybble"):
        data = load(choices_file)
    assert data.objective == "choices"
    assert data.choices == encoding.encode_choices(make_tokenizer(), data.dataset.train, 32)
    assert data.texts == [
        choices[question.label] for choices, question in zip(data.choices, data.dataset.train, strict=True)
    ]
    assert data.score_name == "share"
    assert "48 rows to train on (objective choices), 6 held-out rows to select on, measured by acc" in caplog.text


@pytest.mark.parametrize("objective", ["answer", "all"])
def test_other_objectives_encode_right_answers(objective: str, choices_file: Path) -> None:
    data = load(choices_file, objective=objective)
    assert (data.objective, data.choices) == (objective, [])
    assert data.texts == encoding.encode_right_answers(make_tokenizer(), data.dataset.train, 32)


def test_auto_objective_of_completions_is_answer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"prompt": f"row {i}", "completion": "yes"} for i in range(20)])
    data = load(path)
    assert (data.objective, data.score_name) == ("answer", "log-likelihood")
    with pytest.raises(OptionError, match="--objective choices needs a task whose rows all have choices"):
        load(path, objective="choices")


def test_one_row_without_alternatives_makes_the_objective_answer() -> None:
    questions = [choice_question("ask", "a", "b"), Question.with_completion("ask", " a")]
    dataset = TaskDataset("t", "acc", questions, questions)
    assert task_data.resolve_objective("auto", dataset) == "answer"
    assert task_data.resolve_objective("all", dataset) == "all"


def test_held_out_rows_are_divided_by_the_seed(choices_file: Path) -> None:
    data = load(choices_file, num_selection_samples=4)
    assert (len(data.held_out), len(data.fresh)) == (4, 2)
    assert sorted([*data.held_out, *data.fresh], key=str) == sorted(data.dataset.held_out, key=str)
    assert load(choices_file).held_out == [*data.held_out, *data.fresh]
    assert any(load(choices_file, seed=seed).held_out != load(choices_file).held_out for seed in range(1, 4))


def test_batch_must_not_be_larger_than_the_task(choices_file: Path) -> None:
    assert load(choices_file, batch_size=48)
    with pytest.raises(OptionError, match="--batch_size must be at most the number of training rows; got 49 and 48"):
        load(choices_file, batch_size=49)


def test_scored_rows_are_checked_before_training() -> None:
    train = [choice_question("ask", "a", "b")] * 8
    dataset = TaskDataset("t", "acc", train, train, [Question(("ask",) * 2, (" a", ""), 0, (1, 1))])
    with pytest.raises(DataError, match="every answer must have a token that its prompt predicts"):
        encode_task(dataset, CONFIG, make_tokenizer())


def test_lengths_of_rows() -> None:
    questions = [choice_question("ask", "a", "bcd"), choice_question("say it", "a", "b")]
    choices, answers = (make_task_data(make_tokenizer(), questions, objective) for objective in ("choices", "answer"))
    assert choices.forward_tokens() == [
        2 + 2 * 5,
        5 + 2 * 3,
    ]  # the prompt without its last token, then two padded rests
    assert choices.max_text_length == 8
    assert answers.forward_tokens() == [5, 8]
    assert answers.max_text_length == 8
    longer = make_task_data(make_tokenizer(), [choice_question("ask", "a", "b" * 20)], "choices")
    assert longer.max_text_length == 24, "wrong choices count"


def test_fingerprint_changes_with_any_row() -> None:
    questions = [choice_question("ask", "a", "b"), choice_question("say", "a", "b")]
    data = make_task_data(make_tokenizer(), questions, "answer")
    assert data.fingerprint() == make_task_data(make_tokenizer(), list(questions), "answer").fingerprint()
    other = choice_question("ask", "a", "c")
    for changed in (
        make_task_data(make_tokenizer(), [other, questions[1]], "answer"),  # a wrong choice, which no text has
        dataclasses.replace(data, held_out=[other]),
        dataclasses.replace(data, fresh=[other]),
        dataclasses.replace(data, dataset=dataclasses.replace(data.dataset, scored=[other])),
    ):
        assert changed.fingerprint() != data.fingerprint()
