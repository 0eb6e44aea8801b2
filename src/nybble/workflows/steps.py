"""The steps between opening a run and its report, which every workflow puts in its own order."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nybble import processes
from nybble.callbacks import Callback, CallbackList
from nybble.compression import pipeline
from nybble.compression.calibration import BlockwiseConfig, Calibration
from nybble.compression.init import QuantizedInit
from nybble.compression.pipeline import CompressionResult
from nybble.compression.store import BlockStore
from nybble.console import bar
from nybble.data.generate import GENERATED_FILE, generate_pending, generation_batch
from nybble.data.packing import TokenRows, token_fingerprint
from nybble.data.prepare import TextData
from nybble.errors import DataError, ExportError
from nybble.export.base import EXPORTERS
from nybble.export.read_back import runtime_errors
from nybble.models import quantized_model
from nybble.models.head import LMHead
from nybble.models.loading import LoadedModel, model_fingerprint
from nybble.models.positions_file import has_positions
from nybble.models.quantized_file import LayerLayout, LazyMapping
from nybble.models.schemes import describe
from nybble.models.selection import LayerSelection
from nybble.options.commands import RunCommand
from nybble.options.compression import CompressionOptions
from nybble.options.model import ModelOptions
from nybble.qat.insert import quantize_embeddings
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.run.complete import QUANTIZED
from nybble.run.folder import RunFolder
from nybble.run.results import read_results
from nybble.runtime import hand_back_freed_memory, raise_if_interrupted
from nybble.training.teacher import HiddenStates, teacher_hidden_states
from nybble.workflows.export_run import export_run
from nybble.workflows.init_from import take_over
from nybble.workflows.measure import Evaluator, measure_row, size_when_shipped
from nybble.workflows.plan import CompressionPlan, PlannedRun, pick_place
from nybble.workflows.target import open_exported

log = logging.getLogger("nybble")


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What the steps of a run work on.

    Attributes:
        loaded: the 16-bit model, which the steps change in place.
        options: where and how models compute.
        compression, calibration: the plan, and the options of the methods.
        head: the 16-bit head, a copy.
        formats: what is exported at the end.
        identity: tells the 16-bit model apart from others of the same name.
        callback: is told of stages, steps and validations.
    """

    run: RunFolder
    loaded: LoadedModel
    selection: LayerSelection
    options: ModelOptions
    compression: CompressionPlan
    calibration: CompressionOptions
    text: TextData
    head: LMHead
    formats: tuple[str, ...]
    seed: int
    identity: str
    callback: Callback

    @staticmethod
    def of(
        run: RunFolder,
        options: RunCommand,
        calibration: CompressionOptions,
        planned: PlannedRun,
        callbacks: Sequence[Callback],
    ) -> RunContext:
        """The context of a run that was just opened."""
        return RunContext(
            run=run,
            loaded=planned.loaded,
            selection=planned.selection,
            options=options.model,
            compression=planned.compression,
            calibration=calibration,
            text=planned.text,
            head=planned.head,
            formats=planned.formats,
            seed=options.run.seed,
            identity=f"{options.model.pretrained} {model_fingerprint(planned.loaded.model)}",
            callback=CallbackList(callbacks),
        )


@dataclass(frozen=True)
class CompressedModel:
    """A model that was compressed in place.

    Attributes:
        inits: where each 4-bit layer starts, by name; a dictionary, or read at each access where the model is on disk.
        weights: all quantized weights, those in 8 bits too, on the CPU.
        has_positions: inits lie where the compression left them; False where they lie in the middle of their cells.
    """

    inits: Mapping[str, QuantizedInit]
    weights: Mapping[str, QuantizedWeight]
    has_positions: bool = True

    @property
    def linears(self) -> Mapping[str, QuantizedWeight]:
        """The quantized weights of the 4-bit layers; those of a model on disk are read at each access."""
        return LazyMapping(self.inits, self.weights.__getitem__)

    def release_inits(self) -> None:
        """Free the weights before rounding, where they are in memory."""
        if isinstance(self.inits, dict):
            self.inits.clear()


def generate_text(context: RunContext) -> RunContext:
    """With --data self: let the model generate what it is trained on. Otherwise the context as it is.

    Raises:
        DataError: the model repeats itself; the run folder is deleted if nothing was measured yet.
    """
    run, text, model = context.run, context.text, context.loaded.model
    pending = text.pending
    if pending is None:
        return context
    # Not what is free: the batch decides what is generated.
    gpu_memory = torch.cuda.get_device_properties(model.device).total_memory if model.device.type == "cuda" else 0
    fitting = generation_batch(model.config, pending.seq_len, model.dtype.itemsize, gpu_memory)
    path = run.path / GENERATED_FILE
    try:
        with run.stage("generate"), bar("generate", pending.count) as advance:
            batch, tokenizer = min(pending.count, fitting), context.loaded.tokenizer
            ids = processes.on_first(lambda: generate_pending(pending, model, tokenizer, path, batch, advance))
    except DataError:
        if not run.results.models:
            run.delete()
        raise
    log.info("the model generated %d sequences of %d tokens: %s", *ids.shape, path)
    return replace(context, text=text.with_generated(ids))


def teacher_states(context: RunContext, splits: Mapping[str, TokenRows], batch: int) -> dict[str, HiddenStates]:
    """The 16-bit model's last hidden states on some splits, kept on disk. `batch`: sequences per forward pass."""
    run, model, states = context.run, context.loaded.model, {}
    with run.stage("teacher"), bar("teacher", sum(len(rows) for rows in splits.values())) as advance:
        for split, rows in splits.items():
            path = run.path / "teacher" / f"{split}.bin"
            states[split] = teacher_hidden_states(path, model, rows.ids, batch, context.identity, advance)
    return states


def compress_model(context: RunContext) -> CompressedModel:
    """Compress in place: linear layers by the method, embedding and head by round-to-nearest.

    Where the method calibrates, decoder blocks are compressed one by one, and those that an earlier session finished
    are restored. With --init_from the 4-bit weights of that run are taken over instead.
    """
    if context.compression.init_from is not None:
        return _take_over(context, context.compression.init_from)
    run, model, method = context.run, context.loaded.model, context.compression.method
    selection = context.selection
    schemes = {name: selection.schemes[name] for name in selection.linears}
    with run.stage("compress"):
        with bar(f"compress ({method})", len(schemes), "now") as advance:
            started, done = time.perf_counter(), 0
            context.callback.on_stage_start("compress", len(schemes))

            def progress(finished: int, text: str) -> None:
                nonlocal done
                done += finished
                advance(finished, now=text)
                if finished:
                    context.callback.on_step("compress", done, len(schemes), {})
                run.save()  # a killed process keeps the seconds so far

            store = _block_store(context)
            try:
                result = pipeline.compress(model, schemes, method, _calibration(context, store), progress, store)
            finally:
                context.callback.on_stage_end("compress", time.perf_counter() - started)
        rows = quantize_embeddings(model, {name: selection.schemes[name] for name in selection.embeddings})
    run.results.layer_errors = {name: asdict(error) for name, error in result.errors.items()}
    run.results.block_losses = {name: list(losses) for name, losses in result.blocks.items()}
    run.save()
    log.info("%s: %s", method, describe(selection))
    for line in _error_lines(result):
        log.info(line)
    hand_back_freed_memory()
    weights = {name: weight.to("cpu") for name, weight in rows.items()}
    return CompressedModel(result.inits, _all_weights(weights, result.inits, schemes, model))


def _all_weights(
    rows: dict[str, QuantizedWeight],
    inits: Mapping[str, QuantizedInit],
    schemes: Mapping[str, QuantScheme],
    model: Any,
) -> Mapping[str, QuantizedWeight]:
    """The quantized weights of embedding, head and compressed layers; those on disk are read at each access."""

    def quantized(name: str) -> QuantizedWeight:
        return inits[name].quantized(schemes[name]).to("cpu")

    if isinstance(inits, dict):
        return rows | {name: quantized(name) for name in inits}
    every = {name: weight.scheme for name, weight in rows.items()} | dict(schemes)
    layouts = {name: LayerLayout(tuple(model.get_submodule(name).weight.shape), every[name]) for name in every}
    return LazyMapping(every, lambda name: rows[name] if name in rows else quantized(name), layouts)


def _block_store(context: RunContext) -> BlockStore:
    """Where finished blocks are kept until the 4-bit model is saved."""
    # Of the model as it is now: in tune it has learned the task before it is compressed.
    identity = (
        f"{context.options.pretrained} {model_fingerprint(context.loaded.model)} "
        f"{token_fingerprint(context.text.calibration, context.compression.method)}"
    )
    return BlockStore(context.run.path / "compress", identity)


def _calibration(context: RunContext, store: BlockStore) -> Calibration | None:
    """What the method calibrates on; None if it does not calibrate."""
    if not context.compression.calibrates:
        return None
    options, ids_ST, folder = context.calibration, context.text.calibration, context.run.path
    return Calibration(
        input_ids=ids_ST,
        seed=context.seed,
        gptq_damping=options.gptq_damping,
        gptq_activation_order=options.gptq_act_order,
        blockwise=BlockwiseConfig(epochs=options.blockwise_epochs),
        limit_blocks=options.limit_blocks,
        folder=folder,
        store=store,
    )


def _take_over(context: RunContext, source: Path) -> CompressedModel:
    run, results = context.run, read_results(source)
    with run.stage("compress"):
        inits, weights = take_over(source, context.loaded, context.selection)
    if results.command == "compress":
        run.results.layer_errors, run.results.block_losses = results.layer_errors, results.block_losses
    run.save()
    return CompressedModel(inits, weights, has_positions(source / QUANTIZED))


def _error_lines(result: CompressionResult) -> list[str]:
    """What compression did, in sentences."""
    measured = {
        name: (error.rtn, error.compressed)
        for name, error in result.errors.items()
        if error.rtn is not None and error.compressed is not None
    }
    lines = []
    if measured:
        before, after = (sum(errors[i] for errors in measured.values()) / len(measured) for i in (0, 1))
        worst = max(measured, key=lambda name: measured[name][1])
        lines.append(
            f"mean output error of a layer: {before:.2%} by round-to-nearest, {after:.2%} compressed; largest "
            f"{measured[worst][1]:.2%} ({worst})"
        )
    if result.blocks:
        before, after = (sum(losses[i] for losses in result.blocks.values()) / len(result.blocks) for i in (0, 1))
        lines.append(
            f"mean output error of a decoder block on held-out sequences: {before:.3%} before reconstruction, "
            f"{after:.3%} after"
        )
    return lines


def measure_shipped(context: RunContext, evaluator: Evaluator, row: str) -> list[ExportError]:
    """Measure the 4-bit model in the run folder and its exports: what is measured is what ships.

    Formats that were exported by hand before are exported again where they are missing.

    Args:
        row: of the 4-bit model in torch: compressed or tuned.

    Returns: the exports that failed; everything else is done and worth a report.
    """
    run, options = context.run, context.options
    context.loaded.model.to("meta")  # frees the weights of the 16-bit model
    if row not in run.results.models:
        device, dtype = pick_place(options)
        trust = options.trust_remote_code
        if not context.loaded.on_disk:
            model, tokenizer, quantized = quantized_model.load_quantized(run.quantized, dtype, trust)
            model.to(device)
        else:
            model, tokenizer, quantized = quantized_model.load_quantized_on_disk(run.quantized, dtype, device, trust)
        shipped = LoadedModel(model, tokenizer, context.loaded.name)
        measure_row(run, evaluator, row, shipped, size_when_shipped(model, quantized))
        del model, shipped
    failed = []
    for name in dict.fromkeys((*run.results.exports, *context.formats)):
        measured = name in run.results.models
        if run.is_complete(name) and (measured or (name in run.results.exports and EXPORTERS[name].too_slow())):
            continue
        try:
            result = export_run(run, name, options.trust_remote_code)
            if slow := EXPORTERS[name].too_slow():
                log.info("%s is not measured: %s; nybble eval %s measures it", name, slow, run.path / name)
                continue
            exported = open_exported(run.path / name, EXPORTERS[name], options.trust_remote_code)
            with runtime_errors(EXPORTERS[name].label, name):
                measure_row(run, evaluator, name, exported, result.bytes)
        except ExportError as error:
            raise_if_interrupted()
            failed.append(error)
    return failed
