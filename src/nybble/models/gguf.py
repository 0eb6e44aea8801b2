"""Models and tokenizers in GGUF files."""

from __future__ import annotations

import importlib.util
import io
import logging
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from nybble.errors import MissingExtraError, ModelError, first_line

log = logging.getLogger("nybble")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def load_gguf(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "reading .gguf files")
    config = GgufConfig(gguf_file=path.name, dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            return AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=config, dtype=dtype
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be loaded as GGUF: {first_line(error)}") from error


# What llama.cpp does before byte-level BPE, by tokenizer.ggml.pre. "smollm": digits one by one, then GPT-2's pattern.
_DIGITS_FIRST = {"smollm": True, "gpt-2": False}
# Token types of the GGUF specification.
_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(path: Path) -> Any:
    """Tokenizer of a GGUF file: rebuilt where llama.cpp's rules are known here, else as transformers converts it.

    The special tokens and the chat template are the file's. The end-of-sequence token is the one the file names, which for
    instruct models is the end of a turn.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields

    def value(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    if value("model") != "gpt2" or value("pre") not in _DIGITS_FIRST:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens, types = value("tokens"), value("token_type")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_FIRST[value("pre")] else []
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    )

    named = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = value(f"{key}_token_id")
        if number is not None:
            named[role] = tokens[number]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        wrapped.chat_template = template.contents()
    return wrapped
