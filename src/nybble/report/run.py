"""One run: its results as tables of text and as a summary in sentences."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nybble.qat.absorb import WeightChanges
from nybble.report.labels import (
    duration,
    format_label,
    is_export,
    metric_cell,
    metric_columns,
    metric_label,
    ordered_rows,
    row_label,
)
from nybble.report.tables import Cells
from nybble.run.results import Metrics, RunResults, Training

LAYER_HEADINGS = ["layer", "output error, rtn", "output error, compressed", "weight error", "clipped"]
LAYER_NOTE = (
    "Output error: mean square error of a layer's outputs relative to their mean square, on the calibration text. "
    "Weight error: root mean square error of the weights relative to their root mean square. Clipped: share of the "
    "weights outside of the range of their group."
)
CODES_CHANGED, SCALES_MOVED = "codes changed by training", "scales moved by training"
DECODER_NOTE = (
    "Error: relative error of the hidden states after a decoder layer, with all layers before it compressed too (mean "
    "over tokens of squared distance to the 16-bit model's hidden states by their squared length, at the beginning of "
    "the test text; for the last layer after the final norm)."
)
_RECONSTRUCTION_NOTE = (
    " Block-wise reconstruction: relative error of the outputs of one layer for the compressed model's inputs, on "
    "held-out sequences, before and after reconstruction."
)
_TRAINING_TITLES = {"": "adapters", "scales": "scales and norms"}


def recovered_share(models: Mapping[str, Metrics], row: str) -> float | None:
    """Share of the compression damage that training recovered in the model `row`; None if compression did no damage.

    (ppl_compressed - ppl_row) / (ppl_compressed - ppl_16bit), by word perplexity where all three models have it,
    otherwise by token perplexity.
    """
    for metric in ("word_perplexity", "token_perplexity"):
        values = [models[key][metric] for key in ("16bit", "compressed", row) if metric in models.get(key, {})]
        if len(values) == 3:
            full, compressed, trained = values
            return float((compressed - trained) / (compressed - full)) if compressed > full else None
    return None


def kept_compressed(results: RunResults) -> bool:
    """Whether no step of a distillation was better than the compressed model, which ships as it was."""
    training = results.training()
    return results.task is None and training is not None and training.best_step == 0


def shows_recovered(results: RunResults) -> bool:
    """Whether the table of results says how much of the compression damage was recovered: after distillation."""
    return results.trains and results.task is None


def result_rows(results: RunResults) -> Cells:
    """The table of results: a row per model, a column per metric."""
    models, rows = results.models, []
    columns = metric_columns(models, "" if results.task is None else results.task.column)
    for key in ordered_rows(models):
        row = [row_label(results, key), *(metric_cell(column, models[key].get(column)) for column in columns)]
        if shows_recovered(results):
            share = recovered_share(models, key) if key == "tuned" or is_export(key) else None
            share = 0.0 if share is not None and kept_compressed(results) else share
            row.append("-" if share is None else f"{share:.0%}")
        rows.append(row)
    return ["model", *map(metric_label, columns), *(["recovered"] if shows_recovered(results) else [])], rows


def other_rows(results: RunResults) -> Cells:
    """Perplexity and KL divergence on text of another domain; no rows where it was not measured."""
    rows = []
    for key in ordered_rows(results.models):
        metrics = results.models[key]
        if "other_token_perplexity" in metrics:
            cells = (metric_cell(name, metrics[f"other_{name}"]) for name in ("token_perplexity", "kl_to_teacher"))
            rows.append([row_label(results, key), *cells])
    return ["model", metric_label("token_perplexity"), metric_label("kl_to_teacher")], rows


def other_title(results: RunResults) -> str:
    """The heading of `other_rows`."""
    return f"Another domain: {results.other_data}"


def measured_on(results: RunResults, columns: Collection[str] | None = None) -> str:
    """The text, and the number of documents, that metrics were measured on.

    Args:
        columns: the metrics; None: those of this run.
    """
    text = f"Perplexity and KL divergence to the 16-bit model were measured on {results.test_data or 'the test split'}."
    columns = {key for metrics in results.models.values() for key in metrics} if columns is None else columns
    limited = ["word perplexity"] if "word_perplexity" in columns else []
    limited += ["tasks"] if any(key.startswith("task:") for key in columns) else []
    if results.limit is not None and limited:
        were = f"{' and '.join(limited).capitalize()} {'were' if 'tasks' in limited else 'was'}"
        text += f" {were} measured on the first {results.limit} documents only (--limit)."
    return text


def summary(results: RunResults, size: int | None = None) -> str:
    """The outcome of a run in sentences.

    Args:
        results: of the run.
        size: bytes of what ships; None: of the model whose figures are given.
    """
    if "lora16" in results.models:
        text = _summary_of_lora(results)
    elif results.trains:
        text = _summary_of_training(results, size)
    else:
        text = _summary_of_compression(results, size)
    return text or f"{results.model}: the run is not finished; continue it with --resume."


def _summary_of_lora(results: RunResults) -> str:
    metric = _common_metric(results, "16bit", "lora16")
    if metric is None:
        return ""
    full, tuned = (_value(results, row, metric) for row in ("16bit", "lora16"))
    return (
        f"{results.model} tuned in 16-bit with LoRA has {metric_label(metric)} {tuned}; it had {full} before training."
    )


def _summary_of_compression(results: RunResults, size: int | None) -> str:
    shipped = _shipped_row(results)
    metric = _common_metric(results, "16bit", shipped)
    if metric is None:
        return ""
    full, compressed = (_value(results, row, metric) for row in ("16bit", shipped))
    return (
        f"{results.model} compressed to {results.precision} with {results.described_method} ({_runtime(shipped)}) has "
        f"{metric_label(metric)} {compressed}; the 16-bit model has {full}. Compression took "
        f"{duration(results.seconds.get('compress', 0))}. {_size_text(results, shipped, size)}"
    )


def _summary_of_training(results: RunResults, size: int | None) -> str:
    shipped, start = _shipped_row(results), "tuned16" if results.tuned_in_16_bit else "compressed"
    metric = _common_metric(results, "16bit", start, shipped)
    if metric is None:
        return ""
    full, before, after = (_value(results, row, metric) for row in ("16bit", start, shipped))
    text = f"{results.model} in {results.precision} ({_runtime(shipped)}) has {metric_label(metric)} {after}; "
    if results.tuned_in_16_bit:
        text += f"the 16-bit model has {before} after tuning and {full} before."
    else:
        text += f"it had {before} before training, and the 16-bit model has {full}."
    if results.task is None and kept_compressed(results):
        text += " No step of the training was better; the compressed model was kept."
    elif results.task is None:
        text += _recovery_text(results.models, shipped)
    elif results.task.chosen_on_test:
        text += " The ranks were chosen by this score on the test rows, so it is no score on unseen rows."
    seconds = sum(results.seconds.get(stage, 0) for stage in ("train", "train scales"))
    return f"{text} Training took {duration(seconds)}. {_size_text(results, shipped, size)}"


def _shipped_row(results: RunResults) -> str:
    """The first export; without exports the 4-bit model as torch runs it."""
    exports = (row for row in results.models if is_export(row))
    return next(exports, "tuned" if results.trains else "compressed")


def _runtime(row: str) -> str:
    return format_label(row) if is_export(row) else "torch"


def _common_metric(results: RunResults, *rows: str) -> str | None:
    """The metric that the summary compares these models by; None if one of them was not measured."""
    measured = [results.models.get(row, {}) for row in rows]
    if results.task is not None:
        metric = results.task.column
    else:
        metric = "word_perplexity" if all("word_perplexity" in row for row in measured) else "token_perplexity"
    return metric if all(metric in row for row in measured) else None


def _value(results: RunResults, row: str, metric: str) -> str:
    return f"{results.models[row][metric]:.{2 if results.task is None else 4}f}"


def _recovery_text(models: Mapping[str, Metrics], row: str) -> str:
    """A sentence on what training recovered; nothing if compression did no damage."""
    share = recovered_share(models, row)
    if share is None:
        return ""
    before, after = (models[key]["kl_to_teacher"] for key in ("compressed", row))
    if share < 0 and after < before:
        fell = f"from {before:.4f} to {after:.4f}"
        return f" Training lowered the KL divergence to the 16-bit model {fell}, and not the perplexity."
    if share > 1:  # The text suits the trained model better than the 16-bit one: the KL divergence tells more.
        return (
            " This is below the 16-bit model's perplexity; the KL divergence to the 16-bit model is "
            f"{after:.4f} ({before:.4f} before training)."
        )
    return f" Training recovered {share:.0%} of the compression damage." if share >= 0 else " Training made it worse."


def _size_text(results: RunResults, row: str, size: int | None) -> str:
    size, full = results.models[row]["bytes"] if size is None else size, results.models["16bit"]["bytes"]
    digits = 0 if min(size, full) >= 10e6 else 1
    return f"Size: {size / 1e6:.{digits}f} MB (16-bit: {full / 1e6:.{digits}f} MB)."


def error_cells(error: Mapping[str, float | None]) -> list[str]:
    """The cells below LAYER_HEADINGS[1:] for one layer of RunResults.layer_errors."""
    outputs = ["-" if error[key] is None else f"{error[key]:.3%}" for key in ("rtn", "compressed")]
    return [*outputs, f"{error['weight']:.2%}", f"{error['clipped']:.3%}"]


def layer_changes(results: RunResults) -> dict[str, dict[str, float]]:
    """Heading -> layer -> what training changed in it; without training there are no headings."""
    changes = results.changes
    if changes is None:
        return {}
    shares = {CODES_CHANGED: changes.layer_codes_changed, SCALES_MOVED: changes.layer_scales_moved}
    return {heading: layers for heading, layers in shares.items() if layers}


def layer_rows(results: RunResults) -> Cells:
    """A row per 4-bit layer: bits where they differ, errors of the compression, and what training changed."""
    changes = layer_changes(results)
    bits = {} if results.layers is None else results.layers.bits
    rows = [
        [
            name,
            *([str(bits.get(name, "-"))] if bits else []),
            *error_cells(error),
            *(f"{layers[name]:.2%}" if name in layers else "-" for layers in changes.values()),
        ]
        for name, error in results.layer_errors.items()
    ]
    return [LAYER_HEADINGS[0], *(["bits"] if bits else []), *LAYER_HEADINGS[1:], *changes], rows


def decoder_note(results: RunResults) -> str:
    """What the columns of `decoder_rows` are."""
    return DECODER_NOTE + (_RECONSTRUCTION_NOTE if results.block_losses else "")


def decoder_rows(results: RunResults) -> Cells:
    """A row per decoder layer: errors of the hidden states, and block-wise reconstruction where the method has it."""
    columns = {
        f"error, {row_label(results, row).partition(', ')[2]}": list(errors)
        for row, errors in results.decoder_errors.items()
    }
    if results.block_losses:
        losses = list(results.block_losses.values())
        columns |= {
            "reconstruction error, before": [before for before, _ in losses],
            "reconstruction error, after": [after for _, after in losses],
        }
    count = max(map(len, columns.values()), default=0)
    return ["decoder layer", *columns], [
        [str(i), *(f"{values[i]:.3%}" if i < len(values) else "-" for values in columns.values())] for i in range(count)
    ]


def validation_rows(training: Training) -> Cells:
    """A row per validation of a training."""
    keys = [key for key in training.validation[0] if key not in ("step", "tokens")]
    rows = [[f"{row['step']:.0f}", *(metric_cell(key, row[key]) for key in keys)] for row in training.validation]
    return ["step", *map(metric_label, keys)], rows


def changes_text(changes: WeightChanges) -> str:
    """What training changed in the 4-bit weights, as a clause without a full stop."""
    return (
        f"Training in INT4 changed {changes.codes_changed:.1%} of the codes, and scales by {changes.scales_moved:.2%} "
        "(root mean square)"
    )


def training_title(results: RunResults, training: Training) -> str:
    """What a training trained, where the run has two trainings; otherwise empty."""
    return f" of {_TRAINING_TITLES[training.name]}" if len(results.trainings) > 1 else ""


def schemes_text(results: RunResults) -> str:
    """Which layers have which scheme, and how many bits a weight; "" where the results do not have it."""
    layers = results.layers
    if layers is None or layers.bits_per_weight is None:
        return ""
    counts = ", ".join(f"{count} x {scheme}" for scheme, count in layers.schemes.items())
    text = f"{counts}. Average: {layers.bits_per_weight:.2f} bits a weight, with scales and zero points."
    return text + (f" {layers.in_16_bits} layers stay in 16 bits." if layers.in_16_bits else "")


def memory_text(results: RunResults) -> str:
    """Peak memory per device."""
    return ", ".join(f"{value / 1e9:.2f} GB ({kind})" for kind, value in results.peak_memory_bytes.items() if value)


def versions_text(results: RunResults) -> str:
    """Versions of the packages that the run used."""
    return ", ".join(f"{name} {version}" for name, version in results.machine.get("versions", {}).items())
