"""Folders of compressed-tensors: words, values, logits and generation of every family, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.export.safetensors_writer import read_metadata
from nybble.quant.scheme import QuantScheme
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.exports import (
    BFLOAT16_NORM,
    Export,
    check_group_sizes,
    check_logits_and_greedy_tokens,
    export_bfloat16,
    export_checkpoint,
    export_tiny,
    logits_of,
    slow_values,
)
from tests.helpers.smollm2 import ANSWER, chat_ids, smollm2_checkpoint
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, save_model

pytest.importorskip("compressed_tensors", reason="the extra vllm")
VLLM = EXPORTERS["vllm"]


@pytest.fixture(scope="module", params=fast_cases(FAMILIES, FAST_FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model of each family, exported once."""
    return export_tiny("vllm", tmp_path_factory.mktemp(request.param), request.param)


def slow_unpack(words: Tensor) -> Tensor:
    """int32 [M, N] -> 4-bit fields [M, 8 N], one field at a time."""
    unsigned = words.to(torch.int64) % 2**32
    fields = torch.empty(words.shape[0], 8 * words.shape[1], dtype=torch.int64)
    for i in range(fields.shape[1]):
        fields[:, i] = unsigned[:, i // 8] // 16 ** (i % 8) % 16
    return fields


def check_layers(exported: Export) -> dict[str, Tensor]:
    """Compare the tensors of linear layers with slow loops; returns the others."""
    tensors, checkpoint = load_file(exported.folder / "model.safetensors"), exported.checkpoint
    for name in checkpoint.selection.linears:
        weight = checkpoint.quantized[name]
        packed, scale = tensors.pop(f"{name}.weight_packed"), tensors.pop(f"{name}.weight_scale")
        assert (packed.dtype, scale.dtype) == (torch.int32, torch.float16)
        assert torch.equal(slow_unpack(packed), weight.codes_OI.long())
        assert torch.equal(scale.float(), weight.scale_OG)
        assert tensors.pop(f"{name}.weight_shape").tolist() == list(weight.codes_OI.shape)
        if not weight.scheme.symmetric:
            zero_points = tensors.pop(f"{name}.weight_zero_point")
            assert torch.equal(slow_unpack(zero_points.T).T, weight.zero_point_OG.long())
    return tensors


def test_the_file_holds_codes_scales_and_zero_points(exported: Export) -> None:
    checkpoint, others = exported.checkpoint, check_layers(exported)
    for name in checkpoint.selection.embeddings:
        stored, expected = others.pop(f"{name}.weight"), slow_values(checkpoint.quantized[name])
        assert torch.equal(stored, expected.half())
        largest = float((stored.double() - expected).abs().max())
        assert exported.result.rounded[name] == pytest.approx(largest, rel=1e-6)
    assert others.keys() == checkpoint.others.keys(), "and all other tensors; no head that is tied"
    assert all(torch.equal(others[name].float(), tensor.float()) for name, tensor in checkpoint.others.items())


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [(1.5, torch.float16, "float16"), (70000.0, torch.bfloat16, "float32"), (1e-9, torch.bfloat16, "float16")],
)
def test_a_model_in_bfloat16_has_one_dtype_where_that_is_exact(
    tmp_path: Path, value: float, stored: torch.dtype, dtype: str
) -> None:
    """vLLM warns of every tensor of another dtype. Too small a number is rounded by its kernels."""
    exported = export_bfloat16("vllm", tmp_path, value)
    tensors = load_file(exported.folder / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert dtypes.pop(BFLOAT16_NORM) == stored
    assert set(dtypes.values()) == {torch.float16}
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == dtype
    for name, tensor in exported.checkpoint.others.items():
        assert torch.equal(tensors[name].float(), tensor.float())


def test_compressed_tensors_reads_the_weights(exported: Export) -> None:
    weights = VLLM.read_weights(exported.folder)
    for name in exported.checkpoint.selection.linears:
        assert torch.equal(weights[name].double(), slow_values(exported.checkpoint.quantized[name]))


def test_logits_and_greedy_tokens_are_those_of_torch(exported: Export) -> None:
    check_logits_and_greedy_tokens(VLLM, exported)


@pytest.mark.parametrize("family", fast_cases(["smollm", "phi3"], ["smollm"]))
def test_plain_transformers_loads_the_folder(tmp_path: Path, family: str) -> None:
    """Without nybble's settings, weights are dequantized at the first call; a tied head stays out of it."""
    exported, ids = export_tiny("vllm", tmp_path, family), torch.randint(0, 256, (1, 20))
    model, info = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float16
    opened = VLLM.open_model(exported.folder, exported.checkpoint.config)
    assert torch.equal(logits_of(model, ids), logits_of(opened, ids))
    weight = exported.checkpoint.quantized[exported.checkpoint.selection.linears[0]]
    assert torch.equal(
        model.get_submodule(exported.checkpoint.selection.linears[0]).weight.double(), slow_values(weight)
    )


@pytest.mark.parametrize(
    ("group_size", "symmetric"),
    first_fast(2, [(64, True), (128, False), (32, False), (32, True), (64, False), (128, True)]),
)
def test_group_sizes_and_symmetric_schemes(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    scheme = QuantScheme(group_size=group_size, symmetric=symmetric)
    exported = export_tiny(
        "vllm", tmp_path, "qwen2", scheme, hidden_size=128, intermediate_size=256, num_hidden_layers=1
    )
    others = check_layers(exported)
    assert not [name for name in others if "zero_point" in name], "a symmetric scheme stores no zero points"
    codes = VLLM.read_codes(exported.folder)
    assert {weight.scheme for weight in codes.values()} == {scheme}
    VLLM.compare_weights(VLLM.held(exported.checkpoint).quantized, exported.folder)


def test_a_changed_code_is_found(tmp_path: Path) -> None:
    exported = export_tiny("vllm", tmp_path, "smollm", num_hidden_layers=1)
    path, name = exported.folder / "model.safetensors", exported.checkpoint.selection.linears[3]
    for leaf, message in (("weight_packed", "codes"), ("weight_scale", "scales"), ("weight_zero_point", "zero points")):
        tensors = load_file(path)
        changed = tensors | {f"{name}.{leaf}": tensors[f"{name}.{leaf}"] + 1}
        save_file(changed, path, read_metadata(exported.folder))
        with pytest.raises(ExportError, match=f"the {message} of {name} read back differently"):
            VLLM.compare_weights(VLLM.held(exported.checkpoint).quantized, exported.folder)
        save_file(tensors, path, read_metadata(exported.folder))


def test_only_nybbles_folders_are_recognized(tmp_path: Path) -> None:
    exported = export_tiny("vllm", tmp_path, "smollm", num_hidden_layers=1)
    assert exporter_of(exported.folder) is VLLM
    assert exporter_of(save_model(tmp_path / "other", "smollm", num_hidden_layers=1)) is None


def test_schemes_without_a_kernel_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", "smollm", num_hidden_layers=1)
    check_group_sizes(VLLM, VLLM.label)
    config, selection = checkpoint.config, checkpoint.selection
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    with pytest.raises(ExportError, match="vllm needs a model whose code is in transformers; llama .*; remove vllm"):
        VLLM.check(config, selection)


def test_rows_that_vllm_cannot_split_are_refused(tmp_path: Path) -> None:
    """Four keys and values: less than a word of zero points. A symmetric scheme has none."""
    odd = {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 2, "num_hidden_layers": 1}
    with pytest.raises(ExportError, match=r"rows in multiples of 8 .*; model.layers.0.self_attn.k_proj has 4; remove"):
        export_tiny("vllm", tmp_path, "smollm", **odd)
    exported = export_tiny("vllm", tmp_path / "symmetric", "smollm", QuantScheme(group_size=32, symmetric=True), **odd)
    assert exported.result.logit_difference is not None


def test_config_names_the_class_and_a_dtype_that_does_not_overflow(exported: Export) -> None:
    config = exported.checkpoint.config
    gemma = config.model_type.startswith("gemma")
    model = VLLM.open_model(exported.folder, config)
    assert model.dtype == (torch.float32 if gemma else torch.float16)
    assert json.loads((exported.folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert len(VLLM.limits(config)) == (1 if gemma else 0)


@pytest.mark.slow
def test_the_real_model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = export_checkpoint("vllm", smollm2_checkpoint(tmp_path_factory), tmp_path / "export")
    assert exported.result.logit_difference is not None
    assert list(exported.result.rounded) == ["model.embed_tokens"]
    assert json.loads((exported.folder / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    model, ids = VLLM.open_model(exported.folder, exported.checkpoint.config), chat_ids(exported.checkpoint.tokenizer)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert ANSWER in exported.checkpoint.tokenizer.decode(answer)
