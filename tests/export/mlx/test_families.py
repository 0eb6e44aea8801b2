"""Models that mlx-lm computes otherwise than transformers, and configurations as it reads them."""

from typing import Any

import pytest

from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.export.mlx import families
from nybble.models.selection import LayerSelection
from tests.helpers.mixtures import make_mixture
from tests.helpers.tiny import make_config

pytest.importorskip("mlx_lm", reason="the extra mlx")
MLX, NONE_SELECTED = EXPORTERS["mlx"], LayerSelection((), (), tied=True)

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("smollm", {"hidden_act": "gelu"}, "hidden_act = silu; llama has gelu"),
    ("qwen3", {"attention_bias": True}, "attention_bias = False; qwen3 has True"),
    ("gemma2", {"sliding_window": 2048, "tie_word_embeddings": False}, "tie_word_embeddings = True; gemma2 has False"),
    ("gemma2", {"sliding_window": 2048, "attn_logit_softcapping": None}, "soft caps .*; gemma2 has none"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = None; gemma3_text has 30.0"),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "full attention in every p-th layer; gemma3"),
    ("mistral", {}, "attention to at least 1024 tokens in every layer; mistral has windows of 8"),
    ("qwen2", {}, "attention to at least 1024 tokens in every layer; qwen2 has windows of 8"),
    ("gemma2", {"sliding_window": 2048, "rope_parameters": LINEAR}, "of type default; gemma2 has linear"),
    ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "yarn whose .*; qwen3 has attention_factor 1.5"),
    (
        "qwen3",
        {"rope_parameters": YARN | {"mscale": 0.7}},
        "yarn whose .*; qwen3 has mscale 0.7 without",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_models_that_mlx_lm_computes_otherwise_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=f"an export to MLX needs .*{message}.*; remove mlx from --export"):
        MLX.check(make_config(family, **changes), NONE_SELECTED)


def test_a_model_type_without_code_is_refused() -> None:
    config = make_config("smollm")
    config.model_type = "no_such_type"
    with pytest.raises(ExportError, match="a model type that mlx-lm has code for; no_such_type has none"):
        families.check_model(config)


def test_limits_name_the_length_up_to_which_an_export_is_right() -> None:
    limits = MLX.limits
    assert limits(make_config("smollm")) == ()
    assert limits(make_config("qwen2", use_sliding_window=False)) == ()
    assert (
        "right up to 4096 tokens: beyond them this model attends to a sliding"
        in limits(make_config("mistral", sliding_window=4096))[0]
    )
    window, rope = limits(make_config("phi3", sliding_window=2047))
    assert "2047 tokens" in window
    assert "right up to 128 tokens: beyond them this model changes its rotary embeddings" in rope
    assert len(limits(make_config("gemma3"))) == 1, "mlx-lm has the windows of Gemma 3"


def test_the_short_factors_of_longrope_are_written_for_both() -> None:
    config = make_config("phi3")
    fields = families.mlx_config(config, tied=False)
    assert fields["rope_scaling"]["long_factor"] == config.rope_parameters["short_factor"]
    assert fields["rope_scaling"]["type"] == "longrope"
    assert config.rope_parameters["long_factor"] == [2.0] * 8, "the configuration of the model is unchanged"


def test_gemma_3_has_two_frequencies_and_a_period() -> None:
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = make_config("gemma3", num_hidden_layers=14, layer_types=[*types, *types[:2]])
    fields = families.mlx_config(config, tied=True)
    assert (fields["rope_theta"], fields["rope_local_base_freq"], fields["sliding_window_pattern"]) == (1e6, 1e4, 6)
    families.check_model(config)


def test_every_family_has_facts() -> None:
    assert families._FAMILIES.keys() == MLX.tested_families


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = False; qwen2_moe has True"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers = .*; qwen2_moe has"),
        ("qwen3_moe", {"rope_parameters": LINEAR}, "of type default; qwen3_moe has linear"),
        ("glm4_moe", {"n_group": 2}, "n_group = 1; glm4_moe has 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = None; olmoe has 8.0"),
        ("ernie4_5_moe", {}, "experts of glm4_moe, .*; ernie4_5_moe has others, which mlx-lm computes otherwise"),
        ("deepseek_v3", {}, "experts of glm4_moe, .*; deepseek_v3 has others"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention"] * 2},
            "sliding windows in others; gpt_oss has full_attention in",
        ),
    ],
)
def test_mixtures_that_mlx_lm_computes_otherwise_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=f"an export to MLX needs .*{message}.*; remove mlx from --export"):
        MLX.check(make_mixture(family, **changes).config, NONE_SELECTED)
