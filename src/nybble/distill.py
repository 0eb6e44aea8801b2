"""The flow of `nybble distill`: a 16-bit model teaches its own 4-bit self.

load -> teacher states -> compress -> insert -> train on KL -> absorb -> save -> export -> measure
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble import absorb, checkpoint, data, estimate, evaluate, insert, models, report, stages
from nybble.checkpoint import Run
from nybble.config import DistillOptions
from nybble.console import bar
from nybble.errors import OptionError, TrainingError
from nybble.layers import FakeQuantizedLoRALinear
from nybble.losses import Head, kl_to_teacher, last_hidden
from nybble.quantized import QuantizedWeight
from nybble.stages import Job, Sequences
from nybble.train import Progress, Recipe, Trainer

log = logging.getLogger("nybble")

CHUNK = 256  # tokens whose logits exist at a time in the loss
# More tokens than this in a microbatch gain nothing: the matrix products are already large (docs/log.md).
MOST_TOKENS = {"cpu": {torch.float32: 1024, torch.float16: 1024, torch.bfloat16: 4096}, "cuda": {}}


def distill(options: DistillOptions) -> Path:
    """Run the whole flow; returns the run folder. Raises NybbleError for whatever a person can repair."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("nybble distill must run in one process for now; start it without accelerate launch or torchrun")

    def cut(loaded: models.LoadedModel) -> Sequences:
        return stages.sequences_of(options, loaded, options.start, options.samples * options.epochs, options.batch_size, options.valid_samples)

    with stages.opened(options, options.start, "--start", cut, _resolve) as job:
        _run(job)
        return job.run.path


def _run(job: Job) -> None:
    run, options, loaded, sequences = job.run, job.options, job.loaded, job.sequences
    splits = {"validation": sequences.validation, "test": sequences.test}
    if not job.quantized.exists():  # else training is over
        splits["train"] = sequences.train
    states = stages.teach(job, splits, options.microbatch)
    reference = evaluate.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference)
    if not job.quantized.exists():
        compressed, layers = _compress(job)
        with _fixed_weights(options, layers):
            stages.measure(job, reference, "compressed", loaded.model, loaded.tokenizer, stages.size_of(loaded.model, compressed))
        _train(run, options, loaded.model, layers, sequences, states, job.head)
        with run.stage("absorb"):
            tuned = absorb.absorb(loaded.model, layers)
            run.results["codes_changed"], run.results["layer_codes_changed"] = absorb.codes_changed(compressed, tuned)
            run.save_results()
            checkpoint.save_quantized(job.quantized, loaded.model, loaded.tokenizer, compressed | tuned)
    for leftover in run.path.glob("teacher/train.*"):
        leftover.unlink()
    checkpoint.remove_folder(run.path / "compress")
    stages.measure_saved(job, reference, "tuned")
    stages.finish(run, _judge(run))


# --- before training ----------------------------------------------------------------------------------------------------------


def _resolve(options: DistillOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences) -> DistillOptions:
    """Fill in what is automatic, print the estimate, refuse a disk that is too small, and warn of memory."""
    path = options.folder
    if options.resume and (path / checkpoint.CONFIG).is_file():
        # What was chosen automatically when the run started stays: other microbatches would give other bits.
        saved = checkpoint.read_options(path)
        cache = saved["cache"] if options.cache == "auto" else options.cache
        options = replace(options, cache=cache, microbatch=options.microbatch or saved["microbatch"])
    device = loaded.model.device
    shapes = estimate.Shapes.of(loaded.model, plan.int4, loaded.model.dtype.itemsize)
    sizes = (shapes, options.lora_rank, options.group_size)
    available = stages.free_memory(loaded)
    cache = options.cache
    if cache == "auto":
        cache = "step" if estimate.memory(*sizes, options.seq_len, CHUNK, True) < 0.7 * available else "recompute"
    microbatch = options.microbatch or estimate.pick_microbatch(
        *sizes, options.seq_len, options.batch_size, CHUNK, cache == "step", available, MOST_TOKENS[device.type].get(loaded.model.dtype, 32768)
    )
    calibration = stages.check_calibration(options, options.start, sequences)
    memory = estimate.memory(*sizes, microbatch * options.seq_len, CHUNK, cache == "step")
    memory = max(memory, stages.estimate_compression(options, loaded, shapes, calibration))
    splits = (sequences.train, sequences.validation, sequences.test)
    disk = estimate.disk(*sizes, sum(split.ids.numel() for split in splits)) + estimate.blocks_disk(shapes, sequences.calibration.numel())
    checkpoint.check_disk(path, disk)
    steps = options.steps_per_epoch * options.epochs
    tokens = steps * options.batch_size * options.seq_len
    log.info(
        "%d steps of %d x %d tokens = %.2f M tokens, %.2f times the %d training sequences; microbatch %d",
        steps, options.batch_size, options.seq_len, tokens / 1e6, steps * options.batch_size / len(sequences.train), len(sequences.train), microbatch,
    )  # fmt: skip
    log.info("estimate: %.1f GB of memory (%s cache; %.1f GB free), %.1f GB of disk", memory / 1e9, cache, available / 1e9, disk / 1e9)
    stages.check_memory(memory, available, "a smaller --lora_rank, --microbatch 1, --cache recompute or a shorter --seq_len needs less")
    return replace(options, cache=cache, microbatch=microbatch, output_dir=str(path))


def _compress(job: Job) -> tuple[dict[str, QuantizedWeight], dict[str, FakeQuantizedLoRALinear]]:
    """Replace the model's layers; returns what they ship without tuning, and the layers to be trained."""
    options, model = job.options, job.loaded.model
    compressed, rows = stages.compress_model(job, options.start)
    layers = insert.insert(model, compressed.starts, job.grid, options.lora_rank, options.seed)
    clamped = sum(layer.rank < options.lora_rank for layer in layers.values())
    if clamped:
        log.info("rank %d clamped in %d layers that are narrower", options.lora_rank, clamped)
    return rows | {name: start.quantized(job.grid).cpu() for name, start in compressed.starts.items()}, layers


# --- training -----------------------------------------------------------------------------------------------------------------


def _train(
    run: Run, options: DistillOptions, model: Any, layers: Mapping[str, FakeQuantizedLoRALinear], sequences: Sequences, states: dict[str, Tensor], head: Head
) -> None:
    """Train adapters and scales on KL to the teacher; afterwards the layers hold the best weights."""
    student, device = Head.of(model), model.device
    steps = options.steps_per_epoch * options.epochs
    order = data.order(len(sequences.train), steps * options.batch_size, options.seed)

    def loss(indices: Tensor) -> Tensor:
        rows = sequences.train[indices]
        counted = rows.counted.to(device)
        hidden = last_hidden(model, rows.ids.to(device))
        return kl_to_teacher(hidden[counted], states["train"][indices].to(device)[counted], student, head, CHUNK)

    trainer = Trainer(
        _groups(options, layers),
        Recipe(steps, options.batch_size, options.microbatch, options.warmup, options.max_grad_norm),
        loss,
        lambda step: order[step * options.batch_size : (step + 1) * options.batch_size],
        partial(insert.step_cache, list(layers.values())) if options.cache == "step" else nullcontext,
        lambda indices: int(sequences.train.counted[indices].sum()),
    )
    last, best = run.path / "last.safetensors", run.path / "best.safetensors"
    if last.exists():
        tensors, note = checkpoint.load_tensors(last)
        trainer.load_state(tensors)
        trainer.progress = Progress(**note)
        log.info("resumed at step %d of %d", trainer.progress.step, steps)
    progress = trainer.progress

    def save(path: Path, tensors: dict[str, Tensor]) -> None:
        checkpoint.save_tensors(path, tensors, vars(progress))

    def validate() -> None:
        held = sequences.validation
        with _fixed_weights(options, layers):
            measured = evaluate.measure(
                evaluate.logits_of(model, held.ids), held.ids, evaluate.logits_from_states(head, states["validation"]), counted=held.counted
            )
        progress.history.append({"step": progress.step} | measured)
        log.info("step %d of %d: validation KL %.4f, token perplexity %.3f", progress.step, steps, measured["kl_to_teacher"], measured["token_perplexity"])
        if measured["kl_to_teacher"] < progress.best_loss:
            progress.best_loss, progress.best_step = measured["kl_to_teacher"], progress.step
            save(best, dict(trainer.parameters))

    def stale() -> bool:
        return 0 < options.patience <= sum(validation["step"] > progress.best_step for validation in progress.history)

    with run.stage("train"), _curves(run, options) as curves, bar("train", steps, "loss") as advance:
        advance(progress.step)
        try:
            if not progress.history:
                validate()  # the untuned start is a candidate too
            for record in () if stale() else trainer.run():
                progress.curve.append(record)
                curves(progress.step, {key: record[key] for key in ("loss", "grad_norm", "lr")})
                tokens_per_second = options.batch_size * options.seq_len / record["seconds"]
                advance(1, loss=f"loss {record['loss']:.4f}, {tokens_per_second:.0f} tokens/s")
                if progress.step % options.steps_per_epoch == 0:
                    validate()
                    curves(progress.step, {f"validation_{key}": value for key, value in progress.history[-1].items() if key != "step"})
                if progress.step % options.save_every == 0 or progress.step % options.steps_per_epoch == 0:
                    save(last, trainer.state())
                if stale():
                    log.info(
                        "stopped at step %d: the last %d validations were no better than that of step %d", progress.step, options.patience, progress.best_step
                    )
                    break
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the device must hold one microbatch; it ran out of memory; go on with --resume after a smaller --microbatch or --cache recompute"
            ) from error
    run.results |= {"training": progress.curve, "validation": progress.history, "best_step": progress.best_step}
    tensors, _ = checkpoint.load_tensors(best)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(tensors[name])


def _groups(options: DistillOptions, layers: Mapping[str, FakeQuantizedLoRALinear]) -> list[dict[str, Any]]:
    adapters = {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers.items() for leaf in ("lora_a", "lora_b")}
    scales = {f"{name}.log_scale_shift": layer.log_scale_shift for name, layer in layers.items()}
    return [
        {"params": adapters, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": scales, "lr": options.scale_lr, "weight_decay": 0.0},
    ]


def _fixed_weights(options: DistillOptions, layers: Mapping[str, FakeQuantizedLoRALinear]) -> AbstractContextManager[None]:
    """For measuring: quantize once, where the memory for it was found."""
    return insert.step_cache(layers.values(), push=False) if options.cache == "step" else nullcontext()


@contextmanager
def _curves(run: Run, options: DistillOptions) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """TensorBoard, where it is wanted and installed."""
    try:
        if not options.tensorboard:
            raise ImportError
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if options.tensorboard:
            log.info('no curves: TensorBoard is not installed (pip install "nybble[tensorboard]")')
        yield lambda step, values: None
        return
    with SummaryWriter(str(run.path / "tensorboard")) as writer:

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        yield write


# --- after training -----------------------------------------------------------------------------------------------------------


def _judge(run: Run) -> list[str]:
    """Fill in the improvement; returns warnings in plain words."""
    results = run.results
    results["improvement"] = {row: report.improvement(results["models"], row) for row in ("tuned", "openvino") if row in results["models"]}
    warnings = []
    if results.get("best_step") == 0:
        warnings.append("no step of tuning was better on the validation text than the compressed start, so the start was kept; use more text or another --lr")
    for metric in ("kl_to_teacher", "token_perplexity"):
        before, after = results["models"]["compressed"][metric], results["models"]["tuned"][metric]
        if after > before:
            warnings.append(f"tuning made {metric} on the test text worse: {before:.4f} before, {after:.4f} after")
    return warnings
