"""`nybble compress`: a 16-bit model becomes an INT4 model without training.

validate -> read the text -> load -> plan -> open the run -> compress -> export -> measure -> report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.callbacks import Callback
from nybble.evaluation.decoder_error import decoder_outputs
from nybble.evaluation.lm_eval import LmEvalConfig
from nybble.evaluation.perplexity import logits_from_states
from nybble.files import remove_folder
from nybble.models.quantized_model import save_quantized
from nybble.options.commands import CompressOptions
from nybble.run.results import Phase
from nybble.workflows import placement, plan, session, steps, text
from nybble.workflows.begin import Beginning, begin
from nybble.workflows.measure import (
    DECODER_ERROR_TOKENS,
    SIXTEEN_BIT,
    Evaluator,
    measure_row,
    other_domain,
    size_in_16_bits,
)
from nybble.workflows.positions import compressed_positions
from nybble.workflows.steps import RunContext


def compress(
    options: CompressOptions, callbacks: Sequence[Callback] = (), known: Mapping[str, Any] | None = None
) -> Path:
    """Run the whole workflow; returns the run folder.

    Args:
        callbacks: are told of stages and steps.
        known: what another run has measured of the 16-bit model on the same tasks.

    Raises:
        NybbleError: whatever a person can repair.
    """
    begun = begin(options, text.compression_request)
    with placement.freed_memory(begun.on_disk):
        return _compress(begun, callbacks, known)


def _compress(
    begun: Beginning[CompressOptions], callbacks: Sequence[Callback], known: Mapping[str, Any] | None
) -> Path:
    """Everything from the model to the report."""
    options, loaded = begun.options, begun.load_model()
    evaluation, data_dir = options.evaluation, options.text.data_dir
    selection = plan.select(loaded, options.scheme)
    compression = plan.plan_compression(options.compression, loaded, selection)
    prepared = begun.read.for_method(compression.calibrates)
    options = options.replace(output_dir=str(options.folder), method=compression.method)
    planned = plan.check_fit(options, evaluation, loaded, selection, compression, prepared)
    placement.plan_compression_memory(options, planned)
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
        states = steps.teacher_states(context, prepared.measured(), batch=1)
        tasks = LmEvalConfig(evaluation.eval_tasks, evaluation.eval_batch_size, evaluation.limit, data_dir)
        reference = logits_from_states(context.head, states["test"])
        other = other_domain(context.head, prepared, states)
        evaluator = Evaluator(prepared.test, reference, tasks, other=other, decoder_outputs=outputs)
        measure_row(run, evaluator, SIXTEEN_BIT, loaded, size_in_16_bits(loaded.model), known)
        if not run.results.phase.reached(Phase.QUANTIZED):
            # The model is not needed any more: what is measured is loaded from the folder.
            compressed = steps.compress_model(context)
            positions = compressed_positions(context, compressed)
            compressed.release_inits()
            weights = compressed.weights
            run.on_first(lambda: save_quantized(run.quantized, loaded, weights, positions, release=True))
            run.reach(Phase.QUANTIZED)
        run.on_first(lambda: _finish(context, evaluator))
        return run.path


def _finish(context: RunContext, evaluator: Evaluator) -> None:
    """Delete what is no longer needed, export, measure, report."""
    remove_folder(context.run.path / "compress")
    session.finish(context.run, [], steps.measure_shipped(context, evaluator, "compressed"))
