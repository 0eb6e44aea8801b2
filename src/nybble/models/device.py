"""Which device and dtype a model computes on."""

from __future__ import annotations

import logging

import torch

from nybble.errors import ModelError, first_line


def has_bfloat16(device: torch.device) -> bool:
    """Whether bf16 matrix products are fast there: CUDA, or a CPU with AMX or AVX512-BF16 (elsewhere they are emulated, 4 x slower than fp32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


log = logging.getLogger("nybble")


def pick_device(device: str) -> torch.device:
    """ "auto" -> CUDA where there is one, else CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        if picked.type == "meta":
            raise RuntimeError("it has no memory")
        torch.empty(0, device=picked)
        if picked.type == "cuda":
            torch.cuda.set_device(picked)
    except (RuntimeError, AssertionError) as error:
        usable = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu"
        raise ModelError(
            f"--device {device} is not usable on this machine ({first_line(error)}); choose {usable}"
        ) from error
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" -> bfloat16 where its matrix products are fast, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
