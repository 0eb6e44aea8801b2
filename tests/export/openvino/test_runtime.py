"""OpenVINOModel compared with the torch model from which it was exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.export.base import EXPORTERS
from tests.export.openvino.conftest import Exported
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.tiny import make_model


def check_padding_and_windows(model: Any, runtime: Any) -> None:
    """Compare two left-padded sequences, longer than the sliding window, with each one alone in torch."""
    long, short = torch.randint(0, 256, (1, 20)), torch.randint(0, 256, (1, 13))
    ids = torch.cat([long, torch.cat([torch.full((1, 7), 257), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    logits = runtime(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        # 1e-3: float32 rounding through soft caps; a token too many or too few in a mask changes logits by 0.1.
        torch.testing.assert_close(logits[:1], model(long).logits, rtol=0, atol=1e-3)
        torch.testing.assert_close(logits[1:, 7:], model(short).logits, rtol=0, atol=1e-3)


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


def record_lengths(runtime: Any) -> list[int]:
    """Numbers of tokens of all calls of `infer` from now on."""
    lengths, original = [], runtime.infer

    def infer(input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        return original(input_ids, *args, **kwargs)

    runtime.infer = infer
    return lengths


def test_generation_computes_each_token_once(exported: Exported, runtime: Any) -> None:
    lengths = record_lengths(runtime)
    prompt = torch.randint(0, 256, (1, 9))
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = exported.model.generate(prompt, **arguments)
    assert torch.equal(runtime.generate(prompt, **arguments), expected)
    assert lengths == [9, *[1] * 7]
    assert torch.equal(runtime.generate(prompt, **arguments), expected), "a second call starts with an empty state"
    assert lengths[8:] == lengths[:8]


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
