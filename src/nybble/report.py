"""results.json -> a table in the terminal, one sentence, and report.md. Numbers come from results.json alone."""

from __future__ import annotations

from typing import Any

from rich.table import Table

# Rows in this order; key in results["models"] -> what people read.
ROWS = {
    "16bit": "16 bit",
    "compressed": "4 bit, compressed",
    "tuned": "4 bit, tuned (torch)",
    "openvino": "4 bit, tuned (OpenVINO)",
}


def label(results: dict[str, Any], row: str) -> str:
    """What people read for a row; a run that only compresses has nothing tuned."""
    text = ROWS.get(row, row)
    return text if tunes(results) else text.replace("tuned", "compressed")


def tunes(results: dict[str, Any]) -> bool:
    """Whether the run trains after compressing."""
    return bool(results.get("kind", "distill") != "compress")


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


def _heading(column: str) -> str:
    return {"token_perplexity": "token perplexity", "word_perplexity": "word perplexity", "kl_to_teacher": "KL to 16 bit", "bytes": "size"}.get(
        column, column.removeprefix("task:")
    )


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
            if tunes(results):
                repaired = improvement(models, key) if key in ("tuned", "openvino") else None
                line.append("-" if repaired is None else f"{repaired:.0%}")
            table.append(line)
    return ["model", *map(_heading, columns), *(["repaired"] if tunes(results) else [])], table


def table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    headings, lines = rows(results)
    made = Table()
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in lines:
        made.add_row(*line)
    return made


def sentence(results: dict[str, Any]) -> str:
    """What came out, in words."""
    models, name = results["models"], results["model"]
    if not tunes(results):
        return _compressed_sentence(results)
    last = "openvino" if "openvino" in models else "tuned"
    if not {"16bit", "compressed", last} <= models.keys():
        return f"{name}: the run is not finished; go on with --resume."
    metric = "word_perplexity" if all("word_perplexity" in models[row] for row in ("16bit", "compressed", last)) else "token_perplexity"
    full, before, after = (models[row][metric] for row in ("16bit", "compressed", last))
    repaired = improvement(models, last)
    where = "OpenVINO" if last == "openvino" else "torch"
    minutes = results["seconds"].get("train", 0) / 60
    text = f"{name} in 4 bits ({where}): {_heading(metric)} {after:.2f}, against {before:.2f} before tuning and {full:.2f} in 16 bit"
    if repaired is not None:
        text += f": {repaired:.0%} of the damage repaired" if repaired >= 0 else ": tuning made it worse"
    ratio = models["16bit"]["bytes"] / models[last]["bytes"]
    return f"{text}, in {minutes:.1f} minutes of training; {models[last]['bytes'] / 1e6:.0f} MB, {ratio:.1f} times smaller than 16 bit."


def _compressed_sentence(results: dict[str, Any]) -> str:
    models, name = results["models"], results["model"]
    last = "openvino" if "openvino" in models else "compressed"
    if not {"16bit", last} <= models.keys():
        return f"{name}: the run is not finished; go on with --resume."
    metric = "word_perplexity" if all("word_perplexity" in models[row] for row in ("16bit", last)) else "token_perplexity"
    full, after = models["16bit"][metric], models[last][metric]
    ratio = models["16bit"]["bytes"] / models[last]["bytes"]
    seconds, size = results["seconds"].get("compress", 0), models[last]["bytes"] / 1e6
    return (
        f"{name} in 4 bits by {results['method']} ({'OpenVINO' if last == 'openvino' else 'torch'}): "
        f"{_heading(metric)} {after:.2f} against {full:.2f} in 16 bit, in {seconds:.0f} s of compression; {size:.0f} MB, {ratio:.1f} times smaller than 16 bit."
    )


def error_cells(error: dict[str, Any]) -> list[str]:
    """A layer's output error by rtn and as compressed, weight error, clipped share."""
    outputs = ["-" if error[key] is None else f"{error[key]:.3%}" for key in ("rtn", "start")]
    return [*outputs, f"{error['weight']:.2%}", f"{error['clipped']:.3%}"]


def _errors_markdown(results: dict[str, Any]) -> str:
    headings = ["layer", "output error, rtn", "compressed", "weight error", "clipped"]
    lines = [[name, *error_cells(error)] for name, error in results["layer_errors"].items()]
    return "\n".join(
        [
            f"## Compression ({results.get('method', 'rtn')})",
            "",
            "Output error: mean square error of a layer's outputs relative to their mean square, on the calibration text.",
            "Weight error: root mean square error of the weights relative to their root mean square. Clipped: share of the weights outside of their range.",
            "",
            *("| " + " | ".join(row) + " |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *lines)),
        ]
    )


def markdown(results: dict[str, Any]) -> str:
    """report.md."""
    headings, lines = rows(results)
    seconds, memory = results["seconds"], results.get("peak_memory_bytes", {})
    parts = [
        f"# {results['model']}: 4-bit {'distillation' if tunes(results) else 'compression'} ({results.get('method', 'rtn')})",
        sentence(results),
        "\n".join(["| " + " | ".join(row) + " |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *lines)]),
        f"Perplexity and KL on {results.get('test', 'the test split')}."
        + (" Repaired = (perplexity compressed - tuned) / (compressed - 16 bit)." if tunes(results) else ""),
    ]
    if results.get("warnings"):
        parts.append("\n".join(f"**Warning:** {warning}" for warning in results["warnings"]))
    if results.get("validation"):
        parts.append("## Validation\n\n| step | token perplexity | KL to 16 bit |\n| ---: | ---: | ---: |")
        parts[-1] += "".join(f"\n| {v['step']:.0f} | {v['token_perplexity']:.3f} | {v['kl_to_teacher']:.4f} |" for v in results["validation"])
    if results.get("layer_errors"):
        parts.append(_errors_markdown(results))
    parts.append("## Cost\n\n| stage | seconds |\n| --- | ---: |" + "".join(f"\n| {stage} | {value:.1f} |" for stage, value in seconds.items()))
    parts[-1] += f"\n| all | {sum(seconds.values()):.1f} |"
    parts.append("Peak memory: " + ", ".join(f"{value / 1e9:.2f} GB ({kind})" for kind, value in memory.items() if value) + ".")
    if "codes_changed" in results:
        parts.append(f"Tuning changed {results['codes_changed']:.1%} of the 4-bit codes of {results['layers']['int4']} layers.")
    parts.append(
        f"## How\n\n    {results['command']}\n\nSeed {results.get('seed')}. " + ", ".join(f"{k} {v}" for k, v in results["machine"]["versions"].items())
    )
    return "\n\n".join(parts) + "\n"
