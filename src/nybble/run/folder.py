"""The run folder: what is saved when. Every file appears whole or not at all, so that a run can be killed at any moment and resumed.

nybble-run.json      the marker: this folder is a run of nybble
config.toml          the options, resolved
log.txt              what the console said since the folder exists, with times
results.json         measurements and seconds per stage, growing; report.md is the same for people
teacher/             the teacher's hidden states (train states are deleted when training is done)
compress/            finished blocks of the compression (deleted when the 4-bit model is saved, unless adapters inside the rounding may be tried at other ranks)
last.safetensors     newest checkpoint: adapters, scales, optimizer; its header says the step
best.safetensors     adapters and scales with the lowest validation loss
scales-*.safetensors the same of nybble tune's second training, in 4 bits
quantized/           the 4-bit model: codes, scales, zeros, the untouched rest, tokenizer
openvino/            exports
and, where the run has them: self.safetensors (text that the model wrote), search.db (trials of nybble search), tensorboard/, report.html,
trial/ (a configuration that is being tested), merged/ and texts/ (16-bit LoRA of nybble tune --compare)
"""

from __future__ import annotations

import fcntl
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nybble.errors import ExportError, RunError
from nybble.files import write_text
from nybble.options.commands import to_toml
from nybble.run.machine import peak_memory
from nybble.run.results import _MARKER_FORMAT, CONFIG, MARKER, RESULTS, is_run, read_results
from nybble.run.resume import check_same_options
from nybble.runtime import hand_back_freed_memory

log = logging.getLogger("nybble")
# What a run leaves in its folder before its configuration is whole.
_EMPTY = {".lock", MARKER, f"{MARKER}.tmp", f"{CONFIG}.tmp"}
# Everything that a run writes into its folder beside its exports. --overwrite deletes these names and no others; configuration and marker come last,
# so that the folder is known as a run as long as anything is left of it.
_OWN = (
    "log.txt", RESULTS, "report.md", "report.html", "teacher", "compress", "last.safetensors", "best.safetensors", "scales-last.safetensors",
    "scales-best.safetensors", "quantized", "self.safetensors", "search.db", "tensorboard", "trial", "merged", "texts", CONFIG, MARKER,
)  # fmt: skip


def _check_deletable(path: Path) -> None:
    """Raise RunError where --overwrite would delete from a folder that is more than a run, even if it has a run's marker."""
    resolved, here, home = path.resolve(), Path.cwd().resolve(), Path.home().resolve()
    if resolved == here or resolved in here.parents:
        what = "the current folder or one above it"
    elif resolved == home or resolved in home.parents:
        what = "the home folder or one above it"
    elif (path / ".git").exists():
        what = "a git repository"
    else:
        return
    raise RunError(f"--overwrite must name the folder of a run alone; {path} is {what}; choose another --output_dir")


def _delete_run(path: Path) -> None:
    """Delete what a run wrote; other files in its folder stay, and are named."""
    exports: set[str] = set()
    with suppress(RunError):  # damaged results: the exports stay
        exports = set(read_results(path).get("exports", {}))
    for name in (*exports, *_OWN):
        for entry in (path / f"{name}.tmp", path / name):
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
            elif entry.is_dir():
                shutil.rmtree(entry)
    if left := sorted(entry.name for entry in path.iterdir() if entry.name != ".lock"):
        log.info("%s: left in place, as no run wrote it: %s", path, ", ".join(left))


def _lock(path: Path) -> IO[str]:
    """Make the folder and lock it for this process; RunError if it cannot be written or another process has it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise RunError(f"--output_dir {path} must be writable; {error.strerror}; choose another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(
            f"--output_dir {path} is in use by another process; wait for it, or choose another folder"
        ) from error
    return lock


class Run:
    """An open run folder, locked against a second process.

    Use `Run.open`. `results` is what results.json holds; change it and call `save_results`.
    """

    def __init__(self, path: Path, lock: IO[str] | None, results: dict[str, Any]) -> None:
        self.path, self.results, self._lock = path, results, lock
        self.failed: list[ExportError] = []  # exports of this sitting
        self._stage: tuple[str, float] | None = None  # its name, and up to when its seconds are counted

    @staticmethod
    def check(path: Path, resume: bool, overwrite: bool) -> bool:
        """Whether there is a run already; RunError if it may not be touched, or if the folder holds something else."""
        used = path.exists() and (not path.is_dir() or any(entry.name not in _EMPTY for entry in path.iterdir()))
        if used and not is_run(path):
            raise RunError(
                f"--output_dir {path} must be a new folder or an earlier run; it holds other files; choose another folder"
            )
        if used and not (resume or overwrite):
            raise RunError(
                f"--output_dir {path} already holds a run; add --resume to go on with it, or --overwrite to delete it"
            )
        if overwrite:
            _check_deletable(path)
        return used

    @staticmethod
    def reopen(path: Path) -> Run:
        """Open a finished run to add to it."""
        return Run(path, _lock(path), read_results(path))

    @staticmethod
    def open(path: Path, options: Any, resume: bool, overwrite: bool) -> Run:
        """Start a run folder, or go on with one.

        Raises:
            RunError: in use, not empty, not writable, or made with other options (on resume; the option is named).
        """
        used = Run.check(path, resume, overwrite)
        lock = _lock(path)
        if used and overwrite:
            _delete_run(path)
        run = Run(path, lock, {"seconds": {}, "models": {}})
        if used and resume:
            check_same_options(path, options)
            run.results |= read_results(path)
        if not is_run(path):
            write_text(path / MARKER, json.dumps({"format": _MARKER_FORMAT}) + "\n")
        if not (used and getattr(options, "eval_only", False)):  # a trial of ranks leaves the run's options alone
            write_text(path / CONFIG, to_toml(options))
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        if run.results.setdefault("command", command) != command:
            run.results.setdefault("resumed_by", []).append(command)
        return run

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, over all sittings. It begins without what earlier ones freed; none is inside another."""
        hand_back_freed_memory()
        self._stage = name, time.perf_counter()
        try:
            yield
        finally:
            self.save_results()
            self._stage = None

    def save_results(self) -> None:
        """Write results.json, with the seconds so far."""
        if self._stage is not None:
            (name, since), now, seconds = self._stage, time.perf_counter(), self.results["seconds"]
            seconds[name] = round(seconds.get(name, 0) + now - since, 3)
            self._stage = name, now
        memory = self.results.setdefault("peak_memory_bytes", {})
        for kind, value in peak_memory().items():
            memory[kind] = max(value, memory.get(kind, 0))
        write_text(self.path / RESULTS, json.dumps(self.results, indent=2) + "\n")
