"""Exported files: what other readers find in them, the logits of llama.cpp, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.checks import check_exportable
from nybble.export.gguf import architectures, file, tensors
from nybble.export.gguf.architectures import MODEL_TYPES
from nybble.export.gguf.exporter import GGUFExporter
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from tests.export.gguf.conftest import CHANGES, FAMILIES, LONG_ROPE, Exported
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.tiny import make_config

pytestmark = pytest.mark.usefixtures("needs_llama_cpp")

EXPORTER = GGUFExporter()
SELECTION = LayerSelection((), (), tied=True)
FAST = ("smollm", "gemma2", "phi3")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

# Written out, to compare with the table of the package gguf.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def file_name(parameter: str, model_type: str) -> str:
    """The name of a parameter in llama.cpp."""
    module, _, leaf = parameter.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{(GEMMA_NAMES if 'gemma' in model_type else LAYER_NAMES)[inner]}.{leaf}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[module] + f".{leaf}"


def slow_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1, ... by a loop."""
    size, order = len(rows) // heads, []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + i + size // 2]
    return rows[order]


def expected_tensors(exported: Exported) -> dict[str, np.ndarray]:
    """Name in the file -> numbers that llama.cpp needs."""
    checkpoint, expected = exported.checkpoint, {}
    config = checkpoint.config
    for parameter, tensor in {
        **{f"{name}.weight": weight.dequantize() for name, weight in checkpoint.quantized.items()},
        **{name: tensor.float() for name, tensor in checkpoint.others.items()},
    }.items():
        numbers = tensor.numpy()
        if "gemma" in config.model_type and parameter.endswith("norm.weight"):
            numbers = numbers + np.float32(1)
        if config.model_type in ("llama", "mistral") and "q_proj" in parameter:
            numbers = slow_neighbours(numbers, config.num_attention_heads)
        if config.model_type in ("llama", "mistral") and "k_proj" in parameter:
            numbers = slow_neighbours(numbers, config.num_key_value_heads)
        expected[file_name(parameter, config.model_type)] = numbers
    return expected


def check_tensors(exported: Exported) -> Any:
    """Compare all tensors with what the reader of the package gguf finds; returns that reader."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader, expected = GGUFReader(exported.folder / "model.gguf"), expected_tensors(exported)
    found = {tensor.name: tensor for tensor in reader.tensors}
    rope_names = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    assert found.keys() - rope_names == expected.keys()
    for name, numbers in expected.items():
        assert tuple(found[name].shape[::-1]) == numbers.shape, name
        assert np.array_equal(dequantize(found[name].data, found[name].tensor_type), numbers), name
    return reader


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST))
def test_a_family_is_exact_for_other_readers_and_computed_by_llama_cpp(
    family: str, export: Callable[..., Exported]
) -> None:
    exported = export(family)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in check_tensors(exported).tensors}
    assert {kind for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name} <= {"Q4_1", "F32"}
    assert kinds["token_embd.weight"] == kinds.get("output.weight", "Q8_0") == "Q8_0"
    result, gemma = exported.result, family.startswith("gemma")
    assert result.linear_weights == (8 if family == "phi3" else 14)
    assert result.bytes == (exported.folder / "model.gguf").stat().st_size
    assert result.rounded == {}
    assert result.logit_difference is not None
    assert result.logit_difference <= (5e-3 if gemma else 2e-5)  # the table of GELU in float16
    assert exported.checkpoint.config.model_type in EXPORTER.tested_families


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"scheme": QuantScheme(4, 64, symmetric=True)}),
    ("qwen2", {"rope_parameters": YARN}),
    ("gemma3", {"rope_parameters": GEMMA_ROPE, "query_pre_attn_scalar": 48, "tie_word_embeddings": False}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("qwen3", {"scheme": QuantScheme(4, 64)}),
    ("llama", {"scheme": QuantScheme(4, 128), "hidden_size": 128, "head_dim": 32}),
    ("smollm", {"scheme": QuantScheme(4, None)}),
    ("smollm", {"attention_bias": True, "mlp_bias": True}),
    ("smollm", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("smollm", {"rope_parameters": YARN}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 2}),
    ("gemma3", {"sliding_window": 256}),  # as long as the context; the layers differ in rotary embeddings
]


@pytest.mark.parametrize(("family", "changes"), first_fast(3, VARIANTS), ids=str)
def test_variants_of_families(family: str, changes: dict[str, Any], export: Callable[..., Exported]) -> None:
    exported = export(family, **changes)
    symmetric = exported.checkpoint.selection.schemes[exported.checkpoint.selection.linears[0]].symmetric
    if "query_pre_attn_scalar" not in changes:  # the norms hold the scale of the queries then
        kinds = {tensor.tensor_type.name for tensor in check_tensors(exported).tensors}
        assert kinds == {"F32", "Q8_0", "Q4_0" if symmetric else "Q4_1"}
    assert exported.result.logit_difference is not None
    assert exported.result.logit_difference <= (5e-3 if family.startswith("gemma") else 2e-5)


def test_fields_are_those_of_the_converter_of_llama_cpp(export: Callable[..., Exported]) -> None:
    from gguf import GGUFReader

    exported = export("gemma2")
    quantized = list(exported.checkpoint.shapes)
    reader = GGUFReader(exported.folder / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF", "tok"))}
    assert fields.pop("gemma2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert fields == {
        "general.architecture": "gemma2", "general.type": "model", "general.file_type": 3,
        "general.quantization_version": 2, "nybble.quantized": quantized,
        "gemma2.context_length": 256,
        "gemma2.vocab_size": 260, "gemma2.embedding_length": 64, "gemma2.block_count": 2,
        "gemma2.feed_forward_length": 128, "gemma2.attention.head_count": 4, "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 32, "gemma2.attention.value_length": 32, "gemma2.rope.freq_base": 10000.0,
        "gemma2.rope.dimension_count": 32, "gemma2.attn_logit_softcapping": 3.0,
        "gemma2.final_logit_softcapping": 5.0, "gemma2.attention.sliding_window": 8,
    }  # fmt: skip
    other = {key: field.contents() for key, field in GGUFReader(export("gemma3").folder / "model.gguf").fields.items()}
    assert other["gemma3.attention.sliding_window_pattern"] == 2  # 6 without the field
    assert (other["gemma3.rope.freq_base"], other["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)


def test_llama3_factors_are_those_of_the_formula(export: Callable[..., Exported]) -> None:
    content = file.GGUFContent(export("llama").folder / "model.gguf")
    factors = []
    for i in range(8):
        length = 2 * np.pi * 500000.0 ** (2 * i / 16)
        smooth = (64 / length - 1) / 3
        factors.append(1.0 if length < 16 else 8.0 if length > 64 else 1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(content.read("rope_freqs.weight"), factors, rtol=1e-6)
    long, short = (file.GGUFContent(export("phi3").folder / "model.gguf").read(f"rope_factors_{name}.weight")
                   for name in ("long", "short"))  # fmt: skip
    assert (long.tolist(), short.tolist()) == (
        [2.0] * 8, np.array(LONG_ROPE["short_factor"], np.float32).tolist()
    )  # fmt: skip


def _without(name: str) -> Callable[..., Any]:
    def plan(checkpoint: Any) -> Any:
        return (tensor for tensor in tensors.plan_tensors(checkpoint) if tensor.name != name)

    return plan


def _other_field(key: str, value: Any) -> Callable[..., Any]:
    def metadata(config: Any) -> dict[str, Any]:
        return architectures.metadata(config) | {key: value}

    return metadata


@pytest.mark.parametrize(
    ("family", "place", "fault"),
    first_fast(
        4,
        [
            ("smollm", "tensors.to_neighbours", lambda rows, heads: rows),
            ("phi3", "exporter.plan_tensors", _without("rope_factors_short.weight")),
            ("gemma3", "tensors.MODEL_TYPES", {"gemma3_text": replace(MODEL_TYPES["gemma3_text"], norm_offset=0.0)}),
            ("gemma2", "exporter.metadata", _other_field("attention.sliding_window", 9)),
            ("llama", "exporter.plan_tensors", _without("rope_freqs.weight")),
            ("gemma2", "exporter.metadata", _other_field("attention.sliding_window_pattern", 3)),
            ("gemma2", "exporter.metadata", _other_field("attn_logit_softcapping", 3.5)),
            ("gemma2", "exporter.metadata", _other_field("final_logit_softcapping", 5.5)),
            ("gemma3", "exporter.metadata", _other_field("rope.freq_base_swa", 20000.0)),
            ("qwen3", "exporter.metadata", _other_field("rope.freq_base", 20000.0)),
            ("qwen2", "exporter.metadata", _other_field("attention.layer_norm_rms_epsilon", 1e-3)),
            ("phi3", "exporter.metadata", _other_field("rope.scaling.attn_factor", 1.0)),
        ],
    ),
)
def test_the_comparison_of_logits_finds_faults(
    family: str, place: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", family, **CHANGES.get(family, {}))
    monkeypatch.setattr(f"nybble.export.gguf.{place}", fault)
    (tmp_path / "gguf").mkdir()
    EXPORTER.write(EXPORTER.held(checkpoint), tmp_path / "gguf")
    with pytest.raises(ExportError, match=r"gguf must give the logits of torch within"):
        EXPORTER.compare_logits(checkpoint, tmp_path / "gguf")


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST))
def test_a_deployed_model_answers_with_8_bit_activations(family: str, export: Callable[..., Exported]) -> None:
    """Measured: 1.2 to 4.4 % of the largest logit. Wrong rows in query and key projections change 60 %."""
    exported, ids = export(family), torch.randint(0, 256, (1, 48))
    with torch.no_grad():
        expected = exported.checkpoint.build()(ids).logits
    difference = EXPORTER.open_model(exported.folder, exported.checkpoint.config)(ids).logits - expected
    assert 1e-3 < float(difference.abs().max() / expected.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar 48"),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
        ("gemma2", {"attention_bias": True}, "attention_bias"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding and full layers without a per"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "full attention in all layers"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
        ("mistral", {}, "a sliding window of 8 tokens"),
        ("qwen2", {}, "a sliding window of 8 tokens"),
        ("phi3", {"sliding_window": None}, "rotary embeddings for contexts of 128 tokens"),
        ("phi3", {"sliding_window": None, "head_dim": 32}, "attention heads of 128 numbers together for a hidden si"),
        ("qwen3", {"rope_parameters": make_config("llama").rope_parameters}, "rotary embeddings of the type llama3"),
        ("qwen3", {"rope_parameters": YARN | {"beta_slow": 2.0}}, "the type yarn with beta_slow 2.0"),
        ("smollm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "rotary embeddings of a part (0.5) of a head"),
    ],
)  # fmt: skip
def test_check_refuses_what_llama_cpp_does_not_compute(family: str, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ExportError, match="needs a model whose parts llama.cpp computes") as error:
        EXPORTER.check(make_config(family, **changes), SELECTION)
    assert found in str(error.value)
    assert str(error.value).endswith("; remove gguf from --export")


def test_check_refuses_models_and_schemes_that_the_format_cannot_hold() -> None:
    config = make_config("smollm")
    EXPORTER.check(config, SELECTION)
    assert EXPORTER.container(QuantScheme(4, 96), 192, embedding=False) == QuantScheme(4, 32)
    with pytest.raises(
        ExportError, match=r"needs a model type of deepseek_v2, .*, qwen3_moe; got mamba; remove gguf from --ex"
    ):
        EXPORTER.check(SimpleNamespace(model_type="mamba"), SELECTION)
    assert EXPORTER.container(QuantScheme(4, 48), 96, embedding=False) is None
    assert EXPORTER.container(QuantScheme(4, None), 96, embedding=False) == QuantScheme(4, 32)
    assert EXPORTER.container(QuantScheme(3, 64), 128, embedding=False) == QuantScheme(4, 32, symmetric=True)
    with pytest.raises(
        ExportError, match="needs rows that are multiples of 32 weights; this model has rows of 80; rem"
    ):
        EXPORTER.check(make_config("smollm", intermediate_size=80), SELECTION)
    with pytest.raises(ExportError, match="this model has a head that is not tied to the embedding"):
        EXPORTER.check(make_config("gemma2"), LayerSelection((), (), tied=False))


def test_limits_say_for_which_texts_a_file_is_right(caplog: pytest.LogCaptureFixture) -> None:
    long = {"sliding_window": 600, "max_position_embeddings": 1024}
    check_exportable(["gguf"], make_config("mistral", **long), SELECTION, {})
    assert "the GGUF export is right up to 600 tokens" in caplog.text
    assert EXPORTER.limits(make_config("mistral", sliding_window=256)) == ()  # as long as the context
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "right up to 256 tokens" in EXPORTER.limits(make_config("smollm", rope_parameters=dynamic))[0]
    assert "a context (-c) of at most 256" in EXPORTER.limits(make_config("phi3", **CHANGES["phi3"]))[0]
    assert EXPORTER.limits(make_config("gemma3")) == EXPORTER.limits(make_config("llama")) == ()


def test_a_parameter_without_a_tensor_is_refused(export: Callable[..., Exported]) -> None:
    checkpoint = export("smollm").checkpoint
    other = SimpleNamespace(
        config=checkpoint.config, shapes={}, others={"model.layers.0.new.weight": torch.ones(3)},
        selection=checkpoint.selection,
    )  # fmt: skip
    with pytest.raises(
        ExportError, match="a tensor of llama.cpp for every parameter; there is none for model.layers.0"
    ):
        list(tensors.plan_tensors(other))  # type: ignore[arg-type]


def test_a_disk_that_fills_is_one_line(
    export: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nybble.export.gguf.exporter.write_file", fail)
    with pytest.raises(
        ExportError, match=r"must be written to disk; it cannot be \(OSError: .*No space left on device.* --to gguf$"
    ):
        EXPORTER.write(EXPORTER.held(export("smollm").checkpoint), tmp_path)


def test_tensors_are_written_one_at_a_time(
    export: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a tensor is read, the one before it is in the file."""
    import gguf

    order, written = [], gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(
        tensors, "to_blocks", lambda weight, original=tensors.to_blocks: order.append("r") or original(weight)
    )
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_tensor_data", lambda self, data: order.append("w") or written(self, data)
    )
    EXPORTER.write(EXPORTER.held(export("smollm").checkpoint), tmp_path)
    quantized = 15
    assert order[: 2 * quantized] == ["r", "w"] * quantized
    assert (tmp_path / "model.gguf").read_bytes() == (export("smollm").folder / "model.gguf").read_bytes()


def test_a_file_of_another_program_is_refused(export: Callable[..., Exported], tmp_path: Path) -> None:
    content = (export("smollm").folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b"nybble.quantized", b"others.quantized"))
    with pytest.raises(ExportError, match="must be a GGUF file that nybble exported; it has no field nybble.quantized"):
        EXPORTER.read_codes(tmp_path)


def test_the_estimate_of_memory_counts_the_float32_copy() -> None:
    assert EXPORTER.peak_memory(400_000_001, 10**9) == 3_700_000_000
    assert EXPORTER.peak_memory(100_000_000, 10**8) == 1_400_000_000


def test_the_format_is_registered_and_recognized(export: Callable[..., Exported], tmp_path: Path) -> None:
    assert EXPORTERS["gguf"].label == "GGUF"
    assert EXPORTER.recognizes(export("smollm").folder)
    assert not EXPORTER.recognizes(export("smollm").folder / "model.gguf")
    assert not EXPORTER.recognizes(tmp_path)


def test_a_tokenizer_without_a_pre_tokenizer_is_said(
    export: Callable[..., Exported], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = export("smollm").checkpoint
    with caplog.at_level(logging.WARNING):
        EXPORTER.write(EXPORTER.held(checkpoint), tmp_path)
    assert caplog.text == ""
    monkeypatch.setattr("nybble.export.gguf.tokenizer.name_pre_tokenizer", lambda content: "default")
    EXPORTER.write(EXPORTER.held(checkpoint), tmp_path)
    assert "llama.cpp has no pre-tokenizer that splits text as the tokenizer of this model does" in caplog.text
