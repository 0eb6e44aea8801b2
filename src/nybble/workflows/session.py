"""The open run folder of a workflow: its log file, the facts about the run, and its end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nybble import processes
from nybble.console import console, log_to, say
from nybble.errors import ExportError
from nybble.files import write_text
from nybble.models.loading import model_fingerprint
from nybble.models.schemes import average_bits, weight_shapes
from nybble.models.selection import LayerSelection, select_layers
from nybble.options.commands import RunCommand
from nybble.report.markdown import run_markdown
from nybble.report.run import result_rows, summary
from nybble.report.tables import as_table
from nybble.run.folder import RunFolder, open_run
from nybble.run.machine import describe_machine
from nybble.run.results import LayerCounts, Phase
from nybble.run.resume import check_same_inputs
from nybble.workflows import init_from
from nybble.workflows.plan import PlannedRun
from nybble.workflows.publish import write_cards

log = logging.getLogger("nybble")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known when the run folder is opened.

    Attributes:
        command: of the results: the command's name, or lora.
        load_seconds: seconds from the start until now.
        limit: documents per lm-eval task, where tasks are measured.
        keep_options: leave the run's config.toml as it is.
    """

    planned: PlannedRun
    command: str
    load_seconds: float
    limit: int | None
    keep_options: bool = False


@contextmanager
def run_session(options: RunCommand, facts: RunFacts) -> Iterator[RunFolder]:
    """The run folder, opened and locked; the log is also written to its log.txt.

    Raises:
        RunError: it cannot be opened, or what the run reads has changed since it began.
    """
    fingerprints = _fingerprints(facts.planned)
    processes.check_same(fingerprints)
    run = open_run(options, facts.keep_options)
    try:
        with log_to(run.path / "log.txt"):
            _note_facts(run, options, facts)
            check_same_inputs(run.results, fingerprints)
            yield run
    finally:
        run.close()


def _note_facts(run: RunFolder, options: RunCommand, facts: RunFacts) -> None:
    results, planned = run.results, facts.planned
    loaded, compression, selection, text = planned.loaded, planned.compression, planned.selection, planned.text
    results.command, results.model, results.seed = facts.command, loaded.name, options.run.seed
    results.machine = describe_machine() | {"processes": processes.count()}
    results.dtype = str(loaded.model.dtype).removeprefix("torch.")
    results.method, results.limit_blocks = compression.method, _limit_of_blocks(options, loaded.model)
    results.init_from = None if compression.init_from is None else str(compression.init_from)
    if not compression.is_made:
        results.init_trained = compression.init_from is not None and init_from.was_trained(compression.init_from)
    results.layers = _layer_counts(selection, loaded.model)
    only = ", what the assistant says" if options.flat().get("assistant_only_loss") else ""
    results.test_data = f"{text.test_source} ({len(text.test)} x {text.test.ids.shape[1]} tokens{only})"
    if len(text.other):
        results.other_data = f"{text.other_source} ({len(text.other)} x {text.other.ids.shape[1]} tokens)"
    results.limit = facts.limit
    results.seconds.setdefault("load", round(facts.load_seconds, 2))


def _limit_of_blocks(options: RunCommand, model: Any) -> int | None:
    """--limit_blocks, where it is a limit."""
    limit = options.flat().get("limit_blocks")
    blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return None if limit is None or (blocks is not None and limit >= blocks) else limit


def _fingerprints(planned: PlannedRun) -> dict[str, str]:
    """Hashes of what the run reads."""
    compression = planned.compression
    fingerprints = {"model": model_fingerprint(planned.loaded.model)} | dict(planned.text.fingerprints)
    if compression.init_from is not None and not compression.is_made:
        fingerprints["4-bit model of --init_from"] = init_from.fingerprint(compression.init_from)
    return fingerprints


def _layer_counts(selection: LayerSelection, model: Any) -> LayerCounts:
    everything = select_layers(model)
    bits = {name: selection.schemes[name].bits for name in selection.linears}
    widths = sorted(set(bits.values()))
    return LayerCounts(
        int4=len(selection.linears),
        int8=len(selection.embeddings),
        tied=selection.tied,
        precision="/".join(f"INT{width}" for width in widths),
        schemes=dict(Counter(str(scheme) for scheme in selection.schemes.values())),
        bits_per_weight=average_bits(selection.schemes, weight_shapes(model, selection)),
        in_16_bits=len(everything.linears) + len(everything.embeddings) - len(selection.schemes),
        bits=bits if len(widths) > 1 else {},
        notes=list(selection.notes),
    )


def finish(run: RunFolder, warnings: Sequence[str], failed_exports: Sequence[ExportError]) -> None:
    """Write and print the report.

    Raises:
        ExportError: after that, where an export failed.
    """
    results = run.results
    limits = [limit for counts in results.exports.values() for limit in counts.get("limits", ())]
    notes = [] if results.layers is None else results.layers.notes
    results.warnings = [*warnings, *notes, *limits, *(f"not exported: {error}" for error in failed_exports)]
    if sent := processes.bytes_sent():
        results.machine["bytes_sent"] = sent
    results.phase = Phase.FINISHED
    for warning in results.warnings:
        log.warning(warning)
    write_cards(run)
    write_text(run.path / "report.md", run_markdown(results))
    console.print(as_table(*result_rows(results)))
    say(summary(results))
    exports = "".join(f", {name}/" for name in results.exports)
    model = ", quantized/" if run.quantized.is_dir() else ""
    say(f"Everything is in {run.path} (report.md, results.json{model}{exports}).")
    if failed_exports:
        raise failed_exports[0]
