"""Tiny models exported to a format, the values that its files must hold, and logits to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.export.base import EXPORTERS, ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.checkpoints import make_checkpoint


@dataclass(frozen=True)
class Export:
    """A quantized model, and the folder to which it was exported."""

    checkpoint: QuantizedCheckpoint
    folder: Path
    result: ExportResult


def export_checkpoint(name: str, checkpoint: QuantizedCheckpoint, folder: Path) -> Export:
    """Export to `folder`, which does not exist."""
    folder.mkdir()
    return Export(checkpoint, folder, EXPORTERS[name].export(checkpoint, folder))


def export_tiny(name: str, folder: Path, family: str, scheme: QuantScheme | None = None, **changes: Any) -> Export:
    """Export a random model of a family of tiny.py to FOLDER/export."""
    return export_checkpoint(name, make_checkpoint(folder / "quantized", family, scheme, **changes), folder / "export")


def slow_values(weight: QuantizedWeight) -> Tensor:
    """scale * (code - zero point) of every weight by its own indices, float64 [O, I]."""
    rows, columns = weight.codes_OI.shape
    width = columns // weight.scale_OG.shape[1]
    values = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(columns):
        scale_O, zero_O = weight.scale_OG[:, i // width].double(), weight.zero_point_OG[:, i // width].double()
        values[:, i] = scale_O * (weight.codes_OI[:, i].double() - zero_O)
    return values


def logits_of(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    """Logits of a model in float32."""
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits.float()
