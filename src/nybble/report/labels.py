"""The words of reports: names of models, metrics and export formats, and how numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.export.base import EXPORTERS
from nybble.report.figures import standard_error
from nybble.run.results import Metrics, RunResults, TaskResults

# Keys of RunResults.models that are no export formats, in the order of tables.
BASE_ROWS = ("16bit", "lora16", "tuned16", "compressed", "tuned")
ROWS_16_BIT = ("16bit", "lora16", "tuned16")
_HEADINGS = {
    "token_perplexity": "token perplexity",
    "word_perplexity": "word perplexity",
    "kl_to_teacher": "KL divergence to 16-bit",
    "bytes": "size",
    "loss": "held-out loss",
}


def format_label(name: str) -> str:
    """The name of an export format as its exporter writes it; the format's key where no exporter is known."""
    return str(getattr(EXPORTERS[name], "label", name)) if name in EXPORTERS else name


def runtime_label(name: str) -> str:
    """What computes with an export of a format when nybble opens it."""
    return str(getattr(EXPORTERS[name], "runtime", "")) or format_label(name) if name in EXPORTERS else name


def embeddings_text(count: int, tied: bool) -> str:
    """The number of quantized embeddings and heads in words. `tied`: the head is the embedding."""
    if count == 1:
        return "1 embedding (also the head)" if tied else "1 embedding or head"
    return f"{count} embeddings and heads"


def is_export(row: str) -> bool:
    """Whether a key of RunResults.models is an export format."""
    return row not in BASE_ROWS


def ordered_rows(models: Mapping[str, Metrics]) -> list[str]:
    """Keys of RunResults.models in the order of tables; exports stand last, in the order of measurement."""
    return [row for row in BASE_ROWS if row in models] + [row for row in models if is_export(row)]


def trained_word(results: RunResults) -> str:
    """What the run did to its 4-bit model: compressed, distilled or tuned."""
    return {"compress": "compressed", "distill": "distilled"}.get(results.command, "tuned")


def row_label(results: RunResults, row: str) -> str:
    """The name of one model of a run, such as "INT4, tuned (torch)"."""
    if row == "16bit":
        return "16-bit"
    if row == "lora16":
        return "16-bit + LoRA"
    if row == "tuned16":
        return "16-bit, tuned"
    if row == "compressed":
        return f"{results.precision}, {'trained before this run' if results.init_trained else 'compressed'}"
    runtime = "torch" if row == "tuned" else format_label(row)
    return f"{results.precision}, {trained_word(results)} ({runtime})"


def metric_label(column: str) -> str:
    """The heading of a key of Metrics."""
    return _HEADINGS.get(column, column.removeprefix("task:"))


def metric_columns(models: Mapping[str, Mapping[str, Any]], first: str = "") -> list[str]:
    """Keys of Metrics that a table shows: perplexities, KL divergence, tasks, size.

    Args:
        first: the metric that the models are compared by, where it is a task's.
    """
    columns = _in_order(models)
    return [first, *(column for column in columns if column != first)] if first in columns else columns


def _in_order(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = dict.fromkeys(key for metrics in models.values() for key in metrics)
    first = [key for key in ("token_perplexity", "word_perplexity", "kl_to_teacher") if key in known]
    return [*first, *(key for key in known if key.startswith("task:")), "bytes"]


def metric_cell(column: str, value: Any) -> str:
    """A value of Metrics as text; "-" where it was not measured."""
    if value is None:
        return "-"
    if column == "bytes":
        return f"{value / 1e6:.1f} MB"
    fine = column in ("kl_to_teacher", "loss", "accuracy") or column.startswith("task:")
    return f"{value:.4f}" if fine else f"{value:.3f}"


def held_out_loss(task: TaskResults) -> str:
    """What the validation of a task computes."""
    return "1 - share of the right choice" if task.scored_by == "share" else "- log-likelihood per token"


def duration(seconds: float) -> str:
    """A time in words: seconds up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def ranks_text(configuration: Sequence[int]) -> str:
    """One rank per decoder layer, or one for all where they are equal."""
    uniform = len(configuration) > 1 and len(set(configuration)) == 1
    return f"{configuration[0]} everywhere" if uniform else " ".join(map(str, configuration))


def before_and_after(before: Metrics, after: Metrics, column: str) -> str:
    """A task's score of two models; where the rows are known, also the mean difference row by row, with its error."""
    text = f"{before[column]:.4f} before, {after[column]:.4f} after"
    rights = [metrics.get(column.replace("task:", "right:", 1), "") for metrics in (before, after)]
    if not rights[0] or len(rights[0]) != len(rights[1]):
        return text
    differences = [int(b) - int(a) for a, b in zip(*rights, strict=True)]
    return f"{text} (row by row {statistics.fmean(differences):+.4f} +- {standard_error(differences):.4f})"
