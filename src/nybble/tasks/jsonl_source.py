"""Task source for files of rows: .jsonl, .json, .csv and .parquet.

Each row has one of two forms, and a file has rows of one form only:

    {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}         answer: index of the right choice, counted from 0
    {"prompt": "The capital of France is", "completion": "Paris"}

In a .csv file choices are the JSON text of the list.

Of every ten neighbouring rows, eight are for training, one is held out, and one is scored
(nybble.data.splits.split_of_row). nybble scores the task itself.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from nybble.data import sampling, splits
from nybble.data.files import ROW_SUFFIXES, check_unicode, read_rows
from nybble.errors import DataError
from nybble.tasks.dataset import Question, TaskDataset, TaskRequest

log = logging.getLogger("nybble")

# With fewer rows, a split could be empty.
_MIN_ROWS = 10


class JsonlSource:
    """Reads files of rows; see nybble.tasks.sources.TaskSource for the contract."""

    name = "jsonl"

    def matches(self, task: str) -> bool:
        """Whether the task is a path that ends like a file of rows, in upper or lower case."""
        return Path(task).suffix.lower() in ROW_SUFFIXES

    def load(self, request: TaskRequest) -> TaskDataset:
        """Read and split the file.

        The metric is acc for rows with choices, and log_likelihood for rows with a completion.

        Raises:
            DataError: the file cannot be read, a row is malformed, the rows have both forms, or there are fewer than
                10.
        """
        path = Path(request.task)
        cells = _read_cells if path.suffix.lower() == ".csv" else dict
        questions = [
            _parse_row(cells(row), f"--task {path}: row {number}")
            for number, row in enumerate(read_rows(path, "--task"), 1)
        ]
        metric = _metric(questions, path)
        parts: dict[str, list[Question]] = {split: [] for split in splits.SPLITS}
        for i, question in enumerate(questions):
            parts[splits.split_of_row(i)].append(question)
        _warn_of_repeated_rows(parts, path)
        train = parts["train"]
        order = sampling.draw_order(len(train), len(train), request.seed).tolist()
        chosen = [train[i] for i in order[: request.num_train_samples or None]]
        return TaskDataset(str(path), metric, chosen, parts["validation"], parts["test"])


def _metric(questions: list[Question], path: Path) -> str:
    if len(questions) < _MIN_ROWS:
        raise DataError(f"--task {path} must have at least {_MIN_ROWS} rows; it has {len(questions)}; add rows")
    with_alternatives = {question.has_alternatives for question in questions}
    if len(with_alternatives) > 1:
        raise DataError(
            f"--task {path} must have choices in all rows or in none; it has rows of both kinds; "
            "split it into two files"
        )
    return "acc" if with_alternatives == {True} else "log_likelihood"


def _warn_of_repeated_rows(parts: dict[str, list[Question]], path: Path) -> None:
    held_back = {(question.prompts, question.choices) for split in ("validation", "test") for question in parts[split]}
    repeated = sum((question.prompts, question.choices) in held_back for question in parts["train"])
    if repeated:
        log.warning(
            "%s: %d of %d training rows repeat rows that are held out or scored; "
            "scores will be better than on unseen rows; remove the duplicates",
            path,
            repeated,
            len(parts["train"]),
        )


def _parse_row(row: dict[str, Any], where: str) -> Question:
    prompt, choices, completion = row.get("prompt"), row.get("choices"), row.get("completion")
    question = None
    if isinstance(prompt, str) and prompt.strip():
        check_unicode([prompt, choices, completion], where)
        if choices is not None:
            question = _parse_choices(prompt, choices, row.get("answer"), where)
        elif isinstance(completion, str) and completion.strip():
            question = Question.with_completion(prompt, _with_space(prompt, completion))
    if question is None:
        raise DataError(
            f"{where} must have prompt, choices (two or more) and answer (the index of the right choice, "
            f"the first is 0), or prompt and completion; got {str(row)[:80]}"
        )
    return question


def _read_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a .csv file, whose cells are text, with the list of its choices and the number of its answer."""
    return row | {name: _read(row[name]) for name in ("choices", "answer") if isinstance(row.get(name), str)}


def _read(cell: str) -> Any:
    try:
        read = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return read if isinstance(read, list) or type(read) is int else cell


def _parse_choices(prompt: str, choices: Any, answer: Any, where: str) -> Question | None:
    """The question, or None where choices or answer are malformed.

    Raises:
        DataError: a choice is blank, or repeated.
    """
    if not isinstance(choices, list) or len(choices) < 2:
        return None
    if not all(type(choice) in (str, int, float) for choice in choices):  # not bool, which is an int
        return None
    if not all(math.isfinite(choice) for choice in choices if isinstance(choice, float)):
        return None
    texts = [str(choice) for choice in choices]
    if not all(text.strip() for text in texts):
        raise DataError(f"{where} must have text in every choice; got {str(choices)[:80]}; remove blank choices")
    if len(set(texts)) < len(texts):
        raise DataError(f"{where} must have choices that differ; got {str(choices)[:80]}; remove repeated choices")
    if type(answer) is not int or not 0 <= answer < len(texts):
        return None
    return Question(
        (prompt,) * len(texts),
        tuple(_with_space(prompt, text) for text in texts),
        answer,
        tuple(len(text) for text in texts),
    )


def _with_space(prompt: str, text: str) -> str:
    """`text`, preceded by a space unless there is white space between prompt and text already."""
    return text if prompt[-1].isspace() or text[:1].isspace() else f" {text}"
