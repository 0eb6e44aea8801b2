"""Models and tokenizers read from small GGUF files that are written here. test_smollm2.py compares with llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from nybble.errors import MissingExtraError, ModelError
from nybble.models.gguf import load_gguf_model, load_gguf_tokenizer
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


def tokenizer_file(path: Path, pre: str, kind: str = "gpt2", template: str | None = TEMPLATE) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, kind, pre)
    if template is not None:
        writer.add_chat_template(template)
    finish(writer)
    return path


@pytest.mark.parametrize(("pre", "ids"), [("smollm", ["1", "2", "a"]), ("gpt-2", ["12", "a"])])
def test_digits_are_split_where_llama_cpp_does(pre: str, ids: list[str], tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(tokenizer_file(tmp_path / "model.gguf", pre))
    assert tokenizer("12a").input_ids == [TOKENS.index(token) for token in ids]
    assert tokenizer.decode(tokenizer("12 ä").input_ids) == "12 ä"


def test_special_tokens_and_template_are_those_of_the_file(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(tokenizer_file(tmp_path / "model.gguf", "smollm"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<start>", "<end>", None)
    assert tokenizer("<end><user>a").input_ids == [258, 259, TOKENS.index("a")]
    assert tokenizer.decode([258, 259], skip_special_tokens=True) == "<user>"
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a<end>"


def test_a_file_may_have_no_chat_template(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", "smollm", template=None)
    assert load_gguf_tokenizer(path).chat_template is None


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "some-other"), ("llama", "smollm")])
def test_other_tokenizers_are_left_to_transformers(
    kind: str, pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", pre, kind)
    calls: list[Any] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *names, **options: calls.append((names, options)))
    load_gguf_tokenizer(path)
    assert calls == [((tmp_path,), {"gguf_file": "model.gguf"})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_model_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("qwen2", use_sliding_window=False, tie_word_embeddings=False)
    config, writer = model.config, gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    add_tokenizer(writer, "gpt2", "smollm")
    expected = model.state_dict()
    for name, tensor in expected.items():
        stem, leaf = name.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, module = stem.split(".", 2)
            stem = f"blk.{layer}.{NAMES[module]}"
        stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(stem, stem)
        writer.add_tensor(f"{stem}.{leaf}", tensor.numpy())
    finish(writer)
    loaded = load_gguf_model(tmp_path / "model.gguf", dtype)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in loaded.state_dict().items())


def test_a_file_in_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("no gguf")
    with pytest.raises(ModelError, match="--pretrained model.gguf must be a GGUF file that transformers can read; "):
        load_gguf_model(tmp_path / "model.gguf", torch.float32)


def test_a_missing_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match='the extra "gguf" is needed for reading .gguf files'):
        load_gguf_model(tmp_path / "model.gguf", torch.float32)
