"""Conversations -> token sequences, through the model's own chat template.

A conversation is a list of {"role": ..., "content": ...}. Whole conversations are packed one after the other into rows of equal length; what stays free
at the end of a row is filled with the beginning of the next conversation (so that calibration sees nothing but text), and does not count. With
`assistant_only`, what counts is the prediction of the assistant's words and of what the template writes to end its turn, not that of the other roles'
words, nor of a turn that nothing came before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.errors import DataError

Message = dict[str, Any]


def check_messages(value: Any, where: str) -> list[Message]:
    """The value as a conversation; DataError if it is none."""
    fine = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )
    if not fine:
        raise DataError(
            f'{where} must be a list of messages like {{"role": "user", "content": "..."}}; got {str(value)[:80]}'
        )
    odd = next((m["content"] for m in value if not isinstance(m["content"], str | None)), None)
    if odd is not None:
        raise DataError(
            f"{where} must have text as the content of its messages; got {str(odd)[:80]}; join the texts of its parts"
        )
    return list(value)


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], assistant_only: bool
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the model should learn to predict.

    Raises:
        DataError: no chat template; it refuses the conversation; it renders a turn differently once more turns follow (with assistant_only).
    """
    text = _render(tokenizer, messages)
    if assistant_only and not tokenizer.is_fast:
        raise DataError(
            "--loss_on assistant needs a fast tokenizer, which says where in the text a token stands; this model's is none; use --loss_on all"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=assistant_only, verbose=False)
    if not assistant_only:
        return encoded.input_ids, [True] * len(encoded.input_ids)
    spans = []
    for k, message in enumerate(messages):
        if k and message["role"] == "assistant":
            before, after = _render(tokenizer, messages[:k], True), _render(tokenizer, messages[: k + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    "the chat template renders a turn differently once more turns follow, so assistant tokens cannot be told apart; use --loss_on all"
                )
            spans.append((len(before), len(after)))
    # Tokenizers that trim offsets leave nothing of a token of white space but the place where it ends.
    places = [(start, end) if start < end else (end - 1, end) for start, end in encoded.offset_mapping]
    return encoded.input_ids, [any(begin <= start and end <= stop for begin, stop in spans) for start, end in places]


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "conversations need a chat template, and this model's tokenizer has none; give plain text, or use the model's instruction-tuned version"
        )
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            f"the chat template refuses a conversation of {' '.join(str(m['role']) for m in messages)}: {' '.join(str(error).split())[:200]}"
        ) from error


def pack_conversations(conversations: Sequence[tuple[list[int], list[bool]]], length: int) -> tuple[Tensor, Tensor]:
    """Encoded conversations, in their order, into rows of `length` tokens; those that are longer are left out.

    Returns: ids [S, length] (int64), and counted [S, length] (bool): whether the prediction made at a position (of the token after it) counts.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    fitting = [(ids, learnt) for ids, learnt in conversations if len(ids) <= length]
    for ids, learnt in fitting:
        if not rows or len(rows[-1][0]) + len(ids) > length:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(learnt)
    ids_ST = torch.empty(len(rows), length, dtype=torch.int64)
    counted_ST = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (ids, learnt) in enumerate(rows):
        following = itertools.cycle([*rows[(i + 1) % len(rows)][0], *ids])
        ids_ST[i] = torch.tensor([*ids, *itertools.islice(following, length - len(ids))])
        counted_ST[i, : len(ids) - 1] = torch.tensor(learnt[1:], dtype=torch.bool)
    return ids_ST, counted_ST
