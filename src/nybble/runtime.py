"""Settings of the whole process: threads, allocator, torch flags."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress

log = logging.getLogger("nybble")


def hand_back_freed_memory() -> None:
    """glibc: hand freed pages back to the system. Between tensors that live on, a stage leaves holes in which the next one's tensors, of other sizes, find no
    room: without this, distilling takes a sixth more memory (docs/log.md)."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
