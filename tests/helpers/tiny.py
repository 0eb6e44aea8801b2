"""Tiny random models of real families, made from transformers' own configurations, with a byte-level tokenizer.

Two layers, and the options that make each family different: grouped heads, biases, tied or untied heads, fused
projections, norm offset, soft-capping, sliding windows (shorter than the sequences of the tests), rope scaling, q/k
norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
WIDE = {"initializer_range": 0.15}  # wide enough for logits of a few units
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE}),  # Llama 3.x
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
    "phi3": (
        "Phi3Config",
        {
            "tie_word_embeddings": False,
            "sliding_window": 8,
            "rope_parameters": _LONG_ROPE,
            "original_max_position_embeddings": 128,
        },
    ),
}


FAST_FAMILIES = ("gemma2", "phi3")
"""Together they have a tied and an untied head, fused projections, norm offsets, soft caps and sliding windows."""


def make_config(family: str, **changes: Any) -> Any:
    kind, options = FAMILIES[family]
    return getattr(transformers, kind)(**COMMON | WIDE | options | changes)


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A frozen model; norms are random too, so that a forgotten offset shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False).eval()


def make_tokenizer(begin: bool = False) -> Any:
    """One token a byte; with `begin`, <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {
        "<s>": 256,
        "</s>": 257,
        "<extra>": 258,
        "<more>": 259,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


_SAVED: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}
"""Arguments of `save_model` -> the files, and the state of torch's generator afterwards."""


def save_model(folder: Path, family: str, begin: bool = False, **changes: Any) -> Path:
    """A folder that --pretrained takes. The same arguments give the same files, which are made once a process."""
    key = repr((family, begin, sorted(changes.items())))
    if key not in _SAVED:
        make_model(family, **changes).save_pretrained(folder)
        make_tokenizer(begin).save_pretrained(folder)
        _SAVED[key] = {path.name: path.read_bytes() for path in folder.iterdir()}, torch.get_rng_state()
        return folder
    files, state = _SAVED[key]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)  # another model may have the file mapped into memory
        (folder / name).write_bytes(content)
    torch.set_rng_state(state)
    return folder
