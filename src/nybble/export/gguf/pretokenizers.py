"""Which pre-tokenizer of llama.cpp does what the pre_tokenizer of a tokenizer.json does.

llama.cpp has a list of regular expressions for each name in `tokenizer.ggml.pre`. Its converter finds the name by a
hash of the tokens of a fixed text, which knows published vocabularies only. Here the name follows from the structure:
the regular expressions in the order in which they split the text, and whether words that are in the vocabulary skip
the merges.

Expressions: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN = "default"
"""Name of the pre-tokenizer that llama.cpp applies to files without a name."""

_GPT2 = "ByteLevel"
"""Stands for the expression inside of ByteLevel(use_regex=True)."""

_DIGIT = r"\p{N}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATHS}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"

_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
"""(Expressions, whether known words skip the merges) -> name."""


def name_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Return the name of the pre-tokenizer of llama.cpp that splits text as a byte-level BPE tokenizer does.

    Args:
        tokenizer: content of tokenizer.json.

    Returns:
        The name; UNKNOWN where llama.cpp has none.
    """
    steps = tuple(_expressions(tokenizer["pre_tokenizer"]))
    return _NAMES.get((steps, bool(tokenizer["model"].get("ignore_merges"))), UNKNOWN)


def uses_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Return whether a pre_tokenizer writes bytes as printable characters."""
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer))


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    else:
        yield pre_tokenizer


def _expressions(pre_tokenizer: Mapping[str, Any]) -> Iterator[str]:
    """Expressions of the steps; a text that is none of the table's where a step is not known."""
    for step in _steps(pre_tokenizer):
        kind, pattern = step["type"], step.get("pattern", {})
        # Expressions that match all text split it the same way whether matches are isolated or all else is removed.
        split = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            yield from [_GPT2] if step["use_regex"] else []
        elif kind == "Digits" and step["individual_digits"]:
            yield _DIGIT
        elif kind == "Split" and split and "Regex" in pattern:
            yield pattern["Regex"]
        else:
            yield f"unknown step {kind}"
