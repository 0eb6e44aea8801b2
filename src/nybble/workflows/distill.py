"""The flow of `nybble distill`: a 16-bit model teaches its own 4-bit self.

load -> teacher states -> compress -> insert -> train on KL -> absorb -> save -> export -> measure
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nybble import files
from nybble.data import sampling
from nybble.evaluation import perplexity
from nybble.models import loading, quantized_model, selection
from nybble.models.head import LMHead, last_hidden_states
from nybble.options.commands import DistillOptions
from nybble.qat import absorb, insert
from nybble.qat.layers import QuantizedLinear
from nybble.report import run as report_run
from nybble.run.folder import Run
from nybble.training.losses import kl_to_teacher
from nybble.training.teacher import HiddenStates
from nybble.workflows import stages, starts, text, tuning
from nybble.workflows.stages import Job
from nybble.workflows.text import Sequences
from nybble.workflows.tuning import TrainingObjective

log = logging.getLogger("nybble")


def distill(options: DistillOptions) -> Path:
    """Run the whole flow; returns the run folder. Raises NybbleError for whatever a person can repair."""

    def cut(options: DistillOptions, loaded: loading.LoadedModel) -> Sequences:
        wanted = options.samples * (1 if options.same_samples else options.epochs)
        return text.sequences_of(options, loaded, options.start, wanted, options.batch_size, options.valid_samples)

    with stages.opened(options, options.start, "--start", cut, _resolve) as job:
        _run(job)
        return job.run.path


def _run(job: Job) -> None:
    run, options, loaded, sequences = job.run, job.options, job.loaded, job.sequences
    splits = {"validation": sequences.validation, "test": sequences.test}
    first, which = sampling.distinct_rows(sequences.train.ids)  # shares of small sources give some sequences again
    if not job.quantized.exists():  # else training is over
        splits["train"] = sequences.train[first]
    states = stages.teach(job, splits, options.microbatch)
    reference = perplexity.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference)
    if not job.quantized.exists():
        compressed, layers = tuning.insert_layers(job, options.lora_rank)
        with tuning.fixed_weights(options, layers):
            stages.measure(
                job, reference, "compressed", loaded.model, loaded.tokenizer, stages.size_of(loaded.model, compressed)
            )
        norms = insert.train_norms(loaded.model) if options.norm_lr else {}
        tuning.train_layers(run, options, layers, _course(job, states, which, layers), norms)
        with run.stage("absorb"):
            insert.settle_norms(loaded.model)
            tuned = absorb.absorb(loaded.model, layers)
            run.results |= absorb.changes(compressed, tuned)
            run.save_results()
            quantized_model.save_quantized(job.quantized, loaded.model, loaded.tokenizer, compressed | tuned)
    for leftover in run.path.glob("teacher/train.*"):
        leftover.unlink()
    files.remove_folder(run.path / "compress")
    stages.measure_saved(job, reference, "tuned")
    stages.finish(run, _judge(run))


def _resolve(
    options: DistillOptions, loaded: loading.LoadedModel, plan: selection.LayerSelection, sequences: Sequences
) -> DistillOptions:
    if not options.lora_rank and (options.lr, options.weight_decay) != (DistillOptions.lr, DistillOptions.weight_decay):
        log.warning(
            "--lr and --weight_decay are those of adapters, and there are none (--lora_rank 0): nothing follows them"
        )
    if options.moves_codes and (starts.start_run(options.start) or "blockwise" in options.start):
        log.warning(
            "adapters hardly move the codes of a finished run or of blockwise, whose weights lie in the middle of their cells; "
            "--lora_rank 0 trains scales and norms, in less time and memory; --start awq+se+gptq leaves adapters room"
        )
    steps = options.steps_per_epoch * options.epochs
    count = len(sampling.distinct_rows(sequences.train.ids)[0])
    tokens, seen = steps * options.batch_size * options.seq_len, steps * options.batch_size / count
    log.info(
        "%d steps of %d x %d tokens = %.2f M tokens, %.2f times the %d training sequences",
        steps, options.batch_size, options.seq_len, tokens / 1e6, seen, count,
    )  # fmt: skip
    states = options.seq_len * (count + len(sequences.validation) + len(sequences.test))
    copies = 2 if options.scale_lr and options.lora_rank else 1
    return tuning.resolve(options, loaded, plan, sequences, options.lora_rank, states, options.seq_len, copies)  # type: ignore[no-any-return]


def _course(
    job: Job, states: Mapping[str, HiddenStates], which: Tensor, layers: Mapping[str, QuantizedLinear]
) -> TrainingObjective:
    """KL to the teacher, on text for training, whose i-th sequence has the states which[i], and on text for validation."""
    options, model, sequences = job.options, job.loaded.model, job.sequences
    student, device = LMHead.of(model), model.device
    order = sampling.draw_order(
        len(sequences.train), options.steps_per_epoch * options.epochs * options.batch_size, options.seed
    )

    def loss(indices: Tensor) -> Tensor:
        rows = sequences.train[indices]
        loss_mask = rows.loss_mask.to(device)
        hidden = last_hidden_states(model, rows.ids.to(device))
        return kl_to_teacher(
            hidden[loss_mask], states["train"][which[indices]].to(device)[loss_mask], student, job.head
        )

    def validate() -> dict[str, float]:
        held = sequences.validation
        teacher = perplexity.logits_from_states(job.head, states["validation"])
        with tuning.fixed_weights(options, layers):
            return perplexity.measure_sequences(
                perplexity.model_logits(model, held.ids), held.ids, teacher, loss_mask=held.loss_mask
            )

    return TrainingObjective(
        steps_per_epoch=options.steps_per_epoch,
        draw=lambda step: order[step * options.batch_size : (step + 1) * options.batch_size],
        loss=loss,
        tokens=lambda indices: int(sequences.train.loss_mask[indices].sum()),
        validate=validate,
        criterion="kl_to_teacher",
        pace=lambda step, seconds: f"{options.batch_size * sequences.train.ids.shape[1] / seconds:.0f} tokens/s",
        describe=lambda measured: (
            f"validation KL {measured['kl_to_teacher']:.4f}, token perplexity {measured['token_perplexity']:.3f}"
        ),
    )


# --- after training -----------------------------------------------------------------------------------------------------------


def _judge(run: Run) -> list[str]:
    """Fill in the improvement; returns warnings in plain words."""
    results = run.results
    results["improvement"] = {
        row: report_run.improvement(results["models"], row) for row in ("tuned", "openvino") if row in results["models"]
    }
    warnings = []
    if results.get("best_step") == 0:
        warnings.append(
            "no step of tuning was better on the validation text than the compressed start, so the start was kept; use more text or other rates"
        )
    compressed, tuned, exported = (results["models"].get(row, {}) for row in ("compressed", "tuned", "openvino"))
    for metric in ("kl_to_teacher", "token_perplexity", "word_perplexity"):
        before, after, shipped = (row.get(metric, math.nan) for row in (compressed, tuned, exported))
        name = report_run.heading(metric)
        if after > before:
            warnings.append(f"tuning made the {name} of the test text worse: {before:.4f} before, {after:.4f} after")
        elif shipped > before:
            warnings.append(
                f"in OpenVINO the tuned model's {name} is worse than the compressed one's in torch: {shipped:.4f}, against {before:.4f}"
            )
    return warnings
