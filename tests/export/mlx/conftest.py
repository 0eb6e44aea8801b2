"""Tiny models whose attention windows mlx-lm can do, exported once."""

from typing import Any

import pytest

from tests.helpers.cases import fast_cases
from tests.helpers.exports import Export, export_tiny
from tests.helpers.tiny import FAMILIES, FAST_FAMILIES

WINDOWS: dict[str, dict[str, Any]] = {
    family: {"sliding_window": 1024} for family in ("mistral", "qwen2", "gemma2", "phi3")
}
"""Longer than the sequences of the tests. Gemma 3 keeps its windows of 8 tokens, which mlx-lm has."""

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {},
    "granitemoe": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "glm4_moe": {"routed_scaling_factor": 2.5, "use_qk_norm": True, "attention_bias": True},
    "gpt_oss": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0,
            "truncate": False, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip
"""Mixtures of experts that mlx-lm computes, with the options in which they differ."""


@pytest.fixture(scope="session", params=fast_cases(FAMILIES, FAST_FAMILIES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model of each family."""
    pytest.importorskip("mlx_lm", reason="the extra mlx")
    family = request.param
    return export_tiny("mlx", tmp_path_factory.mktemp(family), family, **WINDOWS.get(family, {}))
