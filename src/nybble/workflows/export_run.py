"""Export the 4-bit model of a run, and say how exact the export is."""

from __future__ import annotations

import logging
from dataclasses import asdict

from nybble.export.base import EXPORTERS, Exporter
from nybble.export.checks import note_files
from nybble.export.result import ExportResult
from nybble.files import atomic_folder, carry_over, file_sizes
from nybble.models.checkpoint import open_checkpoint
from nybble.models.companions import companion_files, copy_companions
from nybble.report.labels import embeddings_text, runtime_label
from nybble.run.folder import RunFolder
from nybble.runtime import returning_freed_memory

log = logging.getLogger("nybble")


def export_run(run: RunFolder, name: str, trust_remote_code: bool, compare_logits: bool = False) -> ExportResult:
    """Export the 4-bit model of a run to the folder RUN/name.

    Args:
        compare_logits: compare logits whatever the size of the model.

    Raises:
        ExportError: the format cannot hold the model, or what was read back differs.
    """
    exporter, folder = EXPORTERS[name], run.path / name
    with run.stage(f"export {name}"), returning_freed_memory():
        checkpoint = open_checkpoint(run.quantized, trust_remote_code)
        config = exporter.exported_config(checkpoint.config, checkpoint.selection)
        exporter.check(config, checkpoint.selection)
        log.info("exporting to %s", exporter.label)
        with atomic_folder(folder) as temporary:
            result = exporter.export(checkpoint, temporary, compare_logits)
            copy_companions(companion_files(run.quantized, checkpoint.tokenizer), temporary)
            note_files(temporary, name)
            written = file_sizes(temporary)
            carry_over(folder, temporary, run.results.files.get(name, written if name in run.results.exports else {}))
        run.note_files(name, written)
        run.results.exports[name] = asdict(result) | {"limits": exporter.limits(config)}
    log.info(
        "%s: %d linear layers%s, %s; %s; %s; %.1f MB",
        exporter.label, result.linear_weights, _held(exporter, result),
        embeddings_text(result.embedding_weights, checkpoint.selection.tied), _exactness(result),
        _logits_compared(result, name), result.bytes / 1e6,
    )  # fmt: skip
    return result


def _held(exporter: Exporter, result: ExportResult) -> str:
    """How the format holds weights that it does not have the codes of, in brackets; "" if it has them."""
    parts = [f"{count} weights of {words}" for words, count in result.widened.items()]
    if not exporter.holds_codes:
        parts.append("as values in 16 bits")
    return f" ({', '.join(parts)})" if parts else ""


def _exactness(result: ExportResult) -> str:
    if not result.rounded:
        return "all read back equal to the run's"
    rounded = f"rounded by at most {max(result.rounded.values()):.1e}"
    return f"all read back equal to the run's but {', '.join(result.rounded)}, {rounded}"


def _logits_compared(result: ExportResult, name: str) -> str:
    if result.logit_difference is None:
        return "logits not compared, as the model is large (nybble export --compare_logits)"
    return f"logits in {runtime_label(name)} within {result.logit_difference:.1e} of torch with the weights of the file"
