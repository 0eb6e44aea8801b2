"""The flow of `nybble tune`: a model learns a downstream task, with adapters of elastic rank; the best ranks are chosen, and it gets 4 bits.

load -> rows of the task -> insert -> train, a random configuration a step -> choose on held-out rows -> merge -> compress
     -> train scales and norms in 4 bits -> absorb -> save -> export -> measure

That is `--adapters before`: the adapters learn on 16-bit weights. With `--adapters inside` they learn inside the rounding of a model that is compressed first,
as in the reference:

load -> rows of the task -> compress -> insert -> train, a random configuration a step -> choose on held-out rows -> absorb -> save -> export -> measure

What is chosen (epoch, configuration) is chosen on held-out rows; the test rows are scored once. `--select_on test` is the exception, and is called so.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nybble import absorb, checkpoint, data, evaluate, insert, models, questions, ranks, report, stages, starts, tuning
from nybble.checkpoint import Run
from nybble.config import TuneOptions
from nybble.console import bar, console
from nybble.data import Rows
from nybble.errors import DataError, ModelError, OptionError, RunError
from nybble.layers import QuantizedLinear, StepLinear
from nybble.losses import Head
from nybble.quantized import QuantizedWeight
from nybble.questions import Question, Score, Task, Text
from nybble.ranks import Configuration
from nybble.stages import Job
from nybble.text import NO_ROWS, Sequences
from nybble.tuning import Course

log = logging.getLogger("nybble")

# Rows in a microbatch, where it costs little to have few: padding doubles the tokens of 16 rows, but adds a fifth to those of 4 of like length (docs/log.md).
MOST_ROWS = {"cpu": 4}


# Up to so many tokens in a text, the fused attention of torch on a CPU takes longer than its plain products: a step on openbookqa an eighth (docs/log.md).
PLAIN_ATTENTION = 160

# Of the softmax over choices that are scored by length. At 1 the first steps follow the few questions that are most wrong; from 10 on, the model is driven
# to margins that cost it its language (docs/log.md).
TEMPERATURE = 4.0

# The training in 4 bits that comes after the adapters' own: name of its checkpoints and results.
SCALES = "scales"


@dataclass(frozen=True)
class Lesson:
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
    texts: Sequence[Text]
    choices: Sequence[Sequence[Text]]
    held_out: Sequence[Question]
    fresh: Sequence[Question]
    space: tuple[int, ...]
    count: int
    teacher: Any = None


@dataclass(frozen=True)
class Trained:
    """A trained run, opened again: its layers hold the adapters of the best epoch.

    Attributes:
        compressed: what the run started from, 8-bit weights included; None where the adapters learnt on 16-bit weights.
        reference: the 16-bit model's logits on the test sequences.
    """

    job: Job
    lesson: Lesson
    layers: dict[str, Any]  # of StepLinear
    compressed: dict[str, QuantizedWeight] | None
    reference: evaluate.Logits

    def score(self, configuration: Configuration, rows: Sequence[Question]) -> Score:
        """Of one configuration on held-out rows."""
        ranks.activate(self.layers, configuration)
        with _for_measuring(self.job.options, self.layers):
            return _score(self.job, self.lesson, rows)


def tune(options: TuneOptions, known: Mapping[str, dict[str, Any]] | None = None) -> Path:
    """Run the whole flow, or with --eval_only its last step; returns the run folder. Raises NybbleError for whatever a person can repair.

    Args:
        known: rows of the results that another run has measured on the same model and task.
    """
    options.check()
    custom, path = options.custom_rank_config, options.folder
    if options.eval_only:
        _check_trained(path)
    if options.resume and checkpoint.is_run(path):
        saved = tuple(checkpoint.read_options(path).get("custom_rank_config", ()))
        if options.eval_only:
            options = replace(options, custom_rank_config=saved)  # a trial leaves the run's own options alone
            custom = () if custom == saved else custom  # they may have been filled in from the run, in which `nybble search` has put others in place
        elif custom != saved and (path / "quantized").exists():
            raise RunError(f"{path} is finished, with other ranks; --eval_only tests --custom_rank_config, another --output_dir ships it")
    with opened(options, custom) as (job, lesson):
        _test_one(_trained(job, lesson), custom) if options.eval_only else _run(job, lesson, known or {})
        return job.run.path


def settled(options: TuneOptions) -> TuneOptions:
    """Ranks in order, each once; the task among those that lm-eval measures."""
    options = replace(options, lora_rank_space=ranks.space_of(options.lora_rank_space))
    return options if options.task.endswith(".jsonl") else replace(options, tasks=tuple(dict.fromkeys((options.task, *options.tasks))))


@contextmanager
def reopened(options: TuneOptions) -> Iterator[Trained]:
    """A run that was trained, with the options that it was trained with."""
    _check_trained(options.folder)
    with opened(options, ()) as (job, lesson):
        yield _trained(job, lesson)


def _check_trained(path: Path) -> None:
    results = checkpoint.read_results(path)
    if results.get("kind") != "tune" or not results.get("training") or "lora16" in results["models"]:
        raise RunError(f"{path} must be a run of nybble tune that was trained; it is none, or its training did not end; train first (--resume)")


@contextmanager
def opened(options: TuneOptions, custom: Configuration) -> Iterator[tuple[Job, Lesson]]:
    """The run's folder, model and rows; checks everything first. `custom`: a configuration to check too, or ()."""
    options = settled(options)
    if options.adapters == "before" and starts.start_run(options.start):
        raise OptionError(
            f"--start {options.start} must be a method where adapters learn before the model has 4 bits; it is a folder with one; use --adapters inside"
        )
    lessons: list[Lesson] = []

    def cut(options: TuneOptions, loaded: models.LoadedModel) -> Sequences:
        lessons.append(_prepare(options, loaded, options.lora_rank_space, custom))
        return _sequences(options, loaded, lessons[0])

    def resolve(options: TuneOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences) -> TuneOptions:
        return _resolve(options, loaded, plan, sequences, lessons[0])

    with stages.opened(options, options.start, "--start", cut, resolve) as job:
        yield replace(job, score=_own_score(job, lessons[0])), lessons[0]


# --- before training ----------------------------------------------------------------------------------------------------------


def _prepare(options: TuneOptions, loaded: models.LoadedModel, space: tuple[int, ...], custom: Configuration) -> Lesson:
    task = questions.load_task(options.task, options.data_dir, options.seed, options.train_rows)
    count = len(set(ranks.decoder_layers(list(models.plan(loaded.model).int4)).values()))
    if custom:
        ranks.check_configuration(custom, space, count)
    loss_on = _loss_on(options, task)
    choices = questions.encode_choices(loaded.tokenizer, task.train, options.seq_len) if loss_on == "choices" else []
    texts = _right(task.train, choices) if choices else questions.encode_gold(loaded.tokenizer, task.train, options.seq_len)
    if len(texts) < options.batch_size:
        raise OptionError(f"--batch_size must be at most the number of training rows; got {options.batch_size} and {len(texts)} rows")
    order = data.order(len(task.held_out), len(task.held_out), options.seed)
    held_out = [task.held_out[i] for i in order.tolist()]
    count_held = options.select_rows or len(held_out)
    held_out, fresh = held_out[:count_held], held_out[count_held:]
    log.info("%s: %d rows to train on (loss on %s), %d held out to choose by, reported as %s", task.name, len(texts), loss_on, len(held_out), task.metric)
    return Lesson(task, loss_on, texts, choices, held_out, fresh, space, count, _teacher(options, loaded))


def _right(asked: Sequence[Question], encoded: Sequence[Sequence[Text]]) -> list[Text]:
    return [texts[question.gold] for question, texts in zip(asked, encoded, strict=True)]


def _loss_on(options: TuneOptions, task: Task) -> str:
    """--loss_on with auto resolved; OptionError for choices where there are none."""
    alternatives = all(len(question.pairs) > 1 for question in task.train)
    if options.loss_on == "choices" and not alternatives:
        raise OptionError(f"--loss_on choices needs a task with choices; {task.name} has answers in the model's own words; use --loss_on answer")
    return options.loss_on if options.loss_on != "auto" else "choices" if alternatives else "answer"


def _teacher(options: TuneOptions, student: models.LoadedModel) -> Any:
    """The model of --teacher; None without, or where training is over."""
    if not options.teacher or ((options.folder / "quantized").exists() and not options.overwrite):
        return None
    try:
        model = models.load(options.teacher, student.model.dtype, student.model.device, options.trust_remote_code).model
    except ModelError as error:
        raise ModelError(str(error).replace("--pretrained", "--teacher")) from error
    theirs, ours = (loaded.get_output_embeddings().weight.shape[0] for loaded in (model, student.model))
    if theirs != ours:
        raise ModelError(f"--teacher must have the vocabulary of --pretrained, {ours} tokens; {options.teacher} has {theirs}; tune --pretrained itself for it")
    return model


def _sequences(options: TuneOptions, loaded: models.LoadedModel, lesson: Lesson) -> Sequences:
    """Right answers as running text, for calibration and for perplexity and KL beside the task's own measure."""
    tokenizer, task = loaded.tokenizer, lesson.task
    end = data.end_tokens(tokenizer)

    def joined(texts: Sequence[Text]) -> torch.Tensor:
        return torch.tensor([token for ids, _ in texts for token in (*ids, *(end if ids[-1:] != end else []))], dtype=torch.int64)

    questions.encode_choices(tokenizer, task.scored, options.seq_len)  # raises now what would be raised at the end
    held_out = joined(_right(task.held_out, questions.encode_choices(tokenizer, task.held_out, options.seq_len)))
    train = joined(lesson.texts)
    length = text_length(options, len(train), len(held_out))
    calibration, test = (data.cut(tokens, length, data.begin_tokens(tokenizer)) for tokens in (train, held_out))
    calibration = calibration[data.order(len(calibration), min(len(calibration), options.calib_samples), options.seed)]
    rows = repr((lesson.texts, task.train, lesson.held_out, lesson.fresh, task.scored))
    others = {"rows of the task": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    if lesson.teacher is not None:
        others["teacher"] = models.identity(lesson.teacher)
    measured = Rows.of(test[: options.test_samples or None])
    return Sequences(NO_ROWS, calibration, NO_ROWS, measured, f"held-out rows of {task.name} with their right answers", others)


def text_length(options: TuneOptions, train: int, held_out: int) -> int:
    """Tokens in a sequence of running text: 256, or less where there are too few to calibrate with 8 sequences and measure on one.

    Raises:
        DataError: fewer than 8 sequences of 16 tokens.
    """
    length = 256
    while length > 16 and (length > options.seq_len or train < 9 * length or held_out < 2 * length):
        length //= 2
    if train < 9 * length or held_out < length + 1:
        raise DataError(f"the rows of --task must have at least {9 * length} tokens to train on and {length + 1} held out; got {train} and {held_out}")
    return length


def _resolve(options: TuneOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences, lesson: Lesson) -> TuneOptions:
    steps = _steps_per_epoch(options, lesson)
    log.info("%d epochs of %d steps of %d rows; ranks %s for each of %d decoder layers", options.epochs, steps, options.batch_size,
             " ".join(map(str, lesson.space)), lesson.count)  # fmt: skip
    longest = max(_tokens(lesson))
    rows = None if lesson.choices else MOST_ROWS.get(loaded.model.device.type)
    copies = 2 if options.adapters == "inside" and options.scale_lr else 1
    states = sequences.test.ids.numel()
    return tuning.resolve(options, loaded, plan, sequences, max(lesson.space), states, longest, copies, rows)  # type: ignore[no-any-return]


def _steps_per_epoch(options: TuneOptions, lesson: Lesson) -> int:
    return len(lesson.texts) // options.batch_size


def _tokens(lesson: Lesson) -> list[int]:
    """Tokens that go through the model for each training row."""
    return [questions.tokens_of(choices) for choices in lesson.choices] or [len(ids) for ids, _ in lesson.texts]


def _own_score(job: Job, lesson: Lesson) -> Any:
    """A task of one's own is scored here, not by lm-eval."""
    scored, name = lesson.task.scored[: job.options.task_limit], Path(lesson.task.name).stem

    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        if not scored:
            return {}
        head = Head.of(model) if model.get_output_embeddings() is not None else None  # exported models have none
        found = questions.score(model, head, tokenizer, scored, lesson.task.by_length, job.options.seq_len)
        measured = {f"task:{name} log_likelihood": found.log_likelihood, f"documents:{name}": len(scored)}
        return measured if found.accuracy is None else {f"task:{name} acc": found.accuracy} | measured

    return score


# --- the flow -----------------------------------------------------------------------------------------------------------------


def _run(job: Job, lesson: Lesson, known: Mapping[str, dict[str, Any]]) -> None:
    run, options = job.run, job.options
    run.results["models"] = {**known, **run.results["models"]}
    run.results["task"] = described(lesson)
    states = stages.teach(job, {"test": job.sequences.test}, 1)
    reference = evaluate.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference)
    if not job.quantized.exists():
        compressed, layers = _inserted(job, lesson)
        if compressed is not None:
            _measure_compressed(job, reference, compressed, layers)
        tuning.train_layers(run, options, layers, course(job, lesson, layers))
        chosen = tuple(run.results.get("applied", ())) or options.custom_rank_config or _choose(job, lesson, layers)
        _save(Trained(job, lesson, layers, compressed, reference), chosen)
    stages.measure_saved(job, reference, "tuned")
    stages.finish(run, _judge(job, lesson))


def _inserted(job: Job, lesson: Lesson) -> tuple[dict[str, QuantizedWeight] | None, dict[str, Any]]:
    """All 4-bit weights as they start, or None with --adapters before; and the layers with adapters, in place."""
    rank = max(lesson.space)
    return (None, dict(tuning.insert_adapters(job, rank))) if job.options.adapters == "before" else tuning.insert_layers(job, rank)


def _measure_compressed(
    job: Job, reference: evaluate.Logits, compressed: Mapping[str, QuantizedWeight], layers: Mapping[str, QuantizedLinear], known: dict[str, Any] | None = None
) -> None:
    model = job.loaded.model
    with _for_measuring(job.options, layers):
        stages.measure(job, reference, "compressed", model, job.loaded.tokenizer, stages.size_of(model, compressed), known)


def described(lesson: Lesson) -> dict[str, Any]:
    """For the results."""
    return {"name": lesson.task.name, "metric": lesson.task.metric, "space": list(lesson.space), "loss_on": lesson.loss_on}


def _configuration(options: TuneOptions, lesson: Lesson, step: int, number: int) -> Configuration:
    """What is trained at a step; with the sandwich rule the largest, the smallest and a random one after each other."""
    if options.sampling == "sandwich" and number < 2:
        return ranks.uniform((max, min)[number](lesson.space), lesson.count)
    return ranks.sample(lesson.space, lesson.count, options.seed, step)


# Indices of rows [M] -> their mean loss; and how much of it they are, by which a microbatch counts in its batch.
_Loss = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], int]]


def _token_loss(loaded: models.LoadedModel, lesson: Lesson) -> _Loss:
    """Of each token of the answers (--loss_on all: of the prompts too): -log p, or KL to the teacher."""
    model, head, everything = loaded.model, Head.of(loaded.model), lesson.loss_on == "all"
    teacher_head = Head.of(lesson.teacher) if lesson.teacher is not None else None
    learnt = torch.tensor([len(text.ids) - 1 if everything else text.answered for text in lesson.texts])

    def loss(indices: torch.Tensor) -> torch.Tensor:
        batch = questions.pad([lesson.texts[i] for i in indices.tolist()], everything)
        return batch.losses(model, head).mean() if teacher_head is None else batch.divergence(model, head, lesson.teacher, teacher_head)

    return loss, lambda indices: int(learnt[indices].sum())


def _choice_loss(loaded: models.LoadedModel, lesson: Lesson) -> _Loss:
    """Of each question: -log of the right choice's share among the choices, or KL of the shares to the teacher's.

    What is shared out is log p(answer), as it is scored; where the metric counts it by length, times the mean length of its question's choices / its own, at
    TEMPERATURE. (By character, as it is scored, the shares are nearly flat: 1.41 nats before training on openbookqa, where guessing gives 1.39.)
    """
    asked = lesson.task.train
    gold = torch.tensor([question.gold for question in asked])
    factors = torch.ones(len(asked), max(map(len, lesson.choices)))
    if lesson.task.by_length:
        for row, question in zip(factors, asked, strict=True):
            row[: len(question.lengths)] = sum(question.lengths) / len(question.lengths) / torch.tensor(question.lengths) / TEMPERATURE

    def scores(model: Any, indices: torch.Tensor) -> torch.Tensor:
        found = questions.choice_log_probs(model, Head.of(model), [lesson.choices[i] for i in indices.tolist()])
        return found * factors[indices, : found.shape[1]].to(found.device)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        found = scores(loaded.model, indices)
        if lesson.teacher is None:
            return F.cross_entropy(found, gold[indices].to(found.device))
        with torch.no_grad():
            taught = scores(lesson.teacher, indices)
        return F.kl_div(found.log_softmax(-1).masked_fill(found.isinf(), 0), taught.softmax(-1), reduction="batchmean")

    return loss, len


def course(job: Job, lesson: Lesson, layers: Mapping[str, StepLinear]) -> Course:
    """Cross-entropy, or KL to a teacher, of the choices or of the answers' tokens; validated by the likelihood of the right choice at the middle
    configuration."""
    options, loaded = job.options, job.loaded
    if loaded.model.device.type == "cpu" and max(len(text.ids) for texts in (lesson.choices or [lesson.texts]) for text in texts) <= PLAIN_ATTENTION:
        loaded.model.set_attn_implementation("eager")
    steps = _steps_per_epoch(options, lesson)
    lengths = torch.tensor(_tokens(lesson))
    order = data.order(len(lengths), steps * options.epochs * options.batch_size, options.seed)
    loss, counted = (_choice_loss if lesson.choices else _token_loss)(loaded, lesson)

    def draw(step: int) -> torch.Tensor:
        """By length, so that a microbatch has little padding."""
        rows = order[step * options.batch_size : (step + 1) * options.batch_size]
        return rows[lengths[rows].argsort(stable=True)]

    def validate() -> dict[str, float]:
        ranks.activate(layers, ranks.middle(lesson.space, lesson.count))  # before the weights are quantized
        with _for_measuring(options, layers):
            found = _score(job, lesson, lesson.held_out)
        return {"loss": -found.log_likelihood} | ({} if found.accuracy is None else {"accuracy": found.accuracy})

    return Course(
        steps_per_epoch=steps,
        draw=draw,
        loss=loss,
        tokens=counted,
        validate=validate,
        criterion="loss",
        pace=lambda step, seconds: f"{options.batch_size / seconds:.1f} rows/s",
        describe=lambda measured: "held-out " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items()),
        passes=3 if options.sampling == "sandwich" and len(lesson.space) > 1 else 1,
        enter=lambda step, number: ranks.activate(layers, _configuration(options, lesson, step, number)),
    )


def _score(job: Job, lesson: Lesson, rows: Sequence[Question]) -> Score:
    model = job.loaded.model
    return questions.score(model, Head.of(model), job.loaded.tokenizer, rows, lesson.task.by_length, job.options.seq_len)


# --- choosing -----------------------------------------------------------------------------------------------------------------


def candidates(job: Job, lesson: Lesson) -> dict[Configuration, str]:
    """Configuration -> why it is one: the middle of the space, the largest ranks (absorbed, they cost nothing), what was trained most often, the least losses
    of training."""
    options, training = job.options, job.run.results["training"]
    if len(lesson.space) == 1:
        return {ranks.uniform(lesson.space[0], lesson.count): "the only one"}
    if job.run.results["best_step"] == 0:  # the start was kept: its adapters add nothing at any rank
        return {ranks.middle(lesson.space, lesson.count): "median"}
    seen = [ranks.sample(lesson.space, lesson.count, options.seed, int(row["step"]) - 1) for row in training]
    uniform = [ranks.uniform(extreme(lesson.space), lesson.count) for extreme in (max, min)] if options.sampling == "sandwich" else []
    proposed = [(ranks.middle(lesson.space, lesson.count), "median"), (ranks.uniform(max(lesson.space), lesson.count), "largest")]
    proposed.append((ranks.most_frequent([*seen, *(uniform * len(seen))]), "most frequent"))
    losses = [row["last_pass"] if uniform else row["loss"] for row in training]  # of the configuration in `seen`: it comes after the largest and the smallest
    proposed += [(ranks_, f"least loss {i}") for i, ranks_ in enumerate(ranks.least_loss(seen, losses, options.num_min_loss_configs), 1)]
    found: dict[Configuration, str] = {}
    for configuration, why in proposed:
        found[configuration] = f"{found[configuration]}, {why}" if configuration in found else why
    return found


def _choose(job: Job, lesson: Lesson, layers: Mapping[str, StepLinear]) -> Configuration:
    """The candidate with the best score on held-out rows; what each scored goes into the results."""
    run, options, found = job.run, job.options, candidates(job, lesson)
    on_test = options.select_on == "test"
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    with run.stage("choose"), bar("choose", len(found), "best") as advance:
        for configuration, why in found.items():
            ranks.activate(layers, configuration)
            with _for_measuring(options, layers):
                score = _score(job, lesson, lesson.held_out)
                row = {"why": why, "configuration": list(configuration), "log_likelihood": score.log_likelihood, "accuracy": score.accuracy}
                if on_test:
                    row["test"] = _test_metric(job, lesson)
            rows.append(row)
            scores.append(score)
            advance(1, best=f"{max(row['log_likelihood'] for row in rows):.4f}")
    best = max(range(len(rows)), key=lambda i: rows[i]["test"] if on_test else rows[i]["log_likelihood"])
    for row, score in zip(rows, scores, strict=True):
        row["behind"], row["error"] = scores[best].better_by(score)
    run.results["candidates"], run.results["selected_on"], run.results["chosen"] = rows, options.select_on, rows[best]["configuration"]
    log.info("of %d candidates the best on %s rows: %s, %s", len(rows), "test" if on_test else "held-out", rows[best]["why"],
             " ".join(map(str, rows[best]["configuration"])))  # fmt: skip
    return tuple(rows[best]["configuration"])


def _for_measuring(options: TuneOptions, layers: Mapping[str, StepLinear]) -> Any:
    """Weights quantized once, with --fast_eval or where training does so too."""
    return tuning.fixed_weights(replace(options, cache="step") if options.fast_eval else options, layers)


def _test_metric(job: Job, lesson: Lesson) -> float:
    """The task's own figure on its test rows."""
    options, model, tokenizer = job.options, job.loaded.model, job.loaded.tokenizer
    if lesson.task.scored:
        return next(iter(job.score(model, tokenizer).values()))
    measured = evaluate.run_tasks(model, tokenizer, [options.task], options.eval_batch_size, options.task_limit, options.data_dir)
    return float(measured[options.task][lesson.task.metric])


def _trained(job: Job, lesson: Lesson) -> Trained:
    """Insert again (compressed from the blocks that the run kept), and load the adapters."""
    states = stages.teach(job, {"test": job.sequences.test}, 1)  # of the 16-bit model, which is gone afterwards
    compressed, layers = _inserted(job, lesson)
    tensors, _ = checkpoint.load_tensors(job.run.path / tuning.checkpoints()[1])
    with torch.no_grad():
        for name, tensor in tensors.items():
            layer, leaf = name.rsplit(".", 1)
            getattr(layers[layer], leaf).copy_(tensor)
    return Trained(job, lesson, layers, compressed, evaluate.logits_from_states(job.head, states["test"]))


def _test_one(trained: Trained, custom: Configuration) -> None:
    """--eval_only: measure one configuration of a trained run on the task's test rows."""
    job, lesson, results = trained.job, trained.lesson, trained.job.run.results
    in_place = tuple(results.get("configuration", ()))
    chosen = custom or in_place or ranks.middle(lesson.space, lesson.count)
    ranks.activate(trained.layers, chosen)
    with job.run.stage("test"):
        if trained.compressed is not None:
            with _for_measuring(job.options, trained.layers):
                value = _test_metric(job, lesson)
        elif chosen == in_place and job.quantized.exists():
            loaded = job.loaded
            model, tokenizer, _ = checkpoint.load_quantized(job.quantized, loaded.model.dtype, job.options.trust_remote_code)
            value = _test_metric(replace(job, loaded=replace(loaded, model=model.to(loaded.model.device), tokenizer=tokenizer)), lesson)
        else:
            with _aside(job) as trial:
                _in_4_bits(replace(trained, job=trial))
                value = _test_metric(trial, lesson)
    fast = trained.compressed is None or job.options.fast_eval or job.options.cache == "step"
    tested = {"configuration": list(chosen), lesson.task.metric: value, "fast_eval": fast}
    results.setdefault("tested", []).append(tested)
    job.run.save_results()
    if report.finished(results):
        checkpoint.write_text(job.run.path / "report.md", report.markdown(results))
    console.print(f"{lesson.task.name} at ranks {' '.join(map(str, chosen))}: {lesson.task.metric} {value:.4f}", highlight=False)


@contextmanager
def _aside(job: Job) -> Iterator[Job]:
    """The same job in a folder of its own inside the run's, which is deleted afterwards: what is tried there changes nothing in the run."""
    folder = job.run.path / "trial"
    checkpoint.remove_folder(folder)
    folder.mkdir()
    try:
        yield replace(job, run=Run(folder, None, copy.deepcopy(job.run.results)))
    finally:
        checkpoint.remove_folder(folder)


def put_in_place(trained: Trained, chosen: Configuration) -> None:
    """Absorb another configuration than before; save, export and measure it. Killed in between, `nybble tune --resume` ends with the same."""
    job, results = trained.job, trained.job.run.results
    kinds = stages.kinds_of(job)
    for row in ("tuned", *kinds, *(("learnt", "compressed") if trained.compressed is None else ())):
        results["models"].pop(row, None)
    results["applied"] = list(chosen)
    results.pop(SCALES, None)
    job.run.save_results()
    for name in (*kinds, job.quantized.name):
        checkpoint.remove_folder(job.run.path / name)
    for name in tuning.checkpoints(SCALES):
        (job.run.path / name).unlink(missing_ok=True)
    _save(trained, chosen)
    stages.measure_saved(job, trained.reference, "tuned")
    stages.finish(job.run, _judge(job, trained.lesson))


def _save(trained: Trained, chosen: Configuration) -> None:
    """The layers, with the chosen ranks active, become the run's 4-bit model."""
    job, loaded = trained.job, trained.job.loaded
    ranks.activate(trained.layers, chosen)
    job.run.results["configuration"] = list(chosen)
    quantized = _in_4_bits(trained)
    checkpoint.save_quantized(job.quantized, loaded.model, loaded.tokenizer, quantized)
    if trained.compressed is None:
        checkpoint.remove_folder(job.run.path / "compress")  # of weights with these ranks; others are compressed anew


def _in_4_bits(trained: Trained) -> dict[str, QuantizedWeight]:
    """The layers, with the ranks that are active, become plain ones in place. Returns: all quantized weights."""
    job, results = trained.job, trained.job.run.results
    before, layers = _compress_learnt(trained) if trained.compressed is None else (trained.compressed, trained.layers)
    with job.run.stage("absorb"):
        insert.settle_norms(job.loaded.model)
        tuned = absorb.absorb(job.loaded.model, layers)
        if trained.compressed is not None:
            results["codes_changed"], results["layer_codes_changed"] = absorb.codes_changed(before, tuned)
    return before | tuned


def _compress_learnt(trained: Trained) -> tuple[dict[str, QuantizedWeight], dict[str, QuantizedLinear]]:
    """Merge adapters into 16-bit weights, compress these, and train scales and norms on the task, with codes that stay. Returns: all quantized weights as
    compressed; and the trained layers."""
    job, model = trained.job, trained.job.loaded.model
    absorb.merge(model, trained.layers)
    stages.measure(job, trained.reference, "learnt", model, job.loaded.tokenizer, 2 * sum(p.numel() for p in model.parameters()))
    compressed, layers = tuning.insert_layers(job, 0)
    _measure_compressed(job, trained.reference, compressed, layers, {})  # what it scores, held-out rows say
    options = replace(job.options, epochs=job.options.scale_epochs)
    if options.epochs and (options.scale_lr or options.norm_lr):
        norms = insert.train_norms(model) if options.norm_lr else {}
        tuning.train_layers(job.run, options, layers, course(replace(job, options=options), trained.lesson, layers), norms, SCALES)
    return compressed, layers


def _judge(job: Job, lesson: Lesson) -> list[str]:
    """Warnings in plain words."""
    results, warnings = job.run.results, []
    if results.get("best_step") == 0:
        warnings.append("no epoch of tuning was better on held-out rows than the start, so the start was kept; use more rows or another --lr")
    if results.get("selected_on") == "test" and not report.replaced(results):
        warnings.append("the configuration was chosen on the test rows, as published results do; its figure on them is no longer that of unseen rows")
    column, models = report.task_column(results), results["models"]
    for before, after, what in (("16bit", "learnt", "the adapters"), ("compressed", "tuned", "tuning in 4 bits")):
        values = [models.get(row, {}).get(column) for row in (before, after)]
        if None not in values and values[1] < values[0]:
            warnings.append(f"{what} made {report.heading(column)} on the test rows worse: {values[0]:.4f} before, {values[1]:.4f} after")
    return warnings
