"""One exported model that the tests of this folder share, because an export takes more than a second."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.export.base import EXPORTERS, ExportResult
from nybble.quant.weight import QuantizedWeight
from tests.helpers.rounding import round_model_to_nearest
from tests.helpers.tiny import make_model, make_tokenizer


@dataclass(frozen=True)
class Exported:
    """A model, its quantized weights, and the folder to which they were exported."""

    model: Any
    quantized: dict[str, QuantizedWeight]
    folder: Path
    result: ExportResult


@pytest.fixture(scope="session")
def exported(needs_openvino: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Gemma 2: sliding window of 8 tokens in one of two layers, soft caps, norm offset, tied head."""
    model, folder = make_model("gemma2"), tmp_path_factory.mktemp("openvino")
    quantized = round_model_to_nearest(model)
    result = EXPORTERS["openvino"].export(model, make_tokenizer(), quantized, folder)
    return Exported(model, quantized, folder, result)
