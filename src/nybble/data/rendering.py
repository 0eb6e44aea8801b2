"""Conversations to text, by the chat template that comes with a tokenizer.

A template is a program from the same place as the model, so it may be wrong or never end. Its errors become one line,
and its time and the length of its text are limited. Side effect: while a template runs in the main thread, SIGALRM
interrupts it after `MAX_SECONDS`. In other threads, and on Windows, the time is not limited.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nybble.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A conversation takes milliseconds.
MAX_SECONDS = 10.0
# Characters that a template may write for a conversation: its own ones ten times, and this many.
_MAX_CHARACTERS = 1 << 20
_MAX_GROWTH = 10


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: with the chat template.
        messages: the conversation.
        add_generation_prompt: whether the text goes on to where the model answers.
        tools: descriptions of the functions that the model may call; a template may leave them out.

    Raises:
        DataError: there is no template, or it fails, does not end, or writes far more than the conversation holds.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "conversations need a chat template; the tokenizer of this model has none; "
            "use plain text, or the instruction-tuned version of the model"
        )
    try:
        with _time_limit(MAX_SECONDS):
            text = str(
                tokenizer.apply_chat_template(
                    list(messages),
                    tools=None if tools is None else list(tools),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
    except _TimeUpError:
        raise DataError(
            f"the chat template must end; with the roles {roles(messages)} it has not after {MAX_SECONDS:g} seconds; "
            "use the template that belongs to the model"
        ) from None
    except Exception as error:  # a template can raise anything
        raise DataError(
            f"the chat template must accept every conversation; it rejects one with the roles {roles(messages)}: "
            f"{' '.join(str(error).split())[:200]}; remove or change this conversation"
        ) from error
    own = len(str(messages)) + len(str(tools)) if len(text) > _MAX_CHARACTERS else 0
    if len(text) > _MAX_CHARACTERS + _MAX_GROWTH * own:
        raise DataError(
            f"the chat template must write what a conversation holds; it gives {len(text)} characters for a "
            f"conversation of {own}; use the template that belongs to the model"
        )
    return text


def roles(messages: Sequence[dict[str, Any]]) -> str:
    """The roles of a conversation, in order, for error messages."""
    return " ".join(str(message["role"]) for message in messages)[:200]


class _TimeUpError(Exception):
    """The time of a template is up."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeUpError

    handler = signal.signal(signal.SIGALRM, stop)
    # It repeats, for the case that it meets one of the places where jinja ignores errors.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
