"""The flow of `nybble distill`: a 16-bit model teaches its own 4-bit self.

load -> teacher states -> compress -> insert -> train on KL -> absorb -> save -> export -> measure
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nybble import absorb, checkpoint, data, evaluate, insert, models, report, stages, starts, text, tuning
from nybble.checkpoint import Run
from nybble.config import DistillOptions
from nybble.layers import QuantizedLinear
from nybble.losses import Head, kl_to_teacher, last_hidden
from nybble.stages import Job
from nybble.teacher import States
from nybble.text import Sequences
from nybble.tuning import Course

log = logging.getLogger("nybble")


def distill(options: DistillOptions) -> Path:
    """Run the whole flow; returns the run folder. Raises NybbleError for whatever a person can repair."""

    def cut(options: DistillOptions, loaded: models.LoadedModel) -> Sequences:
        wanted = options.samples * (1 if options.same_samples else options.epochs)
        return text.sequences_of(options, loaded, options.start, wanted, options.batch_size, options.valid_samples)

    with stages.opened(options, options.start, "--start", cut, _resolve) as job:
        _run(job)
        return job.run.path


def _run(job: Job) -> None:
    run, options, loaded, sequences = job.run, job.options, job.loaded, job.sequences
    splits = {"validation": sequences.validation, "test": sequences.test}
    first, which = data.distinct(sequences.train.ids)  # shares of small sources give some sequences again
    if not job.quantized.exists():  # else training is over
        splits["train"] = sequences.train[first]
    states = stages.teach(job, splits, options.microbatch)
    reference = evaluate.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference)
    if not job.quantized.exists():
        compressed, layers = tuning.insert_layers(job, options.lora_rank)
        with tuning.fixed_weights(options, layers):
            stages.measure(job, reference, "compressed", loaded.model, loaded.tokenizer, stages.size_of(loaded.model, compressed))
        norms = insert.train_norms(loaded.model) if options.norm_lr else {}
        tuning.train_layers(run, options, layers, _course(job, states, which, layers), norms)
        with run.stage("absorb"):
            insert.settle_norms(loaded.model)
            tuned = absorb.absorb(loaded.model, layers)
            run.results |= absorb.changes(compressed, tuned)
            run.save_results()
            checkpoint.save_quantized(job.quantized, loaded.model, loaded.tokenizer, compressed | tuned)
    for leftover in run.path.glob("teacher/train.*"):
        leftover.unlink()
    checkpoint.remove_folder(run.path / "compress")
    stages.measure_saved(job, reference, "tuned")
    stages.finish(run, _judge(run))


def _resolve(options: DistillOptions, loaded: models.LoadedModel, plan: models.Plan, sequences: Sequences) -> DistillOptions:
    if not options.lora_rank and (options.lr, options.weight_decay) != (DistillOptions.lr, DistillOptions.weight_decay):
        log.warning("--lr and --weight_decay are those of adapters, and there are none (--lora_rank 0): nothing follows them")
    if options.moves_codes and (starts.start_run(options.start) or "blockwise" in options.start):
        log.warning(
            "adapters hardly move the codes of a finished run or of blockwise, whose weights lie in the middle of their cells; "
            "--lora_rank 0 trains scales and norms, in less time and memory; --start awq+se+gptq leaves adapters room"
        )
    steps = options.steps_per_epoch * options.epochs
    count = len(data.distinct(sequences.train.ids)[0])
    tokens, seen = steps * options.batch_size * options.seq_len, steps * options.batch_size / count
    log.info(
        "%d steps of %d x %d tokens = %.2f M tokens, %.2f times the %d training sequences",
        steps, options.batch_size, options.seq_len, tokens / 1e6, seen, count,
    )  # fmt: skip
    states = options.seq_len * (count + len(sequences.validation) + len(sequences.test))
    copies = 2 if options.scale_lr and options.lora_rank else 1
    return tuning.resolve(options, loaded, plan, sequences, options.lora_rank, states, options.seq_len, copies)  # type: ignore[no-any-return]


def _course(job: Job, states: Mapping[str, States], which: Tensor, layers: Mapping[str, QuantizedLinear]) -> Course:
    """KL to the teacher, on text for training, whose i-th sequence has the states which[i], and on text for validation."""
    options, model, sequences = job.options, job.loaded.model, job.sequences
    student, device = Head.of(model), model.device
    order = data.order(len(sequences.train), options.steps_per_epoch * options.epochs * options.batch_size, options.seed)

    def loss(indices: Tensor) -> Tensor:
        rows = sequences.train[indices]
        counted = rows.counted.to(device)
        hidden = last_hidden(model, rows.ids.to(device))
        return kl_to_teacher(hidden[counted], states["train"][which[indices]].to(device)[counted], student, job.head)

    def validate() -> dict[str, float]:
        held = sequences.validation
        teacher = evaluate.logits_from_states(job.head, states["validation"])
        with tuning.fixed_weights(options, layers):
            return evaluate.measure(evaluate.logits_of(model, held.ids), held.ids, teacher, counted=held.counted)

    return Course(
        steps_per_epoch=options.steps_per_epoch,
        draw=lambda step: order[step * options.batch_size : (step + 1) * options.batch_size],
        loss=loss,
        tokens=lambda indices: int(sequences.train.counted[indices].sum()),
        validate=validate,
        criterion="kl_to_teacher",
        pace=lambda step, seconds: f"{options.batch_size * sequences.train.ids.shape[1] / seconds:.0f} tokens/s",
        describe=lambda measured: f"validation KL {measured['kl_to_teacher']:.4f}, token perplexity {measured['token_perplexity']:.3f}",
    )


# --- after training -----------------------------------------------------------------------------------------------------------


def _judge(run: Run) -> list[str]:
    """Fill in the improvement; returns warnings in plain words."""
    results = run.results
    results["improvement"] = {row: report.improvement(results["models"], row) for row in ("tuned", "openvino") if row in results["models"]}
    warnings = []
    if results.get("best_step") == 0:
        warnings.append("no step of tuning was better on the validation text than the compressed start, so the start was kept; use more text or other rates")
    compressed, tuned, exported = (results["models"].get(row, {}) for row in ("compressed", "tuned", "openvino"))
    for metric in ("kl_to_teacher", "token_perplexity", "word_perplexity"):
        before, after, shipped = (row.get(metric, math.nan) for row in (compressed, tuned, exported))
        name = report.heading(metric)
        if after > before:
            warnings.append(f"tuning made the {name} of the test text worse: {before:.4f} before, {after:.4f} after")
        elif shipped > before:
            warnings.append(f"in OpenVINO the tuned model's {name} is worse than the compressed one's in torch: {shipped:.4f}, against {before:.4f}")
    return warnings
