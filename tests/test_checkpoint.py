"""The run folder: refusals, locks, atomic writes; the 4-bit model on disk."""

import dataclasses
import json
import os
import platform
import resource
from pathlib import Path

import pytest
import torch

from nybble import files
from nybble.compress import pipeline
from nybble.errors import RunError
from nybble.models import quantized_model, selection
from nybble.options.commands import DistillOptions
from nybble.qat import absorb, insert
from nybble.quant.scheme import QuantScheme
from nybble.run import results as run_results
from nybble.run import resume as run_resume
from nybble.run.folder import Run
from tests.tiny import FAMILIES, make_model, make_tokenizer

OPTIONS = DistillOptions(pretrained="smollm2")


def test_a_used_folder_needs_resume_or_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "run"
    Run.open(path, OPTIONS, resume=False, overwrite=False).close()
    (path / "last.safetensors").write_text("x")
    with pytest.raises(
        RunError, match=r"already holds a run; add --resume to go on with it, or --overwrite to delete it"
    ):
        Run.open(path, OPTIONS, resume=False, overwrite=False)
    Run.open(path, OPTIONS, resume=True, overwrite=False).close()
    assert (path / "last.safetensors").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (path / "teacher").symlink_to(elsewhere, target_is_directory=True)
    Run.open(path, OPTIONS, resume=False, overwrite=True).close()
    assert not (path / "last.safetensors").exists()
    assert not (path / "teacher").is_symlink()
    assert elsewhere.is_dir(), "what a link points to is not the run's"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_foreign_folder_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="must be a new folder or an earlier run; it holds other files"):
        Run.open(tmp_path, OPTIONS, resume=False, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "settings", [b'baseURL = "https://example.org"\n', b"not toml", b"\xff\xfe", b'pretrained = "m"\nseed = 0\n']
)
def test_settings_of_another_program_are_not_taken_for_a_run(settings: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(settings)
    (tmp_path / "post.md").write_text("keep me")
    with pytest.raises(RunError, match="it holds other files"):
        Run.open(tmp_path, OPTIONS, resume=False, overwrite=True)
    assert (tmp_path / "post.md").read_text() == "keep me"


@pytest.mark.parametrize("text", [b'{"models": {}', b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_damaged_results_are_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(text)
    with pytest.raises(
        RunError, match=r"results.json must be the results of a run; .*; repair it, or make the run again"
    ):
        run_results.read_results(tmp_path)


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False)
    with pytest.raises(RunError, match="is in use by another process"):
        Run.open(tmp_path / "run", OPTIONS, resume=True, overwrite=False)
    run.close()
    Run.open(tmp_path / "run", OPTIONS, resume=True, overwrite=False).close()


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be writable; Not a directory; choose another folder"):
        Run.open(tmp_path / "file" / "run", OPTIONS, resume=False, overwrite=False)


@pytest.mark.parametrize(("field", "value"), [("lr", 0.5), ("seed", 7), ("pretrained", "other"), ("lora_rank", 8)])
def test_resume_with_another_option_names_it(field: str, value: object, tmp_path: Path) -> None:
    Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False).close()
    changed = dataclasses.replace(OPTIONS, **{field: value})
    with pytest.raises(
        RunError,
        match=rf"--resume must use the options of the run .*run: --{field} was {getattr(OPTIONS, field)}, got {value}",
    ):
        Run.open(tmp_path / "run", changed, resume=True, overwrite=False)


def test_what_changes_no_weights_may_change_on_resume(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False).close()
    changed = dataclasses.replace(OPTIONS, microbatch=1, cache="recompute", save_every=3)
    Run.open(tmp_path / "run", changed, resume=True, overwrite=False).close()
    assert run_resume.read_options(tmp_path / "run")["microbatch"] == 1


def test_a_run_killed_before_its_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / "config.toml.tmp").write_text("half")
    Run.open(tmp_path, OPTIONS, resume=False, overwrite=False).close()
    assert (tmp_path / "config.toml").exists()


def test_overwrite_deletes_what_runs_write_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False)
    run.results["exports"] = {"toy": {}}
    run.save_results()
    run.close()
    for folder in ("quantized", "toy", "toy.tmp", "notes"):
        (run.path / folder).mkdir()
        (run.path / folder / "file").write_text("")
    (run.path / "thesis.tex").write_text("precious")
    deleted, original = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, *a: (deleted.append(self.name), original(self, *a))[1])
    with caplog.at_level("INFO", "nybble"):
        Run.open(run.path, OPTIONS, resume=False, overwrite=True).close()
    assert deleted[-2:] == ["config.toml", "nybble-run.json"], "known as a run as long as anything is left of it"
    assert sorted(entry.name for entry in run.path.iterdir()) == [
        ".lock",
        "config.toml",
        "notes",
        "nybble-run.json",
        "thesis.tex",
    ]
    assert "left in place, as no run wrote it: notes, thesis.tex" in caplog.text


def test_overwrite_refuses_folders_that_are_more_than_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, home = tmp_path / "project" / "run", tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for folder in (run, run.parent, home):
        Run.open(
            folder, OPTIONS, resume=False, overwrite=False
        ).close() if not folder.exists() or folder == home else None
    monkeypatch.chdir(run)
    (run / "log.txt").write_text("precious")
    with pytest.raises(RunError, match="is the current folder or one above it; choose another --output_dir"):
        Run.open(Path("."), OPTIONS, resume=False, overwrite=True)
    with pytest.raises(RunError, match="is the home folder or one above it"):
        Run.open(home, OPTIONS, resume=False, overwrite=True)
    monkeypatch.chdir(tmp_path)
    (run / ".git").mkdir()
    with pytest.raises(RunError, match="is a git repository"):
        Run.open(run, OPTIONS, resume=False, overwrite=True)
    assert (run / "log.txt").read_text() == "precious"
    (run / ".git").rmdir()
    Run.open(run, OPTIONS, resume=False, overwrite=True).close()
    assert not (run / "log.txt").exists()


def test_disk_counts_what_is_already_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    (tmp_path / "teacher.bin").write_bytes(bytes(5000))
    files.check_free_disk(tmp_path, 5500)
    with pytest.raises(RunError):
        files.check_free_disk(tmp_path, 6500)


def test_seconds_add_up_over_sittings(tmp_path: Path) -> None:
    for resume in (False, True):
        run = Run.open(tmp_path / "run", OPTIONS, resume=resume, overwrite=False)
        run.results["seconds"]["train"] = run.results["seconds"].get("train", 0) + 10
        with run.stage("train"):
            pass
        run.close()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"]["train"] == pytest.approx(20, abs=0.5)
    assert results["peak_memory_bytes"]["cpu"] > 10**8


def test_a_killed_process_leaves_the_seconds_of_what_it_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 107.0, 110.0])
    monkeypatch.setattr("nybble.run.folder.time.perf_counter", lambda: next(clock))
    run = Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False)
    with run.stage("train"):
        run.save_results()
        assert json.loads((tmp_path / "run" / "results.json").read_text())["seconds"] == {"train": 7.0}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seconds"] == {"train": 10.0}
    run.save_results()
    assert run.results["seconds"] == {"train": 10.0}, "what happens between stages counts for none"
    run.close()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    files.save_tensors(path, {"a": torch.ones(3)}, {"step": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, note = files.load_tensors(path)
    assert tensors["a"].tolist() == [1, 1, 1]
    assert note == {"step": 1}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "made") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / "made") as temporary:
        (temporary / "all").write_text("x")
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["all"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"not tensors")
    with pytest.raises(
        RunError, match=r"last.safetensors must be a readable safetensors file; .*; delete it to start that stage again"
    ):
        files.load_tensors(tmp_path / "last.safetensors")


def test_a_small_disk_is_refused(tmp_path: Path) -> None:
    files.check_free_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(
        RunError,
        match=r"needs 9{15}.*GB for teacher states and checkpoints; .* GB are free; free some, choose another disk, or use less text",
    ):
        files.check_free_disk(tmp_path, int(999999999999999.9e9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_is_the_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(family, dtype=dtype)
    plan, scheme = selection.select_layers(model), QuantScheme()
    rows = insert.quantize_rows(model, plan.int8)
    layers = insert.insert(model, pipeline.compress(model, plan.int4, scheme, "rtn").starts, scheme, 4, 0)
    quantized = rows | absorb.absorb(model, layers)
    quantized_model.save_quantized(tmp_path / "quantized", model, make_tokenizer(), quantized)
    loaded, _, read = quantized_model.load_quantized(tmp_path / "quantized", dtype)
    other, _, _ = quantized_model.load_quantized(tmp_path / "quantized", torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert read.keys() == quantized.keys()
    for name, weight in quantized.items():
        assert torch.equal(weight.codes_OI, read[name].codes_OI)
        assert torch.equal(weight.scale_OG, read[name].scale_OG)
        assert torch.equal(weight.zero_point_OG, read[name].zero_point_OG)
        assert weight.scheme == read[name].scheme
    ids = torch.arange(16).view(1, 16)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == plan.tied


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="hands pages back to glibc's system alone")
def test_a_stage_begins_without_what_earlier_ones_freed(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", OPTIONS, resume=False, overwrite=False)
    pieces = [bytes([1]) * 60_000 for _ in range(4000)]
    kept = pieces[::20]  # so that the freed memory between them is holes
    pieces.clear()
    before = resident()
    with run.stage("next"):
        assert resident() < before - 150e6
    run.close()
    assert len(kept) == 200


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
