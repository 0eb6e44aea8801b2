"""What an export to ONNX refuses, and what its folder holds."""

from types import SimpleNamespace
from typing import Any

import pytest

from nybble.errors import ExportError, OptionError
from nybble.export.base import EXPORTERS
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from tests.export.onnx.conftest import EXPORTER, Export
from tests.helpers.cases import fast_cases, first_fast
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES, make_config

SELECTION = LayerSelection((), (), tied=True)


def test_onnx_is_registered() -> None:
    assert EXPORTERS["onnx"].label == "ONNX"


@pytest.mark.parametrize("family", fast_cases(FAMILIES, FAST_FAMILIES))
def test_an_export_holds_the_model_to_the_bit(family: str, export: Export) -> None:
    exported = export(family)
    result = exported.result
    assert (result.linear_weights, result.embedding_weights) == (
        8 if family == "phi3" else 14,
        1 if exported.checkpoint.selection.tied else 2,
    )
    assert result.rounded == {}
    assert result.logit_difference is not None
    assert result.logit_difference <= 1e-5
    sizes = {file.name: file.stat().st_size for file in exported.folder.iterdir()}
    assert result.bytes == sizes["model.onnx"] + sizes["model.onnx.data"]
    assert sizes.keys() >= {"genai_config.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert EXPORTER.recognizes(exported.folder)
    assert not EXPORTER.recognizes(exported.folder.parent)


@pytest.mark.parametrize(
    ("group_size", "symmetric"),
    first_fast(2, [(16, False), (128, True), (16, True), (64, False), (64, True), (128, False)]),
)
def test_group_sizes(group_size: int, symmetric: bool, export: Export) -> None:
    scheme = QuantScheme(group_size=group_size, symmetric=symmetric)
    exported = export("qwen2", scheme, hidden_size=128, num_hidden_layers=1)
    assert (exported.result.logit_difference or 0) <= 1e-5
    read = EXPORTER.read_codes(exported.folder)
    assert {weight.scheme for weight in read.values()} == {scheme, QuantScheme(8, 128, symmetric=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_check_accepts_the_tested_families(family: str) -> None:
    EXPORTER.check(make_config(family), SELECTION)


@pytest.mark.parametrize(
    ("scheme", "container"),
    [
        (QuantScheme(4, 8), None),
        (QuantScheme(4, 24), None),
        (QuantScheme(4, 48), QuantScheme(4, 16)),
        (QuantScheme(4, 512), QuantScheme(4, 256)),
        (QuantScheme(4, None), QuantScheme(4, 256)),
        (QuantScheme(2, 32), QuantScheme(4, 32, symmetric=True)),
        (QuantScheme(8, 512, symmetric=True), QuantScheme(8, 256, symmetric=True)),
    ],
    ids=str,
)
def test_groups_that_the_operator_does_not_have_are_split(scheme: QuantScheme, container: QuantScheme | None) -> None:
    assert EXPORTER.container(scheme, 1536, embedding=False) == container


def test_an_embedding_has_8_bits_and_is_not_left_out() -> None:
    assert EXPORTER.container(QuantScheme(4, 64), 128, embedding=True) == QuantScheme(8, 64, symmetric=True)
    head_only = LayerSelection(("a",), ("lm_head",), tied=False, schemes={"a": QuantScheme(), "lm_head": INT8_PER_ROW})
    with pytest.raises(OptionError, match="needs a quantized embedding and head; --ignore leaves one in 16 bits; remo"):
        EXPORTER.check(make_config("llama"), head_only)


_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "window attention; qwen3 has chunked_att"),
        ("gemma3", {"use_bidirectional_attention": True}, "earlier tokens only; gemma3_text has bidirectional attent"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "default, dynamic, linear, .*; llama has longrope"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "; llama has spiral"),
        ("llama", {"head_dim": 24}, "rotate a multiple of 16 values; llama has 24"),
        ("phi3", {"rope_parameters": _DEFAULT_ROPE | {"partial_rotary_factor": 0.5}}, "of 16 values; phi3 has 8"),
        ("llama", {"hidden_size": 72, "head_dim": 16}, "hidden size that is a multiple of 16; llama has 72"),
        ("llama", {"hidden_act": "quick_gelu"}, "one of the activations .*, swish; llama has quick_gelu"),
        ("gemma2", {"hidden_activation": "sigmoid"}, "gemma2 has sigmoid"),
    ],
)
def test_check_refuses_what_the_operators_cannot_compute(family: str, changes: dict[str, Any], message: str) -> None:
    config = SimpleNamespace(**make_config(family).to_dict() | changes)
    with pytest.raises(ExportError, match=rf"an export to ONNX needs .*{message}.*; remove onnx from --export"):
        EXPORTER.check(config, SELECTION)


def test_check_refuses_other_model_types_by_name() -> None:
    config = SimpleNamespace(model_type="mamba")
    with pytest.raises(ExportError, match="model types gemma2, gemma3_text, llama, .*; mamba has another type; remove"):
        EXPORTER.check(config, SELECTION)


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 128}, 128),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, None),  # genai computes keys again
        ({"rope_type": "llama3", "original_max_position_embeddings": 64}, None),
        ({"full_attention": {"rope_type": "linear"}, "sliding_attention": {"rope_type": "default"}}, None),
    ],
)
def test_limits_say_where_generation_differs(parameters: dict[str, Any], tokens: int | None) -> None:
    limits = EXPORTER.limits(SimpleNamespace(rope_parameters=parameters))
    assert [f"a generation that passes {tokens} tokens" in limit for limit in limits] == [True] * (tokens is not None)
