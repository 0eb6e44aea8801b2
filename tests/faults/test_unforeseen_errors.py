"""An exception that no check foresaw: one line, exit code 70, and the traceback in a file."""

import re
import tempfile
from pathlib import Path

import pytest

from nybble.cli.main import main


@pytest.mark.parametrize("error", [TypeError("no\nsuch thing"), AssertionError(), ZeroDivisionError("by zero")])
def test_it_is_one_line_and_a_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("nybble.workflows.inspect.inspect", fail)
    assert main(["inspect", "somewhere"]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"nybble: this is a fault of nybble \((.*)\); please report it with the details in (.*)", line)
    assert found is not None
    assert found[1].startswith(type(error).__name__)
    details = Path(found[2]).read_text()
    assert details.startswith("nybble inspect somewhere\n")
    assert "Traceback (most recent call last):" in details
    assert "test_unforeseen_errors.py" in details


def test_a_full_disk_does_not_hide_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    monkeypatch.setattr("nybble.workflows.inspect.inspect", lambda options: [][0])
    assert main(["inspect", "somewhere"]) == 70
    printed = capsys.readouterr().err
    assert "IndexError" in printed
    assert printed.splitlines()[-1].endswith("please report it with the details in stderr")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 GB")]
)
def test_memory_that_runs_out_is_no_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("nybble.workflows.inspect.inspect", fail)
    assert main(["inspect", "somewhere"]) == 2
    assert capsys.readouterr().err.startswith("nybble: the machine must have memory for this; it ran out; close other")


def test_an_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the hub does not answer\ntry again later")

    monkeypatch.setattr("nybble.workflows.inspect.inspect", fail)
    assert main(["inspect", "somewhere"]) == 2
    assert capsys.readouterr().err == "nybble: the hub does not answer try again later\n"
