"""results.json -> a table in the terminal, one sentence, and report.md; several of them -> one comparison. Numbers come from results.json alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

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
    last = "openvino" if "openvino" in models else "lora16" if "lora16" in models else "tuned" if trained else "compressed"
    needed = ("16bit", last) if last == "lora16" or not trained else ("16bit", "learnt" if learns_first(results) else "compressed", last)
    measured = [models.get(row, {}) for row in needed]
    metric = task_column(results) if task else "word_perplexity" if all("word_perplexity" in row for row in measured) else "token_perplexity"
    if not all(metric in row for row in measured):
        return f"{name}: the run is not finished; go on with --resume."
    full, *before, after = (f"{row[metric]:.{4 if task else 2}f}" for row in measured)
    if last == "lora16":
        return f"{name} tuned in 16 bit by LoRA: {heading(metric)} {after}, against {full} before."
    where, seconds, size = "OpenVINO" if last == "openvino" else "torch", results["seconds"], models[last]["bytes"]
    if trained:
        text = f"{name} in 4 bits ({where}): {heading(metric)} {after}, against "
        text += f"{before[0]} tuned in 16 bit and {full}" if learns_first(results) else f"{before[0]} before tuning and {full} in 16 bit"
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
    outputs = ["-" if error[key] is None else f"{error[key]:.3%}" for key in ("rtn", "start")]
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
    errors = {f"error, {label(results, row).removeprefix('4 bit, ')}": found for row, found in results.get("decoder_errors", {}).items()}
    blocks = list(results.get("block_losses", {}).values())
    columns = errors | ({"reconstruction, before": [before for before, _ in blocks], "after": [after for _, after in blocks]} if blocks else {})
    count = max(map(len, columns.values()), default=0)
    return ["decoder layer", *columns], [[str(i), *(f"{found[i]:.3%}" if i < len(found) else "-" for found in columns.values())] for i in range(count)]


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
        line = [row["why"], f"{score_of(row):.4f}", behind, "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"]
        lines.append([*line, *([f"{row['test']:.4f}"] if on_test else []), ranks_written(row["configuration"])])
    return ["candidate", scored_by(results)[0], "behind", "accuracy", *(["test"] if on_test else []), "rank of each decoder layer"], lines


def search_note(results: dict[str, Any]) -> str:
    """What the figures of a search are."""
    note = f"{scored_by(results)[1]} Fresh rows: by which neither tune nor a search has chosen; behind: mean difference row by row, with its standard error."
    return note + (" All of the adapters on 16-bit weights, before these were compressed." if learns_first(results) else "")


FRONT_NOTE = "Not beaten by another trial of nsga2 in score and sum of ranks."


def search_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what `nybble search` compared: what tune had chosen, what is in place if it is another, and the best of each sampler."""
    found = results["search"]["winners"]
    judged = "rows searched" if found[0]["fresh"] is None else "fresh rows"
    headings = ["found by", "rows searched", "fresh rows", f"behind the best ({judged})", f"accuracy ({judged})", "sum of ranks", "rank of each decoder layer"]
    lines = []
    for row in found:
        line = [row["by"], f"{score_of(row):.4f}", "-" if row["fresh"] is None else f"{row['fresh']:.4f}", f"{row['behind']:.4f} +- {row['error']:.4f}"]
        lines.append([*line, "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}", str(row["rank_sum"]), ranks_written(row["configuration"])])
    return headings, lines


def front_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the configurations that no other one searched by nsga2 beats in both aims."""
    lines = [[f"{score_of(row):.4f}", str(row["rank_sum"]), ranks_written(row["configuration"])] for row in results["search"]["front"]]
    return ["rows searched", "sum of ranks", "rank of each decoder layer"], lines


TESTED_NOTE = "One at a time, by `nybble tune --resume --eval_only`, on the test rows: no figure to choose by."


def tested_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the configurations that --eval_only has scored."""
    metric = results["task"]["metric"]
    return [metric, "rank of each decoder layer"], [[f"{row[metric]:.4f}", ranks_written(row["configuration"])] for row in results["tested"]]


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
        + (f"\n\nIn place: {ranks_written(results['configuration'])}, {replaced_by(results)}." if replaced(results) else "")
    )


def moved(results: dict[str, Any]) -> str:
    """What training did to the 4-bit weights, in words."""
    text = f"Training in 4 bits changed {results['codes_changed']:.1%} of the codes"
    return text + (f", and scales by {results['scales_moved']:.2%} (root mean square)" if "scales_moved" in results else "")


def trainings(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of what the run trained, and its losses: one training, or that of adapters on 16-bit weights and then that of scales and norms in 4 bits."""
    return [(" of adapters", results), (" of scales and norms", results["scales"])] if "scales" in results else [("", results)]


def _errors_markdown(results: dict[str, Any]) -> str:
    return f"## Compression ({results.get('method', 'rtn')})\n\n{LAYER_NOTE}\n\n{as_markdown(*layer_rows(results))}"


def measured_on(results: dict[str, Any]) -> str:
    """Which text and how much of the tasks the numbers are of."""
    text = f"Perplexity and KL on {results.get('test', 'the test split')}."
    return text + (f" Word perplexity and tasks on the first {results['task_limit']} documents only (--task_limit)." if "task_limit" in results else "")


def markdown(results: dict[str, Any]) -> str:
    """report.md."""
    seconds, memory = results["seconds"], results.get("peak_memory_bytes", {})
    what = f"tuning on {results['task']['name']}" if "task" in results else "distillation" if tunes(results) else "compression"
    title = f"16-bit LoRA, {what}" if "lora16" in results["models"] else f"4-bit {what} ({results.get('method', 'rtn')})"
    parts = [
        f"# {results['model']}: {title}",
        sentence(results),
        as_markdown(*rows(results)),
        measured_on(results) + (" Repaired = (perplexity before tuning - after) / (before - 16 bit)." if tunes(results) and "task" not in results else ""),
    ]
    if results.get("warnings"):
        parts.append("\n".join(f"**Warning:** {warning}" for warning in results["warnings"]))
    for title, training in trainings(results):
        if training.get("validation"):
            keys = [key for key in training["validation"][0] if key not in ("step", "tokens")]
            lines = [[f"{measured['step']:.0f}", *(f"{measured[key]:.4f}" for key in keys)] for measured in training["validation"]]
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
    parts.append("## Cost\n\n| stage | seconds |\n| --- | ---: |" + "".join(f"\n| {stage} | {value:.1f} |" for stage, value in seconds.items()))
    parts[-1] += f"\n| all | {sum(seconds.values()):.1f} |"
    parts.append("Peak memory: " + ", ".join(f"{value / 1e9:.2f} GB ({kind})" for kind, value in memory.items() if value) + ".")
    if "codes_changed" in results:
        parts.append(f"{moved(results)} ({results['layers']['int4']} layers).")
    parts.append(
        f"## How\n\n    {results['command']}\n\nSeed {results.get('seed')}. " + ", ".join(f"{k} {v}" for k, v in results["machine"]["versions"].items())
    )
    return "\n\n".join(parts) + "\n"


# --- several runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One measured model.

    Attributes:
        label: what people read; no two of a comparison have the same.
        kind: key of ROWS.
        method: how it was compressed, before any tuning.
        values: what was measured.
        run: name of the run that measured it.
        tuned: whether it was trained end to end, rather than only compressed.
        training: how people call that training.
        recipe: what runs that differ only in their seed (and in where they lie) have in common.
        seed: of its run; None where that is not known.
    """

    label: str
    kind: str
    method: str
    values: Mapping[str, Any]
    run: str
    tuned: bool
    training: str
    recipe: str
    seed: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs that measured the same model on the same text.

    Attributes:
        model: which.
        entries: the 16-bit model, then what the runs made of it.
        runs: name -> results.
    """

    model: str
    entries: Sequence[Entry]
    runs: Mapping[str, dict[str, Any]]

    @property
    def measured_on(self) -> str:
        """What the numbers are of, the same in all runs."""
        return measured_on(next(iter(self.runs.values())))

    @property
    def metric(self) -> str:
        """What the models are compared by: the task that was tuned on; else word perplexity where all have it."""
        tasks = {task_column(results) for results in self.runs.values() if "task" in results}
        if len(tasks) == 1 and all(tasks <= entry.values.keys() for entry in self.entries):
            return tasks.pop()
        return "word_perplexity" if all("word_perplexity" in entry.values for entry in self.entries) else "token_perplexity"

    def value(self, entry: Entry) -> float:
        return float(entry.values[self.metric])

    def best(self, entries: Iterable[Entry]) -> Entry | None:
        """The one with the lowest perplexity, or the highest score of a task."""
        return (min if self.metric.endswith("perplexity") else max)(entries, key=self.value, default=None)

    @property
    def shipped(self) -> list[Entry]:
        """The 4-bit models, those exported in place of what they were exported from."""
        exported = {(entry.run, entry.tuned) for entry in self.entries if entry.kind == "openvino"}
        quantized = [entry for entry in self.entries if entry.kind not in _IN_16_BITS]
        return [entry for entry in quantized if entry.kind == "openvino" or (entry.run, entry.tuned) not in exported]

    @property
    def untrained(self) -> list[Entry]:
        """Models compressed without any training, block-wise or end to end."""
        return [entry for entry in self.shipped if not entry.tuned and "blockwise" not in _steps(entry.method)]

    @property
    def baseline(self) -> Entry | None:
        """The best of the untrained; None where there is none."""
        return self.best(self.untrained)

    def improvement(self, entry: Entry, untrained: Sequence[Entry] = ()) -> float | None:
        """Share of the damage of `untrained` (of their mean; default: the baseline) that `entry` repaired; None where there was no damage."""
        compressed = untrained or [baseline for baseline in (self.baseline,) if baseline is not None]
        full = self.entries[0]
        if not self.metric.endswith("perplexity") or not compressed or full.kind != "16bit":
            return None
        damaged = statistics.fmean(map(self.value, compressed))
        return (damaged - self.value(entry)) / (damaged - self.value(full)) if damaged > self.value(full) else None


def _entry_label(results: dict[str, Any], row: str) -> str:
    method = results.get("method", "rtn")
    if row in ("16bit", "lora16"):
        return ROWS[row]
    if not tunes(results):
        return f"4 bit, {method}" + (" (OpenVINO)" if row == "openvino" else "")
    made = f"tuned on {Path(results['task']['name']).stem}" if "task" in results else "distilled"
    if row == "learnt":
        return f"16 bit, {made}"
    if row == "compressed":
        return f"4 bit, {made}, then {method}" if learns_first(results) else f"4 bit, {method} ({'tuned before' if starts_tuned(results) else 'start'})"
    made += f" before and after {method}" if learns_first(results) else f" from {method}"
    return f"4 bit, {made}" + (" (OpenVINO)" if row == "openvino" else "")


def compare(runs: Mapping[str, dict[str, Any]]) -> list[Comparison]:
    """Group runs by model and test text. Args: name -> results.json."""
    groups: list[dict[str, dict[str, Any]]] = []
    for name, results in runs.items():
        fitting = next((members for members in groups if _comparable(next(iter(members.values())), results)), None)
        if fitting is None:
            groups.append({name: results})
        else:
            fitting[name] = results
    comparisons = []
    for members in groups:
        first = next(iter(members.values()))
        found = [(name, results, row) for name, results in members.items() for row in ROWS if row in results["models"]]
        found = [item for i, item in enumerate(found) if item[2] != "16bit" or not any(other[2] == "16bit" for other in found[:i])]
        found.sort(key=lambda item: item[2] != "16bit")
        labels = [_entry_label(results, row) for _, results, row in found]
        counts = Counter(labels)
        entries = [
            Entry(
                named if counts[named] == 1 else f"{named}, {name}",
                row,
                results.get("method", "rtn"),
                results["models"][row],
                name,
                row != "16bit" and (starts_tuned(results) or learns_first(results) if row == "compressed" else tunes(results) or starts_tuned(results)),
                _training(results),
                _recipe(name, results),
                results.get("options", results).get("seed"),
            )
            for (name, results, row), named in zip(found, labels, strict=True)
        ]
        if entries:
            comparisons.append(Comparison(first["model"], entries, members))
    return comparisons


def _comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs measured the same model on the same text, and as many documents of tasks: by name, and by what the 16-bit model scored there (up to 1 %:
    machines differ)."""
    if any(one.get(key) != other.get(key) for key in ("model", "test", "task_limit")):
        return False
    a, b = (results["models"].get("16bit", {}) for results in (one, other))
    values = a.get("token_perplexity"), b.get("token_perplexity")
    return a.get("tokens") == b.get("tokens") and (None in values or math.isclose(*values, rel_tol=0.01))


def _training(results: dict[str, Any]) -> str:
    """How people call a run's training: QAT + LoRA, QAT + NLS, or QAT alone where only scales and norms are trained."""
    if len(results.get("task", {}).get("space", ())) > 1:
        return "QAT + NLS" + (", chosen on test rows" if chosen_on_test(results) else "")
    return "QAT + LoRA" if results.get("lora_rank", 1) else "QAT"


# Options that say where things lie or how fast, and the seed; --start is told by how it was made.
_NO_RECIPE = (
    "seed", "start", "output_dir", "data_dir", "resume", "overwrite", "export", "tensorboard", "save_every", "cache", "microbatch", "eval_batch_size", "device",
    "trust_remote_code", "fast_eval",
)  # fmt: skip


def _recipe(name: str, results: dict[str, Any]) -> str:
    if "options" not in results:  # whoever reads results.json alone
        return name
    options = {key: value for key, value in results["options"].items() if key not in _NO_RECIPE}
    return f"{results.get('kind')} {_steps(results.get('method', 'rtn'))} {sorted(options.items())}"


def _steps(method: str) -> str:
    """ "awq+se (runs/compressed)" -> "awq+se"."""
    return method.split(" (")[0]


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text."""
    columns = _columns({entry.label: dict(entry.values) for entry in comparison.entries})
    repairs = comparison.metric.endswith("perplexity")  # of a task there is nothing to repair
    lines = []
    for entry in comparison.entries:
        repaired = comparison.improvement(entry) if entry.kind != "16bit" and entry is not comparison.baseline else None
        line = [entry.label, *(_cell(c, entry.values.get(c)) for c in columns)]
        lines.append([*line, "-" if repaired is None else f"{repaired:.0%}"] if repairs else line)
    return ["model", *map(heading, columns), *(["repaired"] if repairs else [])], lines


def published_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The kind of table that quantization-aware tuning is published as: per model 16 bit, the best compression without training (PTWC), and the best
    tuned model; improvement = (PTWC - tuned) / (PTWC - 16 bit). Last the mean improvement. The OpenVINO model counts where there is one. Of runs that
    differ in nothing but their seed, given with their "options", the mean counts; behind it stand the least and the most."""
    lines, improvements = [], []
    for comparison in comparisons:
        full, best = comparison.entries[0], max if not comparison.metric.endswith("perplexity") else min
        untrained, tuned = (
            best(_by_recipe(entries), key=lambda group: statistics.fmean(map(comparison.value, group)), default=[])
            for entries in (comparison.untrained, [entry for entry in comparison.shipped if entry.tuned])
        )
        lines.append([comparison.model, ROWS["16bit"], f"{comparison.value(full):.3f}", "-"])
        for group, precision in ((untrained, "best PTWC"), (tuned, tuned[0].training if tuned else "")):
            if group:
                shares = [comparison.improvement(entry, untrained) for entry in group] if group is tuned else []
                repaired = [share for share in shares if share is not None]
                improvements += [statistics.fmean(repaired)] if repaired else []
                name = f"INT4, {precision}" + (f" ({_steps(group[0].method)})" if group is untrained else "") + _repeats(group)
                lines.append([comparison.model, name, _spread(map(comparison.value, group), ".3f"), _spread(repaired, ".1%")])
    if improvements:
        lines.append(["mean", "", "", f"{statistics.fmean(improvements):.1%}"])
    metrics = {comparison.metric for comparison in comparisons}
    return ["model", "precision", heading(metrics.pop()) if len(metrics) == 1 else "measure", "improvement"], lines


def _repeats(group: Sequence[Entry]) -> str:
    """How many runs of one recipe there are, and of how many seeds."""
    seeds = len({entry.seed for entry in group})
    return "" if len(group) == 1 else f", {seeds} seeds" if seeds == len(group) else f", {len(group)} runs of {seeds} seed{'s'[: seeds > 1]}"


def _by_recipe(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.recipe), []).append(entry)
    return list(groups.values())


def _spread(values: Iterable[float], form: str) -> str:
    found = sorted(values)
    if not found:
        return "-"
    return f"{statistics.fmean(found):{form}}" + (f" ({found[0]:{form}} to {found[-1]:{form}})" if len(found) > 1 else "")


def as_table(headings: list[str], lines: list[list[str]], title: str | None = None) -> Table:
    """For the terminal."""
    made = Table(title=title, title_justify="left")
    for i, text in enumerate(headings):
        made.add_column(text, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in lines:
        made.add_row(*line)
    return made


def as_markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *lines))


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """All comparisons, then the report of each run."""
    parts = [MADE_HERE]
    for comparison in comparisons:
        parts += [f"# {comparison.model}: {len(comparison.runs)} runs", as_markdown(*comparison_rows(comparison)), explained(comparison)]
        parts += [markdown(results).replace("\n## ", "\n### ").replace("# ", f"## {name}: ", 1).rstrip() for name, results in comparison.runs.items()]
    return "\n\n".join(parts) + "\n"


def explained(comparison: Comparison) -> str:
    """What the numbers of a comparison are."""
    text = comparison.measured_on
    if comparison.baseline is not None and comparison.metric.endswith("perplexity"):
        text += f" Repaired = share of the damage to {heading(comparison.metric)} done by the best compression without training ({comparison.baseline.label})."
    return text
