"""Versions, hardware and peak memory of this process."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from nybble import container

try:
    import resource
except ImportError:  # Windows, where psutil knows the peak
    resource = None  # type: ignore[assignment]

_STATUS, _CPUS = Path("/proc/self/status"), Path("/proc/cpuinfo")

_PACKAGES = (
    "nybble", "torch", "transformers", "accelerate", "datasets", "safetensors", "openvino", "openvino-tokenizers",
    "openvino-genai", "lm-eval", "gguf", "xllamacpp", "onnxruntime", "onnxruntime-genai",
    "compressed-tensors", "mlx-lm",
)  # fmt: skip


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, in bytes: "cpu" resident, "cuda" allocated."""
    peak = {"cpu": _peak_resident()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    # Linux: not ru_maxrss, which starts at the memory of the process that started this one.
    if _STATUS.exists():
        kilobytes = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if kilobytes:
            return int(kilobytes[1]) * 1024
    if resource is not None:  # macOS counts it in bytes
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return int(psutil.Process().memory_info().peak_wset)


def package_versions() -> dict[str, str]:
    """Package -> its version, or that it is not installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _processor() -> str:
    """The name of the CPU, as its maker writes it; "" where the system does not say."""
    with suppress(OSError):
        named = re.search(r"^model name\s*: (.+)$", _CPUS.read_text(), re.MULTILINE)
        if named:
            return named[1].strip()
    return platform.processor()


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, for results.json and `nybble env`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory": f"{container.total_memory() / 1e9:.0f} GB",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": package_versions(),
    }
