"""nybble.data.chat: which tokens of a conversation are labels, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors

from nybble.data import chat
from nybble.errors import DataError
from tests.helpers.chat import CONVERSATION, TEMPLATE, make_chat_tokenizer


def label_text(tokenizer: Any, encoded: chat.EncodedConversation) -> str:
    """The labels of a conversation as text."""
    labels = [i for i, is_label in zip(encoded.ids, encoded.label_mask, strict=True) if is_label]
    return str(tokenizer.decode(labels))


def test_labels_are_assistant_messages_with_their_end_token() -> None:
    tokenizer = make_chat_tokenizer()
    encoded = chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=True)
    assert tokenizer.decode(encoded.ids) == "[u]hi</s>[a]yes</s>[u]ok</s>[a]a</s>"
    assert label_text(tokenizer, encoded) == "yes</s>a</s>"


def test_all_tokens_are_labels_by_default() -> None:
    tokenizer = make_chat_tokenizer()
    encoded = chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=False)
    assert encoded.ids == chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=True).ids
    assert all(encoded.label_mask)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_white_space_is_a_label_even_if_its_offsets_are_trimmed(trim_offsets: bool) -> None:
    tokenizer = make_chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    conversation = [
        {"role": "user", "content": "go\n"},
        {"role": "assistant", "content": "if x:\n    y \n"},
        {"role": "user", "content": " ok"},
    ]
    encoded = chat.encode_conversation(tokenizer, conversation, assistant_only=True)
    assert label_text(tokenizer, encoded) == "if x:\n    y \n</s>"


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_white_space_at_the_end_of_the_generation_prompt_is_no_label(trim_offsets: bool) -> None:
    tokenizer = make_chat_tokenizer(
        "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[a] {% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    encoded = chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=True)
    assert label_text(tokenizer, encoded) == "yes</s>a</s>"


def test_an_assistant_message_that_opens_the_conversation_gives_no_labels() -> None:
    tokenizer = make_chat_tokenizer()
    conversation = [{"role": "assistant", "content": "hello"}, *CONVERSATION]
    encoded = chat.encode_conversation(tokenizer, conversation, assistant_only=True)
    assert label_text(tokenizer, encoded) == "yes</s>a</s>"


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(DataError, match="need a chat template; the tokenizer of this model has none"):
        chat.encode_conversation(make_chat_tokenizer(None), CONVERSATION, assistant_only=False)


def test_an_error_of_the_template_is_reported_with_the_roles() -> None:
    tokenizer = make_chat_tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match="rejects one with the roles user assistant user assistant: no system"):
        chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=False)


def test_a_slow_tokenizer_is_refused_for_assistant_only_loss() -> None:
    tokenizer = SimpleNamespace(
        is_fast=False, chat_template=TEMPLATE, apply_chat_template=make_chat_tokenizer().apply_chat_template
    )
    with pytest.raises(DataError, match="needs a fast tokenizer.*; leave out --assistant_only_loss"):
        chat.encode_conversation(tokenizer, CONVERSATION, assistant_only=True)


@pytest.mark.parametrize("value", ["text", [], [{"content": "x"}], [{"role": "user"}], [{"role": 1, "content": "x"}]])
def test_values_that_are_no_conversation_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="row 3 must be a list of messages like"):
        chat.check_messages(value, "row 3")


@pytest.mark.parametrize("content", [[{"type": "text", "text": "hi"}], 3])
def test_content_that_is_not_text_is_refused(content: Any) -> None:
    with pytest.raises(DataError, match="chats.jsonl: row 2 must have text as the content of its messages"):
        chat.check_messages([CONVERSATION[0], {"role": "assistant", "content": content}], "chats.jsonl: row 2")


def test_a_message_without_content_is_accepted() -> None:
    conversation = [CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": []}]
    assert chat.check_messages(conversation, "row 1") == conversation
