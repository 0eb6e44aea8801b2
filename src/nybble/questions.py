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

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble import data, evaluate
from nybble.errors import DataError, OptionError
from nybble.losses import Head, cross_entropy, kl_to_teacher, last_hidden
from nybble.rows import read_rows

log = logging.getLogger("nybble")

# Rows of the training split held out to choose by, where the task has no other; at most a tenth.
HELD_OUT = 500
# A training row is left out if more of its runs of three words are in one held-out row. (WinoGrande comes in twins: a sentence, one word changed, the other
# answer.)
MOST_SHARED = 0.3
# Of the softmax over choices that are scored by length. At 1 the first steps follow the few questions that are most wrong; from 10 on, the model is driven
# to margins that cost it its language (docs/log.md).
TEMPERATURE = 4.0
# Tokens, padding included, in one forward of scoring.
_TOKENS = 2048


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
        return [mean / length / TEMPERATURE for length in self.lengths]


class Text(NamedTuple):
    """A prompt and an answer in one. Attributes: ids: tokens; prompt: how many of them are the prompt's."""

    ids: list[int]
    prompt: int

    @property
    def first(self) -> int:
        """Place of the first token that is predicted: the answer's first, or where there is no prompt its second."""
        return max(self.prompt, 1)

    @property
    def answered(self) -> int:
        """How many tokens of the answer are predicted."""
        return max(0, len(self.ids) - self.first)


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
    task = evaluate.open_task(name, data_dir)
    if not task.has_training_docs():
        raise OptionError(f"--task must have a training split; {name} has none; name another, or a .jsonl file with rows of prompt, choices, answer")
    if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        raise OptionError(f"--task must ask for one of several answers or for one of its own words; {name} asks for {task.OUTPUT_TYPE}")
    rows, metric = task.training_docs(), evaluate.metric_of(task)
    order = data.order(len(rows), len(rows), seed).tolist()
    splits = task.config
    scored_on = splits.test_split or splits.validation_split
    if splits.training_split == scored_on:
        raise OptionError(f"--task must be scored on other rows than it trains on; {name} has a single split, {scored_on}; name another task")
    apart = Twins(())
    if splits.validation_split and splits.validation_split not in (scored_on, splits.training_split):
        held_out = [_rendered(task, row, name) for row in task.validation_docs()]
    else:
        count = min(HELD_OUT, len(rows) // 10)
        if not count:
            raise DataError(
                f"--task {name} has no validation split, so a tenth of its training rows is held out; it must have at least 10, and has {len(rows)}"
            )
        held_out, apart = [_rendered(task, rows[i], name) for i in order[:count]], Twins([rows[i] for i in order[:count]])
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


class Twins:
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
    return Question(pairs, choices.index(gold) if isinstance(gold, str) else int(gold), tuple(max(1, len(choice)) for choice in choices))


def _own_task(path: Path, seed: int, most: int) -> Task:
    """A file: a tenth of the rows to choose by, a tenth to score on (data.split_of)."""
    rows = read_rows(path, "--task")
    questions = [_own_question(row, f"--task {path}: row {i + 1}") for i, row in enumerate(rows)]
    if len(questions) < 10:
        raise DataError(f"--task {path} must have at least 10 rows; it has {len(questions)}")
    parts: dict[str, list[Question]] = {split: [] for split in data.SPLITS}
    for i, question in enumerate(questions):
        parts[data.split_of(i)].append(question)
    kinds = {len(question.pairs) > 1 for question in questions}
    if len(kinds) > 1:
        raise DataError(f"--task {path} must have choices in all rows or in none; it has rows of both kinds; make two files")
    metric = "acc" if kinds == {True} else "log_likelihood"
    elsewhere = {question.pairs for question in (*parts["validation"], *parts["test"])}
    if repeated := sum(question.pairs in elsewhere for question in parts["train"]):
        log.warning("%s: %d of %d training rows repeat rows to choose by or to score on, whose figures are then better than those of unseen rows", path,
                    repeated, len(parts["train"]))  # fmt: skip
    order = data.order(len(parts["train"]), len(parts["train"]), seed).tolist()
    return Task(str(path), metric, [parts["train"][i] for i in order[: most or None]], parts["validation"], parts["test"])


def _own_question(row: Any, where: str) -> Question:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip():
        prompt, choices, answer, completion = row["prompt"], row.get("choices"), row.get("answer"), row.get("completion")
        if choices is None and isinstance(completion, str) and completion.strip():
            return Question(((prompt, _spaced(prompt, completion)),), 0)
        if isinstance(choices, list) and len(choices) > 1 and all(type(choice) in (str, int, float) for choice in choices):
            texts = [str(choice) for choice in choices]
            if not all(text.strip() for text in texts):
                raise DataError(f"{where} must have words in every choice; got {str(choices)[:80]}")
            if type(answer) is int and 0 <= answer < len(texts):
                return Question(tuple((prompt, _spaced(prompt, text)) for text in texts), answer, tuple(max(1, len(text)) for text in texts))
    raise DataError(f"{where} must have prompt, choices (two or more) and the number of the right one as answer, or prompt and completion; got {str(row)[:80]}")


def _spaced(prompt: str, answer: str) -> str:
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"


def encode(tokenizer: Any, prompt: str, answer: str) -> Text:
    """Prompt and answer together; spaces at the prompt's end go to the answer, as in lm-eval."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, answer = prompt[:-spaces], prompt[-spaces:] + answer
    ids = tokenizer(prompt + answer).input_ids
    return Text(ids, len(tokenizer(prompt).input_ids) if prompt else min(1, len(data.begin_tokens(tokenizer))))


@dataclass(frozen=True)
class Batch:
    """Texts padded at their ends, which a causal model never sees.

    Attributes:
        ids: [B, T].
        counted: [B, T]: whether the prediction made at a position is one of a token that is to be learnt, or scored.
    """

    ids: Tensor
    counted: Tensor

    def losses(self, model: Any, head: Head | None) -> Tensor:
        """-log q of every counted token, in order: float32 [N]. Without a head, from the model's own logits (exported models)."""
        if head is None:
            logits = model(input_ids=self.ids).logits.float()
            return F.cross_entropy(logits[self.counted], self.ids.roll(-1, 1)[self.counted], reduction="none")
        device = model.device
        counted, targets = self.counted.to(device), self.ids.roll(-1, 1).to(device)
        return cross_entropy(last_hidden(model, self.ids.to(device))[counted], targets[counted], head)

    def divergence(self, model: Any, head: Head, teacher: Any, teacher_head: Head) -> Tensor:
        """Mean over the counted tokens of KL(teacher || model)."""
        ids, counted = self.ids.to(model.device), self.counted.to(model.device)
        with torch.no_grad():
            taught = last_hidden(teacher, ids)[counted]
        return kl_to_teacher(last_hidden(model, ids)[counted], taught, head, teacher_head)

    def sums(self, losses: Tensor) -> Tensor:
        """Sums of `losses` by text: [B]."""
        rows = self.counted.nonzero()[:, 0].to(losses.device)
        return torch.zeros(len(self.ids), device=losses.device).index_add_(0, rows, losses)


def pad(texts: Sequence[Text], everything: bool = False) -> Batch:
    """What `encode` gave; the answer's tokens count, or with `everything` the prompt's too."""
    length = max(len(text.ids) for text in texts)
    batch = Batch(torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length, dtype=torch.bool))
    for i, text in enumerate(texts):
        batch.ids[i, : len(text.ids)] = torch.tensor(text.ids)
        batch.counted[i, (0 if everything else text.first - 1) : len(text.ids) - 1] = True
    return batch


def encode_gold(tokenizer: Any, questions: Sequence[Question], length: int) -> list[Text]:
    """The training texts: prompt and right answer, cut off at `length` tokens (and it is said); an answer in the model's own words ends
    with the end-of-text token. Those of whose answer nothing is left are left out, and counted.

    Raises:
        DataError: nothing is left of any.
    """
    end = data.end_tokens(tokenizer)
    encoded = [encode(tokenizer, *question.pairs[question.gold]) for question in questions]
    encoded = [Text(text.ids + end if len(q.pairs) == 1 else text.ids, text.prompt) for q, text in zip(questions, encoded, strict=True)]
    cut = sum(text.first < length < len(text.ids) for text in encoded)
    encoded = [Text(text.ids[:length], text.prompt) for text in encoded]
    texts = [text for text in encoded if text.answered]
    if not texts:
        shortest = min((text.prompt for text in encoded), default=0)
        raise DataError(f"answers must have tokens within --seq_len {length}; none of {len(encoded)} has; the shortest prompt has {shortest}")
    if len(texts) < len(encoded):
        log.warning("%d of %d rows have no answer within %d tokens and were left out", len(encoded) - len(texts), len(encoded), length)
    if cut:
        log.warning("%d of %d answers are learnt only up to token %d (--seq_len)", cut, len(encoded), length)
    return texts


@dataclass(frozen=True)
class Score:
    """Of held-out questions.

    Attributes:
        log_likelihoods: of each question the logarithm of the right answer's share; without alternatives log p per token (see the head of this file).
        correct: whether the most likely choice is the right one; empty without alternatives.
    """

    log_likelihoods: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def log_likelihood(self) -> float:
        return sum(self.log_likelihoods) / len(self.log_likelihoods)

    @property
    def scores(self) -> tuple[float, ...]:
        """What candidates are compared by, question by question."""
        return tuple(map(math.exp, self.log_likelihoods)) if self.correct else self.log_likelihoods

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def accuracy(self) -> float | None:
        return sum(self.correct) / len(self.correct) if self.correct else None

    def better_by(self, other: Score) -> tuple[float, float]:
        """Mean difference of the scores, question by question, and its standard error (0 for a single question)."""
        differences = torch.tensor([a - b for a, b in zip(self.scores, other.scores, strict=True)], dtype=torch.float64)
        return float(differences.mean()), float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else 0.0


@torch.no_grad()
def score(
    model: Any,
    head: Head | None,
    tokenizer: Any,
    questions: Sequence[Question],
    by_length: bool,
    length: int,
) -> Score:
    """Score a model on questions; what the choices of one have in common goes through it once, and questions of like length together."""
    texts = encode_choices(tokenizer, questions, length)
    begins = _begins(model, head, texts)
    likely, correct = {}, {}
    for part in _parts(texts, begins):
        sums = iter(_sums(model, head, [texts[i] for i in part], [begins[i] for i in part]).tolist())
        for i in part:
            values = [-next(sums) for _ in texts[i]]
            if len(values) == 1:
                likely[i] = values[0] / texts[i][0].answered
            else:
                values = [value * factor for value, factor in zip(values, questions[i].factors(by_length), strict=True)]
                likely[i] = float(F.log_softmax(torch.tensor(values, dtype=torch.float64), 0)[questions[i].gold])
                correct[i] = max(range(len(values)), key=values.__getitem__) == questions[i].gold
    return Score(tuple(likely[i] for i in range(len(questions))), tuple(correct[i] for i in range(len(questions)) if i in correct))


def encode_choices(tokenizer: Any, questions: Sequence[Question], length: int) -> list[list[Text]]:
    """Prompt and answer of every choice; prompts are cut off at their beginnings to fit `length` tokens.

    Raises:
        DataError: an answer without tokens.
    """
    encoded = [[_fitted(encode(tokenizer, *pair), length) for pair in question.pairs] for question in questions]
    for question, texts in zip(questions, encoded, strict=True):
        for (prompt, answer), text in zip(question.pairs, texts, strict=True):
            if not text.answered:
                raise DataError(f"every answer must have tokens of its own; {answer!r} after {prompt[-40:]!r} has none")
    return encoded


def choice_log_probs(model: Any, head: Head, texts: Sequence[Sequence[Text]]) -> Tensor:
    """log p(answer) of every choice, in nats: float32 [questions, most choices], -inf where a question has fewer; differentiable.

    Args:
        texts: of `encode_choices`.
    """
    sums, most = _sums(model, head, texts, _begins(model, head, texts)), max(map(len, texts))
    return torch.stack([F.pad(-values, (0, most - len(values)), value=-math.inf) for values in sums.split([len(choices) for choices in texts])])


def _begins(model: Any, head: Head | None, texts: Sequence[Sequence[Text]]) -> list[int]:
    """How many tokens go through the model once for all choices of a question; 0 for exports, and where an attention window is shorter than a text."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    whole = head is None or (window and window < max(len(text.ids) for choices in texts for text in choices))
    return [0 if whole else _shared(choices) for choices in texts]


def _fitted(text: Text, length: int) -> Text:
    over = max(0, len(text.ids) - length)
    return Text(text.ids[over:], max(text.prompt - over, 0))


def _shared(texts: Sequence[Text]) -> int:
    """How many tokens all texts of a question begin with, before the last one of the prompt: what is learnt of answers comes after them."""
    if len(texts) == 1:
        return 0
    columns = list(zip(*(text.ids for text in texts), strict=False))
    same = next((t for t, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return max(0, min(same, min(text.prompt for text in texts) - 1))


def tokens_of(texts: Sequence[Text]) -> int:
    """How many tokens go through the model for a question, padding of its choices included."""
    begin = _shared(texts)
    return begin + len(texts) * (max(len(text.ids) for text in texts) - begin)


def _parts(texts: Sequence[Sequence[Text]], begins: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of questions, the longest first, as many at a time as fit into `_TOKENS`, padding included; at least one. `begins`: tokens that are shared."""
    part: list[int] = []
    first = rest = rows = 0
    for i in sorted(range(len(texts)), key=lambda i: (-begins[i], -max(len(text.ids) for text in texts[i]))):
        shared = begins[i]
        wide, tall = max(rest, max(len(text.ids) for text in texts[i]) - shared), rows + len(texts[i])
        if part and (len(part) + 1) * first + tall * wide > _TOKENS:
            yield part
            part, first, wide, tall = [], shared, max(len(text.ids) for text in texts[i]) - shared, len(texts[i])
        part, first, rest, rows = [*part, i], max(first, shared), wide, tall
    if part:
        yield part


def _sums(model: Any, head: Head | None, questions: Sequence[Sequence[Text]], begins: Sequence[int]) -> Tensor:
    """-log p of the answer of every text, one after the other: float32 [texts]; of each question so many tokens are shared by all texts as `begins` says."""
    flat = [text for texts in questions for text in texts]
    if head is None or not max(begins):
        batch = pad(flat)
        return batch.sums(batch.losses(model, head))
    most, begin_Q1 = max(begins), torch.tensor(begins)[:, None]
    known_QP = torch.arange(most) >= most - begin_Q1  # beginnings end together: what is in front of a shorter one is padding, and windows see no gap
    kept = model.base_model(
        input_ids=torch.tensor([[0] * (most - begin) + texts[0].ids[:begin] for texts, begin in zip(questions, begins, strict=True)]).to(model.device),
        attention_mask=known_QP.long().to(model.device),
        position_ids=(torch.arange(most) - most + begin_Q1).relu().to(model.device),
        use_cache=True,
    ).past_key_values
    owners = [i for i, texts in enumerate(questions) for _ in texts]
    ends = [Text(text.ids[begins[i] :], text.prompt - begins[i]) for text, i in zip(flat, owners, strict=True)]
    order, found = torch.tensor([len(text.ids) for text in ends]).argsort(stable=True), []
    for part in order.split(2 * len(questions)):  # of like length
        owner_N = torch.tensor([owners[i] for i in part.tolist()])
        batch = pad([ends[i] for i in part.tolist()])
        hidden = model.base_model(
            input_ids=batch.ids.to(model.device),
            attention_mask=torch.cat([known_QP[owner_N], torch.ones_like(batch.counted)], 1).long().to(model.device),
            position_ids=(begin_Q1[owner_N] + torch.arange(batch.ids.shape[1])).to(model.device),
            past_key_values=_rows(kept, owner_N.to(model.device)),
            use_cache=True,
        ).last_hidden_state
        counted, targets = batch.counted.to(model.device), batch.ids.roll(-1, 1).to(model.device)
        found.append(batch.sums(cross_entropy(hidden[counted], targets[counted], head)))
    return torch.cat(found)[order.argsort().to(model.device)]


def _rows(cache: Any, rows_N: Tensor) -> Any:
    """Rows of a cache of keys and values, as a new one; differentiable."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(rows_N)
    return taken
