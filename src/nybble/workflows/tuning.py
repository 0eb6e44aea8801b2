"""What distillation and task tuning share: resolve what is automatic, train adapters and scales, validate, keep the best, survive an interruption."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nybble import files
from nybble.console import bar
from nybble.errors import TrainingError
from nybble.models import loading, selection
from nybble.qat import insert
from nybble.qat.layers import CachedWeightLinear, LoRALinear, QuantizedLinear
from nybble.quant.weight import QuantizedWeight
from nybble.run import results, resume
from nybble.run.folder import Run
from nybble.training import losses
from nybble.training import memory as training_memory
from nybble.training.trainer import Trainer, TrainerConfig, TrainingProgress
from nybble.workflows import stages
from nybble.workflows.stages import Job
from nybble.workflows.text import Sequences

log = logging.getLogger("nybble")


# More tokens than this in a microbatch gain little and cost memory: the matrix products are already large (docs/log.md; cuda: not measured).
MOST_TOKENS = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class TrainingObjective:
    """What is trained on, and how it is judged.

    Attributes:
        steps_per_epoch: optimizer steps between validations.
        draw, loss, tokens: see Trainer.
        passes, enter: see Trainer.
        validate: measures on held-out text, the weights being those of that moment; what must fall is under `criterion`.
        describe: what was measured -> words.
        pace: a step and its seconds -> words.
    """

    steps_per_epoch: int
    draw: Callable[[int], Tensor]
    loss: Callable[[Tensor], Tensor]
    tokens: Callable[[Tensor], int]
    validate: Callable[[], dict[str, float]]
    criterion: str
    describe: Callable[[dict[str, float]], str]
    pace: Callable[[int, float], str]
    passes: int = 1
    enter: Callable[[int, int], None] = lambda step, number: None


def resolve(
    options: Any,
    loaded: loading.LoadedModel,
    plan: selection.LayerSelection,
    sequences: Sequences,
    rank: int,
    states: int,
    length: int,
    copies: int,
    rows: int | None = None,
) -> Any:
    """Fill in cache and microbatch, print the estimate, refuse a disk that is too small, and warn of memory.

    Args:
        rank: of the adapters.
        states: tokens whose teacher states are kept on the disk.
        length: tokens in the longest sequence that is trained on.
        copies: of the weights that the step cache keeps.
        rows: at most so many in an automatic microbatch; None = what memory allows.

    Returns: the options.
    """
    path, trained = options.folder, False
    if options.resume and results.is_run(path):
        trained = (path / "quantized").exists() and not getattr(options, "eval_only", False)
        # What was chosen automatically when the run started stays: other microbatches would give other bits.
        saved = resume.read_options(path)
        cache = saved["cache"] if options.cache == "auto" else options.cache
        options = replace(options, cache=cache, microbatch=options.microbatch or saved["microbatch"])
    device, chunk = loaded.model.device, losses.chunk_size_on(loaded.model.device)
    shapes = training_memory.ModelShapes.of(loaded.model, plan.int4, loaded.model.dtype.itemsize)
    sizes = (shapes, rank, options.group_size)
    available = stages.free_memory(loaded)
    logits = stages.measured_logits(options, loaded, sequences)
    cache = options.cache
    if cache == "auto":
        cache = (
            "step"
            if training_memory.training_memory(*sizes, length, chunk, copies, logits) < 0.7 * available
            else "recompute"
        )
    copies = copies if cache == "step" else 0
    most = min(options.batch_size, rows or options.batch_size)
    microbatch = options.microbatch or training_memory.pick_microbatch(
        *sizes, length, most, chunk, copies, available, MOST_TOKENS.get(device.type, 1024)
    )
    calibration = stages.check_calibration(options, options.start, sequences)
    memory = training_memory.training_memory(*sizes, microbatch * length, chunk, copies, logits)
    memory = max(memory, stages.estimate_compression(options, loaded, shapes, calibration))
    disk = training_memory.training_disk(*sizes, states) + training_memory.blocks_disk(
        shapes, sequences.calibration.numel()
    )
    if not trained:
        files.check_free_disk(path, disk)
        log.info(
            "estimate: %.1f GB of memory (%s cache; %.1f GB free), %.1f GB of disk",
            memory / 1e9,
            cache,
            available / 1e9,
            disk / 1e9,
        )
        stages.check_memory(
            memory, available, "a smaller rank, --microbatch 1, --cache recompute or a shorter --seq_len needs less"
        )
    return replace(options, cache=cache, microbatch=microbatch, output_dir=str(path))


def insert_layers(job: Job, rank: int) -> tuple[dict[str, QuantizedWeight], dict[str, QuantizedLinear]]:
    """Compress, and put 4-bit layers that are trained in place of the model's. Returns: all quantized weights as they start, on the CPU; and the layers."""
    starts, compressed = stages.compress_model(job, job.options.start)
    model, seed = job.loaded.model, job.options.seed
    codes = {name: compressed[name] for name in starts}
    layers: dict[str, QuantizedLinear] = {
        **(insert.insert(model, starts, job.scheme, rank, seed) if rank else insert.insert_codes(model, codes, seed))
    }
    _say_rank(job, layers, rank)
    return compressed, layers


def insert_adapters(job: Job, rank: int) -> dict[str, LoRALinear]:
    """Put layers with adapters on their 16-bit weights in place of those that will get 4 bits."""
    layers = insert.insert_adapters(job.loaded.model, job.plan.int4, rank, job.options.seed)
    _say_rank(job, layers, rank)
    return layers


def _say_rank(job: Job, layers: Mapping[str, CachedWeightLinear], rank: int) -> None:
    job.run.results.setdefault("lora_rank", rank)
    clamped = sum(layer.rank < rank for layer in layers.values())
    if clamped:
        log.info("rank %d clamped in %d layers that are narrower", rank, clamped)


def train_layers(
    run: Run,
    options: Any,
    layers: Mapping[str, CachedWeightLinear],
    course: TrainingObjective,
    norms: Mapping[str, torch.nn.Parameter] | None = None,
    part: str = "",
) -> None:
    """Train adapters, scales and `norms` (insert.train_norms); afterwards the model holds what was best on held-out text. `part`: see `train`."""
    step = partial(insert.weight_cache, list(layers.values())) if options.cache == "step" else nullcontext
    groups = _groups(options, layers)
    if norms:
        groups.append({"params": dict(norms), "lr": options.norm_lr, "weight_decay": 0.0})
    train(run, options, groups, course, step, part)


def train(
    run: Run,
    options: Any,
    groups: list[dict[str, Any]],
    course: TrainingObjective,
    during_step: Callable[[], AbstractContextManager[None]] = nullcontext,
    part: str = "",
) -> None:
    """Train parameters; afterwards they are those that were best on held-out text.

    Args:
        groups: see Trainer.
        during_step: what to hold around all microbatches of a step.
        part: name of this training in a run that has several: of its checkpoints and of what it leaves in the results.
    """
    steps = course.steps_per_epoch * options.epochs
    trainer = Trainer(
        groups,
        TrainerConfig(steps, options.microbatch, options.warmup, options.max_grad_norm, options.schedule),
        course.loss,
        course.draw,
        during_step,
        course.tokens,
        course.passes,
        course.enter,
    )
    last, best = (run.path / name for name in checkpoints(part))
    if last.exists():
        tensors, note = files.load_tensors(last)
        trainer.load_state(tensors)
        trainer.progress = TrainingProgress(**note)
        log.info("resumed at step %d of %d", trainer.progress.step, steps)
    progress = trainer.progress

    def validate() -> None:
        with trainer.averaged():
            measured = course.validate()
            progress.history.append({"step": progress.step} | measured)
            log.info("step %d of %d: %s", progress.step, steps, course.describe(measured))
            if not (progress.step or math.isfinite(measured[course.criterion])):
                remedy = "another --start" if options.dtype == "float32" else "--dtype float32"
                raise TrainingError(
                    f"the {course.criterion} on held-out text must be a finite number; before this training it is none; use {remedy}"
                )
            if measured[course.criterion] < progress.best_loss:
                progress.best_loss, progress.best_step = measured[course.criterion], progress.step
                files.save_tensors(best, dict(trainer.parameters), vars(progress))

    def stale() -> bool:
        return bool(
            0 < options.patience <= sum(validation["step"] > progress.best_step for validation in progress.history)
        )

    stage = " ".join(filter(None, ("train", part)))
    with run.stage(stage), _curves(run, options, part) as curves, bar(stage, steps, "loss") as advance:
        advance(progress.step)
        try:
            if not progress.history:
                validate()  # the untuned start is a candidate too
            for record in () if stale() else trainer.run():
                progress.curve.append(record)
                curves(progress.step, {key: record[key] for key in ("loss", "grad_norm", "lr")})
                advance(1, loss=f"loss {record['loss']:.4f}, {course.pace(progress.step, record['seconds'])}")
                if progress.step % course.steps_per_epoch == 0:
                    validate()
                    curves(
                        progress.step,
                        {f"validation_{key}": value for key, value in progress.history[-1].items() if key != "step"},
                    )
                if progress.step % options.save_every == 0 or progress.step % course.steps_per_epoch == 0:
                    files.save_tensors(last, trainer.state(), vars(progress))
                    run.save_results()  # so that a killed process keeps the seconds so far
                if stale():
                    count = options.patience
                    log.info(
                        "stopped at step %d: the last %d validations were no better than that of step %d",
                        progress.step,
                        count,
                        progress.best_step,
                    )
                    break
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the device must hold one microbatch; it ran out of memory; go on with --resume after a smaller --microbatch or --cache recompute"
            ) from error
    found = {"training": progress.curve, "validation": progress.history, "best_step": progress.best_step}
    run.results |= {part: found} if part else found
    tensors, _ = files.load_tensors(best)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(tensors[name])


def checkpoints(part: str = "") -> tuple[str, str]:
    """Names of a training's newest and best checkpoint."""
    prefix = f"{part}-" if part else ""
    return f"{prefix}last.safetensors", f"{prefix}best.safetensors"


def _groups(options: Any, layers: Mapping[str, CachedWeightLinear]) -> list[dict[str, Any]]:
    adapters = {
        f"{name}.{leaf}": getattr(layer, leaf)
        for name, layer in layers.items()
        if layer.rank
        for leaf in ("lora_a", "lora_b")
    }
    scales = {
        f"{name}.log_scale_shift": layer.log_scale_shift
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLinear)
    }
    for shift in scales.values():
        shift.requires_grad_(options.scale_lr > 0)  # without, the layers need no gradient of the size of a weight
    groups = [{"params": adapters, "lr": options.lr, "weight_decay": options.weight_decay}] if adapters else []
    return (
        [*groups, {"params": scales, "lr": options.scale_lr, "weight_decay": 0.0}]
        if scales and options.scale_lr
        else groups
    )


def fixed_weights(options: Any, layers: Mapping[str, CachedWeightLinear]) -> AbstractContextManager[None]:
    """For measuring: make the weights once, where the memory for it was found."""
    return insert.weight_cache(layers.values(), push=False) if options.cache == "step" else nullcontext()


@contextmanager
def _curves(run: Run, options: Any, part: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """TensorBoard, where it is wanted and installed."""
    try:
        if not options.tensorboard:
            raise ImportError
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if options.tensorboard:
            log.info('no curves: TensorBoard is not installed (pip install -c constraints.txt -e ".[tensorboard]")')
        yield lambda step, values: None
        return
    with SummaryWriter(str(run.path / "tensorboard")) as writer:

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(f"{part} {key}".strip(), value, step)

        yield write
