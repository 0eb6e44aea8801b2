"""`nybble distill`: a 16-bit model teaches its own INT4 copy.

validate -> read the text -> load -> plan -> open the run -> compress -> train -> absorb -> export -> measure -> report

The loss is the KL divergence of the 4-bit model's next-token distribution from the 16-bit model's (training/losses.py),
with --cross_entropy_share partly the cross-entropy of the text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nybble import processes
from nybble.callbacks import Callback
from nybble.data.sampling import distinct_rows, draw_order
from nybble.evaluation.decoder_error import decoder_outputs
from nybble.evaluation.lm_eval import LmEvalConfig
from nybble.evaluation.perplexity import logits_from_states, measure_sequences, model_logits
from nybble.files import remove_folder
from nybble.models.head import LMHead, last_hidden_states
from nybble.models.quantized_model import save_quantized
from nybble.options.commands import DistillOptions
from nybble.options.training import DistillTrainingOptions
from nybble.qat.absorb import absorb_layers, weight_changes
from nybble.qat.base import QuantizedLinear
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.qat.norms import bake_norms, make_norms_trainable
from nybble.quant.weight import QuantizedWeight
from nybble.run.results import Phase
from nybble.training.losses import kl_to_teacher, next_token_cross_entropy
from nybble.training.objective import TrainingObjective
from nybble.training.teacher import HiddenStates
from nybble.workflows import execution, placement, plan, session, steps, text, train
from nybble.workflows.begin import Beginning, begin
from nybble.workflows.judge import judge_distillation
from nybble.workflows.measure import (
    DECODER_ERROR_TOKENS,
    SIXTEEN_BIT,
    Evaluator,
    measure_row,
    other_domain,
    size_in_16_bits,
    size_when_shipped,
)
from nybble.workflows.plan import PlannedRun
from nybble.workflows.positions import TrainedPositions
from nybble.workflows.shard import check_shardable, divide_rows, rounded_blocks
from nybble.workflows.steps import RunContext

log = logging.getLogger("nybble")

# CAGE acts late: before, it would hold weights in cells that training has yet to leave.
_CAGE_FROM = 0.8


def distill(options: DistillOptions, callbacks: Sequence[Callback] = ()) -> Path:
    """Run the whole workflow; returns the run folder.

    Args:
        callbacks: are told of stages, steps and validations.

    Raises:
        NybbleError: whatever a person can repair.
    """
    begun = begin(options, text.distill_request)
    with placement.freed_memory(begun.on_disk):
        return _distill(begun, callbacks)


def _distill(begun: Beginning[DistillOptions], callbacks: Sequence[Callback]) -> Path:
    """Everything from the model to the report."""
    options, loaded = begun.options, begun.load_model()
    evaluation, data_dir = options.evaluation, options.text.data_dir
    selection = plan.select(loaded, options.scheme)
    if options.training.shard:
        check_shardable(loaded.model, selection)
        options = options.replace(weight_cache="recompute")  # no process has room for all weights
    compression = plan.plan_compression(
        options.compression, loaded, selection, options.training.trains_codes, plan.results_if_made(options)
    )
    prepared = begun.read.for_method(compression.calibrates)
    planned = plan.check_fit(options, evaluation, loaded, selection, compression, prepared)
    options = _plan_training(options, planned)
    outputs = decoder_outputs(loaded.model, prepared.test.ids[0, :DECODER_ERROR_TOKENS])

    facts = session.RunFacts(
        planned=planned,
        command=options.NAME,
        load_seconds=begun.seconds(),
        limit=evaluation.limit if evaluation.eval_tasks else None,
    )
    large = placement.is_large(loaded)
    with placement.freed_memory(large), session.run_session(options, facts) as run:
        context = steps.RunContext.of(run, options, options.compression, planned, callbacks)
        context = steps.generate_text(context)
        teacher = _teacher_states(context, options.training.microbatch_size)
        reference = logits_from_states(context.head, teacher.states["test"])
        tasks = LmEvalConfig(evaluation.eval_tasks, evaluation.eval_batch_size, evaluation.limit, data_dir)
        other = other_domain(context.head, prepared, teacher.states)
        evaluator = Evaluator(prepared.test, reference, tasks, other=other, decoder_outputs=outputs)
        measure_row(run, evaluator, SIXTEEN_BIT, loaded, size_in_16_bits(loaded.model))
        if not run.results.phase.reached(Phase.QUANTIZED):
            _train(context, options.training, evaluator, teacher)
        run.on_first(lambda: _finish(context, evaluator))
        return run.path


def _finish(context: RunContext, evaluator: Evaluator) -> None:
    """Delete what is no longer needed, export, measure, report."""
    run = context.run
    for leftover in run.path.glob("teacher/train.*"):
        leftover.unlink()
    remove_folder(run.path / "compress")
    failed = steps.measure_shipped(context, evaluator, "tuned")
    session.finish(run, judge_distillation(run.results), failed)


def _plan_training(options: DistillOptions, planned: PlannedRun) -> DistillOptions:
    """The options with everything automatic resolved. Says what will be trained, and warns of what has no effect."""
    training, prepared = options.training, planned.text
    _warn(training)
    steps_, count = training.steps_per_epoch * training.epochs, prepared.num_distinct_train
    seq_len = options.text.seq_len
    sequences = steps_ * training.batch_size
    log.info(
        "%d steps of %d x %d tokens = %.2f M tokens, %.2f passes over the %d training sequences",
        steps_, training.batch_size, seq_len, sequences * seq_len / 1e6, sequences / count, count,
    )  # fmt: skip
    size = execution.TrainingSize(
        rank=training.lora_rank if training.train == "lora" else 0,
        train=training.train,
        seq_len=seq_len,
        teacher_tokens=seq_len * (count + len(prepared.validation) + len(prepared.test)),
        weight_copies=2 if training.train != "lora" or (training.scale_lr and training.lora_rank) else 1,
        shards=processes.count() if training.shard else 1,
    )
    chosen = execution.plan_memory(options, training, planned, size, options.evaluation.eval_tasks)
    method = {} if planned.compression.init_from is not None else {"method": planned.compression.method}
    return options.replace(
        output_dir=str(options.folder),
        **chosen.options(),
        **method,
    )


def _warn(training: DistillTrainingOptions) -> None:
    """Warn of options without effect."""
    changed = (training.lr, training.weight_decay) != (DistillTrainingOptions.lr, DistillTrainingOptions.weight_decay)
    if training.codes_stay and changed:
        log.warning("--lr and --weight_decay have no effect: they are those of adapters, and --lora_rank is 0")
    if training.base_weights == "fixed" and not training.keeps_base_weights:
        log.warning("--base_weights has no effect: no frozen weights are kept without adapters")


@dataclass(frozen=True)
class Teacher:
    """The 16-bit model's hidden states.

    Attributes:
        states: split -> states; those of the training text are left out when training is done.
        of_row: [S] number of the training states of each training sequence: equal sequences share theirs.
    """

    states: Mapping[str, HiddenStates]
    of_row: Tensor


def _teacher_states(context: RunContext, microbatch_size: int) -> Teacher:
    data = context.text
    splits = {"validation": data.validation, **data.measured()}
    first, of_row = distinct_rows(data.train.ids)
    if not context.run.results.phase.reached(Phase.TRAINED):
        splits["train"] = data.train[first]
    return Teacher(steps.teacher_states(context, splits, microbatch_size), of_row)


def _train(context: RunContext, options: DistillTrainingOptions, evaluator: Evaluator, teacher: Teacher) -> None:
    """Compress, train, absorb and save."""
    run, loaded = context.run, context.loaded
    model = loaded.model
    compressed, fixed_point = steps.compress_model(context), options.base_weights == "fixed"
    layers: dict[str, QuantizedLinear] = {}
    if options.shard and loaded.on_disk:  # no process has room for all layers
        with rounded_blocks(model, compressed.linears):
            measure_row(run, evaluator, "compressed", loaded, size_when_shipped(model, compressed.weights))
    if options.train == "lora":
        divided = options.shard and loaded.on_disk
        layers |= train.insert_quantized_layers(context, compressed, options.lora_rank, fixed_point, divided)
    else:
        layers |= train.insert_layers_without_adapters(context, compressed, options.train, fixed_point)
    positions = TrainedPositions.of(context, compressed, options.codes_stay)
    if options.shard:
        compressed.release_inits()  # the layers will have weights of their own
    weights = compressed.weights if processes.is_first() else {}  # the others do not absorb
    with train.measuring_weights(layers, options.weight_cache):
        measure_row(run, evaluator, "compressed", loaded, size_when_shipped(model, compressed.weights))
    norms = make_norms_trainable(model) if options.norm_lr else {}
    objective = _objective(context, options, teacher, layers)
    del compressed
    if options.shard:
        divide_rows(layers)
    train.train_layers(context, options, layers, objective, norms)
    run.reach(Phase.TRAINED)
    _absorb(context, weights, layers if options.shard or processes.is_first() else {}, positions)


def _absorb(
    context: RunContext,
    compressed: Mapping[str, QuantizedWeight],
    layers: dict[str, QuantizedLinear],
    positions: TrainedPositions,
) -> None:
    """Turn the trained layers into codes in the first process, and save the 4-bit model."""
    run, model, kept = context.run, context.loaded.model, dict[str, Tensor]()

    def save() -> None:
        run.results.changes = weight_changes(compressed, tuned)
        weights = {name: tuned[name] if name in tuned else compressed[name] for name in compressed}
        save_quantized(run.quantized, context.loaded, weights, kept)
        run.reach(Phase.QUANTIZED)

    with run.stage("absorb"):
        bake_norms(model)
        tuned = absorb_layers(model, layers, lambda name, layer: kept.update(positions.after(name, layer)))
        run.on_first(save)


def _objective(
    context: RunContext, options: DistillTrainingOptions, teacher: Teacher, layers: Mapping[str, QuantizedLinear]
) -> TrainingObjective:
    """KL divergence to the 16-bit model on training text, validated on validation text."""
    model, rows, head = context.loaded.model, context.text.train, context.head
    student = LMHead.of(model)
    draws = options.steps_per_epoch * options.epochs * options.batch_size
    order = draw_order(len(rows), draws, context.seed)

    def loss(indices: Tensor) -> Tensor:
        batch = rows[indices]
        ids, mask = batch.ids.to(model.device), batch.loss_mask.to(model.device)
        hidden = last_hidden_states(model, ids)
        taught = teacher.states["train"][teacher.of_row[indices]].to(model.device)
        kl = kl_to_teacher(hidden[mask], taught[mask], student, head, options.kl_temperature)
        share = options.cross_entropy_share
        return kl if not share else kl.lerp(next_token_cross_entropy(hidden, ids, mask, student), share)

    def validate() -> dict[str, float]:
        held = context.text.validation
        reference = logits_from_states(head, teacher.states["validation"])
        with train.measuring_weights(layers, options.weight_cache):
            return measure_sequences(model_logits(model, held.ids), held.ids, reference, loss_mask=held.loss_mask)

    return TrainingObjective(
        steps_per_epoch=options.steps_per_epoch,
        draw=lambda step: order[step * options.batch_size : (step + 1) * options.batch_size],
        loss=loss,
        weight=lambda indices: int(rows.loss_mask[indices].sum()),
        validate=validate,
        criterion="kl_to_teacher",
        describe=lambda metrics: (
            f"validation KL divergence {metrics['kl_to_teacher']:.4f}, "
            f"token perplexity {metrics['token_perplexity']:.3f}"
        ),
        after_step=lambda done, multiplier: _pull_to_codes(layers, options, done, multiplier),
        throughput=lambda step, seconds: f"{options.batch_size * rows.ids.shape[1] / seconds:.0f} tokens/s",
    )


def _pull_to_codes(
    layers: Mapping[str, QuantizedLinear], options: DistillTrainingOptions, done: float, multiplier: float
) -> None:
    """CAGE: nothing before the last fifth of the steps, then linearly more."""
    share = options.lr * multiplier * options.cage_lambda * (done - _CAGE_FROM) / (1 - _CAGE_FROM)
    for layer in layers.values() if share > 0 else ():
        if isinstance(layer, FakeQuantizedFullLinear):
            layer.pull_to_codes(min(share, 1.0))
