"""Device and dtype that a model computes with. Code that depends on the kind of device is in this file only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from nybble import container, processes
from nybble.errors import ModelError, first_line

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(device: str) -> torch.device:
    """Choose the device and check that it works. Each process on a machine gets a GPU of its own.

    Args:
        device: "auto", or a name that torch knows: "cpu", "cuda", "cuda:1", "mps". "auto" is CUDA if there is a GPU and
            otherwise the CPU. Apple's GPU has to be named, because no test of nybble runs on one.

    Returns:
        The device. If it is a CUDA device, it is also torch's current one.

    Raises:
        ModelError: torch cannot compute on it here.
    """
    chosen, several = device, processes.local_count() > 1
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" or not several:
            return torch.device(device)
    if device == "cuda" and several:
        device = f"cuda:{processes.local_index()}"
    try:
        picked = torch.device(device)
        if picked.type == "meta":
            raise RuntimeError("it has no memory")
        if several and (chosen == "mps" or ":" in chosen):
            raise RuntimeError("each process needs a device of its own")
        torch.empty(0, device=picked)
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"--device {device} is not usable on this machine ({first_line(error)}); choose {_usable_devices()}"
        ) from error
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose the dtype of the parameters.

    Args:
        dtype: "bfloat16", "float16", "float32", or "auto": bfloat16 where `has_bfloat16`, otherwise float32.
        device: where the model computes.

    Returns:
        The dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return _DTYPES[dtype]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 matrix products are fast on a device.

    They are on CUDA GPUs that have them in hardware and on CPUs with AMX or AVX512-BF16. Other CPUs emulate them, four
    times slower than float32. For other devices the answer is no, because nobody has measured them.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


@contextmanager
def products_of_bfloat16(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices whose numbers bfloat16 can hold with a CPU's bfloat16 instructions, where it has some.

    The products are exact and their sums are float32, in another order. Side effect inside the context: all float32
    matrix products of the process round their operands to bfloat16.
    """
    if device.type != "cpu" or not has_bfloat16(device):
        yield
        return
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device. Devices without memory of their own share that of the machine, and
    so do the processes on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = container.available_memory() // processes.local_count()
    if device.type == "mps":  # Metal gives a process only a part of the memory
        return min(available, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available


def total_memory(device: torch.device) -> int:
    """Return the bytes that a process can have on a device if nothing else is there; of a CPU, with those that the
    machine can move to its disk (swap)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = (container.total_memory() + int(psutil.swap_memory().total)) // processes.local_count()
    return min(total, torch.mps.recommended_max_memory()) if device.type == "mps" else total


def _usable_devices() -> str:
    """Return the values of --device that work on this machine, as text."""
    names = ["auto", "cpu"]
    names += ["cuda"] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return f"{', '.join(names[:-1])} or {names[-1]}"
