"""Conversations to tokens, through the chat template of the model.

A conversation is a list of messages {"role": ..., "content": ...}, and the tools that the model may call in it.

With `assistant_only`, a token is a label (a token that the model learns to predict) if it belongs to an assistant
message or to what the template writes to end it, each turn as it stands in the rendered text. What a template writes
before any content (an empty block of reasoning), the messages of other roles, tools, and an assistant message that
opens the conversation give no labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nybble.data.boundaries import num_equal
from nybble.data.files import check_unicode
from nybble.data.rendering import render, roles
from nybble.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "role" is a string and "content" a string or None. Templates may read further keys (tool calls, names) of any type.
Message = dict[str, Any]
# The description of a function that a model may call, as JSON schemas have it.
Tool = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation as a source has it.

    Attributes:
        messages: at least one.
        tools: what the model may call, which the template shows it; None where the source has none.
    """

    messages: list[Message]
    tools: list[Tool] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """Attributes:
    ids: the token ids.
    label_mask: for every token, whether the model learns to predict it.
    """

    ids: list[int]
    label_mask: list[bool]


# Roles of rows like {"from": "human", "value": "..."} (ShareGPT) -> those of chat templates.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip


def check_messages(value: object, where: str) -> list[Message]:
    """Check that a value is a conversation, and return it. Messages with "from" and "value" get "role" and "content".

    Args:
        value: what a file or data set holds.
        where: where the value stands, for error messages ("chats.jsonl: row 3, column messages").

    Raises:
        DataError: it is not a non-empty list of messages, the content of a message is not text, or text is not Unicode.
    """
    if isinstance(value, list):
        value = [_with_role(message) for message in value]
    if not (isinstance(value, list) and value and all(map(_is_message, value))):
        raise DataError(
            f'{where} must be a list of messages like {{"role": "user", "content": "..."}}; got {repr(value)[:80]}; '
            "convert it to such a list, or name the column of the conversations with --text_column"
        )
    for message in value:
        if not isinstance(message["content"], str | None):
            raise DataError(
                f"{where} must have text as the content of its messages; got {repr(message['content'])[:80]}; "
                "join the texts of its parts"
            )
    check_unicode(value, where)
    return list(value)


def check_tools(value: object, where: str) -> list[Tool] | None:
    """Check the tools of a conversation: a list of objects, or the JSON text of one; None or an empty list is none.

    Args:
        value: what a file or data set holds.
        where: where the value stands, for error messages.

    Raises:
        DataError: it is something else, or text in it is not Unicode.
    """
    read = value
    if isinstance(value, str):
        try:
            read = json.loads(value.strip() or "[]")
        except (ValueError, RecursionError):
            read = value
    if read is None or read == []:
        return None
    if not (isinstance(read, list) and all(isinstance(tool, dict) for tool in read)):
        raise DataError(
            f'{where} must be a list of tools like {{"type": "function", "function": {{...}}}}, or its JSON text; got '
            f"{repr(value)[:80]}"
        )
    check_unicode(read, where)
    return [_without_none(tool) if read is value else tool for tool in read]


def _without_none(value: Any) -> Any:
    """A tool without the keys of other tools, which a table of structs (parquet, hub data) gives it as None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _with_role(message: Any) -> Any:
    if not (isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message):
        return message
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]} | rest


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    assistant_only: bool,
    tools: Sequence[Tool] | None = None,
) -> EncodedConversation:
    """Tokenize a conversation with the chat template.

    Args:
        tokenizer: of the model; a fast one with `assistant_only`.
        messages: the conversation.
        assistant_only: only the tokens of assistant messages are labels; else all tokens are.
        tools: what the model may call.

    Raises:
        DataError: the tokenizer has no chat template; the template rejects the conversation, does not end, or writes
            nothing; with `assistant_only`, the tokenizer gives no character offsets, or the template does not show a
            message.
    """
    text = render(tokenizer, messages, tools=tools)
    if assistant_only and not tokenizer.is_fast:
        raise DataError(
            "--assistant_only_loss needs a fast tokenizer, which gives the characters of every token; the tokenizer "
            "of this model is a slow one; leave out --assistant_only_loss"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=assistant_only, verbose=False)
    ids: list[int] = encoded.input_ids
    if not ids:
        raise DataError(
            f"the chat template must render every conversation to text; it renders one with the roles "
            f"{roles(messages)} to nothing; remove or change this conversation"
        )
    if not assistant_only:
        return EncodedConversation(ids, [True] * len(ids))
    spans = [
        _Turn(partial(render, tokenizer, tools=tools), messages, k, text).span()
        for k, message in enumerate(messages)
        if k and message["role"] == "assistant"
    ]
    # Tokenizers that trim offsets give an empty span for a token of white space, at the position where it ends.
    offsets = [(start, end) if start < end else (end - 1, end) for start, end in encoded.offset_mapping]
    return EncodedConversation(
        ids, [any(begin <= start and end <= stop for begin, stop in spans) for start, end in offsets]
    )


def shows_tools(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> bool:
    """Whether the template writes the tools of a conversation."""
    with_tools = render(tokenizer, conversation.messages, tools=conversation.tools)
    try:
        return with_tools != render(tokenizer, conversation.messages)
    except DataError:  # the template asks for them
        return True


class _Turn:
    """An assistant message in the rendered text of its conversation.

    A template may write something of its own before the content (an empty block of reasoning), and may render a message
    differently once others follow. Such a turn is found by rendering it with a mark in the place of its content.

    Args:
        rendered: messages to text, by the chat template.
        messages: the conversation.
        k: number of the message.
        text: the rendered conversation.
    """

    def __init__(self, rendered: Callable[..., str], messages: Sequence[Message], k: int, text: str) -> None:
        self._render, self._messages, self._k, self._text = rendered, messages, k, text
        self._content = (messages[k]["content"] or "").strip()
        # A character for private use.
        self._mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)

    def span(self) -> tuple[int, int]:
        """Characters (begin, end) of the turn, from after the generation prompt on.

        Raises:
            DataError: the turn cannot be found.
        """
        text = self._text
        prompt = self._render(self._messages[: self._k], add_generation_prompt=True)
        through = self._render(self._messages[: self._k + 1])
        prompt_end = len(prompt) if text.startswith(prompt) else None
        end = len(through) if text.startswith(through) else None
        directly = bool(self._content) and text[len(prompt) :].lstrip().startswith(self._content)
        if prompt_end is not None and end is not None and directly:
            return prompt_end, end
        begin = self._begin(prompt_end)
        end = self._end() if end is None else end
        if begin is None or end is None or begin > end:
            raise DataError(
                "--assistant_only_loss needs a chat template that shows every assistant message; the template of this "
                "model does not; leave out --assistant_only_loss"
            )
        return begin, end

    def _begin(self, prompt_end: int | None) -> int | None:
        """Where the turn begins: after the generation prompt, and after what the template writes before any content."""
        message = self._messages[self._k]
        bare = {key: value for key, value in message.items() if key == "role" or not isinstance(value, str)}
        before, _ = self._around_mark(bare, self._messages[self._k + 1 :])
        if before is None or not self._text.startswith(before):  # there is more than content, such as reasoning
            return prompt_end
        # Tokenizers join a space with the word that follows.
        content_begin = len(before.rstrip(" "))
        written = self._text[prompt_end or 0 : content_begin]
        return content_begin if prompt_end is None or written.strip() else prompt_end

    def _end(self) -> int | None:
        """Where the turn ends: after what the template writes to end it."""
        message = self._messages[self._k]
        _, after = self._around_mark(message, self._messages[self._k + 1 :])
        _, after_alone = self._around_mark(message, ())
        if after is None or after_alone is None or not self._text.endswith(after):
            return None
        return len(self._text) - len(after) + num_equal(after, after_alone)

    def _around_mark(self, message: Message, following: Sequence[Message]) -> tuple[str, str] | tuple[None, None]:
        """The text before and after the content of the message in the place of this one; None if it has no content."""
        marked = [*self._messages[: self._k], message | {"content": self._mark}, *following]
        before, mark, rest = self._render(marked).partition(self._mark)
        return (before, rest.rpartition(self._mark)[2]) if mark else (None, None)
