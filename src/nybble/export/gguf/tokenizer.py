"""The tokenizer of a model as fields of GGUF.

    tokenizer.ggml.model        "gpt2" for byte-level BPE, "llama" for SentencePiece
    tokenizer.ggml.pre          pre-tokenizer of byte-level BPE (pretokenizers.py)
    tokenizer.ggml.tokens       one text for each row of the embedding
    tokenizer.ggml.token_type   NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE
    tokenizer.ggml.merges       of byte-level BPE
    tokenizer.ggml.scores       of SentencePiece: llama.cpp merges the pair whose result has the highest score
    tokenizer.ggml.*_token_id, add_bos_token, add_eos_token, add_space_prefix; tokenizer.chat_template

A SentencePiece tokenizer is a BPE model with byte_fallback in tokenizer.json. Its converter gives it a merge for every
pair of tokens whose joined text is a token, in the order of the scores, so the rank of the first merge that makes a
token gives its score back.

Refused (ExportError): tokenizers without tokenizer.json, and models other than these two.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.errors import ExportError
from nybble.export.gguf.pretokenizers import name_pre_tokenizer, uses_byte_level
from nybble.models.companions import GENERATION_CONFIG

log = logging.getLogger("nybble")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Token types of the GGUF specification."""

_SPACE = "\u2581"
"""SentencePiece writes a space as this character."""

_NO_MERGE = "\u2400 \u2400"
"""llama.cpp refuses byte-level BPE without merges. This one applies never: no byte is written as this character."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Name in transformers -> name in the keys of GGUF, with the spelling of the specification."""

Value = bool | int | str | list[str] | list[int] | list[float]


def tokenizer_fields(tokenizer: Any, vocab_size: int, folder: Path) -> dict[str, Value]:
    """Return the fields that describe a tokenizer.

    Args:
        tokenizer: transformers tokenizer.
        vocab_size: rows of the embedding. Further tokens of the tokenizer are left out; missing ones are UNUSED.
        folder: with generation_config.json, if the model has one.

    Returns:
        Key without "tokenizer." -> value.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = content["model"]
    fields: dict[str, Value] = {}
    tokens, types = _vocabulary(content, vocab_size)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        fields |= _sentence_piece(content, tokens)
    elif model["type"] == "BPE" and uses_byte_level(content["pre_tokenizer"]):
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        fields["ggml.model"] = "gpt2"
        fields["ggml.pre"] = name_pre_tokenizer(content)
        fields["ggml.merges"] = merges or [_NO_MERGE]
    else:
        raise ExportError(
            "an export to GGUF needs a byte-level BPE or SentencePiece BPE tokenizer (tokenizer.json); this one is "
            f"{model['type']}; remove gguf from --export"
        )
    fields["ggml.tokens"], fields["ggml.token_type"] = tokens, types
    fields |= _special_tokens(tokenizer, vocab_size, folder)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        fields["chat_template"] = template
    return fields


def _vocabulary(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all rows of the embedding."""
    model = content["model"]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    vocabulary = model["vocab"].items() if isinstance(model.get("vocab"), dict) else ()
    for text, i in vocabulary:
        if i < vocab_size:
            tokens[i], types[i] = text, _type(text, model)
    for added in content.get("added_tokens") or ():
        i, text = added["id"], added["content"]
        if i >= vocab_size or types[i] == _UNKNOWN:
            continue
        if added["special"] or _looks_special(text):
            tokens[i], types[i] = text, _CONTROL
        else:  # llama.cpp looks for these in the text as it is, with spaces
            tokens[i], types[i] = text.replace(_SPACE, " "), _USER_DEFINED
    return tokens, types


def _type(text: str, model: Mapping[str, Any]) -> int:
    if not model.get("byte_fallback"):
        return _NORMAL
    if text == model.get("unk_token"):
        return _UNKNOWN
    return _BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else _NORMAL


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes a token for a control token, so that text of a user cannot hold it."""
    return text in ("<pad>", "<mask>") or (text.startswith("<|") and text.endswith("|>")) or text.startswith("<unused")


def _sentence_piece(content: Mapping[str, Any], tokens: list[str]) -> dict[str, Value]:
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(content["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    # Tokens that no merge makes are never the result of one, except for tokens that are added, which come first.
    scores = [float(-ranks[text] - 1) if text in ranks else 0.0 for text in tokens]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": _adds_space(content),
        "ggml.remove_extra_whitespaces": False,
    }


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps)
    return prepends or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme") != "never")


_ENDS = ("ggml.eot_token_id", "ggml.eom_token_id")
"""Fields for ends of a turn and of a message; generation stops at both, as at the end of the text."""


def _special_tokens(tokenizer: Any, vocab_size: int, folder: Path) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    for name, i in ids.items():
        if i is not None and i < vocab_size:
            fields[f"ggml.{_SPECIAL[name]}_token_id"] = i
    text_ids = tokenizer("a").input_ids
    for name, place in (("bos", 0), ("eos", -1)):
        fields[f"ggml.add_{name}_token"] = bool(text_ids) and ids[name] is not None and text_ids[place] == ids[name]
    # The end of a turn, where it is not the end of the text: generation stops at both.
    ends = [i for i in _generation_ends(folder) if i != ids["eos"] and i < vocab_size]
    for field, i in zip(_ENDS, ends, strict=False):
        fields[field] = i
    if len(ends) > len(_ENDS):
        log.warning("a GGUF file has room for three end tokens; %s does not end an answer in llama.cpp", ends[2:])
    return fields


def _generation_ends(folder: Path) -> list[int]:
    """Ids at which generation stops, from generation_config.json."""
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return []
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
