"""Settings of the whole process: OpenMP threads, the memory allocator of the C library, attention kernels of torch,
signals, telemetry of libraries, and their use of the network.

They are changed in this file and nowhere else. A function does nothing on a platform that lacks its setting, so all of
them may be called on Linux, macOS and Windows. torch is not imported at the top, because `set_openmp_spin` has to run
before torch starts its threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from nybble import container

# Parameters of mallopt(3), from malloc.h of glibc.
_M_MMAP_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -4, -3, -1, -2

_END_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

_received: Interrupted | None = None
_only_once = False
_keeps_freed_memory = False
_returning = 0


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        signal: number of the signal; SIGINT is Ctrl-C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def interrupt_on_signals(only_once: bool = False) -> Iterator[None]:
    """Raise Interrupted on Ctrl-C, SIGTERM and SIGHUP, so that work is put away before the process ends.

    With `only_once`, later signals are ignored, and the handlers stay: a launcher of several processes repeats the
    signal of the terminal while they end.

    A signal that the process was started to ignore (nohup) stays ignored. Outside of the main thread nothing changes,
    because Python allows no handlers there.
    """
    global _received, _only_once
    _received, _only_once = None, only_once
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _END_SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        if not only_once:
            _received = None  # what comes afterwards in this process was not interrupted
            for number, handler in before.items():
                signal.signal(number, handler)


def end_now(code: int) -> NoReturn:
    """End the process, after what it has printed is written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)


def raise_if_interrupted() -> None:
    """Raise the Interrupted that a library has swallowed or turned into an error of its own.

    Raises:
        Interrupted: a signal came since `interrupt_on_signals` began.
    """
    if _received is not None:
        raise _received


def forget_interruption() -> None:
    """Go on after an Interrupted that was meant for a part of the work only."""
    global _received
    _received = None


def _interrupt(number: int, frame: Any) -> None:
    global _received
    if _only_once and _received is not None:
        return
    _received = Interrupted(number)
    raise _received


@contextmanager
def without_hub() -> Iterator[None]:
    """Look for data of the Hugging Face hub in its cache alone, in this block.

    For the time after the hub could not be reached: each further attempt takes half a minute.
    """
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def disable_openvino_telemetry() -> None:
    """Keep OpenVINO from sending usage data. Call this before openvino is imported.

    Its package openvino_telemetry starts a process that waits for the network. OpenVINO does without the package.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def set_openmp_spin() -> None:
    """Let an idle OpenMP thread spin for some ten microseconds before it sleeps. Call this before torch is imported.

    A thread that sleeps at once makes a training step on 2 cores 40 % slower. A thread that spins as long as GNU OpenMP
    does by default nearly doubles the time where other programs use the same cores. OMP_WAIT_POLICY and GOMP_SPINCOUNT,
    where the user has set them, are respected.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def set_openmp_threads() -> None:
    """Start no more OpenMP threads than a container may keep busy. Call this before torch is imported.

    OpenMP starts a thread for each processor of the machine. OMP_NUM_THREADS, where the user or a launcher has set it,
    is respected.
    """
    limit = container.processor_limit()
    if "OMP_NUM_THREADS" not in os.environ and limit < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(limit)))


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system, except for tensors above 32 MB.

    Training frees and allocates the same tensors in every step, and page faults on fresh memory cost more than the
    arithmetic. A step of SmolLM2-135M on 2 cores becomes about a fifth faster. Larger tensors leave holes that others
    do not fill: with all of them kept, training adapters on a Llama of 0.34 B parameters took 7.1 GB instead of 2.9.
    """
    global _keeps_freed_memory
    _keeps_freed_memory = True
    large = 32 << 20  # glibc takes no more
    _set_allocator(
        (_M_MMAP_MAX, 1 << 16), (_M_MMAP_THRESHOLD, large), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)
    )


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Let glibc return freed tensors to the system at once, in this block; blocks may be nested.

    An export reads thousands of tensors of many sizes, each only once. Kept, the holes that they leave double the
    memory of an export.
    """
    global _returning
    _return_freed_memory()
    _returning += 1
    try:
        yield
    finally:
        _returning -= 1
        if _keeps_freed_memory and not _returning:
            keep_freed_memory()


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Undo `returning_freed_memory` inside this block, for a training in the middle of it."""
    global _returning
    outside = _returning
    if not (_keeps_freed_memory and outside):
        yield
        return
    _returning = 0
    keep_freed_memory()
    try:
        yield
    finally:
        _returning = outside
        _return_freed_memory()


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


def _return_freed_memory() -> None:
    _set_allocator((_M_MMAP_MAX, 1 << 16), (_M_MMAP_THRESHOLD, 1 << 16), (_M_TRIM_THRESHOLD, 1 << 16), (_M_TOP_PAD, 0))


def _set_allocator(*settings: tuple[int, int]) -> None:
    libc = _glibc()
    if libc is not None:
        for parameter, value in settings:
            libc.mallopt(parameter, value)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, which has mallopt and malloc_trim; None for any other."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
