"""What a task gives to a run: rows, encoded; what is learnt of them, and by what it is judged.

    loss on choices     -log of the right choice's share among the choices
    loss on answers     -log p of each token of the right answer; with `all` of the prompt too
    with a teacher      KL of what it says of the same
    held out            1 - share of the right choice, or -log p per token of an answer, at the middle configuration of the ranks

docs/method.md has the formulas.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nybble.data import packing, sampling
from nybble.data.packing import TokenRows
from nybble.errors import DataError, ModelError, OptionError
from nybble.models import loading, selection
from nybble.models.head import LMHead
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.options.commands import TuneOptions
from nybble.qat.layers import CachedWeightLinear
from nybble.run import results as run_results
from nybble.tasks import dataset, encoding, scoring
from nybble.tasks.dataset import Question, Task
from nybble.tasks.encoding import EncodedAnswer
from nybble.tasks.scoring import QuestionScores
from nybble.workflows import tuning
from nybble.workflows.stages import Job
from nybble.workflows.text import NO_ROWS, Sequences
from nybble.workflows.tuning import TrainingObjective

log = logging.getLogger("nybble")

# Rows in a microbatch, where it costs little to have few: padding doubles the tokens of 16 rows, but adds a fifth to those of 4 of like length (docs/log.md).
MOST_ROWS = {"cpu": 4}

# Up to so many tokens in a text, the fused attention of torch on a CPU takes longer than its plain products: a step on openbookqa an eighth (docs/log.md).
PLAIN_ATTENTION = 160


@dataclass(frozen=True)
class TaskData:
    """What a task gives to a run.

    Attributes:
        task: rows.
        loss_on: choices, answer or all.
        texts: encoded training texts: prompts with their right answers.
        choices: of the training rows, every choice encoded, where it is those that are learnt; else none.
        held_out: the rows that are chosen by.
        fresh: held-out rows that nothing is chosen by.
        space: ranks.
        count: decoder layers.
        teacher: of --teacher, as long as there is training to be done.
    """

    task: Task
    loss_on: str
    texts: Sequence[EncodedAnswer]
    choices: Sequence[Sequence[EncodedAnswer]]
    held_out: Sequence[Question]
    fresh: Sequence[Question]
    space: tuple[int, ...]
    count: int
    teacher: Any = None


def prepare(
    options: TuneOptions, loaded: loading.LoadedModel, space: tuple[int, ...], custom: RankConfiguration
) -> TaskData:
    """Rows of the task, encoded, and the teacher; raises NybbleError for whatever does not fit. `custom`: a configuration to check, or ()."""
    task = dataset.load_task(options.task, options.data_dir, options.seed, options.train_rows)
    count = len(set(ranks.decoder_layers(list(selection.select_layers(loaded.model).int4)).values()))
    if custom:
        ranks.check_configuration(custom, space, count)
    loss_on = _loss_on(options, task)
    choices = encoding.encode_choices(loaded.tokenizer, task.train, options.seq_len) if loss_on == "choices" else []
    texts = (
        _right(task.train, choices)
        if choices
        else encoding.encode_right_answers(loaded.tokenizer, task.train, options.seq_len)
    )
    if len(texts) < options.batch_size:
        raise OptionError(
            f"--batch_size must be at most the number of training rows; got {options.batch_size} and {len(texts)} rows"
        )
    order = sampling.draw_order(len(task.held_out), len(task.held_out), options.seed)
    held_out = [task.held_out[i] for i in order.tolist()]
    count_held = options.select_rows or len(held_out)
    held_out, fresh = held_out[:count_held], held_out[count_held:]
    log.info(
        "%s: %d rows to train on (loss on %s), %d held out to choose by, reported as %s",
        task.name,
        len(texts),
        loss_on,
        len(held_out),
        task.metric,
    )
    return TaskData(task, loss_on, texts, choices, held_out, fresh, space, count, _teacher(options, loaded))


def _right(asked: Sequence[Question], encoded: Sequence[Sequence[EncodedAnswer]]) -> list[EncodedAnswer]:
    return [texts[question.gold] for question, texts in zip(asked, encoded, strict=True)]


def _loss_on(options: TuneOptions, task: Task) -> str:
    """--loss_on with auto resolved; OptionError for choices where there are none."""
    alternatives = all(len(question.pairs) > 1 for question in task.train)
    if options.loss_on == "choices" and not alternatives:
        raise OptionError(
            f"--loss_on choices needs a task with choices; {task.name} has answers in the model's own words; use --loss_on answer"
        )
    return options.loss_on if options.loss_on != "auto" else "choices" if alternatives else "answer"


def _teacher(options: TuneOptions, student: loading.LoadedModel) -> Any:
    """The model of --teacher; None without, or where training is over. (Other ranks are tried with scales of their own, --adapters before.)"""
    results = {} if options.overwrite else run_results.read_results(options.folder)
    other_ranks = results.get("applied", results.get("configuration")) != results.get(
        "configuration"
    )  # `nybble search --apply` was interrupted
    over = (options.folder / "quantized").exists() and not (
        options.overwrite or other_ranks or (options.eval_only and options.scale_passes)
    )
    if not options.teacher or over:
        return None
    try:
        model = loading.load(
            options.teacher, student.model.dtype, student.model.device, options.trust_remote_code
        ).model
    except ModelError as error:
        raise ModelError(str(error).replace("--pretrained", "--teacher")) from error
    theirs, ours = (loaded.get_output_embeddings().weight.shape[0] for loaded in (model, student.model))
    if theirs != ours:
        raise ModelError(
            f"--teacher must have the vocabulary of --pretrained, {ours} tokens; {options.teacher} has {theirs}; tune --pretrained itself for it"
        )
    return model


def sequences_of(options: TuneOptions, loaded: loading.LoadedModel, lesson: TaskData) -> Sequences:
    """Right answers as running text, for calibration and for perplexity and KL beside the task's own measure."""
    tokenizer, task = loaded.tokenizer, lesson.task
    end = packing.end_tokens(tokenizer)

    def joined(texts: Sequence[EncodedAnswer]) -> torch.Tensor:
        return torch.tensor(
            [token for ids, _ in texts for token in (*ids, *(end if ids[-1:] != end else []))], dtype=torch.int64
        )

    encoding.encode_choices(tokenizer, task.scored, options.seq_len)  # raises now what would be raised at the end
    held_out = joined(_right(task.held_out, encoding.encode_choices(tokenizer, task.held_out, options.seq_len)))
    train = joined(lesson.texts)
    length = text_length(options, len(train), len(held_out))
    calibration, test = (
        packing.cut_sequences(tokens, length, packing.begin_tokens(tokenizer)) for tokens in (train, held_out)
    )
    calibration = calibration[
        sampling.draw_order(len(calibration), min(len(calibration), options.calib_samples), options.seed)
    ]
    rows = repr((lesson.texts, task.train, lesson.held_out, lesson.fresh, task.scored))
    others = {"rows of the task": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    if lesson.teacher is not None:
        others["teacher"] = loading.model_fingerprint(lesson.teacher)
    measured = TokenRows.of(test[: options.test_samples or None])
    return Sequences(
        NO_ROWS, calibration, NO_ROWS, measured, f"held-out rows of {task.name} with their right answers", others
    )


def text_length(options: TuneOptions, train: int, held_out: int) -> int:
    """Tokens in a sequence of running text: 256, or less where there are too few to calibrate with 8 sequences and measure on one.

    Raises:
        DataError: fewer than 8 sequences of 16 tokens.
    """
    length = 256
    while length > 16 and (length > options.seq_len or train < 9 * length or held_out < 2 * length):
        length //= 2
    if train < 9 * length or held_out < length + 1:
        raise DataError(
            f"the rows of --task must have at least {9 * length} tokens to train on and {length + 1} held out; got {train} and {held_out}"
        )
    return length


def resolve(
    options: TuneOptions,
    loaded: loading.LoadedModel,
    plan: selection.LayerSelection,
    sequences: Sequences,
    lesson: TaskData,
) -> TuneOptions:
    _say_what_is_not_used(options)
    steps = _steps_per_epoch(options, lesson)
    log.info("%d epochs of %d steps of %d rows; ranks %s for each of %d decoder layers", options.epochs, steps, options.batch_size,
             " ".join(map(str, lesson.space)), lesson.count)  # fmt: skip
    longest = max(_tokens(lesson))
    rows = None if lesson.choices else MOST_ROWS.get(loaded.model.device.type)
    copies = 2 if options.adapters == "inside" and options.scale_lr else 1
    states = sequences.test.ids.numel()
    return tuning.resolve(options, loaded, plan, sequences, max(lesson.space), states, longest, copies, rows)  # type: ignore[no-any-return]


def _say_what_is_not_used(options: TuneOptions) -> None:
    """Warn of options that the way of the adapters has no use for."""
    unused = (
        ("scale_epochs", "norm_lr")
        if options.adapters == "inside"
        else ()
        if options.scale_passes
        else ("scale_lr", "norm_lr")
    )
    for name in unused:
        if getattr(options, name) not in (0, getattr(TuneOptions, name)):
            log.warning(
                "--%s has no effect with --adapters %s",
                name,
                options.adapters + ("" if options.adapters == "inside" else " and --scale_epochs 0"),
            )


def _steps_per_epoch(options: TuneOptions, lesson: TaskData) -> int:
    return len(lesson.texts) // options.batch_size


def _tokens(lesson: TaskData) -> list[int]:
    """Tokens that go through the model for each training row."""
    return [encoding.tokens_of(choices) for choices in lesson.choices] or [len(ids) for ids, _ in lesson.texts]


def described(lesson: TaskData) -> dict[str, Any]:
    """For the results."""
    by = "share" if len(lesson.held_out[0].pairs) > 1 else "log-likelihood"
    return {
        "name": lesson.task.name,
        "metric": lesson.task.metric,
        "space": list(lesson.space),
        "loss_on": lesson.loss_on,
        "scored_by": by,
    }


# Indices of rows [M] -> their mean loss; and how much of it they are, by which a microbatch counts in its batch.
_Loss = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], int]]


def _token_loss(loaded: loading.LoadedModel, lesson: TaskData) -> _Loss:
    """Of each token of the answers (--loss_on all: of the prompts too): -log p, or KL to the teacher."""
    model, head, everything = loaded.model, LMHead.of(loaded.model), lesson.loss_on == "all"
    teacher_head = LMHead.of(lesson.teacher) if lesson.teacher is not None else None
    learnt = torch.tensor([len(text.ids) - 1 if everything else text.answered for text in lesson.texts])

    def loss(indices: torch.Tensor) -> torch.Tensor:
        batch = encoding.pad_batch([lesson.texts[i] for i in indices.tolist()], everything)
        return (
            batch.losses(model, head).mean()
            if teacher_head is None
            else batch.divergence(model, head, lesson.teacher, teacher_head)
        )

    return loss, lambda indices: int(learnt[indices].sum())


def _choice_loss(loaded: loading.LoadedModel, lesson: TaskData) -> _Loss:
    """Of each question: -log of the right choice's share among the choices, or KL of the shares to the teacher's.

    What is shared out is log p(answer) times `Question.factors`, as in the score of held-out rows.
    """
    asked = lesson.task.train
    gold = torch.tensor([question.gold for question in asked])
    factors = torch.ones(len(asked), max(map(len, lesson.choices)))
    for row, question in zip(factors, asked, strict=True):
        row[: len(question.pairs)] = torch.tensor(question.factors(lesson.task.by_length))

    def scores(model: Any, indices: torch.Tensor) -> torch.Tensor:
        found = scoring.choice_log_probs(model, LMHead.of(model), [lesson.choices[i] for i in indices.tolist()])
        return found * factors[indices, : found.shape[1]].to(found.device)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        found = scores(loaded.model, indices)
        if lesson.teacher is None:
            return F.cross_entropy(found, gold[indices].to(found.device))
        with torch.no_grad():
            taught = scores(lesson.teacher, indices)
        return F.kl_div(found.log_softmax(-1).masked_fill(found.isinf(), 0), taught.softmax(-1), reduction="batchmean")

    return loss, len


def course(job: Job, lesson: TaskData, layers: Mapping[str, CachedWeightLinear]) -> TrainingObjective:
    """Cross-entropy, or KL to a teacher, of the choices or of the answers' tokens; validated by the share of the right choice at the middle
    configuration."""
    options, loaded = job.options, job.loaded
    steps = _steps_per_epoch(options, lesson)
    lengths = torch.tensor(_tokens(lesson))
    order = sampling.draw_order(len(lengths), steps * options.epochs * options.batch_size, options.seed)
    loss, loss_mask = (_choice_loss if lesson.choices else _token_loss)(loaded, lesson)

    def draw(step: int) -> torch.Tensor:
        """By length, so that a microbatch has little padding."""
        rows = order[step * options.batch_size : (step + 1) * options.batch_size]
        return rows[lengths[rows].argsort(stable=True)]

    def validate() -> dict[str, float]:
        ranks.activate_ranks(
            layers, ranks.median_configuration(lesson.space, lesson.count)
        )  # before the weights are quantized
        with for_measuring(options, layers):
            found = score(job, lesson, lesson.held_out)
        return {"loss": (1.0 if found.correct else 0.0) - found.score} | (
            {} if found.accuracy is None else {"accuracy": found.accuracy}
        )

    return TrainingObjective(
        steps_per_epoch=steps,
        draw=draw,
        loss=loss,
        tokens=loss_mask,
        validate=validate,
        criterion="loss",
        pace=lambda step, seconds: f"{options.batch_size / seconds:.1f} rows/s",
        describe=lambda measured: "held-out " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items()),
        passes=3
        if options.sampling == "sandwich" and len(lesson.space) > 1 and any(layer.rank for layer in layers.values())
        else 1,
        enter=lambda step, number: ranks.activate_ranks(layers, configuration_of(options, lesson, step, number)),
    )


def configuration_of(options: TuneOptions, lesson: TaskData, step: int, number: int) -> RankConfiguration:
    """What is trained at a step; with the sandwich rule the largest, the smallest and a random one after each other (`number` 0, 1, 2)."""
    if options.sampling == "sandwich" and number < 2:
        return ranks.uniform_configuration((max, min)[number](lesson.space), lesson.count)
    if options.sampling == "half" and step % 2 == 0:
        return ranks.uniform_configuration(max(lesson.space), lesson.count)
    return ranks.sample_configuration(lesson.space, lesson.count, options.seed, step)


@contextmanager
def plain_attention(job: Job, lesson: TaskData) -> Iterator[None]:
    """For training on rows and scoring them: attention by plain products, where that is faster."""
    model, texts = job.loaded.model, [text for row in (lesson.choices or [lesson.texts]) for text in row]
    before = model.config._attn_implementation
    short = model.device.type == "cpu" and max(len(text.ids) for text in texts) <= PLAIN_ATTENTION
    try:
        if short:
            model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


def score(job: Job, lesson: TaskData, rows: Sequence[Question]) -> QuestionScores:
    model = job.loaded.model
    return scoring.score_questions(
        model, LMHead.of(model), job.loaded.tokenizer, rows, lesson.task.by_length, job.options.seq_len
    )


def for_measuring(options: TuneOptions, layers: Mapping[str, CachedWeightLinear]) -> Any:
    """Weights made once, with --fast_eval or where training does so too."""
    return tuning.fixed_weights(replace(options, cache="step") if options.fast_eval else options, layers)


def own_score(job: Job, lesson: TaskData) -> Any:
    """A task of one's own is scored here, not by lm-eval."""
    scored, name = lesson.task.scored[: job.options.task_limit], Path(lesson.task.name).stem

    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        if not scored:
            return {}
        head = LMHead.of(model) if model.get_output_embeddings() is not None else None  # exported models have none
        found = scoring.score_questions(model, head, tokenizer, scored, lesson.task.by_length, job.options.seq_len)
        measured = {f"task:{name} log_likelihood": found.log_likelihood, f"documents:{name}": len(scored)}
        return measured if found.accuracy is None else {f"task:{name} acc": found.accuracy} | measured

    return score
