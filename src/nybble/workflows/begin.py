"""What compress and distill do before the model is loaded: options, folder, sources, tokenizer, text, place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from nybble.data.request import TextRequest
from nybble.models.loading import LoadedModel
from nybble.options.commands import CompressOptions, DistillOptions
from nybble.workflows import placement, plan, text

StreamedRun = TypeVar("StreamedRun", CompressOptions, DistillOptions)


@dataclass(frozen=True)
class Beginning(Generic[StreamedRun]):
    """A run whose model is still to be loaded.

    Attributes:
        options: with what was chosen automatically when the run began, if it is continued.
        read: its text.
        on_disk: the decoder blocks stay on the disk.
        started: when it began, by time.perf_counter.
    """

    options: StreamedRun
    read: text.ReadText
    on_disk: bool
    started: float

    def load_model(self) -> LoadedModel:
        """The 16-bit model."""
        return plan.load_model(self.options.model, self.read.tokenizer, self.on_disk)

    def seconds(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.started


def begin(options: StreamedRun, request: Callable[[StreamedRun, bool], TextRequest]) -> Beginning[StreamedRun]:
    """Check all that needs no model, and read the text.

    Args:
        options: of the run.
        request: options, and whether the method calibrates -> what the run asks of its text.

    Raises:
        NybbleError: whatever a person can repair.
    """
    started = time.perf_counter()
    options.check()
    options = plan.keep_saved_choices(options)
    tasks = options.evaluation.eval_tasks
    plan.validate(options, options.compression, options.evaluation, plan.input_names(options))
    placement.check_offload(options, options.model.offload == "disk")
    text.check_sources(tasks, options.text)
    tokenizer = plan.load_tokenizer(options.model, tasks)
    read = text.read_text(partial(request, options), options.compression, tokenizer)
    on_disk = placement.stays_on_disk(options)  # looks at the weights of the model, which may have to be downloaded
    return Beginning(options, read, on_disk, started)
