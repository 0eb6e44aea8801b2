"""From trained adapters to the 4-bit model in the run folder, at one configuration of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from nybble import processes
from nybble.files import remove_folder
from nybble.models.quantized_model import save_quantized
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.nls.scorer import evaluation_weights
from nybble.qat.absorb import absorb_layers, merge_adapters, weight_changes
from nybble.qat.base import CachedWeightLinear, QuantizedLinear
from nybble.qat.lora import LoRALinear
from nybble.qat.norms import bake_norms, make_norms_trainable
from nybble.quant.weight import QuantizedWeight
from nybble.run.folder import RunFolder
from nybble.run.results import Phase
from nybble.tasks.attention import plain_attention
from nybble.training.fit import checkpoint_names
from nybble.workflows import steps, train
from nybble.workflows.measure import measure_row, size_in_16_bits, size_when_shipped
from nybble.workflows.positions import TrainedPositions
from nybble.workflows.task_run import TaskRun

# Name of the training of scales and norms in 4 bits that follows the training of adapters on 16-bit weights.
SCALES = "scales"


@dataclass(frozen=True)
class TunedRun:
    """A run whose layers have adapters.

    Attributes:
        layers: by module name.
        compressed: all quantized weights that the adapters are trained inside; None where they are on 16-bit weights.
        positions: of the same weights; None where the adapters are on 16-bit weights.
    """

    task_run: TaskRun
    layers: dict[str, CachedWeightLinear]
    compressed: dict[str, QuantizedWeight] | None
    positions: TrainedPositions | None = None

    @property
    def quantized_after(self) -> bool:
        """Whether the adapters are on 16-bit weights, which are quantized afterwards."""
        return self.compressed is None


def quantize_and_save(tuned: TunedRun, configuration: RankConfiguration, by_search: bool = False) -> None:
    """Make the run's 4-bit model from the layers at a configuration of ranks.

    Args:
        by_search: nybble search has found the configuration.
    """
    task_run = tuned.task_run
    run, loaded, task = task_run.context.run, task_run.context.loaded, task_run.task
    if task.configuration not in (None, list(configuration)):
        run.results.phase = Phase.REPLACING
    task.configuration, task.replaced_by_search = list(configuration), by_search or task.replaced_by_search
    run.save()
    if run.results.phase == Phase.REPLACING:
        discard_quantized(task_run)
    ranks.activate_ranks(tuned.layers, configuration)
    quantized, positions = to_4_bits(tuned)
    run.on_first(lambda: save_quantized(run.quantized, loaded, quantized, positions))
    run.reach(Phase.QUANTIZED)


def discard_quantized(task_run: TaskRun) -> None:
    """Delete what was made with another configuration of ranks. The run is then trained, and not quantized."""
    run, after = task_run.context.run, task_run.options.training.quantize == "after"
    results, formats = run.results, dict.fromkeys((*run.results.exports, *task_run.context.formats))
    remove_folder(run.quantized)
    for name in formats:
        _delete_export(run, name)
    for name in checkpoint_names(SCALES):
        (run.path / name).unlink(missing_ok=True)
    for row in ("tuned", *formats, *(("tuned16", "compressed") if after else ())):
        results.models.pop(row, None)
    results.trainings = [training for training in results.trainings if training.name != SCALES]
    for stage in ("absorb", *(("compress", f"train {SCALES}") if after else ())):
        results.seconds.pop(stage, None)
    run.reach(Phase.TRAINED)


def _delete_export(run: RunFolder, name: str) -> None:
    """Delete the files that nybble wrote to an export folder; those of other people stay."""
    files = run.results.files.get(name)
    if files is None:  # an earlier version of nybble noted none
        remove_folder(run.path / name)
    elif processes.is_first():
        for file in files:
            (run.path / name / file).unlink(missing_ok=True)


def to_4_bits(tuned: TunedRun) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The layers, with the ranks that are active, become plain ones in place.

    Returns: all quantized weights, and the positions that are kept.
    """
    context = tuned.task_run.context
    if tuned.compressed is None or tuned.positions is None:
        before, layers, positions = _compress_merged(tuned)
    else:
        before, positions = tuned.compressed, tuned.positions
        layers = cast(dict[str, QuantizedLinear], tuned.layers)  # the same object, which absorb_layers empties
    with context.run.stage("absorb"):
        bake_norms(context.loaded.model)
        kept: dict[str, Tensor] = {}
        absorbed = absorb_layers(
            context.loaded.model, layers, lambda name, layer: kept.update(positions.after(name, layer))
        )
        context.run.results.changes = weight_changes(before, absorbed)
    return before | absorbed, kept


def _compress_merged(
    tuned: TunedRun,
) -> tuple[dict[str, QuantizedWeight], dict[str, QuantizedLinear], TrainedPositions]:
    """Merge adapters into the 16-bit weights, compress these, and train scales and norms on the task with fixed codes.

    Returns: all quantized weights as compressed, the trained layers, and what their positions follow from.
    """
    task_run, context = tuned.task_run, tuned.task_run.context
    run, loaded, model = context.run, context.loaded, context.loaded.model
    merge_adapters(model, cast(dict[str, LoRALinear], tuned.layers))
    measure_row(run, task_run.evaluator, "tuned16", loaded, size_in_16_bits(model))
    compressed = steps.compress_model(context)
    layers = train.insert_quantized_layers(context, compressed, rank=0)
    positions = TrainedPositions.of(context, compressed, codes_stay=True)
    measure_compressed(tuned, compressed.weights, layers)
    training = task_run.options.training
    training = replace(training, epochs=training.scale_training_epochs)
    if training.epochs:
        norms = make_norms_trainable(model) if training.norm_lr else {}
        trained: dict[str, CachedWeightLinear] = dict(layers)
        with plain_attention(model, task_run.data.max_text_length):
            train.train_layers(context, training, trained, task_run.objective(trained, training), norms, SCALES)
    return dict(compressed.weights), layers, positions


def measure_compressed(
    tuned: TunedRun, weights: Mapping[str, QuantizedWeight], layers: Mapping[str, CachedWeightLinear]
) -> None:
    """Measure the compressed model before anything is trained in 4 bits."""
    task_run, context = tuned.task_run, tuned.task_run.context
    cached = task_run.options.ranks.fast_eval or task_run.options.training.weight_cache == "step"
    with evaluation_weights(layers, cached):
        size = size_when_shipped(context.loaded.model, weights)
        measure_row(context.run, task_run.evaluator, "compressed", context.loaded, size)


def remove_leftovers(task_run: TaskRun) -> None:
    """Delete what is needed only until the 4-bit model is saved.

    With --quantize during, the compressed blocks stay: other ranks begin from them.
    """
    after = task_run.options.training.quantize == "after"
    for name in ("trial", *(("compress",) if after else ())):
        remove_folder(task_run.context.run.path / name)
