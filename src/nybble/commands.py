"""The small commands: export a finished run, measure a model or an export, show its layers, report, show the environment."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nybble import checkpoint, data, models, page, report
from nybble import evaluate as measuring
from nybble.checkpoint import Run
from nybble.config import EvalOptions, ExportOptions, InspectOptions, ReportOptions
from nybble.console import bar, console
from nybble.errors import OptionError, RunError
from nybble.export import EXPORTERS, check_formats
from nybble.models import LoadedModel
from nybble.quantized import QuantizedWeight
from nybble.stages import export_run


def export(options: ExportOptions) -> None:
    """Export RUN/quantized to every format named."""
    check_formats(options.to)
    path = Path(options.run)
    values = checkpoint.read_options(path)
    if not (path / "quantized").is_dir():
        raise RunError(f"{path} must be a finished run; it has no folder quantized; finish it with --resume")
    run = Run.reopen(path)
    try:
        for kind in options.to:
            export_run(run, kind, values.get("trust_remote_code", False))
    finally:
        run.close()


def open_target(options: EvalOptions, target: str) -> LoadedModel:
    """Whatever can be measured: a run (its 4-bit model), a folder that a run made, or anything that --pretrained takes."""
    path = Path(target)
    if (path / checkpoint.CONFIG).is_file() and (path / "quantized").is_dir():
        path = path / "quantized"
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, device)
    if (path / checkpoint.WEIGHTS).is_file():
        model, tokenizer, _ = checkpoint.load_quantized(path, dtype, options.trust_remote_code)
        return LoadedModel(model.to(device), tokenizer, str(path))
    for kind, exporter in EXPORTERS.items():
        if (path / exporter().MODEL_XML).is_file():
            check_formats([kind])
            from transformers import AutoConfig, AutoTokenizer

            config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
            return LoadedModel(exporter().open_model(path, config, options.strict), AutoTokenizer.from_pretrained(path), str(path))
    return models.load(target, dtype, device, options.trust_remote_code)


def evaluate(options: EvalOptions) -> None:
    """Print token perplexity, KL to a teacher and lm-eval tasks of one model as a table and as JSON."""
    options.check()
    measuring.check_tasks(options.tasks, options.data_dir)
    opened = open_target(options, options.target)
    results: dict[str, float] = {}
    with torch.no_grad():
        if options.perplexity:
            rows = sequences_to_measure(options, opened)
            teacher = None
            if options.teacher is not None:
                teacher = measuring.logits_of(open_target(options, options.teacher).model, rows.ids)
            with bar(f"{options.split} of {' + '.join(options.data)}", len(rows)) as advance:
                results |= measuring.measure(measuring.logits_of(opened.model, rows.ids), rows.ids, teacher, advance, rows.counted)
        if options.tasks:
            tasks = measuring.run_tasks(opened.model, opened.tokenizer, options.tasks, options.eval_batch_size, options.task_limit, options.data_dir)
            results |= measuring.columns(tasks)
    table = Table("measure", "value", title=opened.name)
    for key, value in results.items():
        table.add_row(key.removeprefix("task:"), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print_json(json.dumps(results))


def sequences_to_measure(options: EvalOptions, opened: LoadedModel) -> data.Rows:
    """What `nybble eval` measures on."""
    mixture = data.Mixture.parse(options.data)
    parts = []
    for name in mixture.names:
        texts = data.load_texts(name, options.data_column, options.data_dir)[options.split]
        parts.append(data.sequences(opened.tokenizer, texts, options.seq_len, options.split, assistant_only=options.loss_on == "assistant"))
    return mixture.mix(parts, options.samples or sum(map(len, parts)), 0) if len(parts) > 1 else parts[0][: options.samples or None]


def inspect(options: InspectOptions) -> None:
    """Print every quantized layer of a run or of a folder in it as a table."""
    path = Path(options.target)
    run = next((folder for folder in (path, path.parent) if (folder / checkpoint.RESULTS).is_file()), None)
    results = {} if run is None else checkpoint.read_results(run)
    weights = _quantized_weights(path)
    errors = results.get("layer_errors", {})
    tuned = report.tunes(results) and "tuned" in results.get("models", {})
    table = Table("layer", "shape", "grid", title=f"{path}: {len(weights)} quantized layers")
    for heading in ("output error, rtn", "compressed", "weight error", "clipped", "at the ends"):
        table.add_column(heading, justify="right")
    for name, weight in weights.items():
        cells = report.error_cells(errors[name]) if name in errors else ["-"] * 4
        ends = ((weight.codes_OI == 0) | (weight.codes_OI == weight.grid.max_code)).float().mean()
        table.add_row(name, " x ".join(map(str, weight.codes_OI.shape)), str(weight.grid), *cells, f"{float(ends):.2%}")
    console.print(table)
    if errors and tuned:
        console.print(f"The errors are those of the start ({results.get('method', 'rtn')}), before tuning.", highlight=False)
    counts = Counter(str(weight.grid) for weight in weights.values())
    size = sum(weight.nbytes for weight in weights.values())
    console.print(f"{', '.join(f'{count} x {grid}' for grid, count in counts.items())}; {size / 1e6:.1f} MB.", highlight=False)


def make_report(options: ReportOptions) -> None:
    """Compare runs; write the page, or print the published kind of table."""
    if not options.runs:
        raise OptionError("nybble report needs one or more run folders")
    runs: dict[str, dict[str, Any]] = {}
    for folder in map(Path, options.runs):
        results = checkpoint.read_results(folder)
        if not results:
            raise RunError(f"{folder} must be a run folder; it has no {checkpoint.RESULTS}")
        if "16bit" not in results.get("models", {}):
            raise RunError(f"{folder} has measured nothing yet; finish it with --resume")
        runs[folder.resolve().name if folder.resolve().name not in runs else str(folder)] = results
    comparisons = report.compare(runs)
    if options.table:
        headings, lines = report.published_rows(comparisons)
        console.print(report.as_table(headings, lines))
        console.print(report.as_markdown(headings, lines), highlight=False, soft_wrap=True)
        return
    out = Path(options.out or (Path(options.runs[0]) / "report.html" if len(runs) == 1 else "report.html"))
    if out.suffix != ".html":
        raise OptionError(f"--out must be the name of a page, ending with .html; got {out}")
    text = page.page(comparisons)
    try:
        checkpoint.write_text(out, text)
        checkpoint.write_text(out.with_suffix(".md"), report.comparison_markdown(comparisons))
    except OSError as error:
        raise RunError(f"--out {out} must be writable; {error.strerror}; choose another folder") from error
    for comparison in comparisons:
        console.print(report.as_table(*report.comparison_rows(comparison), title=comparison.model))
        console.print(report.explained(comparison), highlight=False)
    console.print(f"{out} ({out.stat().st_size / 1e3:.0f} kB, opens offline) and {out.with_suffix('.md').name}", highlight=False)


def _quantized_weights(path: Path) -> dict[str, QuantizedWeight]:
    """Name -> codes of a run, its quantized folder, or an export."""
    folder = path / "quantized" if (path / "quantized").is_dir() else path
    if (folder / checkpoint.WEIGHTS).is_file():
        return checkpoint.load_weights(folder)[0]
    for exporter in EXPORTERS.values():
        if (path / exporter().MODEL_XML).is_file():
            return dict(exporter().read_weights(path))
    raise RunError(f"{path} must be a finished run, or a folder quantized or openvino inside one; it is neither")


def environment() -> None:
    """Print versions and hardware."""
    facts = checkpoint.machine()
    table = Table("what", "value")
    for key, value in (facts | facts.pop("versions")).items():
        table.add_row(key, str(value))
    console.print(table)
