"""What is said while a command runs: how far it is, and how long it will take."""

import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nybble import console
from nybble.console import log_to


def test_what_an_earlier_sitting_did_says_nothing_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "nybble")
    with console.bar("train", 1000, "loss") as advance:
        advance(900)
        for step in range(10):
            now[0] += 6
            advance(1, loss=f"loss {step}")
    said = [record.getMessage() for record in caplog.records]
    assert said[-1].startswith("train 906 of 1000, about ")
    assert said[-1].endswith("s left, loss 5")
    assert float(said[-1].split("about ")[1].split()[0]) == pytest.approx(94 * 6, rel=0.25)


def test_a_narrow_terminal_shows_how_far_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=80, force_terminal=True, file=io.StringIO(), markup=False)
    monkeypatch.setattr(console, "console", terminal)
    with console.bar("compress (awq+se+gptq)", 210, "now") as advance:
        for _ in range(7):
            advance(1, now="model.layers.0.self_attn.q_proj: output error 1.70% -> 0.35%")
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())  # type: ignore[attr-defined]
    last = [line for line in written.splitlines() if line.strip()][-1]
    assert "compress (awq+se+gptq)" in last
    assert "7/210" in last
    assert " left " in last
    assert "model.l" in last
    assert len(last.rstrip()) <= 80


def test_a_file_gets_whole_lines_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging()
    logging.getLogger("nybble").warning("a word " * 40)
    console.say("a sentence " * 30)
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.rstrip()) for line in lines] == [9 + 279, 329]
    assert not lines[0].endswith("  ")


def test_the_level_of_a_program_is_as_before_after_a_run(tmp_path: Path) -> None:
    logger = logging.getLogger("nybble")
    before = logger.level
    logger.setLevel("ERROR")
    try:
        with log_to(tmp_path / "log.txt"):
            logger.info("noted")
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)
    assert "noted" in (tmp_path / "log.txt").read_text()


def test_libraries_that_set_up_logging_change_nothing() -> None:
    code = """
import logging
import subprocess
import sys
from nybble.console import set_up_logging
set_up_logging()
logging.basicConfig(format="%(name)s %(message)s", level=logging.INFO)  # as onnxruntime's quantizer does
logging.getLogger("library").info("quiet")
logging.getLogger("library").warning("loud")
logging.getLogger("nybble").info("once")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quiet" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1] == "loud"
    assert done.stdout.count("once") == 1
