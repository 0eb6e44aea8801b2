"""The flow of `nybble distill`: a 16-bit model teaches its own 4-bit self.

load -> teacher states -> compress -> insert -> train on KL -> absorb -> save -> export -> measure
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from nybble import absorb, checkpoint, compress, data, estimate, evaluate, export, insert, models, report, teacher
from nybble.checkpoint import Run
from nybble.config import DistillOptions
from nybble.console import bar, console, log_to
from nybble.errors import OptionError, TrainingError
from nybble.export import EXPORTERS
from nybble.families import family_of
from nybble.grid import Grid, check_group_size
from nybble.layers import FakeQuantizedLoRALinear
from nybble.losses import Head, kl_to_teacher, last_hidden
from nybble.quantized import QuantizedWeight
from nybble.train import Progress, Recipe, Trainer

log = logging.getLogger("nybble")

CHUNK = 256  # tokens whose logits exist at a time in the loss
# More tokens than this in a microbatch gain nothing: the matrix products are already large (docs/log.md).
MOST_TOKENS = {"cpu": {torch.float32: 1024, torch.float16: 1024, torch.bfloat16: 4096}, "cuda": {}}


@dataclass(frozen=True)
class Sequences:
    """Token sequences [S, T] of the three splits; of the training text as many, chosen at random, as the run will use."""

    train: Tensor
    validation: Tensor
    test: Tensor


def distill(options: DistillOptions) -> Path:
    """Run the whole flow; returns the run folder. Raises NybbleError for whatever a person can repair."""
    options.check()
    compress.check_method(options.start)
    export.check_formats(options.export)
    evaluate.check_tasks(options.tasks, options.data_dir)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("nybble distill must run in one process for now; start it without accelerate launch or torchrun")
    path = options.folder
    Run.check(path, options.resume, options.overwrite)

    # Everything that can be wrong with model, options and data is found before the run folder exists.
    started = time.perf_counter()
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, device)
    log.info("loading %s (%s, %s)", options.pretrained, device, str(dtype).removeprefix("torch."))
    loaded = models.load(options.pretrained, dtype, device, options.trust_remote_code)
    plan = models.plan(loaded.model)
    for name in plan.int4:
        check_group_size(name, loaded.model.get_submodule(name).in_features, options.group_size)
    sequences = _sequences(options, loaded.tokenizer)
    if options.resume and (path / checkpoint.CONFIG).is_file():
        options = _as_before(options, checkpoint.read_options(path))
    options = _resolve(options, loaded, plan, sequences, path)
    exported = family_of(loaded.model.config).exported
    if options.export and exported is not True:
        log.warning("%s has not been exported by anyone yet%s; if it fails, the 4-bit model in %s/quantized is kept", loaded.model.config.model_type,
                    f" ({exported})" if exported else "", path)  # fmt: skip
    head = Head.of(loaded.model, copy=True)
    head.verify(loaded.model, sequences.validation[:1, :32].to(device))

    run = Run.open(path, options, options.resume, options.overwrite)
    try:
        with log_to(path / "log.txt"):
            run.results["seconds"].setdefault("load", round(time.perf_counter() - started, 2))
            _run(run, options, loaded, plan, sequences, head)
    finally:
        run.close()
    return path


def _run(run: Run, options: DistillOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences, head: Head) -> None:
    name, device, dtype = loaded.name, loaded.model.device, loaded.model.dtype
    run.results |= {"model": name, "seed": options.seed, "machine": checkpoint.machine()}
    run.results["layers"] = {"int4": len(plan.int4), "int8": len(plan.int8), "tied": plan.tied}
    run.results["test"] = f"the test split of {options.data} ({len(sequences.test)} x {options.seq_len} tokens)"

    states = _teach(run, options, loaded, sequences)
    measure = partial(_measure, run, options, sequences.test, evaluate.logits_from_states(head, states["test"]))
    if "16bit" not in run.results["models"]:
        size = 2 * sum(p.numel() for p in loaded.model.parameters())
        measure("16bit", loaded.model, loaded.tokenizer, size)

    if not (run.path / "quantized").exists():
        with run.stage("compress"):
            compressed, layers = _compress(options, loaded.model, plan)
        if "compressed" not in run.results["models"]:
            with _fixed_weights(options, layers):
                measure("compressed", loaded.model, loaded.tokenizer, _size(loaded.model, compressed))
        _train(run, options, loaded.model, layers, sequences, states, head)
        with run.stage("absorb"):
            tuned = absorb.absorb(loaded.model, layers)
            run.results["codes_changed"] = absorb.share_of_codes_changed(compressed, tuned)
            run.save_results()
            checkpoint.save_quantized(run.path / "quantized", loaded.model, loaded.tokenizer, compressed | tuned)
    # From here on everything is made from the saved folder, so what is measured is what is shipped.
    loaded.model.to("meta")  # frees the weights
    for leftover in run.path.glob("teacher/train.*"):
        leftover.unlink()
    if "tuned" not in run.results["models"]:
        model, tokenizer, quantized = checkpoint.load_quantized(run.path / "quantized", dtype, options.trust_remote_code)
        measure("tuned", model.to(device), tokenizer, _size(model, quantized))
        del model
    for kind in options.export:
        if kind not in run.results["models"]:
            exported = export_run(run, kind, options.trust_remote_code)
            measure(kind, exported.model, exported.tokenizer, exported.size)
    _finish(run)


# --- before training ----------------------------------------------------------------------------------------------------------


def _sequences(options: DistillOptions, tokenizer: Any) -> Sequences:
    texts = data.load_texts(options.data, options.data_column, options.data_dir)
    cut = partial(data.sequences, tokenizer, length=options.seq_len)
    train = cut(documents=texts.train, what="training", minimum=options.batch_size)
    needed = min(len(train), options.samples * options.epochs)
    validation, test = cut(documents=texts.validation, what="validation"), cut(documents=texts.test, what="test")
    # A random choice of what is needed, seeded, so that a short run sees all parts of the text.
    train = train[data.order(len(train), needed, options.seed)]
    return Sequences(train, validation[: options.valid_samples], test[: options.test_samples or None])


def _as_before(options: DistillOptions, saved: dict[str, Any]) -> DistillOptions:
    """What was chosen automatically when the run started stays: other microbatches would give other bits."""
    cache = saved["cache"] if options.cache == "auto" else options.cache
    return replace(options, cache=cache, microbatch=options.microbatch or saved["microbatch"])


def _resolve(options: DistillOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences, path: Path) -> DistillOptions:
    """Fill in what is automatic, print the estimate, refuse a disk that is too small, and warn of memory."""
    device = loaded.model.device
    shapes = estimate.Shapes.of(loaded.model, plan.int4, loaded.model.dtype.itemsize)
    sizes = (shapes, options.lora_rank, options.group_size)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    available = free + shapes.parameters * shapes.itemsize  # the model is there already, and is in the estimate
    cache = options.cache
    if cache == "auto":
        cache = "step" if estimate.memory(*sizes, options.seq_len, CHUNK, True) < 0.7 * available else "recompute"
    microbatch = options.microbatch or estimate.pick_microbatch(
        *sizes, options.seq_len, options.batch_size, CHUNK, cache == "step", available, MOST_TOKENS[device.type].get(loaded.model.dtype, 32768)
    )
    memory = estimate.memory(*sizes, microbatch * options.seq_len, CHUNK, cache == "step")
    splits = (sequences.train, sequences.validation, sequences.test)
    disk = estimate.disk(*sizes, sum(split.numel() for split in splits))
    checkpoint.check_disk(path, disk)
    steps = options.steps_per_epoch * options.epochs
    tokens = steps * options.batch_size * options.seq_len
    log.info(
        "%s: %.1f M parameters; %d linear layers get 4 bits (group %d), %s 8 bits%s",
        loaded.name, shapes.parameters / 1e6, len(plan.int4), options.group_size, ", ".join(plan.int8), " (tied)" if plan.tied else "",
    )  # fmt: skip
    log.info(
        "%d steps of %d x %d tokens = %.2f M tokens, %.2f times the %d training sequences; microbatch %d",
        steps, options.batch_size, options.seq_len, tokens / 1e6, steps * options.batch_size / len(sequences.train), len(sequences.train), microbatch,
    )  # fmt: skip
    log.info("estimate: %.1f GB of memory (%s cache; %.1f GB free), %.1f GB of disk", memory / 1e9, cache, available / 1e9, disk / 1e9)
    if memory > available:
        log.warning("the estimate is above the free memory; a smaller --lora_rank, --microbatch 1 or --cache recompute needs less")
    return replace(options, cache=cache, microbatch=microbatch, output_dir=str(path))


def _teach(run: Run, options: DistillOptions, loaded: models.LoadedModel, sequences: Sequences) -> dict[str, Tensor]:
    """The teacher's hidden states on validation, test and, unless training is over, train."""
    splits = {"validation": sequences.validation, "test": sequences.test}
    if not (run.path / "quantized").exists():
        splits["train"] = sequences.train
    identity = f"{options.pretrained} {models.identity(loaded.model)}"
    states = {}
    with run.stage("teacher"), bar("teacher", sum(len(ids) for ids in splits.values())) as advance:
        for split, ids in splits.items():
            states[split] = teacher.hidden_states(run.path / "teacher" / f"{split}.bin", loaded.model, ids, options.microbatch, identity, advance)
    return states


def _compress(options: DistillOptions, model: Any, plan: models.Plan) -> tuple[dict[str, QuantizedWeight], dict[str, FakeQuantizedLoRALinear]]:
    """Replace the model's layers; returns what they ship without tuning, and the layers to be trained."""
    grid = Grid(group_size=options.group_size)
    starts = compress.compress(model, plan.int4, grid, options.start)
    rows = insert.quantize_rows(model, plan.int8)
    layers = insert.insert(model, starts, grid, options.lora_rank, options.seed)
    clamped = sum(layer.rank < options.lora_rank for layer in layers.values())
    if clamped:
        log.info("rank %d clamped in %d layers that are narrower", options.lora_rank, clamped)
    log.info("quantized %d of %d linear layers to 4 bits, %s to 8 bits", len(layers), len(plan.int4), ", ".join(rows))
    return rows | {name: start.quantized(grid).cpu() for name, start in starts.items()}, layers


# --- training -----------------------------------------------------------------------------------------------------------------


def _train(
    run: Run, options: DistillOptions, model: Any, layers: Mapping[str, FakeQuantizedLoRALinear], sequences: Sequences, states: dict[str, Tensor], head: Head
) -> None:
    """Train adapters and scales on KL to the teacher; afterwards the layers hold the best weights."""
    student, device = Head.of(model), model.device
    steps = options.steps_per_epoch * options.epochs
    order = data.order(len(sequences.train), steps * options.batch_size, options.seed)

    def loss(indices: Tensor) -> Tensor:
        hidden = last_hidden(model, sequences.train[indices].to(device))
        return kl_to_teacher(hidden.flatten(0, 1), states["train"][indices].to(device).flatten(0, 1), student, head, CHUNK)

    trainer = Trainer(
        _groups(options, layers),
        Recipe(steps, options.batch_size, options.microbatch, options.warmup, options.max_grad_norm),
        loss,
        lambda step: order[step * options.batch_size : (step + 1) * options.batch_size],
        partial(insert.step_cache, list(layers.values())) if options.cache == "step" else nullcontext,
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
        logits = evaluate.logits_of(model, sequences.validation)
        with _fixed_weights(options, layers):
            measured = evaluate.measure(logits, sequences.validation, evaluate.logits_from_states(head, states["validation"]))
        progress.history.append({"step": progress.step} | measured)
        log.info("step %d of %d: validation KL %.4f, token perplexity %.3f", progress.step, steps, measured["kl_to_teacher"], measured["token_perplexity"])
        if measured["kl_to_teacher"] < progress.best_loss:
            progress.best_loss, progress.best_step = measured["kl_to_teacher"], progress.step
            save(best, dict(trainer.parameters))

    with run.stage("train"), _curves(run, options) as curves, bar("train", steps, "loss") as advance:
        advance(progress.step)
        try:
            if not progress.history:
                validate()  # the untuned start is a candidate too
            for record in trainer.run():
                curves(progress.step, {key: record[key] for key in ("loss", "grad_norm", "lr")})
                tokens_per_second = options.batch_size * options.seq_len / record["seconds"]
                advance(1, loss=f"loss {record['loss']:.4f}, {tokens_per_second:.0f} tokens/s")
                if progress.step % options.steps_per_epoch == 0:
                    validate()
                    curves(progress.step, {f"validation_{key}": value for key, value in progress.history[-1].items() if key != "step"})
                if progress.step % options.save_every == 0 or progress.step % options.steps_per_epoch == 0:
                    save(last, trainer.state())
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the device must hold one microbatch; it ran out of memory; go on with --resume after a smaller --microbatch or --cache recompute"
            ) from error
    run.results |= {"validation": progress.history, "best_step": progress.best_step}
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


@dataclass(frozen=True)
class Exported:
    """A model in another runtime, that answers like a transformers model."""

    model: Any
    tokenizer: Any
    size: int


def export_run(run: Run, kind: str, trust_remote_code: bool = False) -> Exported:
    """Export the quantized folder of a run to RUN/kind, and open what was written."""
    if kind not in EXPORTERS:
        raise OptionError(f"formats to export to are {', '.join(EXPORTERS)}; got {kind}")
    exporter, folder = EXPORTERS[kind](), run.path / kind
    with run.stage(f"export {kind}"):
        model, tokenizer, quantized = checkpoint.load_quantized(run.path / "quantized", torch.float32, trust_remote_code)
        log.info("exporting to %s", kind)
        with checkpoint.whole_folder(folder) as temporary:
            counts = exporter.export(model, tokenizer, quantized, temporary)
        run.results.setdefault("exports", {})[kind] = counts
        log.info(
            "%s: %d weights in 4 bits and %d in 8 bits, all codes read back equal; logits within %.1e of torch; %.1f MB",
            kind, counts["weights_u4"], counts["weights_u8"], counts["logit_difference"], counts["bytes"] / 1e6,
        )  # fmt: skip
    return Exported(exporter.open_model(folder, model.config), tokenizer, counts["bytes"])


def _size(model: Any, quantized: Mapping[str, QuantizedWeight]) -> int:
    """Bytes of the model when shipped: quantized weights packed, everything else in 16 bits."""
    weights = {name: weight.nbytes for name, weight in quantized.items()}
    counted = {id(model.get_submodule(name).weight) for name in quantized}
    rest: int = sum(2 * p.numel() for name, p in model.named_parameters() if id(p) not in counted and ".lora_" not in name and "log_scale" not in name)
    return sum(weights.values()) + rest


def _measure(run: Run, options: DistillOptions, test: Tensor, reference: evaluate.Logits, row: str, model: Any, tokenizer: Any, size: int) -> None:
    """Fill one row of the results."""
    label = report.ROWS.get(row, row)
    with run.stage("measure"), bar(f"measure {label}", len(test)) as advance:
        logits = reference if row == "16bit" else evaluate.logits_of(model, test)
        measured: dict[str, Any] = dict(evaluate.measure(logits, test, reference, advance))
        if options.tasks:
            log.info("lm-eval on %s: %s", label, ", ".join(options.tasks))
            tasks = evaluate.run_tasks(model, tokenizer, options.tasks, options.eval_batch_size, options.task_limit, options.data_dir)
            measured |= evaluate.columns(tasks)
    run.results["models"][row] = measured | {"bytes": size}
    run.save_results()
    log.info("%s: token perplexity %.3f, KL to 16 bit %.4f, %.1f MB", label, measured["token_perplexity"], measured["kl_to_teacher"], size / 1e6)


def _finish(run: Run) -> None:
    results = run.results
    results["improvement"] = {row: report.improvement(results["models"], row) for row in ("tuned", "openvino") if row in results["models"]}
    results["warnings"] = warnings = []
    if results.get("best_step") == 0:
        warnings.append("no step of tuning was better on the validation text than the compressed start, so the start was kept; use more text or another --lr")
    for metric in ("kl_to_teacher", "token_perplexity"):
        before, after = results["models"]["compressed"][metric], results["models"]["tuned"][metric]
        if after > before:
            warnings.append(f"tuning made {metric} on the test text worse: {before:.4f} before, {after:.4f} after")
    for warning in warnings:
        log.warning(warning)
    run.save_results()
    checkpoint.write_text(run.path / "report.md", report.markdown(results))
    console.print(report.table(results))
    console.print(report.sentence(results), highlight=False)
    console.print(f"Everything is in {run.path} (report.md, results.json{''.join(f', {kind}/' for kind in results.get('exports', {}))}).", highlight=False)
