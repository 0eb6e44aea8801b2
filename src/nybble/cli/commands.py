"""The small commands: export a finished run, measure a model or an export, show its layers, report, show the environment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from nybble import files
from nybble.console import bar, console
from nybble.data import generate, packing, sources
from nybble.data import mixture as data_mixture
from nybble.errors import ModelError, OptionError, RunError
from nybble.evaluation import lm_eval, perplexity
from nybble.export.base import EXPORTERS, check_formats
from nybble.models import device as models_device
from nybble.models import loading, quantized_model
from nybble.models.loading import LoadedModel
from nybble.options.commands import EvalOptions, ExportOptions, InspectOptions, ReportOptions
from nybble.quant.weight import QuantizedWeight
from nybble.report import comparison as report_comparison
from nybble.report import five_columns, tables
from nybble.report import html as report_html
from nybble.report import run as report_run
from nybble.run import machine, resume
from nybble.run import results as run_results
from nybble.run.folder import Run
from nybble.workflows.stages import export_run

_REMEDY = "name such a run too (nybble compress --method awq+se or awq+se+gptq, same text)"


def export(options: ExportOptions) -> None:
    """Export RUN/quantized to every format named."""
    if not options.to:
        raise OptionError(f"--to must name a format: {', '.join(EXPORTERS)}")
    check_formats(options.to, "--to")
    path = Path(options.run)
    resume.read_options(path)  # a run?
    run = Run.reopen(_finished(path))
    try:
        for kind in options.to:
            export_run(run, kind, options.trust_remote_code)
    finally:
        run.close()


def _finished(run: Path) -> Path:
    """The folder, if it is that of a finished run; else RunError."""
    if not (run / "quantized").is_dir():
        raise RunError(f"{run} must be a finished run; it has no folder quantized; finish it with --resume")
    return run


def open_target(options: EvalOptions, target: str) -> LoadedModel:
    """Whatever can be measured: a run (its 4-bit model), a folder that a run made, or anything that --pretrained takes."""
    path = Path(target)
    if run_results.is_run(path):
        path = _finished(path) / "quantized"
    device = models_device.pick_device(options.device)
    dtype = models_device.pick_dtype(options.dtype, device)
    if (path / quantized_model.WEIGHTS_FILE).is_file():
        model, tokenizer, _ = quantized_model.load_quantized(path, dtype, options.trust_remote_code)
        return LoadedModel(model.to(device), tokenizer, str(path))
    for kind, exporter in EXPORTERS.items():
        if (path / exporter().MODEL_XML).is_file():
            check_formats([kind])
            from transformers import AutoTokenizer

            config = quantized_model.load_config(path, options.trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=options.trust_remote_code)
            return LoadedModel(exporter().open_model(path, config, options.strict), tokenizer, str(path))
    try:
        return loading.load(target, dtype, device, options.trust_remote_code)
    except ModelError as error:
        raise ModelError(
            str(error).replace("--pretrained", "--teacher" if target == options.teacher else "MODEL_OR_RUN")
        ) from error


def evaluate(options: EvalOptions) -> None:
    """Print token perplexity, KL to a teacher and lm-eval tasks of one model as a table and as JSON."""
    options.check()
    lm_eval.check_tasks(options.tasks, options.data_dir)
    opened = open_target(options, options.target)
    results: dict[str, float] = {}
    with torch.no_grad():
        if options.perplexity:
            rows = sequences_to_measure(options, opened)
            teacher = None
            if options.teacher is not None:
                teacher = perplexity.model_logits(_teacher(options, opened).model, rows.ids)
            with bar(f"{options.split} of {' + '.join(options.data)}", len(rows)) as advance:
                results |= perplexity.measure_sequences(
                    perplexity.model_logits(opened.model, rows.ids), rows.ids, teacher, advance, rows.loss_mask
                )
        if options.tasks:
            tasks = lm_eval.run_tasks(
                opened.model,
                opened.tokenizer,
                options.tasks,
                options.eval_batch_size,
                options.task_limit,
                options.data_dir,
            )
            results |= {
                key: value for key, value in lm_eval.result_columns(tasks).items() if not key.startswith("right:")
            }
    table = Table("measure", "value", title=opened.name)
    for key, value in results.items():
        table.add_row(key.removeprefix("task:"), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print_json(json.dumps(results))


def _teacher(options: EvalOptions, opened: LoadedModel) -> LoadedModel:
    """The model to compare with; OptionError where its predictions are of other tokens."""
    assert options.teacher is not None
    teacher = open_target(options, options.teacher)
    sizes = [model.config.get_text_config().vocab_size for model in (teacher.model, opened.model)]
    if (
        generate.vocabulary_fingerprint(teacher.tokenizer) != generate.vocabulary_fingerprint(opened.tokenizer)
        or sizes[0] != sizes[1]
    ):
        raise OptionError(f"--teacher must have the vocabulary of {opened.name}; {teacher.name} has another")
    return teacher


def sequences_to_measure(options: EvalOptions, opened: LoadedModel) -> packing.TokenRows:
    """What `nybble eval` measures on."""
    mixture = data_mixture.Mixture.parse(options.data)
    texts = {
        name: sources.load_texts(name, options.data_column, options.data_dir, (options.split,))[options.split]
        for name in mixture.names
    }
    assistant = options.loss_on == "assistant"
    if assistant:
        data_mixture.check_conversations(texts)
    parts = [
        packing.pack_documents(opened.tokenizer, documents, options.seq_len, options.split, assistant_only=assistant)
        for documents in texts.values()
    ]
    return mixture.first(parts, options.samples)


def inspect(options: InspectOptions) -> None:
    """Print every quantized layer of a run or of a folder in it as a table."""
    path = Path(options.target)
    run = next((folder for folder in (path, path.parent) if (folder / run_results.RESULTS).is_file()), None)
    results = {} if run is None else run_results.read_results(run)
    weights = _quantized_weights(path)
    errors = results.get("layer_errors", {})
    tuned = report_run.tunes(results) and "tuned" in results.get("models", {})
    table = Table("layer", "shape", "grid", title=f"{path}: {len(weights)} quantized layers")
    for heading in (*report_run.LAYER_HEADINGS[1:], "at the ends"):
        table.add_column(heading, justify="right")
    for name, weight in weights.items():
        cells = report_run.error_cells(errors[name]) if name in errors else ["-"] * 4
        ends = ((weight.codes_OI == 0) | (weight.codes_OI == weight.scheme.max_code)).float().mean()
        table.add_row(
            name, " x ".join(map(str, weight.codes_OI.shape)), str(weight.scheme), *cells, f"{float(ends):.2%}"
        )
    console.print(table)
    if errors and tuned:
        what = "before scales and norms were trained" if report_run.learns_first(results) else "before tuning"
        console.print(f"The errors are those of the start ({results.get('method', 'rtn')}), {what}.", highlight=False)
    counts = Counter(str(weight.scheme) for weight in weights.values())
    size = sum(weight.nbytes for weight in weights.values())
    console.print(
        f"{', '.join(f'{count} x {grid}' for grid, count in counts.items())}; {size / 1e6:.1f} MB.", highlight=False
    )


def make_report(options: ReportOptions) -> None:
    """Put runs, or comparisons of tune, side by side; write the page, or print the published kind of table."""
    if not options.runs:
        raise OptionError("nybble report needs one or more run folders")
    if options.table and options.out is not None:
        raise OptionError("--table only prints, and --out names a page; give one of them")
    compared = [folder for folder in options.runs if (Path(folder) / five_columns.FILE).is_file()]
    if compared and len(compared) < len(options.runs):
        other = next(folder for folder in options.runs if folder not in compared)
        raise OptionError(
            f"nybble report takes runs, or comparisons of tune --compare; got {compared[0]}, which is a comparison, and {other}, which is none"
        )
    _report_comparisons(options) if compared else _report_runs(options)


def _report_comparisons(options: ReportOptions) -> None:
    found = five_columns.together(
        [five_columns.read(folder) for folder in {Path(run).resolve(): Path(run) for run in options.runs}.values()]
    )
    written = (
        ""
        if options.table
        else _write_page(options, found.html, lambda: f"{report_run.MADE_HERE}\n\n{found.markdown()}")
    )
    for table in found.tables:
        console.print(tables.as_table(*table))
    console.print(f"{found.note}\n{written}" if written else found.markdown(), highlight=False, soft_wrap=True)


def _report_runs(options: ReportOptions) -> None:
    runs, unfinished = {}, []
    for folder in {Path(run).resolve(): Path(run) for run in options.runs}.values():
        results = run_results.read_results(folder)
        if not results and not run_results.is_run(folder):
            raise RunError(f"{folder} must be a run folder; it has no {run_results.RESULTS}")
        if "16bit" in results.get("models", {}):
            known = {"options": resume.read_options(folder)} if run_results.is_run(folder) else {}
            runs[folder.resolve().name if folder.resolve().name not in runs else str(folder)] = results | known
        if not report_run.finished(results):
            unfinished.append(str(folder))
    if not runs:
        raise RunError(f"{', '.join(unfinished)} has measured nothing yet; finish it with --resume")
    if unfinished:
        console.print(
            f"Not finished, and shown as far as measured: {', '.join(unfinished)}; go on with --resume.",
            highlight=False,
            soft_wrap=True,
        )
    comparisons = report_comparison.compare_runs(runs)
    if options.table:
        headings, lines = report_comparison.published_rows(comparisons)
        console.print(tables.as_table(headings, lines))
        console.print(tables.as_markdown(headings, lines), highlight=False, soft_wrap=True)
        for comparison in comparisons:
            if any("task_limit" in results for results in comparison.runs.values()):
                console.print(f"{comparison.model}: {comparison.measured_on}", highlight=False, soft_wrap=True)
            if comparison.baseline is None:
                console.print(
                    f"{comparison.model}: no model compressed without any training to compare with; {_REMEDY}",
                    highlight=False,
                )
        return
    written = _write_page(
        options,
        lambda: report_html.comparison_page(comparisons),
        lambda: report_comparison.comparison_markdown(comparisons),
    )
    for comparison in comparisons:
        console.print(tables.as_table(*report_comparison.comparison_rows(comparison), title=comparison.model))
        console.print(report_comparison.explained(comparison), highlight=False)
    console.print(written, highlight=False)


def _write_page(options: ReportOptions, html: Callable[[], str], markdown: Callable[[], str]) -> str:
    """The page, and the same in Markdown beside it, unless that would replace what a run wrote about itself; returns what was written, in words."""
    out = Path(options.out or (Path(options.runs[0]) / "report.html" if len(options.runs) == 1 else "report.html"))
    if out.suffix != ".html":
        raise OptionError(f"--out must be the name of a page, ending with .html; got {out}")
    beside = out.with_suffix(".md")
    own = beside.resolve() in {
        (Path(folder) / "report.md").resolve() for folder in options.runs if run_results.read_results(Path(folder))
    }
    if (
        not own
        and beside.is_file()
        and not beside.read_text(encoding="utf-8", errors="replace").startswith(report_run.MADE_HERE)
    ):
        raise OptionError(f"--out {out} would replace {beside}, which nybble report did not write; choose another name")
    text = html()
    try:
        files.write_text(out, text)
        if not own:
            files.write_text(beside, markdown())
    except OSError as error:
        raise RunError(f"--out {out} must be writable; {error.strerror}; choose another folder") from error
    return f"{out} ({out.stat().st_size / 1e3:.0f} kB, opens offline)" + (
        f" and {beside.name}" if beside.exists() else ""
    )


def _quantized_weights(path: Path) -> dict[str, QuantizedWeight]:
    """Name -> codes of a run, its quantized folder, or an export."""
    folder = path / "quantized" if (path / "quantized").is_dir() else path
    if (folder / quantized_model.WEIGHTS_FILE).is_file():
        return quantized_model.load_weights(folder)[0]
    for kind, exporter in EXPORTERS.items():
        if (path / exporter().MODEL_XML).is_file():
            check_formats([kind])
            return dict(exporter().read_weights(path))
    raise RunError(f"{path} must be a finished run, or a folder quantized or openvino inside one; it is neither")


def environment() -> None:
    """Print versions and hardware."""
    facts = machine.describe_machine()
    table = Table("what", "value")
    for key, value in (facts | facts.pop("versions")).items():
        table.add_row(key, str(value))
    console.print(table)
