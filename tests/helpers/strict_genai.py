"""openvino-genai as exact as it can be."""

from pathlib import Path
from typing import Any

import pytest


def strict_pipeline(folder: Path) -> Any:
    """The pipeline of an export in float32, without activations or a cache of 8 bits."""
    genai = pytest.importorskip("openvino_genai", reason="extra openvino")
    return genai.LLMPipeline(
        str(folder),
        "CPU",
        INFERENCE_PRECISION_HINT="f32",
        DYNAMIC_QUANTIZATION_GROUP_SIZE="0",
        KV_CACHE_PRECISION="f32",
    )
