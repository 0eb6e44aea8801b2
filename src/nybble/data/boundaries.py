"""Where a prompt ends and its answer begins, in tokens.

Tokenizers differ in what they put around every text: a begin token, an end token, both or neither. They may also join
the last characters of a prompt with the first ones of its answer in one token; that token belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any text that has tokens.
_PROBE = "a"


class AddedTokens(NamedTuple):
    """Tokens that a tokenizer puts around every text.

    Attributes:
        before: [bos] for Gemma and Llama 3, [] for Qwen.
        after: [] for most; [eos] for tokenizers that end every text.
    """

    before: list[int]
    after: list[int]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    """The tokens that a tokenizer puts before and after a text. Where they cannot be told apart, they are before it."""
    if not tokenizer("").input_ids:
        return AddedTokens([], [])
    whole, text = tokenizer(_PROBE).input_ids, tokenizer(_PROBE, add_special_tokens=False).input_ids
    num_added = len(whole) - len(text)
    starts = [i for i in range(num_added + 1) if whole[i : i + len(text)] == text]
    num_before = max(starts, default=num_added)
    return AddedTokens(whole[:num_before], whole[num_before + len(text) :])


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, added: AddedTokens
) -> tuple[list[int], int]:
    """Tokenize prompt and answer as one text without the tokens that end it.

    Args:
        added: `added_tokens` of the tokenizer.

    Returns: the token ids, and how many of them are the prompt's: those that the prompt alone begins with too.
    """
    ids = _encode(tokenizer, prompt + answer, added)
    if not prompt:
        return ids, len(added.before)
    return ids, num_equal(ids, _encode(tokenizer, prompt, added))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, added: AddedTokens) -> list[int]:
    ids: list[int] = tokenizer(text).input_ids
    return ids[: len(ids) - len(added.after)]


def num_equal(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of tokens or characters that two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
