"""Read models and tokenizers from GGUF files.

The blocks of a GGUF file are dequantized, so that the model has ordinary linear layers.

A byte-level BPE tokenizer is rebuilt from the vocabulary and merges of the file, with the pre-tokenizer that llama.cpp
uses for the name in `tokenizer.ggml.pre`, if that name is in `_SPLITS_DIGITS`. The conversion in transformers ignores
the name and loses the digit splitting of SmolLM. Other tokenizers are converted by transformers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch

from nybble.errors import ModelError, NybbleError, first_line
from nybble.models.gguf_file import GGUFFile, stands_in
from nybble.models.weights import check_complete

_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}
"""tokenizer.ggml.pre -> whether llama.cpp splits digits one by one before it applies the pattern of GPT-2."""

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the GGUF specification."""

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Name in transformers -> name in the keys of GGUF."""


def load_gguf_model(file: GGUFFile, dtype: torch.dtype) -> Any:
    """Load a model with dequantized weights.

    Args:
        file: the parsed file.
        dtype: of all parameters.

    Returns:
        A transformers.PreTrainedModel on the CPU.

    Raises:
        ModelError: transformers cannot make a model of the file, or leaves out a part of it.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    name = file.path.name
    _check_size(file)
    config = GgufConfig(gguf_file=name, dequantize=True)
    with _conversion(f"--pretrained {name} must be a GGUF file that transformers can read"), stands_in(file):
        with redirect_stderr(io.StringIO()):  # transformers has no switch for this progress bar
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.path.parent, gguf_file=name, quantization_config=config, dtype=dtype, output_loading_info=True
            )
        model, info = loaded
        unused = info["unexpected_keys"] or _unused_tensors(file, model)
    check_complete(model, info["missing_keys"], (), name, parts=False)
    if unused:
        raise ModelError(
            f"--pretrained {name} must be a GGUF file that transformers uses all of; it leaves out {len(unused)} "
            f"tensors (first: {min(unused)}); choose the original model"
        )
    return model


def load_gguf_tokenizer(file: GGUFFile) -> Any:
    """Load the tokenizer, with the special tokens and the chat template of the file.

    The end-of-sequence token is the one that the file names. For instruct models it is the end of a turn.

    Args:
        file: the parsed file.

    Returns:
        A transformers.PreTrainedTokenizerBase.

    Raises:
        ModelError: there is no tokenizer in the file, or it is damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    prefix, path = "tokenizer.", file.path
    fields = {key.removeprefix(prefix): field.value for key, field in file.fields.items() if key.startswith(prefix)}
    with _conversion(f"--pretrained {path} must hold a tokenizer"):
        _check_tokenizer(fields)
        if fields.get("ggml.model") != "gpt2" or fields.get("ggml.pre") not in _SPLITS_DIGITS:
            with stands_in(file):
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


@contextmanager
def _conversion(requirement: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers and gguf while they convert a file into a ModelError."""
    try:
        yield
    except (NybbleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged value can fail anywhere in their code
        reason = first_line(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{requirement}; {' '.join(reason.split())[:200]}; choose another file or the original model"
        ) from error


def _check_size(file: GGUFFile) -> None:
    """Raise ModelError for more blocks than tensors: they would be built before a tensor is missed."""
    for key, field in file.fields.items():
        if key.endswith(".block_count") and field.value not in range(1, len(file.tensors) + 1):
            raise ModelError(
                f"--pretrained {file.path} must have a tensor at least for each block; {key} is {field.value} and "
                f"it has {len(file.tensors)} tensors; download it again"
            )


def _check_tokenizer(fields: Mapping[str, Any]) -> None:
    """Raise ValueError unless the vocabulary and what refers to it fit each other.

    Args:
        fields: values of the file by key, without the prefix "tokenizer.".
    """
    tokens = fields.get("ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ValueError("the file has no list of tokens")
    for key in ("ggml.token_type", "ggml.scores"):
        values = fields.get(key, tokens)
        if not isinstance(values, list) or len(values) != len(tokens):
            raise ValueError(f"tokenizer.{key} does not have a value for each of the {len(tokens)} tokens")
    for key, value in fields.items():
        if key.endswith("_token_id") and value not in range(len(tokens)):
            raise ValueError(f"tokenizer.{key} is {value}, which is none of the {len(tokens)} tokens")
    if not isinstance(fields.get("chat_template", ""), str):
        raise ValueError("tokenizer.chat_template is no text")


def _unused_tensors(file: GGUFFile, model: Any) -> set[str]:
    """Return the names of the tensors that the conversion in transformers has no place for and skips in silence."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = file.fields["general.architecture"].value
    if is_gguf_arch_supported(architecture):  # the other conversion; it reports them
        return set()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    return {tensor.name for tensor in file.tensors} - set(get_gguf_hf_weights_map(model, processor))


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
