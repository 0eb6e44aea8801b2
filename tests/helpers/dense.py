"""Tiny random models of all dense decoders of transformers that compress, beyond the families of tiny.py.

The values differ from tiny.py only where a configuration names them differently.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import COMMON

_ALL_HEADS = {"num_key_value_heads": 4}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGenConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 128}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 8}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": 8}),
    "falcon": ("FalconConfig", {"alibi": False, "new_decoder_architecture": False, "parallel_attn": True}),
    "falcon-40b": ("FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 8}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128}),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 128}),
    "granite": ("GraniteConfig", {}),
    "helium": ("HeliumConfig", {"head_dim": 16}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 32}),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    "nemotron": ("NemotronConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 8}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "persimmon": ("PersimmonConfig", _ALL_HEADS),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", {}),
    "vaultgemma": ("VaultGemmaConfig", {"head_dim": 32, "sliding_window": 8}),
}


# Norms before, after and on both sides of a layer, parallel attention, three kinds of fused projections, ReLU, biases.
_FAST = {"cohere", "falcon-40b", "gemma2", "gpt_neox", "llama", "olmo2", "opt", "phi3"}
DENSE_CASES = [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in DENSE]
"""All names, for pytest.mark.parametrize; those that resemble another one are slow tests."""


def make_dense(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A frozen model; norms and biases are random too, so that a forgotten offset or bias shows."""
    kind, options = DENSE[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**COMMON | options | changes)
    for field in ("initializer_range", "init_std"):  # wide enough for logits of a few units
        if hasattr(config, field):
            setattr(config, field, 0.15)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and (
                "norm" in parameter_name or "ln_" in parameter_name or "bias" in parameter_name
            ):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False).eval()
