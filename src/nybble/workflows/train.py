"""What distill and tune share around a training: layers to train, and the call of fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from torch import nn

from nybble import processes
from nybble.callbacks import Callback, CallbackList
from nybble.models.loading import release_files
from nybble.options.training import TrainingOptions
from nybble.qat.base import CachedWeightLinear, QuantizedLinear, cached_weights
from nybble.qat.fake_quant_full import FakeQuantizedFullLinear
from nybble.qat.fake_quant_linear import FakeQuantizedLinear
from nybble.qat.fake_quant_rounding import FakeQuantizedRoundingLinear
from nybble.qat.insert import (
    as_it_is,
    insert_fake_quant_layers,
    insert_fake_quant_layers_of,
    insert_fixed_codes_layers,
    insert_lora_layers,
)
from nybble.qat.lora import LoRALinear
from nybble.run.folder import RunFolder
from nybble.run.results import Training
from nybble.runtime import keeping_freed_memory
from nybble.training.checkpointing import checkpointed_blocks
from nybble.training.fit import FitConfig, checkpoint_names, fit, load_parameters
from nybble.training.objective import TrainingObjective
from nybble.training.tensorboard import TensorBoardCallback
from nybble.training.trainer import ParameterGroup, TrainerConfig
from nybble.workflows.steps import CompressedModel, RunContext

log = logging.getLogger("nybble")


def insert_quantized_layers(
    context: RunContext, compressed: CompressedModel, rank: int, fixed_point: bool = False, divided: bool = False
) -> dict[str, QuantizedLinear]:
    """Replace the compressed layers by trainable ones: adapters inside the rounding, or fixed codes at rank 0.

    Args:
        compressed: with adapters it loses its inits, layer by layer, so that their memory is freed.
        fixed_point: the frozen weights take one byte each.
        divided: each process keeps its own rows of the layers' weights.
    """
    model, layers, numbers = context.loaded.model, dict[str, QuantizedLinear](), count()

    def prepare(layer: QuantizedLinear) -> None:
        if fixed_point:
            _to_fixed_point(layer)
        if divided:
            layer.divide_rows(next(numbers))

    if rank:
        schemes = context.selection.schemes
        layers |= insert_fake_quant_layers(model, compressed.inits, schemes, rank, context.seed, prepare)
    else:
        layers |= insert_fixed_codes_layers(model, compressed.linears, context.seed, prepare)
    if fixed_point or not rank:
        release_files(model)
    _note_rank(context.run, layers, rank)
    return layers


def insert_layers_without_adapters(
    context: RunContext, compressed: CompressedModel, train: Literal["full", "rounding"], fixed_point: bool
) -> dict[str, QuantizedLinear]:
    """Replace the compressed layers by ones whose weights, or the scales that round them, are trained.

    Args:
        compressed: loses its inits, layer by layer, so that their memory is freed.
        fixed_point: the frozen weights take one byte each.
    """
    context.run.results.train, model, layers = train, context.loaded.model, dict[str, QuantizedLinear]()
    given = model, compressed.inits, context.selection.schemes, context.seed
    if train == "full":
        layers |= insert_fake_quant_layers_of(FakeQuantizedFullLinear, *given)
    else:
        prepare = _to_fixed_point if fixed_point else as_it_is
        layers |= insert_fake_quant_layers_of(FakeQuantizedRoundingLinear, *given, prepare)
    if fixed_point or train == "full":
        release_files(model)
    _note_rank(context.run, layers, 0)
    return layers


def _to_fixed_point(layer: QuantizedLinear) -> None:
    if isinstance(layer, FakeQuantizedLinear):
        layer.to_fixed_point()


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
        optim=options.optim,
    )
    config = FitConfig(trainer, options.save_steps, options.early_stopping_patience, name)
    callbacks: list[Callback] = [_SaveSeconds(run), context.callback]
    if "tensorboard" in options.report_to:
        callbacks.append(TensorBoardCallback(run.path / "tensorboard"))
    if processes.count() > 1:
        size = sum(parameter.nbytes for group in groups for parameter in group.parameters.values())
        log.info("%d processes add up %.3f MB of gradients in each step", processes.count(), size / 1e6)
    with run.stage(config.stage):
        with keeping_freed_memory():
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
