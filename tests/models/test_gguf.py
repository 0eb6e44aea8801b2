"""Models and tokenizers read from small GGUF files that are written here. test_smollm2.py compares with llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from nybble.errors import MissingExtraError, ModelError
from nybble.models.gguf import load_gguf_model, load_gguf_tokenizer
from nybble.models.gguf_file import read_gguf
from tests.helpers.gguf_files import TEMPLATE, TOKENS, add_tokenizer, finish, write_model


def tokenizer_file(path: Path, pre: str, kind: str = "gpt2", template: str | None = TEMPLATE) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, kind, pre)
    if template is not None:
        writer.add_chat_template(template)
    finish(writer)
    return path


@pytest.mark.parametrize(("pre", "ids"), [("smollm", ["1", "2", "a"]), ("gpt-2", ["12", "a"])])
def test_digits_are_split_where_llama_cpp_does(pre: str, ids: list[str], tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(read_gguf(tokenizer_file(tmp_path / "model.gguf", pre)))
    assert tokenizer("12a").input_ids == [TOKENS.index(token) for token in ids]
    assert tokenizer.decode(tokenizer("12 ä").input_ids) == "12 ä"


def test_special_tokens_and_template_are_those_of_the_file(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(read_gguf(tokenizer_file(tmp_path / "model.gguf", "smollm")))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<start>", "<end>", None)
    assert tokenizer("<end><user>a").input_ids == [258, 259, TOKENS.index("a")]
    assert tokenizer.decode([258, 259], skip_special_tokens=True) == "<user>"
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a<end>"


def test_a_file_may_have_no_chat_template(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", "smollm", template=None)
    assert load_gguf_tokenizer(read_gguf(path)).chat_template is None


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "some-other"), ("llama", "smollm")])
def test_other_tokenizers_are_left_to_transformers(
    kind: str, pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", pre, kind)
    calls: list[Any] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *names, **options: calls.append((names, options)))
    load_gguf_tokenizer(read_gguf(path))
    assert calls == [((tmp_path,), {"gguf_file": "model.gguf"})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_a_model_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = write_model(tmp_path / "model.gguf").state_dict()
    loaded = load_gguf_model(read_gguf(tmp_path / "model.gguf"), dtype)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in loaded.state_dict().items())


def test_a_file_in_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("no gguf")
    with pytest.raises(
        ModelError, match="--pretrained .*model.gguf must be a complete GGUF file; .*; download it again"
    ):
        load_gguf_model(read_gguf(tmp_path / "model.gguf"), torch.float32)


def test_a_missing_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.gguf_file.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match='the extra "gguf" is needed for reading .gguf files'):
        load_gguf_model(read_gguf(tmp_path / "model.gguf"), torch.float32)
