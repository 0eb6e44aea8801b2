"""The model card (README.md) of an export: what the model is, what was measured, how to run it, how it was made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.export.base import EXPORTERS
from nybble.report.labels import embeddings_text, format_label, is_export, runtime_label
from nybble.report.run import (
    changes_text,
    measured_on,
    memory_text,
    other_rows,
    other_title,
    result_rows,
    schemes_text,
    summary,
    versions_text,
)
from nybble.report.tables import as_markdown, escape_markdown
from nybble.run.results import RunResults

CARD = "README.md"
_BUILT_IN = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_TAGS = ("quantized", "nybble")
_TASKS = {"vision_config": "image-text-to-text", "audio_config": "audio-text-to-text"}
"""Configuration of a part that an export holds beside the text model -> what the hub calls its task."""


def model_card(
    results: RunResults,
    name: str,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    license_name: str = "",
    has_template: bool = True,
) -> str:
    """The card of one export of a run.

    Args:
        results: of the run.
        name: of the export format.
        options: of the run, by name: pretrained.
        config: content of config.json of the export.
        license_name: license of the 16-bit model, as the hub calls it.
        has_template: the model has a chat template.

    Returns:
        Markdown with the front matter that the Hugging Face hub reads.
    """
    label = format_label(name)
    results = _shown(results, name)
    parts = [
        _front_matter(results, name, str(options.get("pretrained", "")), config, license_name),
        f"# {escape_markdown(results.model)}, {results.precision} ({escape_markdown(label)})",
        *_headline(results, name, options),
        as_markdown(*result_rows(results)),
        escape_markdown(_without_paths(measured_on(results))),
        *_other_domain(results),
        *(f"**Limit:** {escape_markdown(limit)}" for limit in results.exports[name].get("limits", ())),
        "## Run it",
        _usage(name, config, has_template),
        "## Weights",
        *map(escape_markdown, _weights(results, name)),
        "## How it was made",
        *map(escape_markdown, _recipe(results)),
        f"    {_without_folders(results.command_line)}",
        escape_markdown(f"Seed {results.seed}. {versions_text(results)}."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(results: RunResults, name: str) -> RunResults:
    """The results without the rows of other exports. An export that was not measured has a row with its size alone."""
    models = {row: metrics for row, metrics in results.models.items() if row == name or not is_export(row)}
    return replace(results, models={**models, name: models.get(name, {"bytes": results.exports[name].get("bytes", 0)})})


def _headline(results: RunResults, name: str, options: Mapping[str, Any]) -> list[str]:
    """The outcome in sentences, and what is to be known of the figures."""
    row, models = results.models[name], results.models
    if row.keys() != {"bytes"}:
        return [
            escape_markdown(_without_paths(summary(results))),
            escape_markdown(f"{runtime_label(name)} computed the figures of this export."),
        ]
    torch = replace(results, models={key: metrics for key, metrics in models.items() if key != name})
    return [
        "**This export was not measured.** Figures are those of the run's quantized weights in torch; the size is that "
        "of this export. To measure it:",
        f"    {_eval_command(options)}",
        escape_markdown(_without_paths(summary(torch, row["bytes"]))),
    ]


def _eval_command(options: Mapping[str, Any]) -> str:
    """What measures an export on the text that its run was measured on."""
    data = [str(name) for name in options.get("eval_data") or options.get("data") or ()]
    known = bool(data) and not any(name.startswith("self") for name in data)
    words = ["nybble", "eval", "FOLDER", "--data", *(data if known else ["TEXT"])]
    if known and options.get("text_column", "text") != "text":
        words += ["--text_column", str(options["text_column"])]
    words += ["--assistant_only_loss"] if known and options.get("assistant_only_loss") else []
    for option, flag in (("seq_len", "seq_len"), ("num_test_samples", "num_samples"), ("pretrained", "teacher")):
        words += [f"--{flag}", str(options[option])] if options.get(option) else []
    return " ".join(_without_folders(shlex.join(words)).split())  # one line, whatever the names of files hold


def _other_domain(results: RunResults) -> list[str]:
    cells = other_rows(results)
    return [escape_markdown(_without_paths(f"{other_title(results)}:")), as_markdown(*cells)] if cells[1] else []


def _precision_tags(results: RunResults) -> list[str]:
    """int4 and 4-bit, and the same for other widths."""
    widths = [part.removeprefix("INT") for part in results.precision.split("/")]
    return [tag for width in widths for tag in (f"int{width}", f"{width}-bit")]


def _front_matter(results: RunResults, name: str, pretrained: str, config: Mapping[str, Any], license_name: str) -> str:
    library = (EXPORTERS[name].library if name in EXPORTERS else "") or name
    task = next((task for part, task in _TASKS.items() if config.get(part)), "text-generation")
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}"]
    lines += [f"license: {license_name}"] if license_name else []
    pretrained = _BUILT_IN.get(pretrained, pretrained)
    is_local = Path(pretrained).exists()
    if (
        pretrained.count("/") == 1
        and not is_local
        and not pretrained.startswith((".", "/", "~"))
        and not pretrained.endswith(".gguf")
    ):
        lines += [f"base_model: {pretrained}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in (*_precision_tags(results), *_TAGS, name)), "---"])


def _usage(name: str, config: Mapping[str, Any], has_template: bool) -> str:
    usage = EXPORTERS[name].how_to_run(config, has_template).strip() if name in EXPORTERS else ""
    if not usage or (not has_template and '"role"' in usage):
        usage = f"`nybble chat FOLDER` talks to this model, and `nybble eval FOLDER` measures it ({name})."
    return usage if has_template else f"This model has no chat template: it continues text.\n\n{usage}"


def _weights(results: RunResults, name: str) -> list[str]:
    """What has how many bits, and what was compared after writing."""
    export, layers = results.exports[name], results.layers
    size = results.models[name]["bytes"]
    embeddings = embeddings_text(export["embedding_weights"], layers is not None and layers.tied)
    text = f"{export['linear_weights']} linear layers and {embeddings} are quantized. Schemes: {schemes_text(results)}"
    if name in EXPORTERS and not EXPORTERS[name].holds_codes:
        text += " This format holds their values in float16."
    for words, count in export.get("widened", {}).items():
        text += f" The format holds codes of {words} ({count} weights), so its files are larger than that average."
    text += f" Everything else is not quantized. Size: {size / 1e6:.1f} MB."
    rounded = export.get("rounded") or {}
    exact = "All quantized weights were read back from these files and are equal to those of the run."
    if rounded:
        exact = (
            "All other quantized weights were read back from these files and are equal to those of the run. The format "
            f"rounds {', '.join(rounded)} by at most {max(rounded.values()):.1e}."
        )
    difference = export.get("logit_difference")
    if difference is not None:
        exact += (
            f" Logits in {runtime_label(name)} differ by at most {difference:.1e} from those of torch with the weights "
            "of these files, both in float32."
        )
    return [text, exact]


def _recipe(results: RunResults) -> list[str]:
    """Method, training, time and memory."""
    parts = [f"Compression: {_without_paths(results.described_method)}."]
    if results.trains:
        adapters = f"LoRA adapters of rank {results.lora_rank}, absorbed into the codes"
        without = {
            "full": "the weights themselves, inside the rounding",
            "rounding": "the scales that round, one for 8 weights, which do not ship",
        }.get(results.train, "scales and norms")
        parts.append(f"Training: {adapters if results.lora_rank else without}.")
    if results.changes is not None:
        parts.append(f"{changes_text(results.changes)}.")
    minutes = sum(results.seconds.values()) / 60
    parts.append(f"Time: {minutes:.1f} minutes, measuring included.")
    if memory := memory_text(results):
        parts.append(f"Peak memory: {memory}.")
    return [" ".join(parts), "The command, with folders shortened to their last part:"]


def _without_paths(text: str) -> str:
    """Absolute paths in a text, shortened to their last part. They begin a word or follow one of (:=."""
    return re.sub(r"(?<![^\s(:=])/(?:[^\s/]+/)*([^\s/]+)", r"\1", text)


def _without_folders(command_line: str) -> str:
    """The command without the folders of the machine that it ran on."""
    words = [re.sub(r"(^|[:=])/(?:[^/]*/)*", r"\1", word) for word in shlex.split(command_line)]
    return shlex.join(words)
