"""Tokenizers in GGUF files: llama.cpp's tokens compared with those of transformers."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from nybble.errors import ExportError
from nybble.export.gguf.file import write_file
from nybble.export.gguf.pretokenizers import name_pre_tokenizer
from nybble.export.gguf.tokenizer import tokenizer_fields
from nybble.export.gguf.tokenizer_check import check_tokenizer
from nybble.export.tokenizer_check import PROBES
from tests.helpers.cases import fast_cases
from tests.helpers.tiny import make_tokenizer
from tests.helpers.tokenizers import BYTE_LEVEL, byte_level_tokenizer, random_texts, sentence_piece_tokenizer

pytestmark = pytest.mark.usefixtures("needs_llama_cpp")

# llama.cpp loads a vocabulary only with the fields of a model.
MODEL = {
    "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": 32,
    "llama.block_count": 1, "llama.feed_forward_length": 32, "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
MARKS = ("tekken", "gpt-4o")
"""Expressions that tell marks from letters, which llama.cpp does not."""


def write_vocabulary(tokenizer: Any, folder: Path, size: int | None = None) -> dict[str, Any]:
    """Write a file without tensors; returns its fields."""
    fields = tokenizer_fields(tokenizer, size or len(tokenizer), folder)
    write_file(folder / "model.gguf", MODEL | {f"tokenizer.{key}": value for key, value in fields.items()}, [])
    return fields


def different_texts(tokenizer: Any, folder: Path, texts: list[str]) -> list[str]:
    """Texts that llama.cpp reads as other tokens."""
    from nybble.export.gguf.llama_cpp import LlamaModel

    model = LlamaModel(folder / "model.gguf", vocab_only=True)
    return [text for text in texts if model.tokenize(text) != tokenizer(text).input_ids]


@pytest.mark.parametrize("name", fast_cases(BYTE_LEVEL, BYTE_LEVEL.keys() - {"gpt-4o"}))
def test_byte_level_tokenizers_are_named_by_their_structure(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(*BYTE_LEVEL[name])
    fields = write_vocabulary(tokenizer, tmp_path)
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", name)
    texts = [*PROBES, *random_texts(400), "a<tool>b<|turn|> c <s>d</s>"]
    different = different_texts(tokenizer, tmp_path, texts)
    assert different == [] or (name in MARKS and all("ि" in text for text in different))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentence_piece_tokenizers(kind: str, tmp_path: Path) -> None:
    tokenizer = sentence_piece_tokenizer(kind)
    fields = write_vocabulary(tokenizer, tmp_path)
    assert (fields["ggml.model"], fields["ggml.add_space_prefix"]) == ("llama", kind == "llama")
    assert fields["ggml.token_type"][:4] == [2, 3, 3, 6]  # <unk>, <s>, </s>, <0x00>
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (True, False)
    assert different_texts(tokenizer, tmp_path, [*PROBES, *random_texts(400)]) == []


def test_a_wrong_pre_tokenizer_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.export.gguf import tokenizer_check
    from nybble.export.gguf.llama_cpp import LlamaModel

    monkeypatch.setattr(tokenizer_check, "LlamaModel", lambda path: LlamaModel(path, vocab_only=True))
    tokenizer = byte_level_tokenizer(*BYTE_LEVEL["dbrx"])
    write_vocabulary(tokenizer, tmp_path)
    check_tokenizer(tmp_path / "model.gguf", tokenizer, len(tokenizer))
    assert caplog.text == ""
    monkeypatch.setattr("nybble.export.gguf.tokenizer.name_pre_tokenizer", lambda content: "gpt-2")
    write_vocabulary(tokenizer, tmp_path)
    with caplog.at_level(logging.WARNING):
        check_tokenizer(tmp_path / "model.gguf", tokenizer, len(tokenizer))
    assert re.search(r"llama.cpp reads \d+ of 28 test texts as other tokens", caplog.text)


def test_unicode_is_not_normalized_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.export.gguf import tokenizer_check
    from nybble.export.gguf.llama_cpp import LlamaModel

    monkeypatch.setattr(tokenizer_check, "LlamaModel", lambda path: LlamaModel(path, vocab_only=True))
    tokenizer = byte_level_tokenizer(*BYTE_LEVEL["qwen2"], normalizer=normalizers.NFC())
    write_vocabulary(tokenizer, tmp_path)
    check_tokenizer(tmp_path / "model.gguf", tokenizer, len(tokenizer))
    assert "llama.cpp reads 1 of 28 test texts as other tokens" in caplog.text
    assert "decomposed" in caplog.text


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True)]),
    ],
    ids=str,
)
def test_other_structures_are_unknown(pre_tokenizer: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    assert name_pre_tokenizer(json.loads(tokenizer.to_str())) == "default"


def test_types_of_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(*BYTE_LEVEL["gpt-2"])
    fields = tokenizer_fields(tokenizer, 605, tmp_path)
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    assert len(tokens) == len(types) == 605
    assert (tokens[:2], types[:3]) == (["<s>", "</s>"], [3, 3, 1])  # control, control, normal
    assert tokens[600:] == ["<tool>", "<|turn|>", "[PAD602]", "[PAD603]", "[PAD604]"]
    assert types[600:] == [4, 3, 5, 5, 5]  # user-defined, control by its look, unused
    shorter = tokenizer_fields(tokenizer, 300, tmp_path)
    assert shorter["ggml.tokens"] == tokens[:300]


def test_special_tokens_and_chat_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(begin=True)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    fields = tokenizer_fields(tokenizer, 260, tmp_path)
    special = {key: value for key, value in fields.items() if key.endswith(("_id", "_token"))}
    assert special == {
        "ggml.bos_token_id": 256, "ggml.eos_token_id": 257, "ggml.padding_token_id": 257,
        "ggml.add_bos_token": True, "ggml.add_eos_token": False,
    }  # fmt: skip
    assert fields["chat_template"] == "{{ messages }}"
    GenerationConfig(eos_token_id=[257, 258]).save_pretrained(tmp_path)
    assert tokenizer_fields(tokenizer, 260, tmp_path)["ggml.eot_token_id"] == 258
    GenerationConfig(eos_token_id=[257, 258, 259, 1]).save_pretrained(tmp_path)
    fields = tokenizer_fields(tokenizer, 260, tmp_path)
    assert (fields["ggml.eot_token_id"], fields["ggml.eom_token_id"]) == (258, 259)
    assert "room for three end tokens; [1] does not end an answer" in caplog.text
    GenerationConfig(eos_token_id=[257, 258]).save_pretrained(tmp_path)
    assert tokenizer_fields(tokenizer, 257, tmp_path).keys().isdisjoint({"ggml.eot_token_id", "ggml.eos_token_id"})
    assert tokenizer_fields(make_tokenizer(), 260, tmp_path)["ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.Unigram([("a", 0.0)]), "Unigram"),
        (models.BPE({"a": 0}, []), "BPE"),
    ],
)
def test_other_tokenizers_are_refused(model: Any, name: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(ExportError, match=rf"\(tokenizer.json\); this one is {name}; remove gguf from --export"):
        tokenizer_fields(tokenizer, 2, tmp_path)


def test_a_tokenizer_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    class Slow:
        pass

    with pytest.raises(ExportError, match="this one is Slow; remove gguf"):
        tokenizer_fields(Slow(), 2, tmp_path)
