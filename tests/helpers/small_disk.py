"""A disk that is full: a tmpfs of a few kilobytes where the process may mount one, a limit of file sizes everywhere."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_tmpfs(folder: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of `size` bytes over an existing folder; what is written stays until the end of the block."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(folder: Path) -> None:
    """Give the tmpfs over `folder` enough space."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


@contextmanager
def limited_file_size(folder: Path, size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as `ulimit -f` does."""
    resource = pytest.importorskip("resource", reason="only POSIX limits file sizes")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SMALL_DISKS: dict[str, Callable[[Path, int], AbstractContextManager[None]]] = {
    "tmpfs": small_tmpfs,
    "limit": limited_file_size,
}
