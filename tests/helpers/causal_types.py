"""Tiny random models of every causal type of transformers, from one table of small values and a few exceptions."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.tiny import VOCABULARY, make_tokenizer

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

NOT_MADE = {
    "blt": "its table of hashes alone has 193 M numbers",
    "dbrx": "transformers cannot build it from a configuration with a part of the fields",
    "dots3_note": "composite with layers of many kinds",
    "gemma3n": "needs timm",
    "gemma4_assistant": "part of another model",
    "gemma4_unified": "composite; 36 M numbers in its embedders",
    "gemma4_unified_assistant": "part of another model",
    "musicgen": "composite",
    "musicgen_melody": "composite",
}
"""Types that have no tiny model here -> reason."""

_SMALL: dict[int, str] = {
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads n_kv_heads linear_num_key_heads mamba_expand num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk num_hash_functions",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_kv_heads linear_num_value_heads "
    "n_routed_experts num_experts num_local_experts moe_num_experts",
    8: "mamba_n_heads mamba_num_heads rotary_dim sliding_window linear_chunk_size num_hash_buckets",
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_head mamba_d_state mamba_head_dim "
    "ssm_state_size state_size linear_key_head_dim linear_value_head_dim",
    32: "q_lora_rank kv_lora_rank hidden_size_per_layer_input laurel_rank adapter_rank mamba_dt_rank time_step_rank",
    64: "hidden_size d_model n_embd emb_dim embedding_size dim moe_intermediate_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size attention_hidden_size "
    "lru_width max_source_positions input_embedding_size output_embedding_size word_embed_proj_dim",
    128: "intermediate_size d_ff ffn_dim n_inner dff d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "feed_forward_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions bos_token_id "
    "decoder_start_token_id",
    257: "eos_token_id pad_token_id",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    1: "n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace image_token_id "
    "image_token_index num_dense_layers is_decoder",
    3: "video_token_id audio_token_id",
}
"""Value -> names of the fields that get it, in whatever type has such a field."""

_FIELDS: dict[str, Any] = {name: value for value, names in _SMALL.items() for name in names.split()} | {
    "initializer_range": 0.15,  # wide enough for logits of a few units
    "init_std": 0.15,
    "is_decoder": True,
}

_EQUAL_HEADS = {"num_key_value_heads": 4}
_POSITIONS_AFTER_PADDING = {"pad_token_id": 1}  # the first position is the one after the number of the padding
_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts": 4}
_SHARED_LAYERS = {"layer_types": _TWO_KINDS, "num_kv_shared_layers": 0}
_KIMI = {
    "linear_num_heads": 4, "linear_head_dim": 32, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
_ZAMBA2 = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
    "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 16, "num_mem_blocks": 1, "num_key_value_heads": 4,
}  # fmt: skip
_REFORMER = {
    "attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "num_buckets": 4,
    "attention_head_size": 16, "local_attn_chunk_length": 32, "lsh_attn_chunk_length": 32, "hash_seed": 0,
}  # fmt: skip

_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 "
    "youtu": _EQUAL_HEADS,
    "camembert data2vec-text prophetnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl": (
        _POSITIONS_AFTER_PADDING
    ),
    "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen3_next olmo_hybrid": _LINEAR_FIRST,
    "kimi_linear": _LINEAR_FIRST | _EQUAL_HEADS | _FOUR_EXPERTS | _KIMI,
    "xmod": {**_POSITIONS_AFTER_PADDING, "languages": ["en_XX"], "default_language": "en_XX"},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {**_SHARED_LAYERS, "intermediate_size": [128, 128], "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _SHARED_LAYERS,
    "cohere_compass_text": {"layer_types": _TWO_KINDS, "rope_parameters": dict.fromkeys(_TWO_KINDS, _ROPE)},
    "bailing_hybrid": {"num_local_experts": 32, "num_experts": 32},
    "kolibri1": _FOUR_EXPERTS,
    "mellum": _FOUR_EXPERTS,
    "qwen3_moe": _FOUR_EXPERTS,
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "state_size": 16, "expand": 2},
    "moshi": {"audio_vocab_size": 32, "num_key_value_heads": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _REFORMER,
    "xlm": {"causal": True, "asm": False},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA2,
    "zaya": {"num_experts_per_tok": 1},
}
"""Types -> values that the table does not give."""


def tiny_config(model_type: str, **fields: Any) -> Any:
    """Configuration of a tiny model; `fields` win."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_small_fields(kind) | _exceptions(model_type) | fields)


def tiny_model(model_type: str, **fields: Any) -> Any:
    """Random model in float32, frozen. Biases and norms are random too."""
    config = tiny_config(model_type, **fields)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 30e6, f"{model_type} is not tiny: {size / 1e6:.0f} M parameters"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False).eval()


def save_tiny(folder: Path, model_type: str) -> Path:
    """A folder that --pretrained takes."""
    tiny_model(model_type).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _exceptions(model_type: str) -> dict[str, Any]:
    return next((fields for types, fields in _EXCEPTIONS.items() if model_type in types.split()), {})


def _small_fields(kind: Any) -> dict[str, Any]:
    """The fields of the table that a configuration has, and those of the configurations inside of it."""
    names = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    aliases = kind.attribute_map
    fields = {name: value for name, value in _FIELDS.items() if name in names and name not in aliases}
    fields |= {aliases[name]: value for name, value in _FIELDS.items() if aliases.get(name) in names - fields.keys()}
    for name, part in kind.sub_configs.items():
        if part is AutoConfig:
            part = type(getattr(kind(), name))
        if getattr(part, "model_type", ""):
            fields[name] = _small_fields(part) | _exceptions(part.model_type) | {"model_type": part.model_type}
    return fields
