"""Exports in mlx-lm as models: logits, padding and generation compared with torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.export.base import EXPORTERS
from nybble.export.mlx.runtime import MLXModel
from tests.helpers.exports import Export, export_tiny, logits_of

pytest.importorskip("mlx_lm", reason="the extra mlx")
MLX = EXPORTERS["mlx"]


def open_strictly(exported: Export) -> Any:
    return MLX.open_model(exported.folder, exported.checkpoint.config, strict=True)


def test_logits_are_those_of_torch(exported: Export) -> None:
    """Longer than the window of Gemma 3, and in two calls."""
    ids, reference, model = torch.randint(0, 256, (2, 20)), exported.checkpoint.build(), open_strictly(exported)
    expected = logits_of(reference, ids)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=tolerance)
    first = model(ids[:, :13], use_cache=True)
    second = logits_of(model, ids[:, 13:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second, expected[:, 13:], rtol=0, atol=tolerance)


def test_generation_is_that_of_torch(exported: Export) -> None:
    prompt, arguments = torch.randint(0, 256, (2, 9)), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # the second prompt is shorter; generation pads on the left
    arguments |= {"attention_mask": mask, "pad_token_id": 0}
    expected = exported.checkpoint.build().generate(prompt, **arguments)
    assert torch.equal(open_strictly(exported).generate(prompt, **arguments), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tmp_path: Path, side: str) -> None:
    exported = export_tiny("mlx", tmp_path, "smollm", num_hidden_layers=1)
    model, ids = open_strictly(exported), torch.randint(0, 256, (3, 10))
    mask = torch.ones_like(ids)
    part = slice(0, 4) if side == "left" else slice(6, 10)
    mask[1, part], mask[2, :] = 0, 0
    logits = logits_of(model, ids, attention_mask=mask)
    alone = logits_of(model, ids[1:2, mask[1].bool()])
    assert torch.equal(logits[1:2, mask[1].bool()], alone)
    torch.testing.assert_close(logits[:1], logits_of(exported.checkpoint.build(), ids[:1]), rtol=0, atol=1e-4)
    assert bool(logits.isfinite().all())


def test_the_factor_of_gemma_3s_embeddings_is_that_of_torch_in_float32(tmp_path: Path) -> None:
    """mlx-lm rounds the square root of 96 to bfloat16: 9.8125 instead of 9.798."""
    exported = export_tiny("mlx", tmp_path, "gemma3", hidden_size=96)
    ids = torch.randint(0, 256, (1, 12))
    expected = logits_of(exported.checkpoint.build(), ids)
    strict, deployed = (
        (logits_of(MLX.open_model(exported.folder, exported.checkpoint.config, strict), ids) - expected).abs().max()
        for strict in (True, False)
    )
    assert float(strict) < 1e-5 * float(expected.abs().max()) < float(deployed)


def test_it_is_a_float32_model(exported: Export) -> None:
    model = open_strictly(exported)
    assert isinstance(model, MLXModel)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.dtype == torch.float32
