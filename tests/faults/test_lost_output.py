"""Output that nobody takes: a closed pipe, a full disk, a stream that is closed. The same for all commands."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble.cli.main import main
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.tiny import make_model

EVAL = ["--data", "python-docs", "--seq_len", "32", "--num_samples", "2", "--device", "cpu", "--dtype", "float32"]
CHAT = ["--prompt", "one", "--max_new_tokens", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "quantized"
    save_checkpoint(path, make_model("smollm", num_hidden_layers=1))
    return path


@pytest.fixture
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115
    yield stream
    stream.close()


@pytest.mark.parametrize("command", ["eval", "chat", "inspect"])
def test_a_closed_pipe_ends_quietly(
    command: str,
    folder: Path,
    closed_pipe: io.TextIOWrapper,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdout", closed_pipe)
    assert main([command, str(folder), *{"eval": EVAL, "chat": CHAT}.get(command, [])]) == 141
    assert "nybble: " not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("command", ["eval", "chat", "inspect"])
def test_a_full_disk_under_stdout_is_named(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main([command, str(folder), *{"eval": EVAL, "chat": CHAT}.get(command, [])]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "nybble: stdout must take what is printed; it cannot: No space left on device; redirect it elsewhere"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">&-", 2, "nybble: stdout must be open; it is closed; redirect it, to /dev/null if nothing is to be seen\n"),
        ("<&- 2>&-", 0, ""),
        (
            "2>&1 >/dev/full | cat >&2; exit ${PIPESTATUS[0]}",
            2,
            "nybble: stdout must take what is printed; it cannot: ",
        ),
    ],
)
def test_streams_of_a_process(redirection: str, code: int, words: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m nybble --help {redirection}'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[: len(words)]) == (code, words)
    assert len(done.stderr.splitlines()) <= 1
