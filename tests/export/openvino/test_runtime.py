"""OpenVINOModel compared with the torch model from which it was exported."""

import subprocess
import sys
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


SIGNAL = """
import signal, sys
from pathlib import Path
from transformers import AutoConfig
from nybble.export.openvino.runtime import OpenVINOModel
models = [OpenVINOModel(Path(sys.argv[1]), AutoConfig.from_pretrained(Path(sys.argv[1]).parent), {}) for _ in range(2)]
del models[0]
models.clear()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.slow  # a process of its own, which it could end
def test_a_signal_after_two_models_is_handled(exported: Exported) -> None:
    path = exported.folder / "openvino_model.xml"
    answer = subprocess.run([sys.executable, "-c", SIGNAL, str(path)], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.splitlines()[-1:]) == (0, ["handled"])


def test_it_is_a_float32_model_on_the_cpu(runtime: Any) -> None:
    assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
