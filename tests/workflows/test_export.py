"""nybble export: what it says when it cannot go on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from nybble.cli.main import main
from nybble.errors import ExportError
from nybble.export.base import EXPORTERS
from nybble.files import reporting_full_disk
from nybble.run.results import read_results
from tests.helpers.compress import compress_command
from tests.helpers.copies import copy_run
from tests.helpers.plain_exporter import PlainExporter
from tests.helpers.tiny import save_model


class OtherExporter(PlainExporter):
    name = label = "other"
    model_file = "other.safetensors"
    weight_files = ("other.safetensors",)


@pytest.fixture(scope="module", autouse=True)
def _formats() -> Iterator[None]:
    for exporter in (PlainExporter(), OtherExporter()):
        EXPORTERS.register(exporter.name, exporter)
    yield
    for name in ("plain", "other"):
        EXPORTERS.unregister(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert main(compress_command(save_model(folder / "model", "smollm", num_hidden_layers=1), folder / "run")) == 0
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, without the name of the program."""
    return capsys.readouterr().err.splitlines()[-1].removeprefix("nybble: ")


def test_the_report_of_the_run_knows_of_the_export(run: Path) -> None:
    assert "| export other |" not in (run / "report.md").read_text()
    assert main(["export", str(run), "--to", "other"]) == 0
    assert "| export other |" in (run / "report.md").read_text()
    shutil.rmtree(run / "other")


def test_a_full_disk_names_a_command_that_exists(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PlainExporter, "write", write)
    assert main(["export", str(run), "--to", "plain"]) == 2
    assert said(capsys) == (
        f"{run / 'plain'} must fit on the disk; it could not be written: No space left on device; "
        f"free some disk space, then run nybble export {run} again"
    )


def test_a_report_on_a_full_disk_does_not_advise_resume(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, _: str) -> None:
        with reporting_full_disk(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nybble.report.command.write_text", write)
    assert main(["report", str(run)]) == 2
    assert said(capsys).endswith("No space left on device; free some disk space, then run the command again")


def test_a_run_in_use_and_one_that_is_read_only_are_refused_without_output_dir(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(run / ".lock"):
        assert main(["export", str(run), "--to", "plain"]) == 2
    assert said(capsys) == f"{run} is in use by another process; wait until that ends"

    def denied(_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("nybble.run.folder.FileLock.acquire", denied)
    assert main(["export", str(run), "--to", "plain"]) == 2
    assert (
        said(capsys) == f"{run} must be writable; Permission denied; change its permissions, or choose another folder"
    )


@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interruption_says_what_is_finished_and_how_to_go_on(
    swallowed: bool, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            if swallowed:
                raise RuntimeError("something happened") from None
            raise

    monkeypatch.setattr(OtherExporter, "write", write)
    assert main(["export", str(run), "--to", "plain", "other"]) == 130
    assert said(capsys) == f"interrupted; finished: plain; for the rest: nybble export {run} --to other"
    assert main(["export", str(run), "--to", "other"]) == 130
    assert said(capsys) == f"interrupted; for the formats: nybble export {run} --to other"


def test_of_all_formats_one_that_fails_does_not_stop_the_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(run.parent, tmp_path / "copy") / "run"

    def fail(*_: object) -> None:
        raise ExportError("an export to other needs more; remove other from --export")

    monkeypatch.setattr(OtherExporter, "write", fail)
    monkeypatch.setattr("nybble.workflows.export.check_exportable", lambda *_: ("other", "plain"))
    assert main(["export", str(run), "--to", "all"]) == 2
    assert "an export to other needs more; the other formats of --to all follow" in capsys.readouterr().out
    assert (run / "plain").is_dir()
    assert not (run / "other").exists()
    assert main(["export", str(run), "--to", "other"]) == 2, "asked for by name"


def test_files_of_other_people_are_not_replaced_by_a_first_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(run.parent, tmp_path / "copy") / "run"
    results = read_results(run)
    results.exports.pop("other", None)
    results.files.pop("other", None)
    results.save(run)
    (run / "other").mkdir(exist_ok=True)
    (run / "other" / "config.json").write_text("mine")
    assert main(["export", str(run), "--to", "other"]) == 2
    assert "other/config.json must not have a name that is written now" in said(capsys)
    assert (run / "other" / "config.json").read_text() == "mine"


def test_what_is_no_run_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nosuch"), "--to", "plain"]) == 2
    assert said(capsys) == f"{tmp_path / 'nosuch'} must be a run folder; there is nothing at this path; check the path"
    assert main(["export", str(run / "quantized"), "--to", "plain"]) == 2
    assert said(capsys).endswith(f"it has no nybble-run.json of nybble's; did you mean {run}?")
    assert main(["export", str(tmp_path), "--to", "plain"]) == 2
    assert said(capsys).endswith("it has no nybble-run.json of nybble's")


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (run / "quantized" / "weights.safetensors").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))
    shutil.rmtree(run / "plain", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(PlainExporter, "write", lambda *_: pytest.fail("it was begun"))
        assert main(["export", str(run), "--to", "plain", "other"]) == 2
    assert re.fullmatch(
        rf"{run} needs at least \S+ GB for exports to plain, other; \S+ GB are free; free some disk space, or .*",
        said(capsys),
    )
    assert main(["export", str(run), "--to", "plain"]) == 0


EVAL = ["--data", "python-docs", "--seq_len", "32", "--num_samples", "2", "--device", "cpu", "--dtype", "float32"]
CHAT = ["--prompt", "one", "--max_new_tokens", "3", "--device", "cpu", "--dtype", "float32"]


def test_a_damaged_file_of_an_export_is_named_wherever_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--to", "plain"]) == 0
    copy = tmp_path / "elsewhere"
    shutil.copytree(run / "plain", copy)
    assert json.loads((copy / "nybble-export.json").read_text())["format"] == "plain"
    (copy / "README.md").write_text("")
    (copy / "generation_config.json").write_text("{}")  # settings may be edited
    for command in (["eval", str(copy), *EVAL], ["chat", str(copy), *CHAT]):
        assert main(command) == 0
    damages: list[tuple[str, bytes | None, str]] = []
    for name in ("plain.safetensors", "tokenizer.json"):
        whole = (copy / name).read_bytes()
        damages += [(name, whole[: len(whole) // 2], f"it is cut to {len(whole) // 2}"), (name, b"", "it is cut to 0")]
    damages += [("plain.safetensors", None, "it is missing")]
    capsys.readouterr()
    for name, content, words in damages:
        whole = (copy / name).read_bytes()
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        for command in (["eval", str(copy), *EVAL], ["chat", str(copy), *CHAT], ["inspect", str(copy)]):
            assert main(command) == 2
            assert said(capsys) == (
                f"{copy / name} must have {len(whole)} bytes; {words}; copy it again, or make it again: "
                "nybble export RUN --to plain"
            )
        (copy / name).write_bytes(whole)
    for note in ("[]", '{"format": []}', '{"format": "plain", "bytes": 3}', '{"format": "gone"}', "{"):
        (copy / "nybble-export.json").write_text(note)
        assert main(["eval", str(copy), *EVAL]) == 0
    os.truncate(run / "plain" / "plain.safetensors", 5)
    for command in (["eval", str(run / "plain"), *EVAL], ["chat", str(run), *CHAT]):
        assert main(command) == 2
        assert said(capsys).endswith(f"or make the folder again: nybble export {run} --to plain")
    weights = copy / "plain.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert main(["eval", str(copy), *EVAL]) == 2
    assert re.fullmatch(
        rf"{copy} must be an export that plain opens; it does not \(SafetensorError: .*\); copy it again, or .* plain",
        said(capsys),
    )
