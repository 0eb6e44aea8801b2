"""Tiny random mixtures of experts of real families, with the options in which they differ.

Sigmoid and softmax routers, groups of experts, shared experts, biases, transposed and interleaved projections, dense
first layers, expert-free layers between, identity experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import make_tokenizer

EXPERTS = 4

_COMMON: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257, "tie_word_embeddings": False,
}  # fmt: skip
_TWO_OF_FOUR = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24,
    "v_head_dim": 32,
}  # fmt: skip
_DEEPSEEK = {
    **_LATENT_ATTENTION, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 32, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_GPT_OSS_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_TWO_OF_FOUR, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_TWO_OF_FOUR, "head_dim": 32, "mlp_only_layers": [1]}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8,
            "rope_parameters": _GPT_OSS_ROPE,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 32,
            "moe_layers": [1], "attention_chunk_size": 64,
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "topk_method": "group_limited_greedy", "head_dim": None}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**_TWO_OF_FOUR, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _TWO_OF_FOUR | _LINEAR_ATTENTION),
    "qwen3_next": ("Qwen3NextConfig", _TWO_OF_FOUR | _LINEAR_ATTENTION),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "kv_channels": 32}),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **_LATENT_ATTENTION, "num_layers": 1, "n_routed_experts": EXPERTS, "zero_expert_num": 2, "moe_topk": 2,
            "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "head_dim": 8,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_LATENT_ATTENTION, "q_lora_rank": None, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "linear_head_dim": 32, "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32,
            "layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4, "head_dim": 32,
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
        },
    ),
}  # fmt: skip


def model_type(family: str) -> str:
    """`model_type` of the configuration of a family."""
    return str(getattr(transformers, FAMILIES[family][0]).model_type)


def make_config(family: str, **changes: Any) -> Any:
    """Configuration of a family."""
    kind, options = FAMILIES[family]
    return getattr(transformers, kind)(**_COMMON | options | changes)


def make_mixture(family: str, seed: int = 0, **changes: Any) -> Any:
    """A frozen model in float32. All of its parameters are random, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0, 0.15)
    return model.float().requires_grad_(False).eval()


def save_mixture(folder: Path, family: str, **changes: Any) -> Path:
    """A folder that --pretrained takes."""
    make_mixture(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
