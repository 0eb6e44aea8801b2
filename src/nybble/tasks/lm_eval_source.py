"""Task source for lm-eval tasks that have a training split.

Prompts and choices are rendered by lm-eval's own templates, without few-shot examples. lm-eval itself scores the task
on its test split, or on its validation split where it has no test split.

If the validation split is not scored, it is held out, and all training rows are for training. If it is scored, up to
500 rows (at most a tenth) of the training split are held out, and training rows that nearly repeat one of them are left
out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from nybble.data import sampling
from nybble.errors import DataError, OptionError
from nybble.evaluation import lm_eval
from nybble.tasks.dataset import Question, TaskDataset, TaskRequest
from nybble.tasks.near_duplicates import NearDuplicateIndex

log = logging.getLogger("nybble")

# Maximum number of training rows that are held out. The standard error of a score in [0, 1] on 500 rows is about 0.02.
MAX_HELD_OUT = 500


class LmEvalSource:
    """Reads lm-eval tasks; see nybble.tasks.sources.TaskSource for the contract."""

    name = "lm-eval"

    def matches(self, task: str) -> bool:
        """Always true: a name that no other source claims is taken for an lm-eval task."""
        return True

    def load(self, request: TaskRequest) -> TaskDataset:
        """Load and render the rows of a task.

        Raises:
            MissingExtraError: lm-eval is not installed.
            OptionError: lm-eval does not know the task, or it has no training split, a single split, several right
                answers a row, or an output type that cannot be trained on.
            DataError: the data cannot be found, a row cannot be rendered, or there are too few rows to hold some out.
        """
        name = request.task
        task = lm_eval.open_task(name, request.data_dir)
        _check_task(task, name)
        rows = task.training_docs()
        order = sampling.draw_order(len(rows), len(rows), request.seed).tolist()
        if _has_unscored_validation_split(task):
            held_out = [_render_row(task, row, name) for row in task.validation_docs()]
            duplicates = NearDuplicateIndex(())
        else:
            count = _num_held_out(len(rows), name)
            held_out_rows, order = [rows[i] for i in order[:count]], order[count:]
            held_out = [_render_row(task, row, name) for row in held_out_rows]
            duplicates = NearDuplicateIndex(held_out_rows)
        train = _render_training_rows(task, name, (rows[i] for i in order), duplicates, request.num_train_samples)
        return TaskDataset(name, lm_eval.main_metric(task), train, held_out)


def _check_task(task: Any, name: str) -> None:
    if not task.has_training_docs():
        raise OptionError(
            f"--task must have a training split; {name} has none; "
            "name another task, or a .jsonl file with rows of prompt, choices and answer"
        )
    if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        raise OptionError(
            f"--task must have the output type multiple_choice or generate_until; {name} has {task.OUTPUT_TYPE}; "
            "name another task"
        )
    scored_split = _scored_split(task)
    if task.config.training_split == scored_split:
        raise OptionError(
            f"--task must be scored on other rows than it trains on; {name} has the single split {scored_split}; "
            "name another task"
        )


def _scored_split(task: Any) -> str | None:
    """The split that lm-eval scores."""
    split: str | None = task.config.test_split or task.config.validation_split
    return split


def _has_unscored_validation_split(task: Any) -> bool:
    validation = task.config.validation_split
    return bool(validation) and validation not in (_scored_split(task), task.config.training_split)


def _num_held_out(num_rows: int, name: str) -> int:
    count = min(MAX_HELD_OUT, num_rows // 10)
    if not count:
        raise DataError(
            f"--task {name} must have at least 10 training rows, as a tenth of them is held out; it has {num_rows}; "
            "name another task"
        )
    return count


def _render_training_rows(
    task: Any, name: str, rows: Iterable[dict[str, Any]], duplicates: NearDuplicateIndex, num_train_samples: int
) -> list[Question]:
    """The first `num_train_samples` rows (0 = all) that are no near duplicates, rendered."""
    questions: list[Question] = []
    skipped = 0
    for row in rows:
        if duplicates.contains(row):
            skipped += 1
            continue
        questions.append(_render_row(task, row, name))
        if len(questions) == num_train_samples:
            break
    if skipped:
        log.info("%s: left out %d training rows that nearly repeat held-out rows", name, skipped)
    return questions


def _render_row(task: Any, row: dict[str, Any], name: str) -> Question:
    try:
        return render_question(task, row)
    except OptionError:
        raise
    except Exception as error:  # templates raise errors of any type
        reason = " ".join(str(error).split())[:100]
        raise DataError(
            f"a row of {name} must be one that lm-eval can render; it cannot ({type(error).__name__}: {reason}); "
            f"check the data: {str(row)[:100]}"
        ) from error


def render_question(task: Any, row: dict[str, Any]) -> Question:
    """Render one row as lm-eval's own requests have it, without few-shot examples.

    Args:
        task: lm-eval's task object, with the output type multiple_choice or generate_until.
        row: a row of its data set.

    Raises:
        OptionError: the row has several right answers.
    """
    prompt = task.fewshot_context(row, 0, gen_prefix=task.doc_to_prefix(row))
    if task.OUTPUT_TYPE == "generate_until":
        target = task.doc_to_target(row)
        if task.config.doc_to_choice is not None:
            target = task.doc_to_choice(row)[target]
        target = target[0] if isinstance(target, list) else target
        return Question.with_completion(prompt, f"{task.config.target_delimiter}{target}")
    choices = task.doc_to_choice(row)
    # Some tasks append unconditional requests, which are not scored here.
    requests = task.construct_requests(row, prompt)[: len(choices)]
    label = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    if isinstance(label, list):
        raise OptionError(
            f"--task must have one right answer a row; {task.config.task} has rows with several; name another task"
        )
    return Question(
        tuple(str(request.args[0]) for request in requests),
        tuple(str(request.args[1]) for request in requests),
        choices.index(label) if isinstance(label, str) else int(label),
        tuple(max(1, len(choice)) for choice in choices),
    )
