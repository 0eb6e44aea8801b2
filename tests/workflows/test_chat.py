"""nybble chat: what the model is given, and what is printed."""

import io
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nybble.cli.main import main
from nybble.models.checkpoint import open_checkpoint
from nybble.runtime import interrupt_on_signals, raise_if_interrupted
from nybble.workflows import chat as module
from tests.helpers.chat import TEMPLATE
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.tiny import make_model, make_tokenizer

SHORT = ["--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quantized/ of a model with a chat template and 256 positions."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("run") / "quantized"
    save_checkpoint(path, make_model("llama"), tokenizer=tokenizer)
    return path


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is given."""
    seen: list[str] = []
    original = module._Conversation._prompt

    def prompt(self: Any) -> torch.Tensor:
        ids = original(self)
        seen.append(self.opened.tokenizer.decode(ids[0]))
        return ids

    monkeypatch.setattr(module._Conversation, "_prompt", prompt)
    return seen


def rendered(folder: Path, *messages: tuple[str, str]) -> str:
    tokenizer = open_checkpoint(folder).tokenizer
    conversation = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def test_an_answer_is_the_most_likely_continuation_of_the_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(folder), "--prompt", "abc", "--system", "be", *SHORT]) == 0
    checkpoint = open_checkpoint(folder)
    text = rendered(folder, ("system", "be"), ("user", "abc"))
    ids = checkpoint.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model, new = checkpoint.build(), []
    for _ in range(6):
        new.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
        if new[-1] == checkpoint.tokenizer.eos_token_id:
            break
    printed = capsys.readouterr()
    assert printed.out == checkpoint.tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert f"[{len(new)} tokens, " in printed.err
    assert f"{folder} in torch." in printed.err


def test_lines_of_the_input_are_a_conversation(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n/new\nthree\n/exit\nfour\n"))
    assert main(["chat", str(folder), *SHORT]) == 0
    assert len(prompts) == 3
    assert prompts[0] == rendered(folder, ("user", "one"))
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].count("two") == 1
    assert prompts[2] == rendered(folder, ("user", "three"))
    assert capsys.readouterr().err.count(" tokens, ") == 3


def test_a_line_that_looks_like_a_command_is_none(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/leave\n/help\n/etc/passwd\n/a b\n/quit\nnot asked\n"))
    assert main(["chat", str(folder), *SHORT]) == 0
    assert len(prompts) == 2
    printed = capsys.readouterr()
    assert "/leave is no command. /new starts another conversation, /exit or Ctrl-D ends" in printed.err
    assert "/help is no command." in printed.err
    assert len(printed.out.splitlines()) >= 2
    assert main(["chat", str(folder), "--prompt", "/exit", *SHORT]) == 0
    assert len(prompts) == 3, "the value of --prompt is a message"


def test_input_that_is_no_text_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"one\n\xff\x80\n"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["chat", str(folder), *SHORT]) == 2
        assert "of the input must be UTF-8 text; it has other bytes; convert it" in capsys.readouterr().err
    assert main(["chat", str(folder), "--prompt", "\udcff", *SHORT]) == 2
    assert "--prompt must be UTF-8 text" in capsys.readouterr().err


def test_the_oldest_messages_are_left_out_of_a_long_conversation(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"first {'a' * 100}\nsecond {'b' * 100}\nthird {'c' * 100}\n"))
    assert main(["chat", str(folder), "--system", "be", *SHORT]) == 0
    assert "first" not in prompts[2]
    assert "be" in prompts[2]
    assert "third" in prompts[2]
    assert "its oldest messages are left out" in capsys.readouterr().err


def test_a_long_message_leaves_room_for_a_shorter_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SHORT[:-1], "100"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'a' * 200}\n"))
    assert main(["chat", str(folder), *flags]) == 0
    tokens = re.search(r"\[(\d+) tokens", capsys.readouterr().err)
    assert tokens is not None
    assert 0 < int(tokens[1]) <= 55


def test_a_longer_answer_than_fits_does_not_cost_the_conversation(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Conversation, "_generate", lambda *_: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert main(["chat", str(folder), *SHORT[:-1], "300"]) == 0
    assert "first" in prompts[1]


def test_beams_of_the_generation_settings_are_left_out(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "quantized")
    (tmp_path / "quantized" / "generation_config.json").write_text('{"num_beams": 4, "num_return_sequences": 2}')
    assert main(["chat", str(tmp_path / "quantized"), "--prompt", "hi", *SHORT]) == 0


def test_a_message_that_is_too_long_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(folder), "--prompt", "a" * 400, *SHORT]) == 2
    assert "must fit into the 255 tokens of the model" in capsys.readouterr().err


def test_a_model_without_a_template_continues_the_text(
    tmp_path: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "quantized", make_model("smollm"))
    assert main(["chat", str(tmp_path / "quantized"), "--prompt", "one two", *SHORT]) == 0
    assert prompts == ["one two"]
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_that_refuses_a_message_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    save_checkpoint(tmp_path / "quantized", make_model("smollm"), tokenizer=tokenizer)
    assert main(["chat", str(tmp_path / "quantized"), "--system", "be", "--prompt", "a", *SHORT]) == 2
    assert "must take these messages; it does not" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_stops_an_answer_and_sigterm_the_program(
    number: signal.Signals,
    code: int,
    folder: Path,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = module._Printer.put

    def put(self: Any, value: torch.Tensor) -> None:
        original(self, value)
        if self.tokens == 2 and len(prompts) == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module._Printer, "put", put)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with interrupt_on_signals():
        assert main(["chat", str(folder), *SHORT]) == code
    raise_if_interrupted()  # what comes afterwards was not interrupted
    if code == 0:
        assert len(prompts) == 2
        assert "[2 tokens, " in capsys.readouterr().err
    else:
        assert len(prompts) == 1


def test_what_computes_is_named(tmp_path: Path) -> None:
    folders = {"hf": "transformers", "vllm": "transformers", "mlx": "mlx-lm", "gguf": "llama.cpp"}
    for name, runtime in folders.items():
        (tmp_path / name).mkdir()
        if name == "gguf":
            (tmp_path / name / "model.gguf").touch()
        else:
            save_file({}, tmp_path / name / "model.safetensors", {"nybble": name})
        assert module._runtime(tmp_path / name) == runtime
    file = tmp_path / "gguf" / "model.gguf"
    assert module._runtime(file) == f"torch; nybble chat {file.parent} computes in llama.cpp"
    assert module._runtime(Path("smollm2")) == "torch"


def test_a_run_is_talked_to_through_its_first_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.run.results import RunResults

    monkeypatch.setattr(module, "is_run", lambda path: path == tmp_path)
    monkeypatch.setattr(module, "check_complete", lambda path: None)
    results = RunResults(exports={"gone": {}, "openvino": {}})
    monkeypatch.setattr(module, "read_results", lambda path: results)
    assert module._in_its_runtime(str(tmp_path)) == str(tmp_path)
    (tmp_path / "openvino").mkdir()
    assert module._in_its_runtime(str(tmp_path)) == str(tmp_path / "openvino")
    assert module._in_its_runtime("smollm2") == "smollm2"
