"""Folders that are replaced: at every moment the old one or the new one is whole, and what is missing is made again."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble import files
from nybble.cli.main import main
from nybble.run.results import Phase, read_results
from nybble.workflows import search as search_module
from nybble.workflows import tune as tune_module
from nybble.workflows.distill import distill
from nybble.workflows.tune import tune
from tests.helpers.cases import fast_cases
from tests.helpers.compress import compress_command
from tests.helpers.distill import distill_options, shipped_bytes
from tests.helpers.kills import kills
from tests.helpers.tiny import save_model
from tests.helpers.tune import tune_options, write_letters

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX forks")


def killed_at(count: int, act: Callable[[], None]) -> bool:
    """Run `act` in a child that is killed just before its count-th rename or deletion; False if it was not killed."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = count

    def killing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        return call

    for name in ("replace", "rename", "unlink", "rmdir"):
        setattr(os, name, killing(getattr(os, name)))
    act()
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@needs_fork
@pytest.mark.parametrize("leftover", fast_cases([False, True], [True]))
def test_the_old_folder_or_the_new_one_is_whole_at_every_moment(leftover: bool, tmp_path: Path) -> None:
    path, count = tmp_path / "quantized", 0
    old, new = (dict.fromkeys(("a", "b/c", "d"), content) for content in (b"old", b"new"))

    def write(folder: Path, whole: dict[str, bytes]) -> None:
        for name, content in whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def replace() -> None:
        with files.atomic_folder(path) as temporary:
            write(temporary, new)

    found = set()
    while True:
        count += 1
        shutil.rmtree(tmp_path)
        write(path, old)
        if leftover:
            write(path.with_name("quantized.tmp"), {"a": b"half"})
        if not killed_at(count, replace):
            break
        files.settle_folder(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["quantized"]
        assert contents(path) in (old, new)
        found.add(contents(path)["a"])
        replace()
        assert contents(tmp_path) == {f"quantized/{name}": b"new" for name in new}
    assert count > 5
    assert found == {b"old", b"new"}


@needs_fork
def test_a_deleted_folder_is_whole_or_gone(tmp_path: Path) -> None:
    path, count, found = tmp_path / "compress", 0, set()
    while True:
        count += 1
        path.mkdir(exist_ok=True)
        for name in "abc":
            (path / name).write_text("x")
        if not killed_at(count, lambda: files.remove_folder(path)):
            break
        files.settle_folder(path)
        found.add(tuple(sorted(contents(path))))
        assert not (tmp_path / "compress.tmp").exists()
    assert found == {("a", "b", "c"), ()}


@pytest.mark.usefixtures("_plain_exporter")
@pytest.mark.parametrize("command", ["compress", pytest.param("distill", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_a_finished_run_lacks_is_made_again(command: str, tmp_path: Path) -> None:
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"

    def make(*more: str) -> None:
        if command == "compress":
            assert main([*compress_command(model, run, "--export", "plain", "--dtype", "float32"), *more]) == 0
        else:
            distill(distill_options(model, run, export=("plain",), resume=bool(more)))

    def made() -> dict[str, dict[str, bytes]]:
        """What the run made; model cards name the time and memory of all sessions, which grow."""
        folders = {name: contents(run / name) for name in ("quantized", "plain")}
        assert b"## How it was made" in folders["plain"].pop("README.md")
        return folders

    make()
    whole, results = made(), read_results(run)
    assert results.files.keys() == whole.keys()
    # Positions may be deleted.
    needed = whole["quantized"].keys() - {"positions.safetensors"}
    assert results.files["quantized"] == {name: len(whole["quantized"][name]) for name in needed}
    damages: list[Callable[[Path], Any]] = [
        lambda folder: shutil.rmtree(folder),
        lambda folder: [file.unlink() for file in folder.glob("*.json")],
        lambda folder: (folder / "tokenizer.json").write_text(""),
        lambda folder: os.truncate(max(folder.glob("*.safetensors")), 1000),
        lambda folder: folder.rename(folder.with_name(folder.name + ".old.tmp")),
    ]
    for name in whole:
        for damage in damages:
            damage(run / name)
            make("--resume")
            assert made() == whole
            again = read_results(run)
            assert (again.phase, again.models) == (Phase.FINISHED, results.models)
            assert {name: files.keys() for name, files in again.files.items()} == {
                name: files.keys() for name, files in results.files.items()
            }
            assert not list(run.glob("*.tmp"))


@pytest.mark.slow
def test_nothing_beside_the_run_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.data.generate.MIN_DISTINCT_NGRAMS", 1.1)
    model, run = save_model(tmp_path / "model", "smollm"), tmp_path / "run"
    for name in ("run.tmp", "run.old.tmp", "run.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    before = contents(tmp_path)
    command = compress_command(model, run, "--data", "self", "--method", "gptq", "--eval_data", "python-docs")
    assert main(command) == 2
    assert contents(tmp_path) == before
    assert not run.exists()


@pytest.mark.usefixtures("_plain_exporter")
def test_what_people_put_into_an_export_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "smollm", num_hidden_layers=1), tmp_path / "run"
    command = compress_command(model, run, "--export", "plain")
    assert main(command) == 0
    exported = contents(run / "plain").keys()
    mine = {"Modelfile": b"FROM ./plain.safetensors", "notes/a/b.txt": b"mine"}
    for name, content in mine.items():
        (run / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "plain" / name).write_bytes(content)
    (run / "plain" / "Modelfile").chmod(0o444)
    (run / "plain" / "empty").mkdir()
    for _ in range(2):  # the second time after all files were noted again
        assert main(["export", str(run), "--to", "plain"]) == 0
        assert contents(run / "plain").keys() == exported | mine.keys()
        assert mine.items() <= contents(run / "plain").items()
        assert (run / "plain" / "empty").is_dir()
        assert read_results(run).files["plain"].keys() == exported
    results = read_results(run)
    del results.files["plain"]["plain.safetensors"]  # as if it were another person's
    results.save(run)
    before = contents(run)
    capsys.readouterr()
    assert main(["export", str(run), "--to", "plain"]) == 2
    assert "must not have a name that is written now" in capsys.readouterr().err
    assert contents(run / "plain") == {
        name.removeprefix("plain/"): content for name, content in before.items() if name.startswith("plain/")
    }
    results.files["plain"] |= {"plain.safetensors": 1, "../../mine": 1, str(tmp_path / "mine"): 1}
    results.save(run)
    (tmp_path / "mine").write_text("not of the run")
    assert main([*command, "--overwrite", "--export", "none"]) == 0
    assert contents(run / "plain") == mine
    assert (tmp_path / "mine").exists()


@pytest.mark.usefixtures("_plain_exporter")
def test_a_file_in_the_place_of_an_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run = save_model(tmp_path / "model", "smollm", num_hidden_layers=1), tmp_path / "run"
    assert main(compress_command(model, run)) == 0
    (run / "plain").write_text("mine")
    assert main(["export", str(run), "--to", "plain"]) == 2
    assert "plain must be a folder, or not be there; it is a file; move it" in capsys.readouterr().err
    assert (run / "plain").read_text() == "mine"
    assert main([*compress_command(model, run, "--export", "plain"), "--resume"]) == 2
    assert (run / "plain").read_text() == "mine"


@pytest.fixture
def smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of tune that chose the smallest ranks, so that a search finds better ones."""
    write_letters(tmp_path / "letters.jsonl")
    monkeypatch.setattr(tune_module, "propose_candidates", lambda *given: {(1, 1): "the smallest"})
    tune(tune_options(tmp_path, epochs=1, lora_rank_space=(8, 1), quantize="after", scale_epochs=1, dtype="float32"))
    monkeypatch.undo()
    return tmp_path / "run"


@pytest.mark.slow
def test_a_search_that_was_killed_before_the_measurement_is_finished_by_the_same_command(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="the extra search")
    command = ["search", str(smallest), "--sampler", "random", "--num_trials", "8", "--apply"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(search_module, "finish", lambda *_: (_ for _ in ()).throw(RuntimeError()))
        search_module.search(
            search_module.SearchOptions.of(run=str(smallest), sampler="random", num_trials=8, apply=True)
        )
    shipped = shipped_bytes(smallest)
    assert read_results(smallest).phase == Phase.QUANTIZED
    assert main(command) == 0
    results = read_results(smallest)
    assert results.phase == Phase.FINISHED
    assert "tuned" in results.models
    assert shipped_bytes(smallest) == shipped


@needs_fork
@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_command(smallest: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search")
    start, work = tmp_path / "start", tmp_path
    shutil.copytree(smallest, start)
    command = ["search", str(smallest), "--sampler", "random", "--num_trials", "4", "--apply"]
    found = kills(start, work, command, every=5)
    clean = found["clean"]
    assert clean["code"] == 0, clean["said"]
    weights = hashlib.sha256(shipped_bytes(start)).hexdigest()
    assert clean["files"]["quantized/weights.safetensors"] != weights, "the search has found something better"
    assert len(found["kills"]) >= 8
    for left in found["kills"]:
        at = {"at": left.pop("at")}
        assert left["code"] == 0, (at, left["said"])
        assert (left["files"], left["models"], left["names"]) == (clean["files"], clean["models"], clean["names"]), at
