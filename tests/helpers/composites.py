"""Tiny random models with further parts beside the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM

from tests.helpers.causal_types import tiny_config
from tests.helpers.tiny import make_tokenizer

_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "head_dim": 16,
}  # fmt: skip
IMAGE_SIZE = 28
FIELDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 32},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 259,
    },
    "gemma4": {}, "idefics3": {}, "llama4": {}, "mistral3": {},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}}, "qwen3_5": {}, "smolvlm": {},
}  # fmt: skip
"""Type -> fields of its configuration beside those of causal_types.py."""


def composite_model(model_type: str) -> Any:
    """Random model in float32, frozen."""
    fields = FIELDS.get(model_type, {})
    torch.manual_seed(0)
    config = tiny_config(model_type)
    for name, value in fields.items():
        part = getattr(config, name)
        if isinstance(value, dict):
            for key, number in value.items():
                setattr(part, key, number)
        else:
            setattr(config, name, value)
    model = AutoModelForMultimodalLM.from_config(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if not bool(parameter.any()):  # Gemma 3's projector begins with zeros
            parameter.normal_(std=0.1)
    return model


def save_composite(folder: Path, model_type: str) -> Path:
    """A folder that --pretrained takes."""
    composite_model(model_type).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
