"""What distill and tune share around a training: memory plan, layers to train, the call of fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from nybble import processes
from nybble.callbacks import Callback, CallbackList
from nybble.files import check_free_disk
from nybble.models.schemes import num_scales
from nybble.options.commands import TrainCommand
from nybble.options.training import TrainedPart, TrainingOptions
from nybble.qat.base import CachedWeightLinear, QuantizedLinear, cached_weights
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.qat.fake_quant_rounding import FakeQuantizedRoundingLinear
from nybble.qat.insert import (
    insert_fake_quant_layers,
    insert_fake_quant_layers_of,
    insert_fixed_codes_layers,
    insert_lora_layers,
)
from nybble.qat.lora import LoRALinear
from nybble.run.folder import RunFolder
from nybble.run.results import Phase, Training, read_results
from nybble.training import memory
from nybble.training.checkpointing import checkpointed_blocks
from nybble.training.fit import FitConfig, checkpoint_names, fit, load_parameters
from nybble.training.losses import chunk_tokens
from nybble.training.memory import MicrobatchLimits, ModelShapes, TrainingSetup
from nybble.training.objective import TrainingObjective
from nybble.training.tensorboard import TensorBoardCallback
from nybble.training.trainer import ParameterGroup, TrainerConfig
from nybble.workflows import plan
from nybble.workflows.plan import PlannedRun
from nybble.workflows.steps import CompressedModel, RunContext

log = logging.getLogger("nybble")

# Larger microbatches are no faster, because the matrix products are already large, and need more memory. The value for
# GPUs is an upper bound that was not measured.
_MAX_MICROBATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class TrainingSize:
    """What the memory of a training depends on, besides the model.

    Attributes:
        rank: of the adapters; 0 = none.
        train: what is trained beside scales and norms.
        seq_len: tokens in the longest sequence that is trained on.
        teacher_tokens: tokens whose teacher states are kept on disk.
        weight_copies: of the weights that the step cache keeps: 2 where it collects gradients, otherwise 1.
        max_rows: upper bound on the sequences of an automatic microbatch; None = what memory allows.
        shards: processes that divide the rows of the 4-bit layers.
    """

    rank: int
    seq_len: int
    teacher_tokens: int
    weight_copies: int
    max_rows: int | None = None
    train: TrainedPart = "lora"
    shards: int = 1


@dataclass(frozen=True)
class ExecutionPlan:
    """How a training computes; chosen by the estimate of memory unless it was given.

    Attributes:
        weight_cache: see --weight_cache.
        microbatch_size: sequences per forward pass.
        gradient_checkpointing: decoder blocks are computed again in the backward.
    """

    weight_cache: Literal["step", "recompute"]
    microbatch_size: int
    gradient_checkpointing: bool


def plan_memory(
    options: TrainCommand, training: TrainingOptions, planned: PlannedRun, size: TrainingSize, tasks: tuple[str, ...]
) -> ExecutionPlan:
    """Choose how to compute by the memory that is free; log the estimate, refuse a small disk, and warn of memory.

    Args:
        tasks: lm-eval tasks that are measured.

    Raises:
        RunError: the disk is too small.
    """
    device, available = planned.loaded.model.device, plan.available_memory(planned.loaded)
    shapes = ModelShapes.of(planned.loaded.model, planned.selection.linears)
    setup = TrainingSetup(
        shapes=shapes,
        rank=size.rank,
        train=size.train,
        positions_bytes=memory.positions_bytes(shapes, options.compression.keep_positions),
        num_scales=num_scales(planned.loaded.model, planned.selection),
        chunk_tokens=chunk_tokens(device),
        weight_copies=size.weight_copies,
        logits_bytes=plan.measured_logit_bytes(planned, tasks),
        shards=size.shards,
    )
    cache = training.weight_cache
    if cache == "auto":
        cache = "step" if memory.fits(memory.training_memory(setup, size.seq_len), available) else "recompute"
    setup = replace(setup, weight_copies=size.weight_copies if cache == "step" else 0)
    checkpointing = training.gradient_checkpointing == "on"
    if training.gradient_checkpointing == "auto":
        smallest = max(1, training.microbatch_size) * size.seq_len
        checkpointing = not memory.fits(memory.training_memory(setup, smallest), available)
    setup = replace(setup, checkpointing=checkpointing)
    limits = MicrobatchLimits(
        length=size.seq_len,
        batch_size=min(training.batch_size, size.max_rows or training.batch_size),
        available_bytes=available,
        max_tokens=_MAX_MICROBATCH_TOKENS.get(device.type, _MAX_MICROBATCH_TOKENS["cpu"]),
    )
    microbatch_size = training.microbatch_size or memory.pick_microbatch_size(setup, limits)
    needed = max(
        memory.training_memory(setup, microbatch_size * size.seq_len),
        memory.measuring_memory(shapes, setup.logits_bytes) if size.shards > 1 else 0,
        plan.calibration_memory(setup.shapes, planned, options.compression.num_calibration_samples),
    )
    if not _is_trained(options):
        disk = memory.training_disk(setup, size.teacher_tokens) + plan.calibration_disk(setup.shapes, planned)
        check_free_disk(options.folder, disk)
        log.info(
            "estimate: %.1f GB of memory (%s cache%s; %.1f GB free), %.1f GB of disk",
            needed / 1e9, cache, ", gradient checkpointing" * checkpointing, available / 1e9, disk / 1e9,
        )  # fmt: skip
        fewer = "--train lora" if size.train == "full" else "a smaller rank"
        remedy = (
            f"{fewer}, --microbatch_size 1, --weight_cache recompute, --gradient_checkpointing on or a shorter "
            "--seq_len needs less"
        )
        plan.warn_of_memory(needed, available, remedy)
    # Free memory differs between processes; what they choose by it must not.
    return processes.on_first(lambda: ExecutionPlan(cache, microbatch_size, checkpointing))


def _is_trained(options: TrainCommand) -> bool:
    """Whether the run that is resumed has its 4-bit model already."""
    return options.run.resume and read_results(options.folder).phase.reached(Phase.QUANTIZED)


def insert_quantized_layers(context: RunContext, compressed: CompressedModel, rank: int) -> dict[str, QuantizedLinear]:
    """Replace the compressed layers by trainable ones: adapters inside the rounding, or fixed codes at rank 0."""
    model, layers = context.loaded.model, dict[str, QuantizedLinear]()
    if rank:
        layers |= insert_fake_quant_layers(model, compressed.inits, context.selection.schemes, rank, context.seed)
    else:
        codes = {name: compressed.weights[name] for name in compressed.inits}
        layers |= insert_fixed_codes_layers(model, codes, context.seed)
    _note_rank(context.run, layers, rank)
    return layers


def insert_layers_without_adapters(
    context: RunContext, compressed: CompressedModel, train: Literal["full", "rounding"]
) -> dict[str, QuantizedLinear]:
    """Replace the compressed layers by ones whose weights, or the scales that round them, are trained."""
    context.run.results.train, model, layers = train, context.loaded.model, dict[str, QuantizedLinear]()
    given = model, compressed.inits, context.selection.schemes, context.seed
    if train == "full":
        layers |= insert_fake_quant_layers_of(FakeQuantizedFullLinear, *given)
    else:
        layers |= insert_fake_quant_layers_of(FakeQuantizedRoundingLinear, *given)
    _note_rank(context.run, layers, 0)
    return layers


def insert_adapters(context: RunContext, rank: int) -> dict[str, LoRALinear]:
    """Put adapters on the 16-bit weights of the layers that will get 4 bits."""
    layers = insert_lora_layers(context.loaded.model, context.selection.linears, rank, context.seed)
    _note_rank(context.run, layers, rank)
    return layers


def _note_rank(run: RunFolder, layers: Mapping[str, CachedWeightLinear], rank: int) -> None:
    if run.results.lora_rank is None:
        run.results.lora_rank = rank
    clamped = sum(layer.rank < rank for layer in layers.values())
    if clamped:
        log.info("rank %d is clamped in %d layers that are narrower", rank, clamped)


def train_layers(
    context: RunContext,
    options: TrainingOptions,
    layers: Mapping[str, CachedWeightLinear],
    objective: TrainingObjective,
    norms: Mapping[str, nn.Parameter],
    name: str = "",
) -> None:
    """Train what `parameter_groups` names, and norms; afterwards they hold the values with the best validation.

    Args:
        options: with weight cache and microbatch size resolved.
        norms: of make_norms_trainable; empty = norms are not trained.
        name: of the training in the run's results and files; see run.results.Training.
    """
    groups = parameter_groups(options, layers)
    if norms:
        groups.append(ParameterGroup(norms, options.norm_lr, 0.0))
    pass_context = partial(cached_weights, list(layers.values())) if options.weight_cache == "step" else nullcontext
    train_parameters(context, options, groups, objective, name, pass_context)


def parameter_groups(options: TrainingOptions, layers: Mapping[str, CachedWeightLinear]) -> list[ParameterGroup]:
    """What is trained in the layers: what moves weights, and scales. Scales that are not trained need no gradient."""
    moving = {f"{name}.{leaf}": getattr(layer, leaf) for name, layer in layers.items() for leaf in layer.TRAINED}
    scales = {
        f"{name}.log_scale_shift": layer.log_scale_shift
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLinear)
    }
    for shift in scales.values():
        shift.requires_grad_(options.scale_lr > 0)
    groups = [ParameterGroup(moving, options.lr, options.weight_decay)] if moving else []
    return [*groups, ParameterGroup(scales, options.scale_lr, 0.0)] if scales and options.scale_lr else groups


def train_parameters(
    context: RunContext,
    options: TrainingOptions,
    groups: list[ParameterGroup],
    objective: TrainingObjective,
    name: str = "",
    pass_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Train parameters, and write the record of the training into the results.

    Args:
        pass_context: held around all microbatches of one pass.
    """
    run = context.run

    @contextmanager
    def one_pass() -> Iterator[None]:
        checkpointed = options.gradient_checkpointing == "on"
        with pass_context(), checkpointed_blocks(context.loaded.model) if checkpointed else nullcontext():
            yield

    trainer = TrainerConfig(
        steps=objective.steps_per_epoch * options.epochs,
        microbatch_size=options.microbatch_size,
        warmup_ratio=options.warmup_ratio,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=options.lr_scheduler_type,
    )
    config = FitConfig(trainer, options.save_steps, options.early_stopping_patience, name)
    callbacks: list[Callback] = [_SaveSeconds(run), context.callback]
    if "tensorboard" in options.report_to:
        callbacks.append(TensorBoardCallback(run.path / "tensorboard"))
    if processes.count() > 1:
        size = sum(parameter.nbytes for group in groups for parameter in group.parameters.values())
        log.info("%d processes add up %.3f MB of gradients in each step", processes.count(), size / 1e6)
    with run.stage(config.stage):
        record = fit(groups, objective, config, run.path, CallbackList(callbacks), one_pass)
        training = Training(name, record.steps, record.validation, record.best_step)
        run.results.trainings = [other for other in run.results.trainings if other.name != name] + [training]


class _SaveSeconds(Callback):
    """Writes the results with every checkpoint, so that a killed process keeps the seconds so far."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_checkpoint(self, stage: str, step: int) -> None:
        """Write the results."""
        self.run.save()


def measuring_weights(layers: Mapping[str, CachedWeightLinear], weight_cache: str) -> AbstractContextManager[None]:
    """For measuring: compute the weights once, where the plan of memory has room for them."""
    return cached_weights(layers.values(), flush=False) if weight_cache == "step" else nullcontext()


def load_best(folder: Path, options: TrainingOptions, layers: Mapping[str, CachedWeightLinear]) -> None:
    """Give layers the parameters with the best validation of the run's first training."""
    groups = parameter_groups(options, layers)
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    load_parameters(folder / checkpoint_names()[1], parameters)
