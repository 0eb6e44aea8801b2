"""The graph that onnxruntime-genai's builder makes: operators, windows, tables, and what the builder gets wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.errors import ExportError
from nybble.export.onnx import graph as module
from nybble.files import reporting_full_disk
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.export.onnx.conftest import EXPORTER, Export, Exported, attributes
from tests.export.onnx.test_experts import FAMILIES as MIXTURES
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixtures import model_type
from tests.helpers.small_disk import SMALL_DISKS
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, make_config

pytestmark = pytest.mark.usefixtures("needs_onnx")


def initializer(exported: Exported, name: str) -> torch.Tensor:
    import onnx

    model = onnx.load(exported.folder / "model.onnx")
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return torch.from_numpy(onnx.numpy_helper.to_array(found).copy())


@pytest.mark.parametrize("family", fast_cases(FAMILIES, [*FAST_FAMILIES, "llama"]))
def test_every_quantized_layer_is_an_operator_with_codes(family: str, export: Export) -> None:
    exported = export(family)
    products = [attributes(node) for node in exported.nodes("MatMulNBits")]
    of_layers = [node for node in products if node["bits"] == 4]
    # Phi-3 has four linear layers per block, two of which the graph splits in three and in two.
    assert len(of_layers) == 14
    assert {(node["block_size"], node["accuracy_level"]) for node in of_layers} == {(32, 4)}
    assert [(node["bits"], node["block_size"]) for node in products if node not in of_layers] == [(8, 64)]
    assert [attributes(node)["bits"] for node in exported.nodes("GatherBlockQuantized")] == [8]
    assert exported.nodes("MatMul") == exported.nodes("Gather")[1:] == []  # one Gather is of a shape


@pytest.mark.parametrize("family", ["smollm", "llama"])
def test_a_tied_head_shares_the_codes_of_the_embedding(family: str, export: Export) -> None:
    exported = export(family)
    (lookup,) = exported.nodes("GatherBlockQuantized")
    head = next(node for node in exported.nodes("MatMulNBits") if attributes(node)["bits"] == 8)
    names = [tensor.name for tensor in exported.graph().initializer]
    assert lookup.input[0] == "model.embed_tokens.codes"
    assert head.input[1] == ("model.embed_tokens.codes" if family == "smollm" else "lm_head.codes")
    assert ("lm_head.codes" in names) == (family == "llama")
    size, codes = (exported.folder / "model.onnx.data").stat().st_size, 260 * 64
    linear = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    # Codes, a float scale and half a byte of zero point per group of 32, norms and tables.
    rest = linear // 32 * (4 + 0.5) + 260 * 4 + 5 * 64 * 4 + 256 * 8 * 4 * 2
    assert size == pytest.approx(linear // 2 + codes + rest + (family == "llama") * (codes + 260 * 4), abs=600)


@pytest.mark.parametrize(
    ("family", "windows"),
    first_fast(
        3,
        [
            ("llama", [-1, -1]),
            ("phi3", [8, 8]),
            ("gemma2", [8, -1]),
            ("mistral", [8, 8]),
            ("qwen2", [-1, 8]),
            ("qwen3", [-1, -1]),
            ("gemma3", [8, -1]),
        ],
    ),
)
def test_layers_have_the_windows_of_transformers(family: str, windows: list[int], export: Export) -> None:
    """The builder alone gives Mistral and Phi-3 no windows."""
    nodes = [attributes(node) for node in export(family).nodes("GroupQueryAttention")]
    assert [node["local_window_size"] for node in nodes] == windows
    # Caches of the size of the window would need buffers that the runtime shares between past and present.
    assert not any("sliding_window_cache" in node for node in nodes)


_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("smollm", {"num_key_value_heads": 1, "head_dim": 48, "rms_norm_eps": 1e-2}),
    ("smollm", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}),  # Llama has no windows
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("gemma3", {"attention_bias": True, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 2}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": None}),
    (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    *(("llama", {"hidden_act": name}) for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")),
    ("llama", {"hidden_act": "relu2"}),
    ("llama", {"hidden_act": "swish"}),
]


_FAST_VARIANTS = [_VARIANTS[i] for i in (0, 5, 10)]


@pytest.mark.parametrize(
    ("family", "changes"), fast_cases(_VARIANTS, _FAST_VARIANTS), ids=lambda value: str(value)[:60]
)
def test_models_of_a_family_that_differ(family: str, changes: dict[str, Any], export: Export) -> None:
    """`export` compares weights and logits; 1e-5 is rounding in float32, a wrong operator gives 0.1."""
    assert (export(family, **changes).result.logit_difference or 0) <= 1e-5


_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope_type", fast_cases(_ROPES, ["linear", "yarn"]))
def test_tables_of_rotary_embeddings_are_those_of_transformers(rope_type: str, export: Export) -> None:
    """The builder alone ignores the type "linear" of a Llama model, for example."""
    exported = export("llama", rope_parameters={"rope_type": rope_type, "rope_theta": 1e4} | _ROPES[rope_type])
    cos_1TD, sin_1TD = exported.checkpoint.build().model.rotary_emb(torch.zeros(1), torch.arange(256)[None])
    assert torch.equal(initializer(exported, "cos_cache"), cos_1TD[0, :, :8])
    assert torch.equal(initializer(exported, "sin_cache"), sin_1TD[0, :, :8])


def test_gemma3_has_a_table_for_each_type_of_layer(export: Export) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    exported = export("gemma3", rope_parameters=ropes)
    rotary = exported.checkpoint.build().model.rotary_emb
    for layer_type, name in (("full_attention", "global"), ("sliding_attention", "local")):
        cos_1TD, _ = rotary(torch.zeros(1), torch.arange(256)[None], layer_type)
        assert torch.equal(initializer(exported, f"cos_cache_{name}"), cos_1TD[0, :, :16])
    assert [node.input[7] for node in exported.nodes("GroupQueryAttention")] == ["cos_cache_local", "cos_cache_global"]


@pytest.mark.parametrize("family", first_fast(1, ["gemma2", "gemma3"]))
def test_the_factor_of_the_embedding_is_exact(family: str, export: Export) -> None:
    """The builder alone rounds it to two decimals: 9.8 instead of 9.79796."""
    import onnx

    exported = export(family, hidden_size=96)
    (factor,) = (node for node in exported.graph().node if node.name == "/model/embed_tokens/Mul")
    (constant,) = (node for node in exported.graph().node if node.output[0] == factor.input[1])
    value = onnx.numpy_helper.to_array(attributes(constant)["value"])
    assert value == np.float32(96**0.5)


def test_a_long_context_of_phi3_has_the_rotary_embeddings_of_long_contexts(export: Export) -> None:
    """Both tables of longrope: 120 tokens of 128, and 140."""
    exported = export("phi3")
    model, runtime = exported.checkpoint.build(), EXPORTER.open_model(exported.folder, exported.checkpoint.config, True)
    for length in (120, 140):
        ids = torch.randint(0, 256, (1, length))
        with torch.no_grad():
            torch.testing.assert_close(runtime(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_nothing_is_dequantized_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", "phi3")

    def dequantize(self: QuantizedWeight) -> torch.Tensor:
        raise AssertionError("a float weight was made")

    monkeypatch.setattr(QuantizedWeight, "dequantize", dequantize)
    capfd.readouterr()
    EXPORTER.write(EXPORTER.held(checkpoint), tmp_path)
    assert capfd.readouterr() == ("", "")
    assert {file.name for file in tmp_path.iterdir()} == {
        "quantized", "model.onnx", "model.onnx.data", "genai_config.json",
    }  # fmt: skip


def test_importing_the_builders_leaves_the_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "onnxruntime_genai.models", raising=False)  # which adds its folder when imported
    assert hasattr(module._import_builders(), "LlamaModel")
    assert sys.path == before


def test_genai_config_says_what_the_model_says(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", "gemma3")
    settings = {"eos_token_id": [257, 258], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (checkpoint.folder / "generation_config.json").write_text(json.dumps(settings))
    EXPORTER.write(EXPORTER.held(checkpoint), tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    model = config["model"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("gemma3_text", 256, 260)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (256, [257, 258], 257)
    search = config["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"]) == (True, 0.6, 20)
    assert "position_ids" not in model["decoder"]["inputs"]


def test_a_model_that_the_builder_does_not_accept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no\nway")

    monkeypatch.setattr(module, "_make_builder", fail)
    with pytest.raises(ExportError, match=r"genai accepts; llama is not accepted \(NotImplementedError: no way\); rem"):
        EXPORTER.write(EXPORTER.held(make_checkpoint(tmp_path / "quantized", "llama")), tmp_path)


def test_a_layer_that_the_graph_does_not_use_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", "llama")
    more = replace(checkpoint, shapes={**checkpoint.shapes, "model.other": (32, 32)})
    with pytest.raises(ExportError, match=r"it does not use 1 of 17 \(first: model.other\); remove onnx from --export"):
        EXPORTER.write(EXPORTER.held(more), tmp_path)


@pytest.mark.parametrize("disk", SMALL_DISKS)
def test_a_disk_that_fills_is_one_line(disk: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "quantized", "llama")
    folder = tmp_path / "run" / "onnx.tmp"
    folder.mkdir(parents=True)
    with SMALL_DISKS[disk](folder, 65536), reporting_full_disk(folder):  # noqa: SIM117
        with pytest.raises(
            ExportError, match=r"run must be written to disk; it cannot be \(OSError: .* free; free so.* --to onnx$"
        ):
            EXPORTER.write(EXPORTER.held(checkpoint), folder)


def test_a_symmetric_scheme_writes_no_zero_points(export: Export) -> None:
    exported = export("llama", QuantScheme(group_size=32, symmetric=True))
    assert not [tensor for tensor in exported.graph().initializer if tensor.name.endswith(".zero_points")]
    weight = EXPORTER.read_codes(exported.folder)["model.layers.0.mlp.up_proj"]
    assert weight.scheme == QuantScheme(group_size=32, symmetric=True)
    assert set(weight.zero_point_OG.flatten().tolist()) == {8}


def test_the_builders_know_the_tested_families() -> None:
    assert module.BUILDERS.keys() == EXPORTER.tested_families
    dense = {make_config(family).model_type for family in FAMILIES}
    assert EXPORTER.tested_families == dense | {model_type(family) for family in MIXTURES}
