"""Small GGUF files: the tiny Qwen2 model and a byte-level tokenizer with one merge."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from tests.helpers.tiny import VOCABULARY, make_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# The merge makes one token of "12", unless digits are split first.
TOKENS = [*BYTES, "12", "<start>", "<end>", "<user>"]
TYPES = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
TEMPLATE = "{{ messages[0].content }}<end>"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def add_tokenizer(writer: Any, kind: str, pre: str) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path: Path, pre: str = "smollm", kind: str = "gpt2", extra: str | None = None) -> Any:
    """Write a file with weights and tokenizer; returns the model that it holds.

    Args:
        extra: name of one more tensor.
    """
    model = make_model("qwen2", use_sliding_window=False, tie_word_embeddings=False)
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    add_tokenizer(writer, kind, pre)
    expected = model.state_dict()
    for name, tensor in expected.items():
        stem, leaf = name.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, module = stem.split(".", 2)
            stem = f"blk.{layer}.{NAMES[module]}"
        stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(stem, stem)
        writer.add_tensor(f"{stem}.{leaf}", tensor.numpy())
    if extra is not None:
        writer.add_tensor(extra, np.ones(8, np.float32))
    finish(writer)
    return model
