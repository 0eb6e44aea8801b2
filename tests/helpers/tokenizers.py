"""Small tokenizers of the kinds that models have, trained on a page of the documentation."""

from __future__ import annotations

import json
import random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.pages import DOCS

_CORPUS = [(DOCS / name).read_text(encoding="utf-8") for name in ("tasks.md", "how-it-works.md")]
_CORPUS += ["Ünïcödé ½ 中文字 12 345 6789 🙂", "def f(x):\n\treturn  x\n\n", "It's we'll DON'T  1234567890 \r\n"] * 3
_SPACE = "\u2581"

# As published tokenizers have them: Llama 3, Qwen 2, Mistral Nemo, GPT-4o (Phi 4 mini).
EXPRESSIONS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|"
    r"'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(name: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(EXPRESSIONS[name]), "isolated"), _byte_level(use_regex=False)]


# Name of the pre-tokenizer in llama.cpp -> steps, and whether known words skip the merges.
BYTE_LEVEL: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": ([_byte_level()], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), _byte_level()], False),
    "llama-bpe": (_split("llama3"), True),
    "dbrx": (_split("llama3"), False),
    "qwen2": (_split("qwen2"), False),
    "tekken": (_split("tekken"), True),
    "gpt-4o": (_split("gpt-4o"), False),
}


def byte_level_tokenizer(steps: list[Any], ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """Byte-level BPE of 602 tokens; <tool> is an added token that is not special, <|turn|> one that looks special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool>", "<|turn|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_piece_tokenizer(kind: str) -> Any:
    """BPE with byte fallback and a merge for every pair whose joined text is a token, as converters write it.

    Args:
        kind: "llama" puts a space before a text, "gemma" does not.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, limit_alphabet=90, show_progress=False)
    trained.train_from_iterator([_SPACE + word for text in _CORPUS for word in text.split()], trainer)
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [text for text in sorted(vocabulary, key=vocabulary.get) if text not in special]
    merges = [
        (text[:i], text[i:])
        for text in pieces
        for i in range(1, len(text))
        if text[:i] in vocabulary and text[i:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", _SPACE)
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    else:
        tokenizer.normalizer, tokenizer.pre_tokenizer = replace, pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special[:3]])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def random_texts(count: int) -> list[str]:
    """Texts of digits, marks, spaces, code and several scripts, the same in every run."""
    pieces = [*"abcdefgXYZ  \n\t\r0123456789.,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`", "é", "ü", "ß", "中", "字", "の", "한"]
    pieces += [
        "ا",
        "ع",
        "ह",
        "🙂",
        "👩",
        "\u200d",
        "\u00a0",
        "½",
        "²",
        "’",
        "“",
        "…",
        "'s",
        "'LL",
        "  ",
        "\n\n",
        "1234",
    ]
    pieces += ["def ", "The ", "<s>", "</s>"]
    source = random.Random(0)
    return ["".join(source.choice(pieces) for _ in range(source.randint(1, 40))) for _ in range(count)]
