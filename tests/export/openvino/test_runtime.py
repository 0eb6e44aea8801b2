"""OpenVINOModel compared with the torch model from which it was exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.export.base import EXPORTERS
from tests.export.openvino.conftest import Exported
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.exports import check_generation, check_padding_and_windows, record_lengths
from tests.helpers.tiny import make_model


@pytest.fixture
def runtime(exported: Exported) -> Any:
    return EXPORTERS["openvino"].open_model(exported.folder, exported.model.config, strict=True)


def test_padding_and_sliding_windows(exported: Exported, runtime: Any) -> None:
    check_padding_and_windows(exported.model, runtime)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize("family", ["smollm", "mistral", "gemma3"])
def test_padding_and_sliding_windows_of_other_families(family: str, tmp_path: Path) -> None:
    model, exporter = make_model(family), EXPORTERS["openvino"]
    checkpoint = save_checkpoint(tmp_path / "quantized", model)
    (tmp_path / "openvino").mkdir()
    exporter.export(checkpoint, tmp_path / "openvino")
    check_padding_and_windows(model, exporter.open_model(tmp_path / "openvino", model.config, strict=True))


def test_generation_computes_each_token_once(exported: Exported, runtime: Any) -> None:
    check_generation(exported.model, runtime)


def test_forward_outside_of_generation_does_not_use_the_state(exported: Exported, runtime: Any) -> None:
    lengths, ids = record_lengths(runtime), torch.randint(0, 256, (1, 6))
    runtime(ids[:, :4])
    logits = runtime(ids).logits
    assert lengths == [4, 6]
    assert logits.shape == (1, 6, 260)
    with torch.no_grad():
        torch.testing.assert_close(logits, exported.model(ids).logits, rtol=0, atol=1e-3)


def test_it_is_a_float32_model_on_the_cpu(runtime: Any) -> None:
    assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
