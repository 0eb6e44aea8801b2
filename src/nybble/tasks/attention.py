"""Plain attention for short texts.

Side effect: the attention implementation of a model is another one while the context is open.

On a CPU, torch's fused attention is slower than plain matrix products for short texts: on OpenBookQA a training step
takes an eighth longer with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nybble.models.composite import decoder_path

# Longest text, in tokens, for which plain products are faster on a CPU (measured with 9 heads of 64, bfloat16).
MAX_PLAIN_LENGTH = 160


@contextmanager
def plain_attention(model: Any, max_text_length: int) -> Iterator[None]:
    """Use plain matrix products for attention while the context is open, on a CPU and for short texts.

    Args:
        model: transformers model; changed in place, and restored at the end.
        max_text_length: tokens of the longest text.
    """
    decoder = model.get_submodule(decoder_path(model))  # towers beside it may have no other attention
    before = decoder.config._attn_implementation
    try:
        if model.device.type == "cpu" and max_text_length <= MAX_PLAIN_LENGTH:
            decoder.set_attn_implementation("eager")
        yield
    finally:
        decoder.set_attn_implementation(before)
