"""Files and folders that appear complete or not at all, so that a process can be killed at any moment.

Everything is written under a temporary name (NAME.tmp) in the same folder and then renamed with `os.replace`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.errors import RunError

# safetensors maps tensors from the file. Windows cannot replace a mapped file, so the tensors are copied there.
_COPY_LOADED_TENSORS = sys.platform == "win32"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with the line ends that `text` has."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a note to one safetensors file atomically.

    Args:
        path: the file.
        tensors: name -> tensor, on any device.
        note: anything that JSON can hold; it is stored in the header of the file under the key "note".

    Raises:
        RunError: the file cannot be written, usually because the disk is full.
    """
    temporary = _temporary(path)
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, temporary, {"note": json.dumps(note)})
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error}; free some disk space, then add --resume") from error
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`.

    Returns: the tensors, on the CPU and in most cases mapped from the file; and the note ({} where the file has none).

    Raises:
        RunError: the file is missing, damaged, or not a safetensors file.
    """
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        note = json.loads((file.metadata() or {}).get("note", "{}"))
    if _COPY_LOADED_TENSORS:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, note


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, to read single tensors of it.

    Raises:
        RunError: the file is missing, damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} must be a readable safetensors file: {error}; delete it to repeat the stage that wrote it"
        ) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder. It replaces `path` if the block succeeds, and is deleted if the block raises."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder if it exists. It is renamed first, so that a killed process leaves no half-deleted `path`."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


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
            f"--output_dir {path} needs {needed / 1e9:.1f} GB for teacher states and checkpoints; "
            f"{free / 1e9:.1f} GB are free; free some disk space, choose another disk, or use less text"
        )


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
