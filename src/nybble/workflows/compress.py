"""The flow of `nybble compress`: a 16-bit model becomes a 4-bit one without end-to-end training.

load -> teacher states of the test text -> compress -> save -> export -> measure
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble import files
from nybble.evaluation import perplexity
from nybble.models import loading, quantized_model
from nybble.options.commands import CompressOptions
from nybble.training import memory as training_memory
from nybble.workflows import stages, text
from nybble.workflows.stages import Job
from nybble.workflows.text import Sequences

log = logging.getLogger("nybble")


def compress(options: CompressOptions, known: Mapping[str, Any] | None = None) -> Path:
    """Run the whole flow; returns the run folder. Raises NybbleError for whatever a person can repair.

    Args:
        known: what another run has measured of the 16-bit model on the same tasks.
    """

    def cut(options: CompressOptions, loaded: loading.LoadedModel) -> Sequences:
        return text.sequences_of(options, loaded, options.method, 0, 0, 0)

    with stages.opened(options, options.method, "--method", cut, _resolve) as job:
        _run(job, known)
        return job.run.path


def _resolve(options: CompressOptions, loaded: Any, plan: Any, sequences: Sequences) -> CompressOptions:
    """Print the estimate; refuse a disk that is too small, and warn of memory."""
    count = stages.check_calibration(options, options.method, sequences)
    shapes = training_memory.ModelShapes.of(loaded.model, plan.int4, loaded.model.dtype.itemsize)
    measuring = training_memory.measuring_memory(shapes, stages.measured_logits(options, loaded, sequences))
    memory, available = (
        max(stages.estimate_compression(options, loaded, shapes, count), measuring),
        stages.free_memory(loaded),
    )
    states = sequences.test.ids.numel() * shapes.hidden * shapes.itemsize
    disk = states + training_memory.blocks_disk(shapes, sequences.calibration.numel()) + 3 * shapes.parameters
    files.check_free_disk(options.folder, disk)
    if count:
        log.info(
            "estimate: %.1f GB of memory (%.1f GB free), %.1f GB of disk", memory / 1e9, available / 1e9, disk / 1e9
        )
        stages.check_memory(memory, available, "fewer --calib_samples or a smaller --seq_len need less")
    return options


def _run(job: Job, known: Mapping[str, Any] | None) -> None:
    states = stages.teach(job, {"test": job.sequences.test}, 1)
    reference = perplexity.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference, known)
    if not job.quantized.exists():
        _compress(job)
    files.remove_folder(job.run.path / "compress")
    stages.measure_saved(job, reference, "compressed")
    stages.finish(job.run, [])


def _compress(job: Job) -> None:
    """Compress and save; the weights are let go."""
    _, weights = stages.compress_model(job, job.options.method)
    quantized_model.save_quantized(job.quantized, job.loaded.model, job.loaded.tokenizer, weights)
