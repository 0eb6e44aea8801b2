"""Versions, hardware and peak memory of this process."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

try:
    import resource
except ImportError:  # Windows, where psutil knows the peak
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")

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


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, for results.json and `nybble env`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": package_versions(),
    }
