"""Settings of the whole process: OpenMP threads, the memory allocator of the C library, attention kernels of torch.

They are changed in this file and nowhere else. A function does nothing on a platform that lacks its setting, so all of
them may be called on Linux, macOS and Windows. torch is not imported at the top, because `set_openmp_spin` has to run
before torch starts its threads.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), from malloc.h of glibc.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD = -4, -1, -2


def set_openmp_spin() -> None:
    """Let an idle OpenMP thread spin for some ten microseconds before it sleeps. Call this before torch is imported.

    A thread that sleeps at once makes a training step on 2 cores 40 % slower. A thread that spins as long as GNU OpenMP
    does by default nearly doubles the time where other programs use the same cores. OMP_WAIT_POLICY and GOMP_SPINCOUNT,
    where the user has set them, are respected.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system.

    Training frees and allocates the same large tensors in every step, and page faults on fresh memory cost more than
    the arithmetic. A step on 2 cores becomes about a fifth faster.
    """
    libc = _glibc()
    if libc is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)


def hand_back_freed_memory() -> None:
    """Return freed memory to the system now (glibc).

    Freed tensors leave holes between those that are still in use. The next stage allocates tensors of other sizes that
    do not fit into the holes. Without this call, distillation needs a sixth more memory.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def disable_cudnn_attention() -> None:
    """Stop torch from choosing cuDNN for scaled dot product attention.

    Its backward pass returns NaN for some padded batches (torch 2.11 on H200). torch chooses another kernel instead.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, which has mallopt and malloc_trim; None for any other."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
