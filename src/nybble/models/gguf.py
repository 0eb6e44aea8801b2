"""Read models and tokenizers from GGUF files.

The blocks of a GGUF file are dequantized, so that the model has ordinary linear layers.

A byte-level BPE tokenizer is rebuilt from the vocabulary and merges of the file, with the pre-tokenizer that llama.cpp
uses for the name in `tokenizer.ggml.pre`, if that name is in `_SPLITS_DIGITS`. The conversion in transformers ignores
the name and loses the digit splitting of SmolLM. Other tokenizers are converted by transformers.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from nybble.errors import MissingExtraError, ModelError, first_line

_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}
"""tokenizer.ggml.pre -> whether llama.cpp splits digits one by one before it applies the pattern of GPT-2."""

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the GGUF specification."""

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Name in transformers -> name in the keys of GGUF."""


def load_gguf_model(path: Path, dtype: torch.dtype) -> Any:
    """Load a model with dequantized weights.

    Args:
        path: the .gguf file.
        dtype: of all parameters.

    Returns:
        A transformers.PreTrainedModel on the CPU.

    Raises:
        MissingExtraError: the extra "gguf" is not installed.
        ModelError: transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "reading .gguf files")
    config = GgufConfig(gguf_file=path.name, dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # transformers has no switch for this progress bar
            return AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=config, dtype=dtype
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--pretrained {path.name} must be a GGUF file that transformers can read; {first_line(error)}; "
            "choose another file or the original model"
        ) from error


def load_gguf_tokenizer(path: Path) -> Any:
    """Load the tokenizer, with the special tokens and the chat template of the file.

    The end-of-sequence token is the one that the file names. For instruct models it is the end of a turn.

    Args:
        path: the .gguf file.

    Returns:
        A transformers.PreTrainedTokenizerBase.
    """
    import gguf
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    prefix = "tokenizer."
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in gguf.GGUFReader(path).fields.items()
        if key.startswith(prefix)
    }
    if fields.get("ggml.model") != "gpt2" or fields.get("ggml.pre") not in _SPLITS_DIGITS:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    special_tokens = {
        name: fields["ggml.tokens"][fields[f"ggml.{key}_token_id"]]
        for name, key in _SPECIAL_TOKENS.items()
        if f"ggml.{key}_token_id" in fields
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(fields), clean_up_tokenization_spaces=False, **special_tokens
    )
    if "chat_template" in fields:
        tokenizer.chat_template = fields["chat_template"]
    return tokenizer


def _byte_level_bpe(fields: Mapping[str, Any]) -> Any:
    """Build the tokenizers.Tokenizer of a byte-level BPE vocabulary.

    Args:
        fields: values of the file by key, without the prefix "tokenizer.".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[fields["ggml.pre"]] else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return tokenizer
