"""Versions, hardware and peak memory."""

from __future__ import annotations

import logging
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch

log = logging.getLogger("nybble")


def peak_memory() -> dict[str, int]:
    """Largest memory of this process so far, in bytes: "cpu" resident, "cuda" allocated."""
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, for results.json and `nybble env`."""
    packages = (
        "nybble",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "safetensors",
        "openvino",
        "openvino-tokenizers",
        "openvino-genai",
        "lm-eval",
        "gguf",
    )
    versions = {}
    for name in packages:
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
