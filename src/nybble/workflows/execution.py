"""How a training computes: cache, microbatch, checkpointing and base weights, chosen by the memory that is free."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from nybble import processes
from nybble.models.schemes import num_scales, weight_shapes
from nybble.options.commands import TrainCommand
from nybble.options.training import TrainedPart, TrainingOptions
from nybble.quant.position import MAX_CODE_BITS
from nybble.run.folder import check_free_disk
from nybble.run.results import Phase, read_results
from nybble.training import memory
from nybble.training.losses import chunk_tokens
from nybble.training.memory import MicrobatchLimits, ModelShapes, TrainingSetup
from nybble.training.optimizer import check_optimizer
from nybble.workflows import estimate, placement
from nybble.workflows.plan import PlannedRun

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
        fixed_point: frozen weights take one byte each.
        reasons: why anything slower than necessary was chosen, for a message.
    """

    weight_cache: Literal["step", "recompute"]
    microbatch_size: int
    gradient_checkpointing: bool
    fixed_point: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        many = f"microbatches of {self.microbatch_size}"
        checkpointing = ", gradient checkpointing" * self.gradient_checkpointing
        return f"{many}, {self.weight_cache} cache{checkpointing}{', base weights in one byte' * self.fixed_point}"

    def options(self) -> dict[str, Any]:
        """These choices as values of options."""
        return {
            "weight_cache": self.weight_cache,
            "microbatch_size": self.microbatch_size,
            "gradient_checkpointing": "on" if self.gradient_checkpointing else "off",
            "base_weights": "fixed" if self.fixed_point else "exact",
        }


def plan_memory(
    options: TrainCommand, training: TrainingOptions, planned: PlannedRun, size: TrainingSize, tasks: tuple[str, ...]
) -> ExecutionPlan:
    """Choose how to compute by the memory that is free; log the estimate, and warn of memory that is not free.

    Args:
        tasks: lm-eval tasks that are measured.

    Raises:
        RunError: the disk or the memory is too small.
        MissingExtraError, OptionError: the optimizer cannot be used here, or a model on disk would have to write text.
    """
    device, available = planned.loaded.model.device, estimate.available_memory(planned.loaded)
    check_optimizer(training.optim, device)
    shapes = ModelShapes.of(planned.loaded.model, planned.selection.linears)
    setup = TrainingSetup(
        shapes=shapes,
        rank=size.rank,
        train=size.train,
        positions_bytes=memory.positions_bytes(shapes, options.compression.keep_positions),
        num_scales=num_scales(planned.loaded.model, planned.selection),
        chunk_tokens=chunk_tokens(device, shapes.vocab_size),
        weight_copies=size.weight_copies,
        logits_bytes=estimate.measured_logit_bytes(planned, tasks),
        short_moments=training.optim == "adamw_8bit",
        averages=training.lr_scheduler_type == "constant_with_averaging",
        on_gpu=device.type != "cpu",
        on_disk=planned.loaded.on_disk,
        shards=size.shards,
    )
    limits = MicrobatchLimits(
        length=size.seq_len,
        batch_size=min(training.batch_size, size.max_rows or training.batch_size),
        available_bytes=available,
        max_tokens=_MAX_MICROBATCH_TOKENS.get(device.type, _MAX_MICROBATCH_TOKENS["cpu"]),
    )
    setup, chosen = _choose(training, planned, setup, limits)
    before = placement.preparation(planned, options.model, options.compression, tasks)
    needed = max(memory.training_memory(setup, chosen.microbatch_size * size.seq_len), before.memory)
    if not _is_trained(options):
        disk = memory.training_disk(setup, size.teacher_tokens) + before.disk
        check_free_disk(options.folder, disk)
        log.info(
            "estimate: %.1f GB of memory (%s; %.1f GB free), %.1f GB of disk%s%s",
            needed / 1e9, chosen, available / 1e9, disk / 1e9, before.place, "".join(f"; {r}" for r in chosen.reasons),
        )  # fmt: skip
        estimate.check_memory(needed, planned, _remedy(training, planned, setup, chosen, size))
    # Free memory differs between processes; what they choose by it must not.
    return processes.on_first(lambda: chosen)


def _remedy(
    training: TrainingOptions, planned: PlannedRun, setup: TrainingSetup, chosen: ExecutionPlan, size: TrainingSize
) -> str:
    """What a training needs with every option that makes it smaller, and what else there is."""
    short = _short_weights(planned) if training.keeps_base_weights else 0
    options: dict[str, tuple[bool, dict[str, Any]]] = {
        "--microbatch_size 1": (chosen.microbatch_size > 1, {}),
        "--weight_cache recompute": (chosen.weight_cache != "recompute", {"weight_copies": 0}),
        "--gradient_checkpointing on": (not chosen.gradient_checkpointing, {"checkpointing": True}),
        "--base_weights fixed": (bool(short) and not chosen.fixed_point, {"fixed_point_weights": short}),
        "--optim adamw_8bit": (not setup.short_moments and setup.trains_many, {"short_moments": True}),
    }
    flags = [flag for flag, (helps, _) in options.items() if helps]
    smallest = replace(setup, **{key: value for flag in flags for key, value in options[flag][1].items()})
    needed = memory.training_memory(smallest, size.seq_len)
    other = "--train lora" if size.train != "lora" else "a smaller rank" if size.rank else "a smaller model"
    with_flags = f"with {' '.join(flags)} the training needs {needed / 1e9:.1f} GB; " if flags else ""
    return f"{with_flags}a shorter --seq_len or {other} needs less"


def _choose(
    training: TrainingOptions, planned: PlannedRun, setup: TrainingSetup, limits: MicrobatchLimits
) -> tuple[TrainingSetup, ExecutionPlan]:
    """Choose what was not given, in the order of what it costs: the cache, checkpointing, base weights in one byte.

    Returns: the setup that follows, and what was chosen.
    """
    smallest, reasons = max(1, training.microbatch_size) * limits.length, list[str]()

    def fits(tokens: int, what: str) -> bool:
        needed = memory.training_memory(setup, tokens)
        if memory.fits(needed, limits.available_bytes):
            return True
        reasons.append(f"{what} would need {needed / 1e9:.1f} GB")
        return False

    cache = training.weight_cache
    if cache == "auto":
        cache = "step" if fits(limits.length, "a step cache") else "recompute"
    setup = replace(setup, weight_copies=setup.weight_copies if cache == "step" else 0)
    checkpointing = training.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = "off" if fits(smallest, "no checkpointing") else "on"
    setup = replace(setup, checkpointing=checkpointing == "on")
    base = training.base_weights if training.keeps_base_weights else "exact"
    if base == "auto":
        base = "exact" if fits(smallest, "base weights in 16 bits") else "fixed"
    if base == "fixed":
        setup = replace(setup, fixed_point_weights=_short_weights(planned))
    size = training.microbatch_size or memory.pick_microbatch_size(setup, limits)
    return setup, ExecutionPlan(cache, size, setup.checkpointing, base == "fixed", tuple(reasons))


def _short_weights(planned: PlannedRun) -> int:
    """Numbers in the linear layers whose codes leave room for a position in one byte."""
    shapes, selection = weight_shapes(planned.loaded.model, planned.selection), planned.selection
    short = [name for name in selection.linears if selection.schemes[name].bits <= MAX_CODE_BITS]
    return sum(math.prod(shapes[name]) for name in short)


def _is_trained(options: TrainCommand) -> bool:
    """Whether the run that is resumed has its 4-bit model already."""
    return options.run.resume and read_results(options.folder).phase.reached(Phase.QUANTIZED)
