"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.errors import RunError

log = logging.getLogger("nybble")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write tensors and a JSON-able note (kept in the header) to one safetensors file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(
            {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()},
            temporary,
            {"note": json.dumps(note)},
        )
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written; {error}; free some space, then go on with --resume") from error
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors on the CPU, and the note."""
    with open_tensors(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads((file.metadata() or {}).get("note", "{}"))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file; RunError where it is none, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} must be a readable safetensors file; {error}; delete it to start that stage again"
        ) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when all went well, and vanishes otherwise."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that is no longer needed, if it is there. Killed meanwhile, it is gone all the same."""
    leaving = path.with_name(path.name + ".tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def check_free_disk(path: Path, needed: int) -> None:
    """Raise RunError unless `needed` bytes are free where `path` is, counting what an earlier sitting already wrote there."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if needed > free:
        raise RunError(
            f"--output_dir {path} needs {needed / 1e9:.1f} GB for teacher states and checkpoints; {free / 1e9:.1f} GB are free; "
            "free some, choose another disk, or use less text"
        )
