"""A list of faults in the config.json of a tiny model: (family, name, change)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DELETE = object()
"""A value that removes its field."""

Change = dict[str, Any] | Callable[[str], str]

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
_WRONG_SIZES: tuple[Any, ...] = (0, -1, "many", None, 1.5, [4], 10**9)

_FIELDS: list[tuple[str, tuple[Any, ...]]] = [
    ("hidden_act", ("no such function", 5, None, ["silu"], "")),
    ("rms_norm_eps", ("small", None, [1])),
    ("rope_parameters", (
        5, "linear", [], {"rope_type": "none such"}, {"rope_type": "linear"}, {"rope_type": 7},
        {"rope_type": "llama3", "factor": "x"}, {"rope_theta": 0.0, "rope_type": "default"},
        {"rope_theta": -1.0, "rope_type": "default"}, {"rope_theta": "big", "rope_type": "default"},
        {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": None},
        {"rope_type": "linear", "factor": None, "rope_theta": 1e4},
    )),
    ("pad_token_id", (10**6, -500, "pad", 1.5, [1, 2])),
    ("tie_word_embeddings", ("no", 5, None, [])),
    ("auto_map", (5, "x", [1], {"AutoConfig": 3})),
    ("dtype", ("float7", 5, [], "int8", {})),
    ("model_type", (DELETE, "no_such_model", 5, None, "", [], {}, "bert", "t5")),
    ("architectures", ("LlamaForCausalLM", 5, [5], {}, ["NoSuchModel"], ["BertForMaskedLM"])),
    ("quantization_config", ("awq", 5, [1], {"bits": 4}, {"quant_method": 7})),
    ("attention_bias", ("yes", 3)),
    ("initializer_range", ("wide", None, -1.0)),
    ("vision_config", ({}, {"a": 1}, 5)),
    ("text_config", ({}, {"a": 1}, 5)),
    ("is_encoder_decoder", (True, "yes")),
]  # fmt: skip

_TEXTS: list[tuple[str, Callable[[str], str]]] = [
    ("truncated", lambda text: text[: len(text) // 2]),
    ("empty", lambda text: ""),
    ("null", lambda text: "null"),
    ("number", lambda text: "5"),
    ("list", lambda text: "[1, 2]"),
    ("string", lambda text: '"config"'),
    ("empty object", lambda text: "{}"),
    ("not JSON", lambda text: "hidden_size = 64"),
    ("Git LFS", lambda text: "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 700\n"),
    ("zero bytes", lambda text: "\0" * 100),
    ("deep", lambda text: "[" * 100000),
    ("surrogate", lambda text: '{"model_type": "\\ud800"}'),
    ("infinite", lambda text: text.replace("64", "Infinity", 1)),
    ("lists", lambda text: '{"model_type": "llama", "hidden_size": [], "vocab_size": {}}'),
]

MUTATIONS: list[tuple[str, str, Change]] = [
    *(("llama", f"{field}={value!r}", {field: value}) for field in _SIZES for value in _WRONG_SIZES),
    *(
        ("llama", f"{field}={'deleted' if value is DELETE else repr(value)}", {field: value})
        for field, values in _FIELDS
        for value in values
    ),
    *(("smollm", f"text {name}", change) for name, change in _TEXTS),
    ("smollm", "rope_theta=0", {"rope_theta": 0.0, "rope_parameters": DELETE}),
    ("qwen3", "layer_types unknown", {"layer_types": ["wide", "narrow"]}),
    ("qwen3", "layer_types short", {"layer_types": ["full_attention"]}),
    ("qwen3", "layer_types number", {"layer_types": 5}),
    ("gemma2", "sliding_window text", {"sliding_window": "wide"}),
    ("gemma2", "final_logit_softcapping text", {"final_logit_softcapping": "x"}),
    ("gemma2", "final_logit_softcapping 0", {"final_logit_softcapping": 0.0}),
    ("gemma2", "query_pre_attn_scalar 0", {"query_pre_attn_scalar": 0}),
    ("gemma2", "query_pre_attn_scalar negative", {"query_pre_attn_scalar": -4}),
]

HARMLESS = {
    "head_dim=None", "dtype=5", "dtype='int8'", "dtype={}", "architectures=['NoSuchModel']", "vision_config={}",
    "vision_config={'a': 1}", "vision_config=5", "max_position_embeddings=1000000000",
}  # fmt: skip
"""Mutations of fields that are not read here, or that have a default: the model is the same."""


def mutate(folder: Path, change: Change) -> None:
    """Apply a change to the config.json of a model folder."""
    path = folder / "config.json"
    text = path.read_text()
    if callable(change):
        path.write_text(change(text))
        return
    config = json.loads(text) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not DELETE}))
