"""Exported models of all families, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.export.base import EXPORTERS
from nybble.export.result import ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint
from tests.helpers.checkpoints import make_checkpoint

LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8, "original_max_position_embeddings": 256,
}  # fmt: skip

# llama.cpp has no sliding windows in these architectures, and no context below 256 tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "phi3": {
        "sliding_window": None,
        "rope_parameters": LONG_ROPE,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 1024,
    },
}
FAMILIES = ("llama", "smollm", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@dataclass(frozen=True)
class Exported:
    """A checkpoint, the folder to which it was exported, and what the exporter says about it."""

    checkpoint: QuantizedCheckpoint
    folder: Path
    result: ExportResult


@pytest.fixture(scope="session")
def needs_llama_cpp() -> None:
    """For tests that export, or compute in llama.cpp."""
    pytest.importorskip("gguf", reason="the extra gguf")
    pytest.importorskip("xllamacpp", reason="the extra gguf")


@pytest.fixture(scope="session")
def export(needs_llama_cpp: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Export a random model of a family; the same arguments give the same folder."""
    made: dict[str, Exported] = {}

    def make(family: str, scheme: Any = None, **changes: Any) -> Exported:
        key = repr((family, scheme, changes))
        if key not in made:
            folder, exporter = tmp_path_factory.mktemp(family), EXPORTERS["gguf"]
            checkpoint = make_checkpoint(folder / "quantized", family, scheme, **CHANGES.get(family, {}) | changes)
            exporter.check(checkpoint.config, checkpoint.selection)
            (folder / "gguf").mkdir()
            made[key] = Exported(checkpoint, folder / "gguf", exporter.export(checkpoint, folder / "gguf"))
        return made[key]

    return make
