"""What the flows share: open model, text and run folder; teach; compress; measure; export; finish. Each flow is these stages in its own order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from nybble import files
from nybble.compress import blockwise, checks, methods, pipeline
from nybble.compress.calibration import Calibration
from nybble.compress.init import QuantizedInit
from nybble.compress.pipeline import CompressionResult
from nybble.compress.store import BlockStore
from nybble.console import bar, console, log_to
from nybble.data import mixture, packing, sources
from nybble.data.packing import TokenRows
from nybble.errors import DataError, ExportError, OptionError, RunError
from nybble.evaluation import decoder_error, lm_eval, perplexity
from nybble.export import base
from nybble.export.base import EXPORTERS
from nybble.models import device as models_device
from nybble.models import loading, quantized_model, selection
from nybble.models.families import family_of
from nybble.models.head import LMHead
from nybble.options.commands import CompressionOptions, CompressOptions, DistillOptions, TuneOptions, check_kind
from nybble.qat import insert
from nybble.quant.scheme import QuantScheme, check_group_size
from nybble.quant.weight import QuantizedWeight
from nybble.report import run as report_run
from nybble.run import machine, resume
from nybble.run import results as run_results
from nybble.run.folder import Run
from nybble.training import memory, teacher
from nybble.training.teacher import HiddenStates
from nybble.workflows import starts as workflows_starts
from nybble.workflows import text as workflows_text
from nybble.workflows.text import Sequences

log = logging.getLogger("nybble")

# Tokens of the test text on which the errors of decoder layers are measured.
_TRACED = 256

Options = CompressOptions | DistillOptions | TuneOptions


@dataclass(frozen=True)
class Job:
    """An open run with its model and text.

    Attributes:
        options: resolved.
        head: the 16-bit head, a copy.
        score: model and tokenizer -> more measures, beside perplexity, KL and lm-eval's tasks.
        outputs: of the decoder layers of the 16-bit model on the first tokens of the test text [L, T, D]; not where the model is to learn something else.
    """

    run: Run
    options: Any
    loaded: loading.LoadedModel
    plan: selection.LayerSelection
    sequences: Sequences
    head: LMHead
    score: Callable[[Any, Any], dict[str, float]] = lambda model, tokenizer: {}
    outputs: Tensor | None = None

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(group_size=self.options.group_size)

    @property
    def quantized(self) -> Path:
        """The folder with the 4-bit model; it exists when compression or tuning is done."""
        return self.run.path / "quantized"


@contextmanager
def opened(
    options: Options,
    method: str,
    flag: str,
    cut: Callable[[Any, loading.LoadedModel], Sequences],
    resolve: Callable[[Any, Any, Any, Any], Any],
) -> Iterator[Job]:
    """Find everything that can be wrong with options, model and data before the run folder exists; then open the folder.

    Args:
        method, flag: of compression, and the option that names it.
        cut: (options, loaded model) -> sequences.
        resolve: (options, loaded, plan, sequences) -> options with what is automatic filled in; prints the estimate.
    """
    options.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            f"nybble {options.KIND} must run in one process for now; start it without accelerate launch or torchrun"
        )
    automatic = (flag, method) == ("--start", workflows_starts.AUTO)
    if not automatic:
        workflows_starts.steps_of(method, flag)
    base.check_formats(options.export)
    for named in (getattr(options, "data", ()), getattr(options, "eval_data", ())):
        if named:
            mixture.Mixture.parse(named)
    path = options.folder
    loading.check_model_path(options.pretrained)
    begun = Run.check(path, options.resume, options.overwrite)
    if options.resume and not begun:
        log.info("there is no run in %s to go on with; this is its beginning", path)
    if options.resume:
        check_kind(path, options)
    if options.resume and begun:  # before the model is loaded; again when it is known what was automatic
        known = {"start": resume.read_options(path).get("start", workflows_starts.AUTO)} if automatic else {}
        resume.check_same_options(path, replace(options, **known))  # type: ignore[arg-type]
    task = getattr(options, "task", None)  # of tune; it is among those to measure
    for names, asked in (
        ((task,) if task in options.tasks else (), "--task"),
        (tuple(name for name in options.tasks if name != task), "--tasks"),
    ):
        lm_eval.check_tasks(names, options.data_dir, asked)
    if options.overwrite:
        _keep_inputs(options, path)
    started = time.perf_counter()
    device = models_device.pick_device(options.device)
    dtype = models_device.pick_dtype(options.dtype, device)
    log.info("loading %s (%s, %s)", options.pretrained, device, str(dtype).removeprefix("torch."))
    loaded = loading.load(options.pretrained, dtype, device, options.trust_remote_code)
    plan = selection.select_layers(loaded.model)
    for name in plan.int4:
        check_group_size(name, loaded.model.get_submodule(name).in_features, options.group_size)
    if automatic:
        method = methods.automatic_method(loaded.model.config, adapters=getattr(options, "moves_codes", False))
        options = replace(options, start=method)  # type: ignore[arg-type]
    if flag == "--start" and (start := workflows_starts.start_run(method)):
        workflows_starts.check(start, loaded, plan, options.group_size)
    sequences = cut(options, loaded)
    _check_tokens(loaded, sequences)
    probe_T = sequences.test.ids[0, :32]
    checks.check_model(
        loaded.model, plan.int4, torch.stack([probe_T, probe_T.flip(0)]), workflows_starts.steps_of(method, flag)
    )
    log.info(
        "%s: %.1f M parameters; %d linear layers get 4 bits (group %d), %s 8 bits%s",
        loaded.name, sum(p.numel() for p in loaded.model.parameters()) / 1e6, len(plan.int4), options.group_size, ", ".join(plan.int8),
        " (tied)" if plan.tied else "",
    )  # fmt: skip
    _say_what_is_not_used(options, workflows_starts.steps_of(method, flag))
    options = resolve(options, loaded, plan, sequences)
    exported = family_of(loaded.model.config).exported
    if options.export and exported is not True:
        log.warning("export of %s is not tested%s; if it fails, the 4-bit model in %s/quantized is kept", loaded.model.config.model_type,
                    f" ({exported})" if exported else "", path)  # fmt: skip
    if options.export:
        _check_export_memory(loaded, path)
    head = LMHead.of(loaded.model, copy=True)
    head.verify(loaded.model, probe_T[None].to(device))
    outputs = decoder_error.decoder_outputs(loaded.model, sequences.test.ids[0, :_TRACED]) if task is None else None

    run = Run.open(path, options, options.resume, options.overwrite)
    try:
        with log_to(path / "log.txt"):
            run.results["seconds"].setdefault("load", round(time.perf_counter() - started, 2))
            run.results |= {
                "model": loaded.name,
                "seed": options.seed,
                "kind": options.KIND,
                "machine": machine.describe_machine(),
            }
            run.results |= {
                "method": workflows_starts.described(method),
                "start_tuned": workflows_starts.tuned(method),
                "dtype": str(dtype).removeprefix("torch."),
            }
            run.results["layers"] = {"int4": len(plan.int4), "int8": len(plan.int8), "tied": plan.tied}
            run.results["test"] = (
                f"{sequences.test_source} ({len(sequences.test)} x {sequences.test.ids.shape[1]} tokens)"
            )
            run.results |= (
                {"task_limit": options.task_limit} if options.task_limit and (options.tasks or task is not None) else {}
            )
            _check_unchanged(
                run,
                {"model": loading.model_fingerprint(loaded.model)}
                | _fingerprints(sequences, workflows_starts.start_run(method)),
            )
            yield Job(
                run,
                options,
                loaded,
                plan,
                workflows_text.written(run, options, loaded, sequences),
                head,
                outputs=outputs,
            )
    finally:
        run.close()


def _say_what_is_not_used(options: Options, steps: tuple[str, ...]) -> None:
    """Warn of options for steps that the compression does not have."""
    for name, step in (("gptq_damping", "gptq"), ("gptq_act_order", "gptq"), ("blockwise_epochs", "blockwise")):
        if step not in steps and getattr(options, name) != getattr(CompressionOptions, name):
            log.warning("--%s has no effect: the method has no step %s", name, step)
    if not steps:
        for name in ("limit_blocks", "calib_samples"):
            if getattr(options, name) != getattr(CompressionOptions, name):
                log.warning("--%s has no effect: nothing is calibrated", name)


def _check_tokens(loaded: loading.LoadedModel, sequences: Sequences) -> None:
    """Raise where the text does not suit the model: DataError for tokens that it does not know; a warning where it is longer than the model has seen."""
    known, length = loaded.model.get_input_embeddings().num_embeddings, sequences.test.ids.shape[1]
    for ids in (sequences.train.ids, sequences.calibration, sequences.validation.ids, sequences.test.ids):
        if ids.numel() and ids.device.type != "meta" and int(ids.max()) >= known:
            raise DataError(
                f"{loaded.name} knows the tokens 0 to {known - 1}; its tokenizer gives {int(ids.max())}; it must be the model's own tokenizer"
            )
    most = getattr(loaded.model.config, "max_position_embeddings", None) or length
    if length > most:
        words = loaded.model.get_input_embeddings()
        tables = [
            module
            for module in loaded.model.modules()
            if isinstance(module, torch.nn.Embedding) and module is not words
        ]
        if any(most <= table.num_embeddings <= most + 2 for table in tables):  # OPT's has two rows more than positions
            raise OptionError(
                f"--seq_len must be at most {most}, for {loaded.name} has learnt so many positions; got {length}"
            )
        log.warning("--seq_len %d is more than the %d positions that %s was made for", length, most, loaded.name)


def _fingerprints(sequences: Sequences, start: Path | None) -> dict[str, str]:
    """Of the text that is there before the run, and of the run that it starts from: what -> fingerprint."""
    rows = {
        "training": sequences.train.ids,
        "calibration": sequences.calibration,
        "validation": sequences.validation.ids,
        "test": sequences.test.ids,
    }
    found = {
        f"{split} text": packing.token_fingerprint(ids, "") for split, ids in rows.items() if ids.device.type != "meta"
    }
    return (
        found
        | (
            {}
            if start is None
            else {"4-bit model of --start": quantized_model.weights_fingerprint(start / "quantized")}
        )
        | dict(sequences.others)
    )


def _check_unchanged(run: Run, now: dict[str, str]) -> None:
    """Raise RunError where a run is gone on with, and what it reads has changed meanwhile."""
    before = run.results.setdefault("fingerprints", now)
    changed = [what for what in now if before.get(what, now[what]) != now[what]]
    if changed:
        it = "it" if len(changed) == 1 else "them"
        raise RunError(
            f"--resume must find what the run began with; the {' and the '.join(changed)} changed; bring {it} back, or start again (--overwrite)"
        )


def _keep_inputs(options: Options, path: Path) -> None:
    """Raise OptionError where --overwrite would delete what the run reads."""
    for flag in ("pretrained", "start", "teacher", "data", "eval_data", "data_dir", "task"):
        value = getattr(options, flag, None)
        for name in (value,) if isinstance(value, str) else mixture.Mixture.parse(value).names if value else ():
            name = sources.written_from(name) or name
            if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
                raise OptionError(
                    f"--overwrite would delete --{flag} {name}, which this run is to read; choose another --output_dir"
                )


def free_memory(loaded: loading.LoadedModel) -> int:
    """Bytes that are free on the model's device, counting those of the model itself."""
    device = loaded.model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    held: int = sum(p.numel() * p.dtype.itemsize for p in loaded.model.parameters())
    return int(free) + held


def measured_logits(options: Options, loaded: loading.LoadedModel, sequences: Sequences) -> int:
    """Bytes of the logits that exist at once while a model is measured: of a test sequence, or of a forward of lm-eval and the copy it makes."""
    config, numbers = loaded.model.config, sequences.test.ids.shape[1]
    if options.tasks:
        window = lm_eval.longest_window(config)
        numbers = max(numbers, 2 * window * lm_eval.requests_at_once(config, window))
    return int(numbers * config.vocab_size * loaded.model.dtype.itemsize)


def check_calibration(options: Options, method: str, sequences: Sequences) -> int:
    """Number of calibration sequences; says where there are fewer than wanted. The training text has been checked for the least that will do."""
    if not workflows_starts.steps_of(method):
        return 0
    count = len(sequences.calibration)
    short = "" if count == options.calib_samples else f" (all there is; --calib_samples is {options.calib_samples})"
    log.info("calibration: %d x %d tokens of the training text%s", count, sequences.calibration.shape[1], short)
    return count


def teach(job: Job, splits: dict[str, TokenRows], batch: int) -> dict[str, HiddenStates]:
    """The teacher's hidden states on the splits."""
    identity = f"{job.options.pretrained} {loading.model_fingerprint(job.loaded.model)}"
    states = {}
    with job.run.stage("teacher"), bar("teacher", sum(len(ids) for ids in splits.values())) as advance:
        for split, rows in splits.items():
            states[split] = teacher.teacher_hidden_states(
                job.run.path / "teacher" / f"{split}.bin", job.loaded.model, rows.ids, batch, identity, advance
            )
    return states


def compress_model(job: Job, method: str) -> tuple[dict[str, QuantizedInit], dict[str, QuantizedWeight]]:
    """Compress in place, embedding and head to 8 bits; block by block where the method has data, going on with the blocks of an earlier sitting.

    Where `method` is a run, its 4-bit weights take the place of the model's instead.

    Returns: where every 4-bit layer starts; and all quantized weights, those in 8 bits too, on the CPU.
    """
    if run := workflows_starts.start_run(method):
        return _take_over(job, run)
    options, model = job.options, job.loaded.model
    calibration = store = None
    if workflows_starts.steps_of(method):
        recipe = blockwise.BlockwiseConfig(epochs=options.blockwise_epochs)
        ids = job.sequences.calibration
        calibration = Calibration(
            ids, options.seed, options.gptq_damping, options.gptq_act_order, recipe, options.limit_blocks, job.run.path
        )
        store = BlockStore(
            job.run.path / "compress",
            f"{options.pretrained} {loading.model_fingerprint(model)} {packing.token_fingerprint(ids, method)}",
        )
    with job.run.stage("compress"):
        with bar(f"compress ({method})", len(job.plan.int4), "now") as advance:

            def done(layers: int, text: str) -> None:
                advance(layers, now=text)
                job.run.save_results()  # so that a killed process keeps the seconds so far

            compressed = pipeline.compress(model, job.plan.int4, job.scheme, method, calibration, store, done)
        rows = insert.quantize_rows(model, job.plan.int8)
    job.run.results["layer_errors"] = {name: asdict(error) for name, error in compressed.errors.items()}
    job.run.results["block_losses"] = compressed.blocks
    log.info(
        "%s: quantized %d of %d linear layers to 4 bits, %s to 8 bits",
        method,
        len(compressed.starts),
        len(job.plan.int4),
        ", ".join(rows),
    )
    for line in error_lines(compressed):
        log.info(line)
    job.run.save_results()
    return compressed.starts, {name: weight.cpu() for name, weight in rows.items()} | {
        name: start.quantized(job.scheme).cpu() for name, start in compressed.starts.items()
    }


def _take_over(job: Job, run: Path) -> tuple[dict[str, QuantizedInit], dict[str, QuantizedWeight]]:
    """Starts with exactly the codes, scales and zeros of a finished run, and the model with what else it has (folded norms)."""
    model, plan, results = job.loaded.model, job.plan, run_results.read_results(run)
    with job.run.stage("compress"):
        quantized, others = quantized_model.load_weights(run / "quantized")
        for name, weight in quantized.items():
            model.get_submodule(name).weight.data.copy_(weight.dequantize())
        model.load_state_dict(others, strict=False)  # starts.check has seen that these are all others
        starts = {}
        for name in plan.int4:
            weight = quantized[name]
            scale_OG, zero_point_OG = (
                tensor.to(model.device, torch.float32) for tensor in (weight.scale_OG, weight.zero_point_OG)
            )
            starts[name] = QuantizedInit(model.get_submodule(name).weight.detach(), scale_OG, zero_point_OG)
    if results.get("kind") == "compress":
        job.run.results |= {key: results[key] for key in ("layer_errors", "block_losses") if key in results}
    log.info("start: the 4-bit weights of %s, %d layers", run, len(starts))
    job.run.save_results()
    return starts, quantized


def error_lines(compressed: CompressionResult) -> list[str]:
    """What compression did, in words."""
    measured = {
        name: error
        for name, error in compressed.errors.items()
        if error.rtn is not None and error.compressed is not None
    }
    lines = []
    if measured:
        before, after = (
            sum(getattr(error, key) for error in measured.values()) / len(measured) for key in ("rtn", "compressed")
        )
        worst = max(measured, key=lambda name: measured[name].compressed or 0.0)
        lines.append(
            f"mean output error of a layer {before:.2%} rounded to nearest, {after:.2%} compressed; largest {measured[worst].compressed:.2%} ({worst})"
        )
    if compressed.blocks:
        before, after = (
            sum(losses[i] for losses in compressed.blocks.values()) / len(compressed.blocks) for i in (0, 1)
        )
        lines.append(
            f"mean error of a block's outputs on held-out sequences {before:.3%} before reconstruction, {after:.3%} after"
        )
    return lines


def size_of(model: Any, quantized: Mapping[str, QuantizedWeight]) -> int:
    """Bytes of the model when shipped: quantized weights packed, everything else in 16 bits."""
    weights = {name: weight.nbytes for name, weight in quantized.items()}
    loss_mask = {
        id(getattr(model.get_submodule(name), "weight", None)) for name in quantized
    }  # layers whose codes stay have none
    rest: int = sum(
        2 * p.numel()
        for name, p in model.named_parameters()
        if id(p) not in loss_mask and ".lora_" not in name and "log_scale" not in name
    )
    return sum(weights.values()) + rest


def measure(
    job: Job,
    reference: perplexity.Logits,
    row: str,
    model: Any,
    tokenizer: Any,
    size: int,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Fill one row of the results, unless an earlier sitting did. `known`: what the tasks gave for this model in another run; they are not measured again."""
    run, options, test = job.run, job.options, job.sequences.test
    if row in run.results["models"]:
        return
    label = report_run.label(run.results, row)
    with run.stage("measure"), bar(f"measure {label}", len(test)) as advance:
        logits = reference if row == "16bit" else perplexity.model_logits(model, test.ids)
        measured: dict[str, Any] = dict(
            perplexity.measure_sequences(logits, test.ids, reference, advance, test.loss_mask)
        )
        if options.tasks and known is None:
            log.info("lm-eval on %s: %s", label, ", ".join(options.tasks))
            tasks = lm_eval.run_tasks(
                model, tokenizer, options.tasks, options.eval_batch_size, options.task_limit, options.data_dir
            )
            measured |= lm_eval.result_columns(tasks)
        measured |= job.score(model, tokenizer) if known is None else known
        if job.outputs is not None and row in ("compressed", "tuned"):
            run.results.setdefault("decoder_errors", {})[row] = decoder_error.decoder_errors(
                model, test.ids[0, : job.outputs.shape[1]], job.outputs
            )
    run.results["models"][row] = measured | {"bytes": size}
    run.save_results()
    log.info(
        "%s: token perplexity %.3f, KL to 16 bit %.4f, %.1f MB",
        label,
        measured["token_perplexity"],
        measured["kl_to_teacher"],
        size / 1e6,
    )


def measure_16bit(job: Job, reference: perplexity.Logits, known: Mapping[str, Any] | None = None) -> None:
    """The row of the model that was given. `known`: see `measure`."""
    measure(
        job,
        reference,
        "16bit",
        job.loaded.model,
        job.loaded.tokenizer,
        2 * sum(p.numel() for p in job.loaded.model.parameters()),
        known,
    )


def kinds_of(job: Job) -> list[str]:
    """Formats that the run is to be exported to, or was, by hand."""
    return list(dict.fromkeys((*job.run.results.get("exports", {}), *job.options.export)))


def measure_saved(job: Job, reference: perplexity.Logits, row: str) -> None:
    """The row of the 4-bit model in the run's folder, and of its exports: what is measured is what is shipped."""
    job.loaded.model.to("meta")  # frees the weights
    options = job.options
    if row not in job.run.results["models"]:
        device = models_device.pick_device(options.device)
        model, tokenizer, quantized = quantized_model.load_quantized(
            job.quantized, models_device.pick_dtype(options.dtype, device), options.trust_remote_code
        )
        measure(job, reference, row, model.to(device), tokenizer, size_of(model, quantized))
        del model
    for kind in kinds_of(job):
        if kind not in job.run.results["models"] or not (job.run.path / kind).is_dir():
            try:
                exported = export_run(job.run, kind, options.trust_remote_code)
            except ExportError as error:  # all else is done and worth a report
                job.run.failed.append(error)
                continue
            measure(job, reference, kind, exported.model, exported.tokenizer, exported.size)


@dataclass(frozen=True)
class Exported:
    """A model in another runtime, that answers like a transformers model."""

    model: Any
    tokenizer: Any
    size: int


def export_run(run: Run, kind: str, trust_remote_code: bool = False) -> Exported:
    """Export the quantized folder of a run to RUN/kind, and open what was written."""
    exporter, folder = EXPORTERS[kind](), run.path / kind
    with run.stage(f"export {kind}"):
        model, tokenizer, quantized = quantized_model.load_quantized(
            run.path / "quantized", torch.float32, trust_remote_code
        )
        log.info("exporting to %s", kind)
        with files.atomic_folder(folder) as temporary:
            counts = exporter.export(model, tokenizer, quantized, temporary)
        run.results.setdefault("exports", {})[kind] = counts
        log.info(
            "%s: %d weights in 4 bits and %d in 8 bits, all codes read back equal; logits within %.1e of torch; %.1f MB",
            kind, counts["weights_u4"], counts["weights_u8"], counts["logit_difference"], counts["bytes"] / 1e6,
        )  # fmt: skip
    return Exported(exporter.open_model(folder, model.config), tokenizer, counts["bytes"])


def finish(run: Run, warnings: list[str]) -> None:
    """Write and print the report. Raises ExportError after that, where an export failed."""
    results = run.results
    warnings = [*warnings, *(f"not exported: {error}" for error in run.failed)]
    results["warnings"] = warnings
    for warning in warnings:
        log.warning(warning)
    run.save_results()
    files.write_text(run.path / "report.md", report_run.markdown(results))
    console.print(report_run.table(results))
    console.print(report_run.sentence(results), highlight=False)
    console.print(
        f"Everything is in {run.path} (report.md, results.json{''.join(f', {kind}/' for kind in results.get('exports', {}))}).",
        highlight=False,
    )
    if run.failed:
        raise run.failed[0]


def check_memory(needed: int, available: int, remedy: str) -> None:
    """Warn where the estimate does not fit."""
    if needed > available:
        log.warning("the estimate is above the free memory (%.1f GB); %s", available / 1e9, remedy)


def _check_export_memory(loaded: loading.LoadedModel, path: Path) -> None:
    """Warn where the export at the end will not fit into the machine's memory, whatever the device: the 16-bit model is gone by then."""
    parameters = list(loaded.model.parameters())
    held = sum(p.numel() * p.dtype.itemsize for p in parameters if p.device.type == "cpu")
    needed, available = (
        memory.export_memory(sum(p.numel() for p in parameters)),
        psutil.virtual_memory().available + held,
    )
    if needed > available:
        log.warning(
            "the export at the end takes about %.1f GB of memory, %.1f GB are free; if it fails, the 4-bit model in %s/quantized is kept, and "
            "nybble export writes it on a larger machine; to do without: --export", needed / 1e9, available / 1e9, path,
        )  # fmt: skip


def estimate_compression(options: Options, loaded: loading.LoadedModel, shapes: memory.ModelShapes, count: int) -> int:
    """Bytes of memory that compression with `count` calibration sequences takes; 0 without."""
    return memory.compression_memory(shapes, count, options.seq_len, loaded.model.device.type == "cuda") if count else 0
