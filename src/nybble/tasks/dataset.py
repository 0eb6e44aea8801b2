"""Questions with answers: what a downstream task trains on, chooses by, and is scored on. Rendered by lm-eval, but without examples before them.

A task is one that lm-eval knows (with a training split), or a .jsonl file of one's own with rows {"prompt", "choices", "answer" (its number, from 0)} or
{"prompt", "completion"}.

    train       lm-eval's training rows; where no held-out rows are left, without those below
    held out    what ranks and epochs are chosen by: the validation split, or, where the task is scored on that, some rows of the training split, which
                then gives up those that nearly repeat them
    scored      lm-eval's own affair, on its test split (or validation): see evaluate.run_tasks

The score of held-out rows is the share of the right answer among the choices, the one whose logarithm is learnt:
    softmax_c (log p(answer_c | prompt_c) * factor_c) [gold],    factor: Question.factors where the task's metric is acc_norm, else 1
(of an answer without alternatives: log p per token). It tells candidates apart long before their accuracies do, and unlike the logarithm of that share it
goes with them: a few rows that are confidently wrong do not outweigh all others (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.data import sampling
from nybble.data import splits as data_splits
from nybble.data.files import read_rows
from nybble.errors import DataError, OptionError
from nybble.evaluation import lm_eval

log = logging.getLogger("nybble")

# Rows of the training split held out to choose by, where the task has no other; at most a tenth.
HELD_OUT = 500
# A training row is left out if more of its runs of three words are in one held-out row. (WinoGrande comes in twins: a sentence, one word changed, the other
# answer.)
MOST_SHARED = 0.3
# Of the softmax over choices that are scored by length. At 1 the first steps follow the few questions that are most wrong; from 10 on, the model is driven
# to margins that cost it its language (docs/log.md).
LENGTH_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Question:
    """Attributes:
    pairs: (prompt, answer) of every choice, as lm-eval renders them; one without alternatives.
    gold: number of the right one.
    lengths: characters of each choice.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...] = ()

    def factors(self, by_length: bool) -> list[float]:
        """What log p of each choice is multiplied by before the softmax over them: 1; or by length, mean length of the choices / its own / TEMPERATURE.

        (log p by character, as lm-eval compares choices, would share out nearly evenly: 1.41 nats before training on openbookqa, where guessing gives 1.39.
        The order of the choices is the same.)
        """
        if not by_length:
            return [1.0] * len(self.pairs)
        mean = sum(self.lengths) / len(self.lengths)
        return [mean / length / LENGTH_TEMPERATURE for length in self.lengths]


@dataclass(frozen=True)
class Task:
    """Attributes:
    name: as lm-eval calls it, or the file.
    metric: what it is reported by: acc_norm, acc, exact_match,strict-match, ...
    train, held_out: see the head of this file.
    scored: of a file of one's own: the questions that it is scored on; of lm-eval's tasks none.
    """

    name: str
    metric: str
    train: Sequence[Question]
    held_out: Sequence[Question]
    scored: Sequence[Question] = ()

    @property
    def by_length(self) -> bool:
        return self.metric == "acc_norm"


def load_task(name: str, data_dir: str | None, seed: int, most: int = 0) -> Task:
    """Rows of a task.

    Args:
        seed: of what is held out, and of which rows are used.
        most: at most so many training rows; 0 = all.

    Raises:
        OptionError: unknown, or without a training split.
        DataError: data missing or malformed.
    """
    return _own_task(Path(name), seed, most) if name.endswith(".jsonl") else _known_task(name, data_dir, seed, most)


def _known_task(name: str, data_dir: str | None, seed: int, most: int) -> Task:
    task = lm_eval.open_task(name, data_dir)
    if not task.has_training_docs():
        raise OptionError(
            f"--task must have a training split; {name} has none; name another, or a .jsonl file with rows of prompt, choices, answer"
        )
    if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        raise OptionError(
            f"--task must ask for one of several answers or for one of its own words; {name} asks for {task.OUTPUT_TYPE}"
        )
    rows, metric = task.training_docs(), lm_eval.metric_of(task)
    order = sampling.draw_order(len(rows), len(rows), seed).tolist()
    splits = task.config
    scored_on = splits.test_split or splits.validation_split
    if splits.training_split == scored_on:
        raise OptionError(
            f"--task must be scored on other rows than it trains on; {name} has a single split, {scored_on}; name another task"
        )
    apart = NearDuplicates(())
    if splits.validation_split and splits.validation_split not in (scored_on, splits.training_split):
        held_out = [_rendered(task, row, name) for row in task.validation_docs()]
    else:
        count = min(HELD_OUT, len(rows) // 10)
        if not count:
            raise DataError(
                f"--task {name} has no validation split, so a tenth of its training rows is held out; it must have at least 10, and has {len(rows)}"
            )
        held_out, apart = (
            [_rendered(task, rows[i], name) for i in order[:count]],
            NearDuplicates([rows[i] for i in order[:count]]),
        )
        order = order[count:]
    train, twins = [], 0
    for i in order:
        if apart.has(rows[i]):
            twins += 1
            continue
        train.append(_rendered(task, rows[i], name))
        if len(train) == most:
            break
    if twins:
        log.info("%s: %d training rows left out, which nearly repeat held-out rows", name, twins)
    return Task(name, metric, train, held_out)


class NearDuplicates:
    """Tells which rows nearly repeat one of those given: of their runs of three words, more than MOST_SHARED are in that one."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows_with: dict[tuple[str, ...], list[int]] = {}
        for i, row in enumerate(rows):
            for run in self._runs(row):
                self._rows_with.setdefault(run, []).append(i)

    def has(self, row: Any) -> bool:
        runs = self._runs(row) if self._rows_with else set()
        shared = Counter(i for run in runs for i in self._rows_with.get(run, ()))
        return bool(shared) and max(shared.values()) > MOST_SHARED * len(runs)

    def _runs(self, row: Any) -> set[tuple[str, ...]]:
        """Runs of three words in all texts of a row."""
        if isinstance(row, str):
            words = re.findall(r"\w+", row.lower())
            return set(zip(words, words[1:], words[2:], strict=False))
        parts = row.values() if isinstance(row, dict) else row if isinstance(row, list) else ()
        return set().union(*map(self._runs, parts))


def _rendered(task: Any, row: dict[str, Any], name: str) -> Question:
    """Prompt and answers, from lm-eval's own requests without examples before them; DataError for a row that it cannot make them of."""
    try:
        return _render(task, row)
    except OptionError:
        raise
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            f"a row of {name} is not what lm-eval expects ({type(error).__name__}: {' '.join(str(error).split())[:100]}): {str(row)[:100]}"
        ) from error


def _render(task: Any, row: dict[str, Any]) -> Question:
    prompt = task.fewshot_context(row, 0, gen_prefix=task.doc_to_prefix(row))
    if task.OUTPUT_TYPE == "generate_until":
        target = task.doc_to_target(row)
        if task.config.doc_to_choice is not None:
            target = task.doc_to_choice(row)[target]
        target = target[0] if isinstance(target, list) else target
        return Question(((prompt, f"{task.config.target_delimiter}{target}"),), 0)
    choices = task.doc_to_choice(row)
    requests = task.construct_requests(row, prompt)[: len(choices)]
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    if isinstance(gold, list):
        raise OptionError(f"--task must have one right answer a row; {task.config.task} has rows with several")
    pairs = tuple((str(request.args[0]), str(request.args[1])) for request in requests)
    return Question(
        pairs,
        choices.index(gold) if isinstance(gold, str) else int(gold),
        tuple(max(1, len(choice)) for choice in choices),
    )


def _own_task(path: Path, seed: int, most: int) -> Task:
    """A file: a tenth of the rows to choose by, a tenth to score on (data.split_of)."""
    rows = read_rows(path, "--task")
    questions = [_own_question(row, f"--task {path}: row {i + 1}") for i, row in enumerate(rows)]
    if len(questions) < 10:
        raise DataError(f"--task {path} must have at least 10 rows; it has {len(questions)}")
    parts: dict[str, list[Question]] = {split: [] for split in data_splits.SPLITS}
    for i, question in enumerate(questions):
        parts[data_splits.split_of(i)].append(question)
    kinds = {len(question.pairs) > 1 for question in questions}
    if len(kinds) > 1:
        raise DataError(
            f"--task {path} must have choices in all rows or in none; it has rows of both kinds; make two files"
        )
    metric = "acc" if kinds == {True} else "log_likelihood"
    elsewhere = {question.pairs for question in (*parts["validation"], *parts["test"])}
    if repeated := sum(question.pairs in elsewhere for question in parts["train"]):
        log.warning("%s: %d of %d training rows repeat rows to choose by or to score on, whose figures are then better than those of unseen rows", path,
                    repeated, len(parts["train"]))  # fmt: skip
    order = sampling.draw_order(len(parts["train"]), len(parts["train"]), seed).tolist()
    return Task(
        str(path), metric, [parts["train"][i] for i in order[: most or None]], parts["validation"], parts["test"]
    )


def _own_question(row: Any, where: str) -> Question:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip():
        prompt, choices, answer, completion = (
            row["prompt"],
            row.get("choices"),
            row.get("answer"),
            row.get("completion"),
        )
        if choices is None and isinstance(completion, str) and completion.strip():
            return Question(((prompt, _spaced(prompt, completion)),), 0)
        if (
            isinstance(choices, list)
            and len(choices) > 1
            and all(type(choice) in (str, int, float) for choice in choices)
        ):
            texts = [str(choice) for choice in choices]
            if not all(text.strip() for text in texts):
                raise DataError(f"{where} must have words in every choice; got {str(choices)[:80]}")
            if type(answer) is int and 0 <= answer < len(texts):
                return Question(
                    tuple((prompt, _spaced(prompt, text)) for text in texts),
                    answer,
                    tuple(max(1, len(text)) for text in texts),
                )
    raise DataError(
        f"{where} must have prompt, choices (two or more) and the number of the right one as answer, or prompt and completion; got {str(row)[:80]}"
    )


def _spaced(prompt: str, answer: str) -> str:
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"
