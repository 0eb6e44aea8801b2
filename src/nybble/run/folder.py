"""The run folder: what is saved when.

Every file appears whole or not at all, so a run can be killed at any moment and resumed.

    nybble-run.json       the marker: this folder is a run
    config.toml           the options, resolved
    log.txt               the log since the folder exists, with times
    results.json          RunResults; report.md is the same for people
    teacher/              hidden states of the 16-bit model (those of training text are deleted after training)
    compress/             finished blocks of the compression (deleted when no other ranks can be tried)
    last.safetensors      newest checkpoint: adapters, scales, optimizer moments; its header has the step
    best.safetensors      adapters and scales with the lowest validation loss
    scales-*.safetensors  the same of the training of scales and norms that follows in `nybble tune`
    quantized/            the 4-bit model: codes, scales, zero points, all other tensors, tokenizer
    FORMAT/               an export, one folder per format

and, where the run has them: self.safetensors (text that the model generated), search.db (trials of nybble search),
tensorboard/, report.html, trial/ (a configuration that is being measured), merged/ and texts/ (16-bit LoRA of nybble
compare).
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from nybble import processes
from nybble.errors import RunError
from nybble.files import file_sizes, settle_folder, write_text
from nybble.models.positions_file import POSITIONS_FILE
from nybble.options.commands import RunCommand
from nybble.options.toml import CONFIG, to_toml
from nybble.run.complete import CHECKPOINTS, MERGED, QUANTIZED, TEXTS, go_back, missing_files
from nybble.run.deletion import delete_run
from nybble.run.machine import peak_memory
from nybble.run.marker import MARKER, check_deletable, is_run, write_marker
from nybble.run.results import RESULTS, Phase, RunResults, has_results, read_results
from nybble.run.resume import check_same_options
from nybble.runtime import hand_back_freed_memory, raise_if_interrupted

log = logging.getLogger("nybble")

T = TypeVar("T")

_LOCK = ".lock"
# What a run leaves in its folder before its configuration is whole.
_BEFORE_CONFIG = {_LOCK, MARKER, f"{MARKER}.tmp", f"{CONFIG}.tmp"}
# Everything that a run writes beside its exports. --overwrite deletes these names and no others; configuration and
# marker come last, so that the folder is known as a run as long as anything is left of it.
_OWN_FOLDERS = ("teacher", "compress", QUANTIZED, "tensorboard", "trial", MERGED, TEXTS)
_OWN = (
    "log.txt", RESULTS, "report.md", "report.html", *CHECKPOINTS, "scales-last.safetensors", "scales-best.safetensors",
    "self.safetensors", "search.db", *_OWN_FOLDERS, CONFIG, MARKER,
)  # fmt: skip


class RunFolder:
    """An open run folder, locked against other processes. Use `open_run` or `reopen_run`.

    Attributes:
        path: the folder.
        results: change them, then call `save`.
    """

    def __init__(self, path: Path, results: RunResults, lock: FileLock | None = None) -> None:
        self.path, self.results, self._lock = path, results, lock
        self._stage: tuple[str, float] | None = None  # its name, and the time up to which its seconds are counted

    @property
    def quantized(self) -> Path:
        """The folder with the 4-bit model."""
        return self.path / QUANTIZED

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage over all sessions. Stages are not nested."""
        hand_back_freed_memory()
        self._stage = name, time.perf_counter()
        try:
            yield
            raise_if_interrupted()  # where a library went on regardless
        finally:
            self.save()
            self._stage = None

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process; returns its result, and gives all processes the results of the run."""
        value, results = processes.on_first(lambda: (function(), self.results))
        vars(self.results).update(vars(results))  # others hold the object
        return value

    def reach(self, phase: Phase) -> None:
        """Note that the run has reached a phase, and write results.json."""
        self.results.phase = phase
        if phase == Phase.QUANTIZED:
            self.note_files(QUANTIZED)
        self.save()

    def note_files(self, name: str, names: Collection[str] | None = None) -> None:
        """Note the files of a folder that was just written, for `is_complete`. Call `save` afterwards.

        Positions of weights are not noted: they may be deleted.

        Args:
            name: of the folder.
            names: of the files that were written, where it may hold others. None: all files.
        """
        self.results.files[name] = {
            file: size
            for file, size in file_sizes(self.path / name).items()
            if file != POSITIONS_FILE and (names is None or file in names)
        }

    def note_file(self, name: str, file: str) -> None:
        """Note one more file that was written to a folder; see `note_files`."""
        self.results.files.setdefault(name, {})[file] = (self.path / name / file).stat().st_size

    def is_complete(self, name: str) -> bool:
        """Whether a folder of the run still has every file that it was written with; see `missing_files`."""
        return not missing_files(self.path, self.results, name)

    def delete(self) -> None:
        """Delete the run, and its folder if nothing else is in it."""
        delete_run(self.path, _OWN, _LOCK)
        (self.path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # other files are in it
            self.path.rmdir()

    def save(self) -> None:
        """Write results.json, with the seconds of the stage so far and the peak memory."""
        results = self.results
        if self._stage is not None:
            (name, since), now = self._stage, time.perf_counter()
            results.seconds[name] = round(results.seconds.get(name, 0) + now - since, 3)
            self._stage = name, now
        for kind, value in peak_memory().items():
            results.peak_memory_bytes[kind] = max(value, results.peak_memory_bytes.get(kind, 0))
        results.save(self.path)


def check_folder(path: Path, resume: bool, overwrite: bool) -> bool:
    """Whether there is a run already.

    Raises:
        RunError: the folder may not be touched: it holds other files, or a run and neither --resume nor --overwrite was
            given.
    """
    used = path.exists() and (not path.is_dir() or any(entry.name not in _BEFORE_CONFIG for entry in path.iterdir()))
    if used and not is_run(path):
        raise RunError(
            f"--output_dir {path} must be a new folder or an earlier run; it holds other files; choose another folder"
        )
    if used and not (resume or overwrite):
        raise RunError(
            f"--output_dir {path} already holds a run; add --resume to continue it, or --overwrite to delete it"
        )
    if overwrite:
        check_deletable(path)
    return used


def check_free_disk(path: Path, needed: int) -> None:
    """Check that a run folder can grow to `needed` bytes. Files that are already in it count as part of these bytes.

    Args:
        path: the run folder; it need not exist.
        needed: bytes.

    Raises:
        RunError: there is less free space.
    """
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if needed > free:
        raise RunError(
            f"--output_dir {path} needs {needed / 1e9:.2f} GB for teacher states and checkpoints; "
            f"{free / 1e9:.2f} GB are free; free some disk space, choose another disk, or use less text or a smaller "
            "--lora_rank"
        )


def open_run(options: RunCommand, keep_options: bool = False) -> RunFolder:
    """Start a run folder, or continue one. Of several processes, the first one does, and the others get its results.

    Args:
        keep_options: leave config.toml as it is, for measurements that are no part of the run.

    Raises:
        RunError: in use, not empty, not writable, made with other options (on resume; the option is named), or not seen
            by all processes.
    """
    path, locks, opened = options.folder, list[FileLock](), list[RunFolder]()
    existed = path.exists()

    def lock_here() -> None:
        check_folder(path, options.run.resume, options.run.overwrite)
        locks.append(_lock(path))

    def open_here() -> RunResults:
        opened.append(_open(options, keep_options, locks[0]))
        return opened[0].results

    processes.on_first(lock_here)
    try:
        _check_seen(path)  # before anything is deleted
        results = processes.on_first(open_here)
    except BaseException:
        for lock in locks:
            if not existed:
                _forget_new(path)
            lock.release()
        raise
    return opened[0] if opened else RunFolder(path, results)


def _check_seen(path: Path) -> None:
    """Raise RunError unless all processes see the folder that the first one has locked."""
    for i, seen in enumerate(processes.gather((path / _LOCK).exists())):
        if not seen:
            raise RunError(
                f"--output_dir {path} must be a folder that all processes see; process {i} does not see it; choose a "
                "folder on a file system that the machines share"
            )


def _forget_new(path: Path) -> None:
    """Delete a folder in which nothing but the lock was made."""
    with suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [_LOCK]:
            (path / _LOCK).unlink()
            path.rmdir()


def _open(options: RunCommand, keep_options: bool, lock: FileLock) -> RunFolder:
    path, resume, overwrite = options.folder, options.run.resume, options.run.overwrite
    used = check_folder(path, resume, overwrite)
    if used and overwrite:
        delete_run(path, _OWN, _LOCK)
    results = RunResults()
    if used and resume:
        check_same_options(path, options)
        results = _settled_results(path)
        go_back(path, results)
    if not is_run(path):
        write_marker(path)
    if not (used and keep_options):
        write_text(path / CONFIG, to_toml(options))
    command_line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    results.command_line = results.command_line or command_line
    if results.command_line != command_line:
        results.resumed_by.append(command_line)
    return RunFolder(path, results, lock)


def reopen_run(path: Path) -> RunFolder:
    """Open a finished run to add to it.

    Raises:
        RunError: in use, not writable, or damaged.
    """
    lock = _lock(path)
    try:
        if not has_results(path):
            raise RunError(f"{path} must be a finished run; it has no {RESULTS}; finish it with --resume")
        return RunFolder(path, _settled_results(path), lock)
    except BaseException:
        lock.release()
        raise


def _settled_results(path: Path) -> RunResults:
    """The results of an earlier session, after what a killed process left in the folder was put in order."""
    results = read_results(path)
    for name in (*results.exports, *_OWN_FOLDERS):
        settle_folder(path / name)
    return results


def _check_no_links(path: Path) -> None:
    """Raise RunError where a file of a run is a link: writing to it would change a file elsewhere.

    Links to folders pass: they put parts of a run on another disk. So does quantized/, which is replaced as a whole.
    """
    for entry in path.rglob("*"):
        if entry.is_symlink() and not entry.is_dir() and QUANTIZED not in entry.relative_to(path).parts:
            raise RunError(
                f"{entry} must be a file of the run; it is a link, and nybble does not write through links; delete it, "
                "or put a copy of the file in its place"
            )


def _lock(path: Path) -> FileLock:
    """Make the folder and lock it for this process; RunError if it cannot be written or another process has it."""
    _check_no_links(path)
    lock = FileLock(path / _LOCK, blocking=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunError(f"{path} is in use by another process; wait until that ends") from error
    except OSError as error:
        raise RunError(
            f"{path} must be writable; {error.strerror}; change its permissions, or choose another folder"
        ) from error
    return lock
