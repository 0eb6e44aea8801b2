"""Claims: processes that share work, without knowing of each other, take different parts of it.

A claim is a lock on a file, which the system frees when its process ends in any way. The files stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nybble.errors import RunError


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Claim what a path names while the context is open. Yields False where another process has it.

    Args:
        path: need not exist; the lock is a hidden file beside it.
        wait: until it is free.

    Raises:
        RunError: the folder cannot be written.
    """
    file = path.with_name(f".{path.name}.claim")
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise RunError(
            f"--output_dir {path.parent} must be writable; {error.strerror}; choose another folder"
        ) from error
    try:
        yield True
    finally:
        lock.release()
