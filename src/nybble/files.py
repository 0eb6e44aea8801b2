"""Files and folders that appear complete or not at all, so that a process can be killed at any moment.

Everything is written under a temporary name (NAME.tmp) in the same folder and then renamed; tensors and folders are
synced to the disk before. A folder that is replaced is renamed to NAME.old.tmp first, so that at every moment the old
folder or the new one is whole; `settle_folder` brings back what a killed process left under that name. A disk that is
full is a RunError.

Of several processes, only the first one writes what replaces a file or deletes a folder; in the others these functions
do nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble import processes
from nybble.errors import NybbleError, RunError, first_line
from nybble.schema import SchemaError, parse_json

# Of a file that TensorReader keeps open.
_BYTES_MAPPED = 32 << 20
# Permissions that files of this process do not get. It can only be read by setting it, here while there is one thread.
_UMASK = os.umask(0o022)
os.umask(_UMASK)
# safetensors maps tensors from the file. Windows cannot replace a mapped file, so the tensors are copied there.
_COPY_LOADED_TENSORS = sys.platform == "win32"
# The folder or its disk went away, or became read-only, while a run works in it.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EIO, getattr(errno, "ESTALE", errno.EIO)}
# Disk full, quota used up, file larger than `ulimit -f` allows. Not every system has a quota error.
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def is_out_of_space(error: BaseException) -> bool:
    """Whether a write failed because the disk, a quota or the limit of a file's size left no space.

    Libraries in Rust (safetensors, tokenizers) and SQLite raise errors of their own, which have the reason as text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    code = re.search(r"\(os error (\d+)\)", str(error))
    return int(code[1]) in _NO_SPACE if code else "database or disk is full" in str(error)


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn a write that fails for want of space, in this block, into a RunError that names `path`."""
    try:
        yield
    except NybbleError:  # says already what is wrong
        raise
    except Exception as error:  # whatever a library raises; everything else passes
        if not is_out_of_space(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise RunError(
            f"{path} must fit on the disk; it could not be written: {reason}; free some disk space, then add --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with the line ends that `text` has.

    Raises:
        RunError: the disk is full.
    """
    if not processes.is_first():
        return
    with _replacing(path) as temporary, temporary.open("x", encoding="utf-8", newline="") as file:
        file.write(text)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a note to one safetensors file atomically.

    Args:
        path: the file.
        tensors: name -> tensor, on any device.
        note: anything that JSON can hold; it is stored in the header of the file under the key "note".

    Raises:
        RunError: the file cannot be written, usually because the disk is full.
    """
    if not processes.is_first():
        return
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        with _replacing(path) as temporary:
            save_file(on_cpu, temporary, {"note": json.dumps(note)})
            temporary.chmod(0o666 & ~_UMASK)  # the library lets nobody else read the file
            sync(temporary)
    except SafetensorError as error:
        raise RunError(f"{path} could not be written: {error}; free some disk space, then add --resume") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name, at which nothing is: what the block writes there replaces `path`, unless it raises."""
    temporary = _temporary(path)
    if temporary.is_symlink() or temporary.exists():
        temporary.unlink()  # of a killed process; a link is not followed
    try:
        with reporting_full_disk(path):
            yield temporary
        os.replace(temporary, path)
    except Exception as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _GONE:
            raise RunError(
                f"{path.parent} must stay where it is, and writable, until the command ends; {path.name} could not be "
                f"written: {error.strerror}; bring it back, then add --resume"
            ) from error
        raise


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    with path.open("rb+" if sys.platform == "win32" else "rb") as file:  # people's files may be read-only
        os.fsync(file.fileno())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`.

    Returns: the tensors, on the CPU and in most cases mapped from the file; and the note ({} where the file has none).

    Raises:
        RunError: the file is missing, damaged, or not a safetensors file.
    """
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        note = note_of(file)
    if _COPY_LOADED_TENSORS:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, note


def note_of(file: Any) -> dict[str, Any]:
    """The note of a file that `open_tensors` opened; {} where it has none. SchemaError if it is no JSON object."""
    note = parse_json((file.metadata() or {}).get("note", "{}"))
    if not isinstance(note, dict):
        raise SchemaError(f"its note must be an object; it is {str(note)[:40]}")
    return note


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, to read single tensors of it.

    Raises:
        RunError: the file is missing, damaged, or not a safetensors file; or the block found what it does not expect
            (SchemaError).
    """
    if not path.exists():
        raise RunError(f"{path} must be a safetensors file; there is none; bring it back, or make the run again")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, SchemaError) as error:
        raise damaged(path, error) from error


class TensorReader:
    """Reads single tensors of a safetensors file, as copies.

    A mapped file counts as memory in use as far as it was read, so it is opened again after some megabytes; and its
    header, which has 37 thousand entries in a large mixture of experts, is not parsed for every tensor.

    Args:
        path: the file. It is opened by the first `read`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, 0
        self._opened = ExitStack()
        weakref.finalize(self, self._opened.close)  # also at exit, before the modules that closing needs are gone
        self._file: Any = None

    def read(self, name: str, *index: int | slice) -> Tensor:
        """Return a copy of one tensor, or of the part of it at `index`.

        Raises:
            RunError: the file is missing, damaged, or not a safetensors file.
        """
        if self._left <= 0:
            self._opened.close()
            self._file, self._left = self._opened.enter_context(open_tensors(self._path)), _BYTES_MAPPED
        try:
            part = self._file.get_slice(name)[index] if index else self._file.get_tensor(name)
            tensor: Tensor = part.clone()
        except (OSError, SafetensorError) as error:
            raise damaged(self._path, error) from error
        self._left -= tensor.nbytes
        if self._left <= 0:
            self._opened.close()
        return tensor


def fingerprint_of(path: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def damaged(path: Path, error: BaseException) -> RunError:
    """The error for a file of tensors that cannot be used."""
    return RunError(
        f"{path} must be a readable safetensors file: {first_line(error)}; delete it to repeat the stage that wrote it"
    )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder. It replaces `path` if the block succeeds, and is deleted if the block raises.

    Raises:
        RunError: the disk is full, or `path` is a file.
    """
    check_folder_place(path)
    settle_folder(path)
    temporary, old = _temporary(path), _old(path)
    temporary.mkdir(parents=True)
    try:
        with reporting_full_disk(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
        with suppress(FileNotFoundError):
            os.replace(path, old)
        os.replace(temporary, path)
        _remove(old)
    finally:
        _remove(temporary)


def check_folder_place(path: Path) -> None:
    """Raise RunError where something that is no folder has the name of a folder that is to be written."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} must be a folder, or not be there; it is a file; move it to another place")


def carry_over(old: Path, new: Path, own: Collection[str]) -> None:
    """Link the files of other people in a folder into the one that replaces it, at the end of `atomic_folder`.

    Args:
        old: the folder; it need not exist.
        new: the temporary folder.
        own: names in `old` of files that nybble wrote; they are left behind.

    Raises:
        RunError: a file in `new` has the name of one of them.
    """
    for entry in sorted(old.rglob("*")):
        name, target = entry.relative_to(old).as_posix(), new / entry.relative_to(old)
        is_folder = entry.is_dir() and not entry.is_symlink()
        if name in own or (is_folder and (any(entry.iterdir()) or target.is_dir())):
            continue  # the files of a folder follow
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry.is_symlink():
                target.symlink_to(os.readlink(entry))
            elif is_folder:
                target.mkdir()
            else:
                _link_or_copy(entry, target)
        except FileExistsError as error:
            raise RunError(
                f"{entry} must not have a name that is written now, as the run did not write it; "
                "move it to another place"
            ) from error


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or a file system without links
        shutil.copy2(file, target)


def settle_folder(path: Path) -> None:
    """Remove what a killed `atomic_folder` or `remove_folder` left; the old folder comes back if no other is there."""
    temporary, old = _temporary(path), _old(path)
    if old.is_dir() and not path.exists():
        os.replace(old, path)
    _remove(temporary)
    _remove(old)


def remove_folder(path: Path) -> None:
    """Delete a folder if it exists. It is renamed first, so that a killed process leaves no half-deleted `path`."""
    if not processes.is_first():
        return
    settle_folder(path)
    with suppress(FileNotFoundError):
        os.replace(path, _temporary(path))
    _remove(_temporary(path))


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Path in the folder -> bytes, of all files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old.tmp")
