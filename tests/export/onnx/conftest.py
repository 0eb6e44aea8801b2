"""Tiny models that are exported to ONNX once a session, and what the tests do with graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nybble.export.onnx.exporter import OnnxExporter
from nybble.export.result import ExportResult
from nybble.models.checkpoint import QuantizedCheckpoint
from tests.helpers.checkpoints import make_checkpoint

EXPORTER = OnnxExporter()


@dataclass(frozen=True)
class Exported:
    """A quantized model and the folder to which it was exported."""

    checkpoint: QuantizedCheckpoint
    folder: Path
    result: ExportResult

    def graph(self) -> Any:
        """The graph without its external data."""
        import onnx

        return onnx.load(self.folder / "model.onnx", load_external_data=False).graph

    def nodes(self, op_type: str) -> list[Any]:
        """The nodes of an operator."""
        return [node for node in self.graph().node if node.op_type == op_type]


Export = Callable[..., Exported]


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node."""
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.fixture(scope="session")
def needs_onnx() -> None:
    """For tests that export."""
    for module in EXPORTER.modules:
        pytest.importorskip(module, reason="the extra onnx")


@pytest.fixture(scope="session")
def export(needs_onnx: None, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a model of tiny.FAMILIES, changed or not; an unchanged one is exported once a session."""
    done: dict[str, Exported] = {}

    def export(family: str, scheme: Any = None, **changes: Any) -> Exported:
        if family in done and not changes and scheme is None:
            return done[family]
        folder = tmp_path_factory.mktemp("onnx")
        checkpoint = make_checkpoint(tmp_path_factory.mktemp("run") / "quantized", family, scheme, **changes)
        EXPORTER.check(checkpoint.config, checkpoint.selection)
        exported = Exported(checkpoint, folder, EXPORTER.export(checkpoint, folder))
        if not changes and scheme is None:
            done[family] = exported
        return exported

    return export
