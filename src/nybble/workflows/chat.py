"""`nybble chat`: talk to a model, a finished run or an export in the terminal, in its own runtime.

A line is a message; the answer appears while it is generated. /new starts another conversation, /exit or Ctrl-D ends.
Ctrl-C stops an answer. Where the input is no terminal, each of its lines is a message. Where stdout is no terminal, it
gets the answers alone; everything else goes to stderr.
"""

from __future__ import annotations

import itertools
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from nybble.console import console, say
from nybble.errors import DataError, ModelError, describe_error
from nybble.export.base import EXPORTERS
from nybble.export.checks import exporter_of
from nybble.models.loading import LoadedModel
from nybble.options.commands import ChatGroup, ChatOptions
from nybble.run.complete import check_complete
from nybble.run.marker import is_run
from nybble.run.results import read_results
from nybble.runtime import Interrupted, forget_interruption
from nybble.workflows.target import open_target

_NEW, _EXIT = "/new", ("/exit", "/quit")
_COMMANDS = f"{_NEW} starts another conversation, {_EXIT[0]} or Ctrl-D ends, Ctrl-C stops an answer."
_COMMAND = re.compile(r"/\w*")  # a line of one word; a path or a sentence is a message


def chat(options: ChatOptions) -> None:
    """Answer messages until the input ends.

    Raises:
        NybbleError: whatever a person can repair.
    """
    options.check()
    asked = options.chat
    target = _in_its_runtime(asked.target)
    opened = open_target(target, options.model, "TARGET")
    conversation = _Conversation(opened, asked)
    interactive = sys.stdin.isatty() and asked.prompt is None
    say(f"{target} in {_runtime(Path(target))}.")
    if conversation.template is None:
        say("This model has no chat template: it continues the text.")
    if asked.prompt is not None:
        conversation.answer(asked.prompt)
        return
    if interactive:
        say(_COMMANDS)
    for message in _messages(interactive):
        if message in _EXIT:
            break
        if message == _NEW:
            conversation.start()
        elif _COMMAND.fullmatch(message):
            say(f"{message} is no command. {_COMMANDS}")
        elif message:
            conversation.answer(message)


def _in_its_runtime(target: str) -> str:
    """Of a run, its first export that is there; everything else as it is."""
    path = Path(target)
    if is_run(path):
        for name in read_results(path).exports:
            if name in EXPORTERS and (path / name).is_dir():
                check_complete(path / name)
                return str(path / name)
    return target


def _runtime(path: Path) -> str:
    """What computes with a target, and how another runtime would, where its file is that of an export."""
    if (exporter := exporter_of(path)) is not None:
        return exporter.runtime or exporter.label
    if path.is_file() and (exporter := exporter_of(path.parent)) is not None:
        return f"torch; nybble chat {path.parent} computes in {exporter.runtime or exporter.label}"
    return "torch"


def _messages(interactive: bool) -> Iterator[str]:
    """Lines of the input, without spaces around them.

    Raises:
        DataError: a line is no UTF-8 text.
    """
    for number in itertools.count(1):
        try:
            message = input("> " if interactive else "").strip()
            message.encode()  # bytes that are no text come as halves of characters in some locales
            yield message
        except UnicodeError as error:
            raise DataError(
                f"line {number} of the input must be UTF-8 text; it has other bytes; convert it, or give a text file"
            ) from error
        except EOFError:
            if interactive:
                print()
            return


class _Printer(TextStreamer):
    """Prints an answer as soon as whole words are there, and measures the time."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.tokens = "", 0
        self.started = self.first = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token after the other."""
        is_prompt = self.skip_prompt and self.next_tokens_are_prompt
        super().put(value)
        if is_prompt:
            return
        self.tokens += 1
        if self.tokens == 1:
            self.first = time.perf_counter()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the answer."""
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)

    def summary(self) -> str:
        """Tokens, tokens per second without the first, and the seconds until the first."""
        seconds = time.perf_counter() - self.first
        speed = f"{(self.tokens - 1) / seconds:.1f} tokens/s, " if self.tokens > 1 else ""
        return f"[{self.tokens} tokens, {speed}first after {self.first - self.started:.2f} s]"


@dataclass
class _Conversation:
    """The messages so far, and the model that answers."""

    opened: LoadedModel
    options: ChatGroup
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.template = getattr(self.opened.tokenizer, "chat_template", None)
        self.start()

    def start(self) -> None:
        """Forget all messages but that of the system."""
        self.messages = [] if self.options.system is None else [{"role": "system", "content": self.options.system}]

    def answer(self, message: str) -> None:
        """Generate and print the answer to a message, and keep both. Ctrl-C stops the answer."""
        self.messages.append({"role": "user", "content": message})
        ids_1T = self._prompt()
        printer = _Printer(self.opened.tokenizer)
        try:
            self._generate(ids_1T, printer)
        except KeyboardInterrupt as interruption:
            if isinstance(interruption, Interrupted) and interruption.signal != signal.SIGINT:
                raise
            forget_interruption()
            printer.end()
        console.print(printer.summary(), style="dim", highlight=False)
        self.messages.append({"role": "assistant", "content": printer.text})

    def _generate(self, ids_1T: torch.Tensor, printer: _Printer) -> None:
        sampling: dict[str, Any] = {}
        temperature = self.options.temperature
        if temperature is not None:
            sampling = {"do_sample": temperature > 0}
            sampling |= {"temperature": temperature} if temperature > 0 else {}
        pad = self.opened.tokenizer.pad_token_id
        with torch.no_grad():
            self.opened.model.generate(
                ids_1T.to(self.opened.model.device),
                attention_mask=torch.ones_like(ids_1T).to(self.opened.model.device),
                max_new_tokens=min(self.options.max_new_tokens, self._longest - ids_1T.shape[1]),
                streamer=printer,
                num_beams=1,  # beams have no words to print before their end
                num_return_sequences=1,
                pad_token_id=self.opened.tokenizer.eos_token_id if pad is None else pad,
                **sampling,
            )

    @property
    def _longest(self) -> int:
        """Tokens of a conversation and its answer together that the model allows."""
        return getattr(self.opened.model.config, "max_position_embeddings", None) or 1 << 30

    def _prompt(self) -> torch.Tensor:
        """Token ids [1, T] of the conversation; without the oldest messages where they leave no room for the answer,
        at most half of what the model allows.

        A single message may leave room for a shorter answer.

        Raises:
            ModelError: the chat template cannot be rendered, or one message is too long.
        """
        while True:
            ids_1T = self._encode()
            if ids_1T.shape[1] + min(self.options.max_new_tokens, self._longest // 2) <= self._longest:
                return ids_1T
            first = 1 if self.messages[0]["role"] == "system" else 0
            if len(self.messages) - first < 3:
                if ids_1T.shape[1] < self._longest:
                    return ids_1T
                raise ModelError(
                    f"a message must fit into the {self._longest - 1} tokens of the model; with its template it has "
                    f"{ids_1T.shape[1]}; write a shorter one"
                )
            del self.messages[first : first + 2]
            say("The conversation is longer than the model allows; its oldest messages are left out.")

    def _encode(self) -> torch.Tensor:
        tokenizer = self.opened.tokenizer
        ids: torch.Tensor
        if self.template is None:
            ids = tokenizer("\n".join(message["content"] for message in self.messages), return_tensors="pt").input_ids
            return ids
        try:
            rendered = tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise ModelError(
                f"the chat template of {self.opened.name} must take these messages; it does not "
                f"({describe_error(error)}); leave --system out, or correct the template"
            ) from error
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
        return ids
