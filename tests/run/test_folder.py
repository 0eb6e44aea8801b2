"""The run folder: refusals, locks, what --overwrite deletes, seconds of stages."""

import multiprocessing
import platform
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nybble.errors import RunError
from nybble.options.commands import DistillOptions
from nybble.run import folder as run_folder
from nybble.run.folder import check_folder, check_free_disk, open_run, reopen_run
from nybble.run.results import RunResults, read_results


def options(path: Path, **changes: object) -> DistillOptions:
    return DistillOptions.of(**{"pretrained": "m", "output_dir": str(path)} | changes)


def begin(path: Path, **changes: object) -> None:
    open_run(options(path, **changes)).close()


def test_a_used_folder_needs_resume_or_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "run"
    begin(path)
    (path / "last.safetensors").write_text("x")
    with pytest.raises(
        RunError, match=r"already holds a run; add --resume to continue it, or --overwrite to delete it"
    ):
        begin(path)
    begin(path, resume=True)
    assert (path / "last.safetensors").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (path / "teacher").symlink_to(elsewhere, target_is_directory=True)
    begin(path, overwrite=True)
    assert not (path / "last.safetensors").exists()
    assert not (path / "teacher").is_symlink()
    assert elsewhere.is_dir(), "what a link points to does not belong to the run"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_foreign_folder_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="must be a new folder or an earlier run; it holds other files"):
        begin(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "settings",
    [b'baseURL = "https://example.org"\n', b"not toml", b"\xff\xfe", b'pretrained = "m"\nseed = 0\n'],
)
def test_settings_of_another_program_do_not_make_a_run(settings: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(settings)
    (tmp_path / "post.md").write_text("keep me")
    with pytest.raises(RunError, match="it holds other files"):
        begin(tmp_path, overwrite=True)
    assert (tmp_path / "post.md").read_text() == "keep me"


def try_to_reopen(path: Path, sender: Connection) -> None:
    """Send the reason why a run cannot be reopened, or nothing."""
    try:
        reopen_run(path).close()
    except RunError as error:
        sender.send(str(error))
    else:
        sender.send("")


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    run = open_run(options(tmp_path / "run"))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # A fork: a new process would take seconds to import torch.
    other = multiprocessing.get_context("fork").Process(target=try_to_reopen, args=(run.path, sender))
    other.start()
    other.join()
    assert "is in use by another process; wait until that ends" in receiver.recv()
    run.save()
    run.close()
    reopen_run(run.path).close()


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be writable; .*; change its permissions, or choose another folder"):
        begin(tmp_path / "file" / "run")


def test_a_run_that_cannot_be_opened_is_not_left_locked(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(RunError, match="--lr was"):
        begin(tmp_path / "run", resume=True, lr=0.5)
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(RunError, match="it is not JSON"):
        reopen_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    begin(tmp_path / "run", resume=True)


def test_a_run_killed_before_its_first_file_is_no_obstacle(tmp_path: Path) -> None:
    for name in (".lock", "config.toml.tmp", "nybble-run.json.tmp"):
        (tmp_path / name).write_text("half")
    begin(tmp_path)
    assert (tmp_path / "config.toml").exists()


def test_overwrite_deletes_what_runs_write_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(options(tmp_path / "run"))
    run.results.exports = {"toy": {}}
    run.save()
    run.close()
    for folder in ("quantized", "toy", "toy.tmp", "notes"):
        (run.path / folder).mkdir()
        (run.path / folder / "file").write_text("")
    (run.path / "thesis.tex").write_text("precious")
    deleted, original = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, *a: (deleted.append(self.name), original(self, *a))[1])
    with caplog.at_level("INFO", "nybble"):
        begin(run.path, overwrite=True)
    assert [name for name in deleted if name != ".lock"][-2:] == ["config.toml", "nybble-run.json"]
    left = sorted(entry.name for entry in run.path.iterdir() if entry.name != ".lock")
    assert left == ["config.toml", "notes", "nybble-run.json", "thesis.tex"]
    assert "left in place, because no run wrote it: notes, thesis.tex" in caplog.text


def test_overwrite_refuses_folders_that_are_more_than_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, home = tmp_path / "project" / "run", tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    begin(run)
    begin(home)
    monkeypatch.chdir(run)
    (run / "log.txt").write_text("precious")
    with pytest.raises(RunError, match="is the current folder or one above it; choose another --output_dir"):
        begin(Path("."), overwrite=True)
    with pytest.raises(RunError, match="is the home folder or one above it"):
        begin(home, overwrite=True)
    monkeypatch.chdir(tmp_path)
    (run / ".git").mkdir()
    with pytest.raises(RunError, match="is a git repository"):
        begin(run, overwrite=True)
    assert (run / "log.txt").read_text() == "precious"
    (run / ".git").rmdir()
    begin(run, overwrite=True)
    assert not (run / "log.txt").exists()


def test_a_folder_is_checked_without_being_touched(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "new", resume=False, overwrite=False) is False
    assert not (tmp_path / "new").exists()
    begin(tmp_path / "run")
    assert check_folder(tmp_path / "run", resume=True, overwrite=False) is True


def test_the_command_is_noted_and_those_that_resumed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/nybble", "distill", "--pretrained", "a b"])
    run = open_run(options(tmp_path))
    run.save()
    run.close()
    monkeypatch.setattr(sys, "argv", ["/bin/nybble", "distill", "--resume"])
    run = open_run(options(tmp_path, resume=True))
    assert run.results.command_line == "nybble distill --pretrained 'a b'"
    assert run.results.resumed_by == ["nybble distill --resume"]
    run.close()


def test_a_measurement_leaves_the_options_of_the_run_alone(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / "config.toml").read_text()
    open_run(options(tmp_path, resume=True, save_steps=3), keep_options=True).close()
    assert (tmp_path / "config.toml").read_text() == before
    begin(tmp_path, resume=True, save_steps=3)
    assert "save_steps = 3" in (tmp_path / "config.toml").read_text()


def test_seconds_add_up_over_sessions(tmp_path: Path) -> None:
    for resume in (False, True):
        run = open_run(options(tmp_path / "run", resume=resume))
        run.results.seconds["train"] = run.results.seconds.get("train", 0) + 10
        with run.stage("train"):
            pass
        run.close()
    results = read_results(tmp_path / "run")
    assert 20 <= results.seconds["train"] < 25
    assert results.peak_memory_bytes["cpu"] > 10**8


def test_a_killed_process_leaves_the_seconds_of_what_it_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(options(tmp_path / "run"))
    clock = iter([100.0, 107.0, 110.0])
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: next(clock))
    with run.stage("train"):
        run.save()
        assert read_results(run.path).seconds == {"train": 7.0}
    assert read_results(run.path).seconds == {"train": 10.0}
    run.save()
    assert run.results.seconds == {"train": 10.0}, "time between stages is not counted"
    run.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone hands pages back to the system")
def test_a_stage_begins_without_what_earlier_ones_freed(tmp_path: Path) -> None:
    run = open_run(options(tmp_path / "run"))
    pieces = [bytes([1]) * 60_000 for _ in range(4000)]
    kept = pieces[::20]  # so that the freed memory between them is holes
    pieces.clear()
    before = psutil.Process().memory_info().rss
    with run.stage("next"):
        assert psutil.Process().memory_info().rss < before - 150e6
    run.close()
    assert len(kept) == 200


@pytest.mark.parametrize("name", ["log.txt", "results.json.tmp", ".lock", "teacher/train.bin", "last.safetensors.tmp"])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_written_through_a_link(name: str, exists: bool, tmp_path: Path) -> None:
    begin(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    if exists:
        elsewhere.write_text("keep me")
    link = tmp_path / "run" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    for attempt in (lambda: begin(tmp_path / "run", resume=True), lambda: reopen_run(tmp_path / "run")):
        with pytest.raises(RunError, match=f"{name} must be a file of the run; it is a link"):
            attempt()
    assert elsewhere.exists() == exists
    assert not exists or elsewhere.read_text() == "keep me"


def test_a_part_of_a_run_may_be_on_another_disk(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "teacher").symlink_to(tmp_path / "disk", target_is_directory=True)
    begin(tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["../mine", "..", "a/b", "/tmp", ""])
def test_results_that_name_folders_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    for results in (RunResults(exports={name: {}}), RunResults(files={name: {"a": 1}})):
        results.save(tmp_path / "run")
        with pytest.raises(RunError, match="must name folders in the run"):
            begin(tmp_path / "run", resume=True)
        begin(tmp_path / "run", overwrite=True)
        assert (tmp_path / "mine").is_dir()


def test_free_disk_counts_the_files_of_an_earlier_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "train.bin").write_bytes(bytes(5000))
    check_free_disk(tmp_path, 6000)
    with pytest.raises(RunError):
        check_free_disk(tmp_path, 6001)


def test_a_small_disk_is_refused(tmp_path: Path) -> None:
    check_free_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(
        RunError, match=r"needs 1000000.00 GB for teacher states and checkpoints; .* GB are free; free some disk space"
    ):
        check_free_disk(tmp_path, 10**15)
