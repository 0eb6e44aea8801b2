"""Compare how llama.cpp and transformers split texts into tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.export.gguf.llama_cpp import LlamaModel
from nybble.export.tokenizer_check import warn_of_other_tokens


def check_tokenizer(path: Path, tokenizer: Any, vocab_size: int) -> None:
    """Load a file in llama.cpp, split texts with both tokenizers, and warn of differences.

    Args:
        path: of the .gguf file.
        tokenizer: transformers tokenizer from which its fields were made.
        vocab_size: tokens of the file.

    Raises:
        ExportError: llama.cpp does not load the file.
    """
    model = LlamaModel(path)
    warn_of_other_tokens("llama.cpp", model.tokenize, tokenizer, vocab_size)
