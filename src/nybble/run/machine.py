"""Versions, hardware and peak memory of this process."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import psutil
import torch

try:
    import resource
except ImportError:  # Windows, where psutil knows the peak
    resource = None  # type: ignore[assignment]

_PACKAGES = (
    "nybble", "torch", "transformers", "accelerate", "datasets", "safetensors", "openvino", "openvino-tokenizers",
    "openvino-genai", "lm-eval", "gguf",
)  # fmt: skip


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, in bytes: "cpu" resident, "cuda" allocated."""
    if resource is not None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        resident = psutil.Process().memory_info().peak_wset
    peak = {"cpu": int(resident)}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, for results.json and `nybble env`."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }
