"""Whether the decoder blocks of a model stay on the disk until it has 4 bits, and the memory that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from nybble import processes
from nybble.errors import OptionError
from nybble.models.device import free_memory
from nybble.models.layers_on_disk import layers_on_disk
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel, is_gguf, refuse_gguf_on_disk
from nybble.models.pretrained import empty_model, read_config
from nybble.models.selection import select_layers
from nybble.models.shards import safetensors_files
from nybble.options.commands import CompressOptions, DistillOptions
from nybble.options.compression import CompressionOptions
from nybble.options.model import ModelOptions, OffloadOptions
from nybble.run.folder import check_free_disk
from nybble.runtime import returning_freed_memory
from nybble.training import memory
from nybble.training.memory import ModelShapes
from nybble.training.memory_from_disk import BlockShapes, CompressionSetup, offloaded_memory
from nybble.workflows.estimate import (
    available_memory,
    calibration_disk,
    calibration_memory,
    check_memory,
    measured_logit_bytes,
)
from nybble.workflows.plan import PlannedRun, pick_place

log = logging.getLogger("nybble")

# Bytes of all parameters. Smaller models are compressed faster where freed memory is kept.
_LARGE_MODEL = 1 << 30
# A model whose weights take less of the free memory is loaded without an estimate.
_SMALL = 0.25


def check_offload(options: CompressOptions | DistillOptions, on_disk: bool) -> None:
    """Check that a run can work on a model whose decoder blocks stay on the disk, if they do.

    Raises:
        OptionError, ModelError: it cannot.
    """
    if on_disk:
        refuse_gguf_on_disk(options.model.pretrained)
    if on_disk and options.scheme.is_average:
        raise OptionError(
            f"--bits {options.scheme.bits:g} needs the model in memory, as the choice of layers takes a gradient; its "
            "decoder blocks would stay on disk; use --bits 4, or --offload none"
        )


def stays_on_disk(options: CompressOptions | DistillOptions) -> bool:
    """Whether the decoder blocks stay on the disk: with --offload auto where the model in memory would not fit.

    Nothing is chosen for a model that cannot be read; loading it says why.

    Raises:
        OptionError: the run cannot work on a model on disk.
    """
    on_disk = options.model.offload == "disk"
    if options.model.offload == "auto":  # free memory differs between processes; what they choose by it must not
        on_disk = any(processes.gather(_does_not_fit(options)))
    check_offload(options, on_disk)
    return on_disk


def _does_not_fit(options: CompressOptions | DistillOptions) -> bool:
    """Whether a model needs more memory than is free; False for one that cannot be read."""
    pretrained = options.model.pretrained
    if is_gguf(pretrained):
        return False
    device, dtype = pick_place(options.model)
    free = min(free_memory(device), free_memory(torch.device("cpu")))
    try:
        if _count_numbers(safetensors_files(pretrained)) * dtype.itemsize < _SMALL * free:
            return False
        config = read_config(pretrained, options.model.trust_remote_code)
        model = linearize(empty_model(config, dtype, options.model.trust_remote_code))
        shapes = ModelShapes.of(model, select_layers(model).linears)
    except Exception as error:  # whatever a library raises
        log.debug("no choice of --offload: %s", error)
        return False
    count, length = options.compression.num_calibration_samples, options.text.seq_len
    # The whole model is on the CPU before it goes to a GPU.
    needed = max(memory.compression_memory(shapes, count, length, on_gpu) for on_gpu in {False, device.type != "cpu"})
    return needed > free


def _count_numbers(files: list[Path]) -> int:
    """Numbers in all tensors of safetensors files, by their headers."""
    count = 0
    for path in files:
        with safe_open(path, "pt") as file:
            count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return count


@contextmanager
def freed_memory(wanted: bool) -> Iterator[None]:
    """Let freed memory go back to the system at once, in this block, where that is wanted."""
    if not wanted:
        yield
        return
    with returning_freed_memory():
        yield


def is_large(loaded: LoadedModel) -> bool:
    """Whether what a run frees between the weights of a model leaves holes that matter.

    Distillation of 1.07 B parameters at rank 64 took 7.1 GB with them and 6.2 without.
    """
    size: int = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return size >= _LARGE_MODEL


def plan_compression_memory(options: CompressOptions, planned: PlannedRun) -> None:
    """Estimate a run that only compresses, and say where decoder blocks wait; warn of memory that is not free.

    Raises:
        OptionError: a model on disk would have to write text.
        RunError: the disk or the memory is too small.
    """
    loaded = planned.loaded
    shapes = ModelShapes.of(loaded.model, planned.selection.linears)
    needed = preparation(planned, options.model, options.compression, options.evaluation.eval_tasks)
    states = planned.text.test.ids.numel() * shapes.hidden_size * shapes.itemsize
    disk = states + needed.disk + 3 * shapes.parameters
    disk += memory.positions_bytes(shapes, options.compression.keep_positions)
    check_free_disk(options.folder, disk)
    available = available_memory(loaded)
    log.info(
        "estimate: %.1f GB of memory (%.1f GB free), %.1f GB of disk%s",
        needed.memory / 1e9, available / 1e9, disk / 1e9, needed.place,
    )  # fmt: skip
    kept = loaded.on_disk or is_gguf(options.model.pretrained)
    remedy = "" if kept else ", and --offload disk holds one decoder block at a time"
    needs = "need" if planned.compression.calibrates else "needs"
    fewer = "fewer --num_calibration_samples or " if planned.compression.calibrates else ""
    check_memory(needed.memory, planned, f"{fewer}a smaller --seq_len {needs} less{remedy}")


@dataclass(frozen=True)
class Preparation:
    """What a run takes before any training, and while the 16-bit model is measured.

    Attributes:
        memory: bytes at the peak.
        disk: bytes of what waits there.
        place: where decoder blocks wait, for a message; "" in memory.
    """

    memory: int
    disk: int
    place: str = ""


def preparation(
    planned: PlannedRun, model: ModelOptions, compression: CompressionOptions, tasks: tuple[str, ...]
) -> Preparation:
    """Estimate the compression, and the measuring of the 16-bit model.

    Args:
        tasks: lm-eval tasks that are measured.

    Raises:
        OptionError: a model on disk would have to write text.
    """
    shapes = ModelShapes.of(planned.loaded.model, planned.selection.linears)
    logits = measured_logit_bytes(planned, tasks)
    calibration = calibration_memory(shapes, planned, compression.num_calibration_samples)
    in_memory = max(calibration, memory.measuring_memory(shapes, logits))
    layers, finished = layers_on_disk(planned.loaded.model), calibration_disk(shapes, planned)
    if layers is None:
        return Preparation(in_memory, finished)
    if planned.text.pending is not None:
        raise OptionError(
            "--data self needs the model in memory, as it would be read from disk for every token that it writes; use "
            "another --data, or --offload none"
        )
    asked = isinstance(model, OffloadOptions) and model.offload == "disk"
    reason = "--offload disk" if asked else "it does not fit into memory"
    place = f"; decoder blocks wait on disk: {reason} (in memory it needs {in_memory / 1e9:.1f} GB)"
    finished = max(finished, shapes.parameters * shapes.itemsize)
    return Preparation(_on_disk(layers.path, planned, shapes, logits), finished, place)


def _on_disk(path: str, planned: PlannedRun, shapes: ModelShapes, logits: int) -> int:
    """Bytes of memory that a compression from disk takes."""
    count, length = planned.text.calibration_shape if planned.compression.calibrates else (0, 0)
    blocks = BlockShapes.of(planned.loaded.model, path, planned.selection.linears)
    on_gpu = planned.loaded.model.device.type != "cpu"
    setup = CompressionSetup(planned.compression.steps, count, length, logits, on_gpu)
    return offloaded_memory(shapes, blocks, setup)
