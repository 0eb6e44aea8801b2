"""Conversations to tokens, through the chat template of the model.

A conversation is a list of messages {"role": ..., "content": ...}. With `assistant_only`, a token is a label (a token
that the model learns to predict) if it belongs to the content of an assistant message or to what the template writes
to end that message. The messages of other roles, and an assistant message that opens the conversation, give no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "role" is a string and "content" a string or None. Templates may read further keys (tool calls, names) of any type.
Message = dict[str, Any]


@dataclass(frozen=True)
class EncodedConversation:
    """Attributes:
    ids: the token ids.
    label_mask: for every token, whether the model learns to predict it.
    """

    ids: list[int]
    label_mask: list[bool]


def check_messages(value: object, where: str) -> list[Message]:
    """Check that a value is a conversation, and return it.

    Args:
        value: what a file or data set holds.
        where: where the value stands, for error messages ("chats.jsonl: row 3, column messages").

    Raises:
        DataError: it is not a non-empty list of messages, or the content of a message is not text.
    """
    if not (isinstance(value, list) and value and all(map(_is_message, value))):
        raise DataError(
            f'{where} must be a list of messages like {{"role": "user", "content": "..."}}; got {str(value)[:80]}; '
            "convert it to such a list, or name the column of the conversations with --text_column"
        )
    for message in value:
        if not isinstance(message["content"], str | None):
            raise DataError(
                f"{where} must have text as the content of its messages; got {str(message['content'])[:80]}; "
                "join the texts of its parts"
            )
    return list(value)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], assistant_only: bool
) -> EncodedConversation:
    """Tokenize a conversation with the chat template.

    Args:
        tokenizer: of the model; a fast one with `assistant_only`.
        messages: the conversation.
        assistant_only: only the tokens of assistant messages are labels; else all tokens are.

    Raises:
        DataError: the tokenizer has no chat template; the template rejects the conversation; with `assistant_only`,
            the tokenizer gives no character offsets, or the template renders a message differently once others follow.
    """
    text = _render(tokenizer, messages)
    if assistant_only and not tokenizer.is_fast:
        raise DataError(
            "--assistant_only_loss needs a fast tokenizer, which gives the characters of every token; the tokenizer "
            "of this model is a slow one; leave out --assistant_only_loss"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=assistant_only, verbose=False)
    ids: list[int] = encoded.input_ids
    if not assistant_only:
        return EncodedConversation(ids, [True] * len(ids))
    spans = _assistant_spans(tokenizer, messages, text)
    # Tokenizers that trim offsets give an empty span for a token of white space, at the position where it ends.
    offsets = [(start, end) if start < end else (end - 1, end) for start, end in encoded.offset_mapping]
    return EncodedConversation(
        ids, [any(begin <= start and end <= stop for begin, stop in spans) for start, end in offsets]
    )


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> list[tuple[int, int]]:
    """Character ranges of the assistant messages in the rendered text, from after the generation prompt on."""
    spans = []
    for k, message in enumerate(messages):
        if k and message["role"] == "assistant":
            prompt = _render(tokenizer, messages[:k], add_generation_prompt=True)
            through = _render(tokenizer, messages[: k + 1])
            if not (through.startswith(prompt) and text.startswith(through)):
                raise DataError(
                    "--assistant_only_loss needs a chat template that renders a message the same way whatever follows; "
                    "the template of this model does not; leave out --assistant_only_loss"
                )
            spans.append((len(prompt), len(through)))
    return spans


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "conversations need a chat template; the tokenizer of this model has none; "
            "use plain text, or the instruction-tuned version of the model"
        )
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # a template can raise anything
        roles = " ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"the chat template must accept every conversation; it rejects one with the roles {roles}: "
            f"{' '.join(str(error).split())[:200]}; remove or change this conversation"
        ) from error
