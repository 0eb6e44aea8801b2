"""results.json -> a table in the terminal, one sentence, and report.md; several of them -> one comparison. Numbers come from results.json alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nybble.report.tables import as_markdown, as_table

# First line of the Markdown that `nybble report` writes: it replaces no other.
MADE_HERE = "<!-- made by nybble report -->"
# Rows in this order; key in results["models"] -> what people read.
ROWS = {
    "16bit": "16 bit",
    "lora16": "16 bit + LoRA",
    "learnt": "16 bit, tuned",
    "compressed": "4 bit, compressed",
    "tuned": "4 bit, tuned (torch)",
    "openvino": "4 bit, tuned (OpenVINO)",
}
_IN_16_BITS = ("16bit", "lora16", "learnt")


def label(results: dict[str, Any], row: str) -> str:
    """What people read for a row; a run that only compresses has nothing tuned, and one that goes on with a tuned model starts from that."""
    text = ROWS.get(row, row)
    if row == "compressed" and starts_tuned(results):
        return "4 bit, tuned before"
    return text if tunes(results) else text.replace("tuned", "compressed")


def tunes(results: dict[str, Any]) -> bool:
    """Whether the run trains after compressing."""
    return bool(results.get("kind", "distill") != "compress")


def finished(results: dict[str, Any]) -> bool:
    """Whether the run has measured all that it makes: it writes its warnings last."""
    return "warnings" in results


def replaced(results: dict[str, Any]) -> bool:
    """Whether other ranks are in place than those that tune had chosen: from `nybble search --apply`, or given when the run was resumed."""
    return "chosen" in results and results.get("configuration") not in (None, results["chosen"])


def replaced_by(results: dict[str, Any]) -> str:
    """Where the ranks in place come from, if tune had chosen others."""
    return "found by nybble search" if results.get("applied") == results["configuration"] else "given"


def chosen_on_test(results: dict[str, Any]) -> bool:
    """Whether ranks were chosen by the score on the test rows, as published results are."""
    return results.get("selected_on") == "test" and len(results.get("candidates", ())) > 1 and not replaced(results)


def starts_tuned(results: dict[str, Any]) -> bool:
    """Whether the run goes on with a model that had been trained end to end."""
    return bool(results.get("start_tuned", False))


def learns_first(results: dict[str, Any]) -> bool:
    """Whether what the run compresses has learnt a task in 16 bit."""
    return "learnt" in results["models"]


def improvement(models: dict[str, Any], tuned: str) -> float | None:
    """Share of the damage that tuning repaired: (ppl_compressed - ppl_tuned) / (ppl_compressed - ppl_16bit).

    By word perplexity where all three have it, else by token perplexity; None where compression did no damage.
    """
    for metric in ("word_perplexity", "token_perplexity"):
        values = [models.get(row, {}).get(metric) for row in ("16bit", "compressed", tuned)]
        if all(isinstance(value, int | float) for value in values):
            full, compressed, repaired = values
            return (compressed - repaired) / (compressed - full) if compressed > full else None
    return None


def _columns(models: dict[str, Any]) -> list[str]:
    seen = dict.fromkeys(key for row in models.values() for key in row)
    first = [key for key in ("token_perplexity", "word_perplexity", "kl_to_teacher") if key in seen]
    tasks = [key for key in seen if key.startswith("task:")]
    return [*first, *tasks, "bytes"]


def heading(column: str) -> str:
    return {
        "token_perplexity": "token perplexity",
        "word_perplexity": "word perplexity",
        "kl_to_teacher": "KL to 16 bit",
        "bytes": "size",
        "loss": "held-out loss",
    }.get(column, column.removeprefix("task:"))


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value:.4f}" if column == "kl_to_teacher" or column.startswith("task:") else f"{value:.3f}"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text of the table of results."""
    models = results["models"]
    columns = _columns(models)
    table = []
    for key in ROWS:
        if key in models:
            line = [label(results, key), *(_cell(c, models[key].get(c)) for c in columns)]
            if tunes(results) and "task" not in results:
                repaired = improvement(models, key) if key in ("tuned", "openvino") else None
                line.append("-" if repaired is None else f"{repaired:.0%}")
            table.append(line)
    return ["model", *map(heading, columns), *(["repaired"] if tunes(results) and "task" not in results else [])], table


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    return as_table(*rows(results))


def _repair(models: dict[str, Any], tuned: str) -> str:
    """What tuning repaired, in words; nothing where compression did no damage."""
    repaired = improvement(models, tuned)
    if repaired is None:
        return ""
    if repaired > 1:  # the text suits the tuned model better: of what was repaired the KL tells more
        before, after = (models[row]["kl_to_teacher"] for row in ("compressed", tuned))
        return f": less than the 16-bit model's, to which the KL is {after:.3f} ({before:.3f} before tuning)"
    return f": {repaired:.0%} of the damage repaired" if repaired >= 0 else ": tuning made it worse"


def sentence(results: dict[str, Any]) -> str:
    """What came out, in words."""
    models, name, trained, task = results["models"], results["model"], tunes(results), "task" in results
    last = (
        "openvino" if "openvino" in models else "lora16" if "lora16" in models else "tuned" if trained else "compressed"
    )
    needed = (
        ("16bit", last)
        if last == "lora16" or not trained
        else ("16bit", "learnt" if learns_first(results) else "compressed", last)
    )
    measured = [models.get(row, {}) for row in needed]
    metric = (
        task_column(results)
        if task
        else "word_perplexity"
        if all("word_perplexity" in row for row in measured)
        else "token_perplexity"
    )
    if not all(metric in row for row in measured):
        return f"{name}: the run is not finished; go on with --resume."
    full, *before, after = (f"{row[metric]:.{4 if task else 2}f}" for row in measured)
    if last == "lora16":
        return f"{name} tuned in 16 bit by LoRA: {heading(metric)} {after}, against {full} before."
    where, seconds, size = "OpenVINO" if last == "openvino" else "torch", results["seconds"], models[last]["bytes"]
    if trained:
        text = f"{name} in 4 bits ({where}): {heading(metric)} {after}, against "
        text += (
            f"{before[0]} tuned in 16 bit and {full}"
            if learns_first(results)
            else f"{before[0]} before tuning and {full} in 16 bit"
        )
        text += " without tuning" if task else _repair(models, last)
        text += " (ranks chosen by this very score: not one on unseen rows)" if chosen_on_test(results) else ""
        text += f", in {sum(seconds.get(stage, 0) for stage in ('train', 'train scales')) / 60:.1f} minutes of training"
    else:
        text = f"{name} in 4 bits by {results['method']} ({where}): {heading(metric)} {after} against {full} in 16 bit"
        text += f", in {seconds.get('compress', 0):.0f} s of compression"
    return f"{text}; {size / 1e6:.0f} MB, {models['16bit']['bytes'] / size:.1f} times smaller than 16 bit."


def task_column(results: dict[str, Any]) -> str:
    """Where the figure of the task that was tuned on stands among what was measured."""
    return f"task:{Path(results['task']['name']).stem} {results['task']['metric']}"


LAYER_HEADINGS = ["layer", "output error, rtn", "compressed", "weight error", "clipped"]
LAYER_NOTE = (
    "Output error: mean square error of a layer's outputs relative to their mean square, on the calibration text. "
    "Weight error: root mean square error of the weights relative to their root mean square. Clipped: share of the weights outside of their range."
)


def error_cells(error: dict[str, Any]) -> list[str]:
    """A layer's output error by rtn and as compressed, weight error, clipped share."""
    outputs = ["-" if error[key] is None else f"{error[key]:.3%}" for key in ("rtn", "compressed")]
    return [*outputs, f"{error['weight']:.2%}", f"{error['clipped']:.3%}"]


MOVED = {"layer_codes_changed": "codes changed by training", "layer_scales_moved": "scales moved by training"}


def layer_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: of every 4-bit layer what compression did, and where there was training, what that changed."""
    shares = {heading: results[key] for key, heading in MOVED.items() if results.get(key)}
    lines = [
        [name, *error_cells(error), *(f"{share[name]:.2%}" if name in share else "-" for share in shares.values())]
        for name, error in results["layer_errors"].items()
    ]
    return [*LAYER_HEADINGS, *shares], lines


DECODER_NOTE = (
    "Error: of what comes out of a decoder layer, all layers before it being 4-bit ones too, relative to the 16-bit model's (mean over tokens of squared "
    "distance by squared length; the beginning of the test text; the last layer's after the final norm). Reconstruction: error of what one layer alone "
    "gives for the compressed model's inputs, on held-out sequences, before and after it was trained block-wise."
)


def decoder_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: of every decoder layer its error compressed and tuned, and what block-wise reconstruction did."""
    errors = {
        f"error, {label(results, row).removeprefix('4 bit, ')}": found
        for row, found in results.get("decoder_errors", {}).items()
    }
    blocks = list(results.get("block_losses", {}).values())
    columns = errors | (
        {"reconstruction, before": [before for before, _ in blocks], "after": [after for _, after in blocks]}
        if blocks
        else {}
    )
    count = max(map(len, columns.values()), default=0)
    return ["decoder layer", *columns], [
        [str(i), *(f"{found[i]:.3%}" if i < len(found) else "-" for found in columns.values())] for i in range(count)
    ]


def scored_by(results: dict[str, Any]) -> tuple[str, str]:
    """What configurations were compared by, as a heading, and in a sentence. (Runs of earlier versions: always by log-likelihood.)"""
    if results["task"].get("scored_by") == "share":
        return "share", "Share: of the right answer among the choices, mean over rows."
    return "log-likelihood", "Log-likelihood: of the right answer, mean over rows."


def score_of(row: dict[str, Any]) -> float:
    """Of a configuration; runs of earlier versions call it otherwise."""
    return float(row["score"] if "score" in row else row["log_likelihood"])


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 of a single one."""
    middle = statistics.fmean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def before_and_after(before: dict[str, Any], after: dict[str, Any], column: str) -> str:
    """A task's figure of two models, and how far apart they are row by row, with the standard error of that, where the rows are known."""
    text = f"{before[column]:.4f} before, {after[column]:.4f} after"
    rights = [model.get(column.replace("task:", "right:", 1), "") for model in (before, after)]
    if not rights[0] or len(rights[0]) != len(rights[1]):
        return text
    each = [int(b) - int(a) for a, b in zip(*rights, strict=True)]
    return f"{text} (row by row {statistics.fmean(each):+.4f} +- {standard_error(each):.4f})"


def ranks_written(configuration: Sequence[int]) -> str:
    """One rank for each decoder layer, or one for all where they are the same."""
    alike = len(configuration) > 1 and len(set(configuration)) == 1
    return f"{configuration[0]} everywhere" if alike else " ".join(map(str, configuration))


def candidate_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the configurations that were compared after training."""
    on_test = "test" in results["candidates"][0]
    lines = []
    for row in results["candidates"]:
        behind = "chosen" if row["configuration"] == results["chosen"] else f"{row['behind']:.4f} +- {row['error']:.4f}"
        line = [
            row["why"],
            f"{score_of(row):.4f}",
            behind,
            "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
        ]
        lines.append([*line, *([f"{row['test']:.4f}"] if on_test else []), ranks_written(row["configuration"])])
    return [
        "candidate",
        scored_by(results)[0],
        "behind",
        "accuracy",
        *(["test"] if on_test else []),
        "rank of each decoder layer",
    ], lines


def search_note(results: dict[str, Any]) -> str:
    """What the figures of a search are."""
    note = f"{scored_by(results)[1]} Fresh rows: by which neither tune nor a search has chosen; behind: mean difference row by row, with its standard error."
    return note + (
        " All of the adapters on 16-bit weights, before these were compressed." if learns_first(results) else ""
    )


FRONT_NOTE = "Not beaten by another trial of nsga2 in score and sum of ranks."


def search_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what `nybble search` compared: what tune had chosen, what is in place if it is another, and the best of each sampler."""
    found = results["search"]["winners"]
    judged = "rows searched" if found[0]["fresh"] is None else "fresh rows"
    headings = [
        "found by",
        "rows searched",
        "fresh rows",
        f"behind the best ({judged})",
        f"accuracy ({judged})",
        "sum of ranks",
        "rank of each decoder layer",
    ]
    lines = []
    for row in found:
        line = [
            row["by"],
            f"{score_of(row):.4f}",
            "-" if row["fresh"] is None else f"{row['fresh']:.4f}",
            f"{row['behind']:.4f} +- {row['error']:.4f}",
        ]
        lines.append(
            [
                *line,
                "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
                str(row["rank_sum"]),
                ranks_written(row["configuration"]),
            ]
        )
    return headings, lines


def front_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the configurations that no other one searched by nsga2 beats in both aims."""
    lines = [
        [f"{score_of(row):.4f}", str(row["rank_sum"]), ranks_written(row["configuration"])]
        for row in results["search"]["front"]
    ]
    return ["rows searched", "sum of ranks", "rank of each decoder layer"], lines


TESTED_NOTE = "One at a time, by `nybble tune --resume --eval_only`, on the test rows: no figure to choose by."


def tested_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the configurations that --eval_only has scored."""
    metric = results["task"]["metric"]
    return [metric, "rank of each decoder layer"], [
        [f"{row[metric]:.4f}", ranks_written(row["configuration"])] for row in results["tested"]
    ]


def _search_markdown(results: dict[str, Any]) -> str:
    found = results["search"]
    text = f"## Search\n\nThe first {found['trials']} trials of each sampler. {search_note(results)}\n\n{as_markdown(*search_rows(results))}"
    if found.get("front"):
        text += f"\n\n{FRONT_NOTE}\n\n{as_markdown(*front_rows(results))}"
    return text


def _candidates_markdown(results: dict[str, Any]) -> str:
    rows = f"{results['selected_on'].replace('_', '-')} rows" + (", in 16 bit" if learns_first(results) else "")
    return (
        f"## Configurations\n\nOf the ranks {' '.join(map(str, results['task']['space']))}, chosen on {rows}. "
        f"{scored_by(results)[1]} Behind: mean difference row by row, with its standard error.\n\n"
        + as_markdown(*candidate_rows(results))
        + (
            f"\n\nIn place: {ranks_written(results['configuration'])}, {replaced_by(results)}."
            if replaced(results)
            else ""
        )
    )


def moved(results: dict[str, Any]) -> str:
    """What training did to the 4-bit weights, in words."""
    text = f"Training in 4 bits changed {results['codes_changed']:.1%} of the codes"
    return text + (
        f", and scales by {results['scales_moved']:.2%} (root mean square)" if "scales_moved" in results else ""
    )


def trainings(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of what the run trained, and its losses: one training, or that of adapters on 16-bit weights and then that of scales and norms in 4 bits."""
    return (
        [(" of adapters", results), (" of scales and norms", results["scales"])]
        if "scales" in results
        else [("", results)]
    )


def _errors_markdown(results: dict[str, Any]) -> str:
    return f"## Compression ({results.get('method', 'rtn')})\n\n{LAYER_NOTE}\n\n{as_markdown(*layer_rows(results))}"


def measured_on(results: dict[str, Any]) -> str:
    """Which text and how much of the tasks the numbers are of."""
    text = f"Perplexity and KL on {results.get('test', 'the test split')}."
    return text + (
        f" Word perplexity and tasks on the first {results['task_limit']} documents only (--task_limit)."
        if "task_limit" in results
        else ""
    )


def markdown(results: dict[str, Any]) -> str:
    """report.md."""
    seconds, memory = results["seconds"], results.get("peak_memory_bytes", {})
    what = (
        f"tuning on {results['task']['name']}"
        if "task" in results
        else "distillation"
        if tunes(results)
        else "compression"
    )
    title = (
        f"16-bit LoRA, {what}" if "lora16" in results["models"] else f"4-bit {what} ({results.get('method', 'rtn')})"
    )
    parts = [
        f"# {results['model']}: {title}",
        sentence(results),
        as_markdown(*rows(results)),
        measured_on(results)
        + (
            " Repaired = (perplexity before tuning - after) / (before - 16 bit)."
            if tunes(results) and "task" not in results
            else ""
        ),
    ]
    if results.get("warnings"):
        parts.append("\n".join(f"**Warning:** {warning}" for warning in results["warnings"]))
    for title, training in trainings(results):
        if training.get("validation"):
            keys = [key for key in training["validation"][0] if key not in ("step", "tokens")]
            lines = [
                [f"{measured['step']:.0f}", *(f"{measured[key]:.4f}" for key in keys)]
                for measured in training["validation"]
            ]
            parts.append(f"## Validation{title}\n\n" + as_markdown(["step", *map(heading, keys)], lines))
    if results.get("candidates"):
        parts.append(_candidates_markdown(results))
    if "search" in results:
        parts.append(_search_markdown(results))
    if "tested" in results:
        parts.append(f"## Tested configurations\n\n{TESTED_NOTE}\n\n{as_markdown(*tested_rows(results))}")
    if (decoder := decoder_rows(results))[1]:
        parts.append(f"## Decoder layers\n\n{DECODER_NOTE}\n\n{as_markdown(*decoder)}")
    if results.get("layer_errors"):
        parts.append(_errors_markdown(results))
    parts.append(
        "## Cost\n\n| stage | seconds |\n| --- | ---: |"
        + "".join(f"\n| {stage} | {value:.1f} |" for stage, value in seconds.items())
    )
    parts[-1] += f"\n| all | {sum(seconds.values()):.1f} |"
    parts.append(
        "Peak memory: " + ", ".join(f"{value / 1e9:.2f} GB ({kind})" for kind, value in memory.items() if value) + "."
    )
    if "codes_changed" in results:
        parts.append(f"{moved(results)} ({results['layers']['int4']} layers).")
    parts.append(
        f"## How\n\n    {results['command']}\n\nSeed {results.get('seed')}. "
        + ", ".join(f"{k} {v}" for k, v in results["machine"]["versions"].items())
    )
    return "\n\n".join(parts) + "\n"
