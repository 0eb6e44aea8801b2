"""Folders for mlx-lm: words, values and dtypes, and mlx-lm's own loader and generation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.export.mlx.exporter import MLXExporter
from nybble.export.safetensors_writer import read_metadata
from nybble.models.quantized_model import load_config
from nybble.quant.scheme import QuantScheme
from tests.export.mlx.conftest import MIXTURES
from tests.helpers.cases import first_fast
from tests.helpers.exports import (
    Export,
    check_codes,
    check_group_sizes,
    export_checkpoint,
    export_tiny,
    logits_of,
    slow_values,
)
from tests.helpers.mixtures import model_type
from tests.helpers.smollm2 import ANSWER, CHAT, smollm2_checkpoint
from tests.helpers.tiny import FAMILIES, make_config, save_model

mx = pytest.importorskip("mlx.core", reason="the extra mlx")
mlx_lm = pytest.importorskip("mlx_lm", reason="the extra mlx")
MLX = EXPORTERS["mlx"]


def slow_unpack(words: Tensor, bits: int) -> Tensor:
    """uint32 [M, N] -> fields of some bits [M, N * 32 / bits], one field at a time."""
    numbers, count = words.to(torch.int64), 32 // bits
    fields = torch.empty(words.shape[0], count * words.shape[1], dtype=torch.int64)
    for i in range(fields.shape[1]):
        fields[:, i] = numbers[:, i // count] // 2 ** (bits * (i % count)) % 2**bits
    return fields


def test_the_file_holds_codes_scales_and_biases(exported: Export) -> None:
    checkpoint, tensors = exported.checkpoint, load_file(exported.folder / "model.safetensors")
    for name, weight in checkpoint.quantized.items():
        words, scales, biases = (tensors.pop(f"{name}.{leaf}") for leaf in ("weight", "scales", "biases"))
        fields = slow_unpack(words, weight.scheme.bits)
        assert torch.equal(fields, weight.codes_OI.long())
        width = fields.shape[1] // scales.shape[1]
        assert width == (64 if name in checkpoint.selection.embeddings else 32), (
            "the largest groups for one scale in a row"
        )
        scale_OI, bias_OI = (part.double().repeat_interleave(width, 1) for part in (scales, biases))
        assert torch.equal(scale_OI * fields + bias_OI, slow_values(weight))
    assert tensors.keys() == checkpoint.others.keys(), "and all other tensors; no head that is tied"
    assert all(torch.equal(tensors[name].float(), tensor.float()) for name, tensor in checkpoint.others.items())


def test_mlx_reads_the_weights(exported: Export) -> None:
    weights = MLX.read_weights(exported.folder)
    assert weights.keys() == exported.checkpoint.quantized.keys()
    for name, weight in exported.checkpoint.quantized.items():
        assert torch.equal(weights[name].double(), slow_values(weight))
    assert exported.result.rounded == {}
    check_codes(MLX, exported)


def test_mlx_lm_loads_the_folder(exported: Export) -> None:
    """With its own loader, tokenizer and generation; the same first token as torch, which computes in float32 too."""
    model, tokenizer = mlx_lm.load(str(exported.folder))
    ids = torch.randint(0, 256, (1, 12))
    expected = exported.checkpoint.build()(input_ids=ids).logits[0, -1].argmax()
    response = next(mlx_lm.stream_generate(model, tokenizer, ids[0].tolist(), max_tokens=1))
    assert response.token == int(expected)


def test_transformers_still_reads_the_configuration(exported: Export) -> None:
    """nybble eval opens an export by its config.json."""
    config = load_config(exported.folder, trust_remote_code=False)
    assert (config.model_type, config.vocab_size) == (exported.checkpoint.config.model_type, 260)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_tensors_are_float16_where_it_holds_them(tmp_path: Path, family: str) -> None:
    """Norms and biases of a bfloat16 model are exact in float16. Gemma 2 overflows in it."""
    exported = export_tiny("mlx", tmp_path, family, dtype=torch.bfloat16, sliding_window=1024)
    expected = torch.float16 if family == "qwen2" else torch.float32
    tensors = load_file(exported.folder / "model.safetensors")
    for name in exported.checkpoint.others:
        assert tensors[name].dtype == expected
    assert tensors["model.embed_tokens.scales"].dtype == expected
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert any("exceed the range of float16" in limit for limit in MLX.limits(exported.checkpoint.config)) == (
        family == "gemma2"
    )


def test_deployed_in_float16_mlx_stays_near(tmp_path: Path) -> None:
    """As on an Apple GPU. 8-bit weights are rounded there, and activations have 11 bits."""
    exported = export_tiny("mlx", tmp_path, "qwen2", dtype=torch.bfloat16, sliding_window=1024)
    model, _ = mlx_lm.load(str(exported.folder))
    ids = torch.randint(0, 256, (1, 12))
    logits = model(mx.array(ids.numpy()))
    assert logits.dtype == mx.float16
    expected = logits_of(exported.checkpoint.build(), ids)
    difference = (torch.tensor(logits.astype(mx.float32).tolist()) - expected).abs().max()
    assert 0 < float(difference) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("group_size", "symmetric"),
    first_fast(2, [(64, True), (128, False), (32, False), (32, True), (64, False), (128, True)]),
)
def test_group_sizes_and_symmetric_schemes(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    scheme = QuantScheme(group_size=group_size, symmetric=symmetric)
    exported = export_tiny(
        "mlx", tmp_path, "smollm", scheme, hidden_size=128, intermediate_size=256, num_hidden_layers=1
    )
    quantization = json.loads((exported.folder / "config.json").read_text())["quantization"]
    assert quantization == {
        "group_size": group_size, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 128, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    codes = MLX.read_codes(exported.folder)
    assert {codes[name].scheme for name in exported.checkpoint.selection.linears} == {scheme}


def test_a_changed_tensor_is_found(tmp_path: Path) -> None:
    exported = export_tiny("mlx", tmp_path, "smollm", num_hidden_layers=1)
    path, name = exported.folder / "model.safetensors", exported.checkpoint.selection.linears[3]
    original = load_file(path)
    for leaf, message in (("weight", "codes"), ("scales", "scales"), ("biases", "zero points")):
        tensors = load_file(path)
        changed = tensors[f"{name}.{leaf}"]
        changed[0, 0] = changed[0, 0] ^ 1 if leaf == "weight" else changed[0, 0] * 2 - 0.25
        save_file(tensors, path, read_metadata(exported.folder))
        with pytest.raises(ExportError, match=f"the {message} of {name} read back differently"):
            MLX.compare_weights(MLX.held(exported.checkpoint).quantized, exported.folder)
        save_file(original, path, read_metadata(exported.folder))


def test_only_nybbles_folders_are_recognized(tmp_path: Path) -> None:
    exported = export_tiny("mlx", tmp_path, "smollm", num_hidden_layers=1)
    assert exporter_of(exported.folder) is MLX
    assert exporter_of(save_model(tmp_path / "other", "smollm", num_hidden_layers=1)) is None


def test_schemes_that_mlx_does_not_have_are_refused() -> None:
    check_group_sizes(MLX, "MLX")


def test_the_tested_families_are_those_of_this_folder() -> None:
    mixtures = {model_type(family) for family in MIXTURES}
    assert MLXExporter.tested_families == {make_config(family).model_type for family in FAMILIES} | mixtures


@pytest.mark.slow
def test_the_real_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = export_checkpoint("mlx", smollm2_checkpoint(tmp_path_factory), tmp_path / "export")
    assert exported.result.logit_difference is not None
    assert exported.result.rounded == {}
    model, tokenizer = mlx_lm.load(str(exported.folder))
    assert model.model.norm.weight.dtype == mx.float16, "the norms of SmolLM2 are exact in float16"
    logits = model(mx.array([[1, 42]]))
    assert bool(mx.isfinite(logits).all().item())
    model.set_dtype(mx.float32)  # on a CPU, mlx takes seconds for a token in float16
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ANSWER in mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
