"""OnnxModel compared with the torch model from which it was exported."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.errors import ExportError, RunError
from nybble.export.onnx import runtime as module
from nybble.workflows.target import open_exported
from tests.export.onnx.conftest import EXPORTER, Export, attributes
from tests.helpers.cases import fast_cases
from tests.helpers.exports import check_generation, check_padding_and_windows, record_lengths
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES


def open_strict(export: Export, family: str) -> tuple[Any, Any]:
    exported = export(family)
    return exported.checkpoint.build(), EXPORTER.open_model(exported.folder, exported.checkpoint.config, strict=True)


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST_FAMILIES))
def test_padding_and_sliding_windows(family: str, export: Export) -> None:
    assert bool(check_padding_and_windows(*open_strict(export, family)).isfinite().all())


def test_padding_at_the_right(export: Export) -> None:
    model, runtime = open_strict(export, "llama")
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    logits = runtime(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        torch.testing.assert_close(logits[:1, :5], model(ids[:1, :5]).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[1:], model(ids[1:]).logits, rtol=0, atol=1e-4)


def test_generation_computes_each_token_once(export: Export) -> None:
    check_generation(*open_strict(export, "gemma2"))


def test_generation_of_a_padded_batch(export: Export) -> None:
    model, runtime = open_strict(export, "qwen2")
    ids = torch.randint(0, 256, (2, 9))
    ids[1, :4] = 257
    mask = (ids != 257).long()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    expected = model.generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(runtime.generate(ids, attention_mask=mask, **arguments), expected)


def test_forward_outside_of_generation_does_not_use_the_state(export: Export) -> None:
    model, runtime = open_strict(export, "gemma2")
    lengths, ids = record_lengths(runtime), torch.randint(0, 256, (1, 6))
    runtime(ids[:, :4])
    logits = runtime(ids).logits
    assert lengths == [4, 6]
    assert logits.shape == (1, 6, 260)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-3)


def test_it_is_a_float32_model_on_the_cpu(export: Export) -> None:
    _, runtime = open_strict(export, "llama")
    assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)


def test_a_text_longer_than_the_context_is_refused(export: Export) -> None:
    _, runtime = open_strict(export, "llama")
    assert runtime(torch.zeros(1, 256, dtype=torch.int64)).logits.shape == (1, 256, 260)
    with pytest.raises(ExportError, match="must have at most 256 tokens, the context of the model; got 257; choose"):
        runtime(torch.zeros(1, 257, dtype=torch.int64))


def test_a_strict_model_computes_in_float32_and_a_deployed_one_with_8_bit_activations(export: Export) -> None:
    exported = export("llama")
    model, config, ids = exported.checkpoint.build(), exported.checkpoint.config, torch.randint(0, 256, (1, 30))
    before = (exported.folder / "model.onnx").read_bytes()
    with torch.no_grad():
        expected = model(ids).logits
        strict, deployed = (
            float((EXPORTER.open_model(exported.folder, config, strict)(ids).logits - expected).abs().max())
            for strict in (True, False)
        )
    assert strict < 1e-4
    assert 1e-3 < deployed < 1.0
    assert (exported.folder / "model.onnx").read_bytes() == before, "the file stays as it is"
    assert {attributes(node)["accuracy_level"] for node in exported.nodes("MatMulNBits")} == {4}


def test_a_session_has_the_threads_of_torch(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    options, original = [], ort.InferenceSession
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, o, **kwargs: options.append(o) or original(model, o, **kwargs)
    )
    exported = export("llama")
    for level in (None, module.FLOAT32_LEVEL):
        module.OnnxModel(exported.folder / "model.onnx", exported.checkpoint.config, level)
    assert [o.intra_op_num_threads for o in options] == [3, 3]


@pytest.mark.parametrize("strict", [False, True])
def test_a_cut_file_is_one_line_without_the_log_of_onnxruntime(
    strict: bool, export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exported = export("llama")
    for file in exported.folder.iterdir():
        shutil.copy(file, tmp_path)
    os.truncate(tmp_path / "model.onnx.data", 100)
    (tmp_path / "nybble-export.json").unlink(missing_ok=True)  # of an earlier version
    with pytest.raises(RunError, match=r"must be an export that ONNX opens; it does not \(.*; copy it again"):
        open_exported(tmp_path, EXPORTER, trust_remote_code=False, strict=strict)
    assert capfd.readouterr().err == ""
