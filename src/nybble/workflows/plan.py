"""The beginning of every workflow that makes a run: what can be wrong is found here, the cheapest checks first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nybble import container, processes
from nybble.compression.checks import check_length, check_model, warn_of_small_weights
from nybble.compression.methods import automatic_method, needs_calibration, parse_method
from nybble.data.mixture import Mixture
from nybble.data.prepare import TextData
from nybble.data.sources import prefix_source
from nybble.errors import OptionError
from nybble.evaluation.lm_eval import check_tokenizer
from nybble.export.base import EXPORTERS
from nybble.export.checks import check_exportable, check_formats
from nybble.models import loading
from nybble.models.device import pick_device, pick_dtype
from nybble.models.head import LMHead
from nybble.models.loading import LoadedModel
from nybble.models.schemes import assign_schemes, average_bits, check_patterns, describe, weight_shapes
from nybble.models.selection import LayerSelection, select_layers
from nybble.options.base import Command
from nybble.options.commands import RunCommand, TrainCommand
from nybble.options.compression import AUTO, CompressionOptions
from nybble.options.evaluation import EvaluationOptions
from nybble.options.model import DeviceOptions, ModelOptions
from nybble.options.scheme import SchemeOptions
from nybble.run.complete import is_quantized
from nybble.run.folder import check_folder
from nybble.run.marker import is_run
from nybble.run.results import RunResults, read_results
from nybble.run.resume import check_same_command, check_same_options, saved_options
from nybble.workflows import init_from, mixed_precision
from nybble.workflows.launch import check_processes
from nybble.workflows.rehearsal import rehearse
from nybble.workflows.text import check_token_ids

log = logging.getLogger("nybble")

AnyRun = TypeVar("AnyRun", bound=RunCommand)
# Tokens of the first test sequence on which a model is tried before the run.
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class CompressionPlan:
    """How the 4-bit weights come about before any training.

    Attributes:
        method: what compresses, or what has compressed the weights of `init_from`.
        calibrates: the compression that is to be done needs calibration text.
        init_from: the finished run whose 4-bit weights are taken over.
        is_made: the run goes on, and its own 4-bit model is complete: what it was made from is not needed.
    """

    method: str
    calibrates: bool
    init_from: Path | None = None
    is_made: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps of the compression that is to be done; none for rtn and where a finished run is taken over."""
        return () if self.init_from is not None else parse_method(self.method, "--method")


@dataclass(frozen=True)
class PlannedRun:
    """The model of a run, its text, and how it is compressed; everything that is known before the run folder is opened.

    Attributes:
        head: the 16-bit head, a copy.
        formats: what is exported at the end.
    """

    loaded: LoadedModel
    selection: LayerSelection
    compression: CompressionPlan
    text: TextData
    head: LMHead
    formats: tuple[str, ...]


def keep_saved_choices(options: AnyRun) -> AnyRun:
    """On --resume, what was chosen automatically when the run began stays: other choices would give other bits."""
    if not (options.run.resume and check_folder(options.folder, resume=True, overwrite=False)):
        return options
    saved, given = saved_options(options.folder), options.flat()
    if saved.get("method") == AUTO:  # of a version that did not note what it had chosen
        saved["method"] = read_results(options.folder).method or AUTO
    automatic: dict[str, Any] = {"method": AUTO, "microbatch_size": 0}
    automatic |= dict.fromkeys(("weight_cache", "gradient_checkpointing", "base_weights"), AUTO)
    kept = {key: saved[key] for key, value in automatic.items() if key in saved and given.get(key) == value}
    return options.replace(**kept | {"output_dir": str(options.folder)})


def validate(
    options: RunCommand,
    compression: CompressionOptions,
    evaluation: EvaluationOptions,
    inputs: Mapping[str, Sequence[str]],
    command: str | None = None,
) -> None:
    """Check what needs no model.

    Args:
        inputs: option name -> files, folders or sources that the run reads; --overwrite must not delete them.
        command: of the results, if it is not that of the options.

    Raises:
        NybbleError: an option, the model's path, the run folder or a format is unusable.
    """
    folder, run = options.folder, options.run
    check_processes(options)
    if compression.method != AUTO:
        parse_method(compression.method, "--method")
    if (source := _source(compression)) is not None and results_if_made(options) is None:
        init_from.check_finished(source)
    check_formats(evaluation.export, "--export")
    pick_device(options.model.device)
    init_from.check_sixteen_bit(options.model.pretrained)
    used = check_folder(folder, run.resume, run.overwrite)
    if run.resume and not used:
        log.info("there is no run in %s to resume; a new one begins", folder)
    if run.resume and used:
        check_same_command(folder, command or options.NAME)
        check_same_options(folder, options)
    if run.overwrite:
        _check_inputs_survive(inputs, folder)


def input_names(options: Command) -> dict[str, Sequence[str]]:
    """Option name -> files, folders and sources that a run with these options reads."""
    found: dict[str, Sequence[str]] = {}
    for name in ("pretrained", "init_from", "teacher", "data", "eval_data", "data_dir", "task"):
        value = options.flat().get(name)
        if value:
            found[name] = (value,) if isinstance(value, str) else Mixture.parse(value).names
    return found


def _check_inputs_survive(inputs: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Raise OptionError where --overwrite would delete what the run reads."""
    for option, names in inputs.items():
        for name in names:
            path = Path(prefix_source(name) or name)
            if path.exists() and path.resolve().is_relative_to(folder.resolve()):
                raise OptionError(
                    f"--overwrite would delete --{option} {path}, which this run reads; choose another --output_dir"
                )


def load_tokenizer(options: ModelOptions, tasks: tuple[str, ...]) -> Any:
    """The tokenizer, with which text is read before the model is; the lm-eval tasks that will be run suit it."""
    tokenizer = loading.load_tokenizer(options.pretrained, options.trust_remote_code)
    check_tokenizer(tasks, tokenizer)
    return tokenizer


def load_model(options: ModelOptions, tokenizer: Any = None, on_disk: bool = False) -> LoadedModel:
    """The 16-bit model and its tokenizer.

    Args:
        tokenizer: of `load_tokenizer`, or None.
        on_disk: its decoder blocks stay on the disk.

    Raises:
        ModelError: not found, not readable, or not supported.
    """
    device, dtype = pick_place(options)
    log.info("loading %s (%s, %s)", options.pretrained, device, str(dtype).removeprefix("torch."))
    return loading.load(options.pretrained, dtype, device, options.trust_remote_code, on_disk, tokenizer)


def pick_place(options: DeviceOptions) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype."""
    device = pick_device(options.device)
    return device, pick_dtype(options.dtype, device)


def select(loaded: LoadedModel, options: SchemeOptions) -> LayerSelection:
    """Which layer gets which scheme; where --bits is an average, all have the bits below it until `check_fit`.

    Raises:
        OptionError: a pattern matches nothing, or a layer cannot have its scheme.
    """
    everything = select_layers(loaded.model)
    check_patterns(everything, loaded.model, options)
    selection = assign_schemes(everything, loaded.model, options)
    ignored = len(everything.linears) + len(everything.embeddings) - len(selection.schemes)
    average = average_bits(selection.schemes, weight_shapes(loaded.model, selection))
    what, notes = f"{describe(selection)}; {average:.2f} bits a weight", selection.notes
    if options.is_average:  # the choice of bits says which layer has which scheme
        what, notes = f"{options.bits:g} bits a weight on average", ()
    what += f"; {ignored} layers stay in 16 bits" if ignored else ""
    log.info("%s: %.1f M parameters; %s", loaded.name, sum(p.numel() for p in loaded.model.parameters()) / 1e6, what)
    for note in notes:
        log.warning(note)
    return selection


def results_if_made(options: RunCommand) -> RunResults | None:
    """The results of a run that goes on and whose 4-bit model is complete; None where one has to be made."""
    goes_on = options.run.resume and not options.flat().get("eval_only")  # other ranks make another model
    return read_results(options.folder) if goes_on and is_quantized(options.folder) else None


def _source(compression: CompressionOptions) -> Path | None:
    """The run of --init_from."""
    given = getattr(compression, "init_from", None)
    return Path(given) if given else None


def plan_compression(
    compression: CompressionOptions,
    loaded: LoadedModel,
    selection: LayerSelection,
    trains_codes: bool | None = None,
    made: RunResults | None = None,
) -> CompressionPlan:
    """Resolve --method auto and --init_from, and warn of options that the method does not use.

    Args:
        trains_codes: whether what is trained afterwards changes codes (adapters or weights inside the rounding) or
            only scales and norms; None: nothing is trained.
        made: of `results_if_made`.

    Raises:
        OptionError: the run of --init_from does not fit the model.
    """
    source = _source(compression)
    if source is not None and made is not None:
        plan = CompressionPlan(made.method, False, source, is_made=True)
    elif source is not None:
        init_from.check_fits(source, loaded, selection)
        if trains_codes:
            init_from.warn_of_centres(source)
        plan = CompressionPlan(init_from.method_of(source), False, source)
    else:
        chosen = compression.method == AUTO
        scales = trains_codes is False
        method = automatic_method(loaded.model, selection.linears, scales) if chosen else compression.method
        plan = CompressionPlan(method, needs_calibration(parse_method(method, "--method")))
    _warn_of_unused(compression, plan)
    return plan


def _warn_of_unused(compression: CompressionOptions, plan: CompressionPlan) -> None:
    """Warn of options for steps that the compression does not have."""
    used_by = {"gptq_damping": "gptq", "gptq_act_order": "gptq", "blockwise_epochs": "blockwise"}
    for name, step in used_by.items():
        if step not in plan.steps and getattr(compression, name) != getattr(CompressionOptions, name):
            log.warning("--%s has no effect: the method has no step %s", name, step)
    for name in ("limit_blocks", "num_calibration_samples"):
        if not plan.calibrates and getattr(compression, name) != getattr(CompressionOptions, name):
            log.warning("--%s has no effect: nothing is calibrated", name)


def check_fit(
    options: RunCommand,
    evaluation: EvaluationOptions,
    loaded: LoadedModel,
    selection: LayerSelection,
    compression: CompressionPlan,
    text: TextData,
) -> PlannedRun:
    """Try the model on the beginning of the test text, and a twin of it on all that follows.

    Raises:
        DataError: the tokenizer does not belong to the model.
        OptionError, ModelError: the method cannot compress this model, sequences are longer than its positions, or its
            logits are not what its family's facts say.
        ExportError: a format cannot hold the model.
    """
    model, ids_ST = loaded.model, text.test.ids
    check_token_ids(text, model.get_input_embeddings().num_embeddings, loaded.name)
    check_length(model, loaded.name, ids_ST.shape[1])
    probe_T = ids_ST[0, :_PROBE_TOKENS]
    probes = torch.stack([probe_T, probe_T.flip(0)])
    check_model(model, selection.linears, probes, compression.steps)
    embeddings = {name: model.get_submodule(name).weight for name in selection.embeddings}
    warn_of_small_weights(embeddings.items(), selection.schemes)
    head = LMHead.of(model, copy=True)
    head.verify(model, probe_T[None].to(model.device))
    if options.scheme.is_average:
        selection = mixed_precision.choose_bits(options, evaluation.export, loaded, text)
    columns = {name: shape[1] for name, shape in weight_shapes(model, selection).items()}
    formats = check_exportable(evaluation.export, model.config, selection, columns)
    _check_export_memory(loaded, formats, options.folder)
    optional = [name for name in formats if name not in evaluation.export]
    if optional or not (options.run.resume and is_run(options.folder)):  # a run was tried when it began
        trains = isinstance(options, TrainCommand)
        trust = options.model.trust_remote_code
        formats = processes.on_first(lambda: rehearse(loaded, options.scheme, formats, trains, trust, optional))
    return PlannedRun(loaded, selection, compression, text, head, formats)


def _check_export_memory(loaded: LoadedModel, formats: Sequence[str], folder: Path) -> None:
    """Warn where an export at the end will not fit into the machine's memory, whatever the device."""
    parameters = list(loaded.model.parameters())
    held = sum(p.numel() * p.dtype.itemsize for p in parameters if p.device.type == "cpu")  # free by then
    available = container.available_memory() + held
    total, largest = (kind(p.numel() for p in parameters) for kind in (sum, max))
    for name in formats:
        needed = EXPORTERS[name].peak_memory(total, 2 * largest)
        if needed > available:
            log.warning(
                "the export to %s at the end needs about %.1f GB of memory, %.1f GB are free; if it fails, the 4-bit "
                "model in %s/quantized is kept, and nybble export writes it on a larger machine; to do without: "
                "--export none",
                name, needed / 1e9, available / 1e9, folder,
            )  # fmt: skip
