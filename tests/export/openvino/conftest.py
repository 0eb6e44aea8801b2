"""One exported model that the tests of this folder share, because an export takes more than a second."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.export.base import EXPORTERS
from nybble.export.result import ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.tiny import make_model


@dataclass(frozen=True)
class Exported:
    """A model, its quantized weights, and the folder to which they were exported."""

    model: Any
    checkpoint: QuantizedCheckpoint
    folder: Path
    result: ExportResult


@pytest.fixture(scope="session")
def exported(needs_openvino: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Gemma 2: sliding window of 8 tokens in one of two layers, soft caps, norm offset, tied head."""
    model, folder = make_model("gemma2"), tmp_path_factory.mktemp("openvino")
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("run") / "quantized", model)
    result = EXPORTERS["openvino"].export(checkpoint, folder)
    return Exported(model, checkpoint, folder, result)
