"""What people see while a command runs: log lines with times, progress bars with time left. rich does the drawing."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, ConsoleDimensions
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from nybble import processes


class _Console(Console):
    """A console that leaves a closed pipe to the command line, and does not fold lines of a file or a pipe at 80."""

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines."""
        return super().size if self.is_terminal else ConsoleDimensions(160, 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled; rich would end the process with 1."""
        raise


console = _Console(markup=False)  # paths may have brackets
log = logging.getLogger("nybble")

# Where the output is no terminal (a file, CI) a progress line is logged instead of drawn, this many seconds apart.
_LOG_EVERY = 30.0


class Advance(Protocol):
    """Called with the number of units done, and texts for named columns.

    What an earlier session did is reported first, and does not count for the estimate of the time left.
    """

    def __call__(self, units: int, **texts: str) -> None: ...


def say(text: str) -> None:
    """Print sentences, folded at words in a terminal and not at all in a file."""
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


class _PlainHandler(logging.Handler):
    """Log lines for a file or a pipe: RichHandler would fill each with spaces up to the width of the console."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), soft_wrap=True, highlight=False)


# transformers imports torchao where it is installed, which reports kernels for GPUs that it cannot load.
_TORCHAO = ("torchao", "torch.utils._pytree")


def set_up_logging(result_on_stdout: bool = False) -> None:
    """Log to the terminal; quiet the progress bars and advice of the libraries underneath.

    Args:
        result_on_stdout: where stdout is no terminal, everything that is written to the console goes to stderr.
    """
    console.stderr = result_on_stdout and not sys.stdout.isatty()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets itself is imported when data are
    import transformers

    handler: logging.Handler = _PlainHandler()
    if console.is_terminal:
        handler = RichHandler(
            console=console,
            show_path=False,
            show_level=False,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
            highlighter=None,
        )
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    root = logging.getLogger()
    if not root.handlers and logging.lastResort is not None:
        # What Python does without handlers: messages from WARNING on. Libraries that set up logging when they are
        # imported (onnxruntime's quantizer) then change nothing.
        root.addHandler(logging.lastResort)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "accelerate", "httpx", "huggingface_hub", "datasets", *_TORCHAO):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|torch.jit|openvino|lm_eval")


class _LogFile(logging.FileHandler):
    """A log file that ends where the disk is full: the work goes on, and other handlers say so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop writing after an error of the file system; a wrong log call is shown as logging does."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        log.removeHandler(self)
        log.warning("%s ends here: %s; free some disk space", self.baseFilename, error.strerror)

    def close(self) -> None:
        """Close the file. What is left in its buffer after an error is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the log to a file as well; of several processes the first one does."""
    if not processes.is_first():
        yield
        return
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    level = log.level
    log.setLevel(min(level or logging.INFO, logging.INFO))  # also when no console was set up
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


@contextmanager
def bar(title: str, total: int, text: str | None = None) -> Iterator[Advance]:
    """A progress bar; `text` names one column of free text."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(40 if text is None else 12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if text is not None:
        # What is left of the line: numbers and times keep their place.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns.append(TextColumn(f"{{task.fields[{text}]}}", table_column=rest))
    spoke = time.monotonic()
    # rich takes the pace of the last minutes, without the first units.
    with Progress(
        *columns,
        console=console,
        transient=True,
        expand=text is not None,
        disable=not console.is_terminal,
        get_time=time.monotonic,
        speed_estimate_period=300,
    ) as progress:
        fields: dict[str, Any] = {} if text is None else {text: ""}
        task = progress.add_task(title, total=total, **fields)

        def advance(units: int, **texts: str) -> None:
            nonlocal spoke
            progress.update(task, advance=units, **dict[str, Any](texts))
            now, state = time.monotonic(), progress.tasks[0]
            if not console.is_terminal and now - spoke > _LOG_EVERY:
                spoke = now
                left = "" if state.time_remaining is None else f", about {state.time_remaining:.0f} s left"
                log.info(
                    "%s %d of %d%s%s",
                    title,
                    state.completed,
                    total,
                    left,
                    "".join(f", {value}" for value in texts.values()),
                )

        yield advance
