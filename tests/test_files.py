"""nybble.files: files and folders appear complete or not at all; a small disk is refused."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nybble import files
from nybble.errors import ExportError, RunError


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
def test_whoever_may_read_other_files_of_a_run_may_read_tensors(tmp_path: Path) -> None:
    files.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    files.write_text(tmp_path / "x.txt", "text")
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, text = tmp_path / "last.safetensors", tmp_path / "results.json"
    files.save_tensors(tensors, {"a": torch.ones(3)}, {"step": 1})
    files.write_text(text, "old")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(tensors, {"a": torch.zeros(3)}, {"step": 2})
    with pytest.raises(KeyboardInterrupt):
        files.write_text(text, "new")
    loaded, note = files.load_tensors(tensors)
    assert loaded["a"].tolist() == [1, 1, 1]
    assert note == {"step": 1}
    assert text.read_text() == "old"


def test_text_keeps_its_line_ends_and_replaces_the_old_text(tmp_path: Path) -> None:
    for text in ("one\n", "caf\u00e9\ntwo\r\n"):
        files.write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_tensors_and_note_are_read_back(tmp_path: Path) -> None:
    saved = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    files.save_tensors(tmp_path / "x.safetensors", saved, {"list": [1, None], "nested": {"b": 0.5}})
    loaded, note = files.load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == saved[name].dtype for name in saved)
    assert note == {"list": [1, None], "nested": {"b": 0.5}}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["note"]) == note


def test_a_file_of_another_program_has_an_empty_note(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert files.load_tensors(tmp_path / "x.safetensors")[1] == {}


def test_tensors_are_copied_where_the_system_locks_mapped_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is mapped would change with its file. Windows cannot replace a mapped file."""
    monkeypatch.setattr(files, "_COPY_LOADED_TENSORS", True)
    path = tmp_path / "x.safetensors"
    files.save_tensors(path, {"a": torch.zeros(1 << 16)}, {})
    loaded, _ = files.load_tensors(path)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")  # 1.0
    assert float(loaded["a"][-1]) == 0.0


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x.safetensors could not be written: .*; free some disk space"):
        files.save_tensors(tmp_path / "missing" / "x.safetensors", {"a": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(RunError, match=r"last.safetensors must be a safetensors file; there is none; bring it back"):
        files.load_tensors(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(
        RunError, match=r"last.safetensors must be a readable safetensors file: .*; delete it to repeat the stage"
    ):
        files.load_tensors(path)


def test_single_tensors_are_read_from_an_open_file(tmp_path: Path) -> None:
    files.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2), "b": torch.zeros(2)}, {})
    with files.open_tensors(tmp_path / "x.safetensors") as file:
        assert sorted(file.keys()) == ["a", "b"]
        assert file.get_tensor("a").tolist() == [1, 1]


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "new") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / "new") as temporary:
        (temporary / "all").write_text("x")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["all"]


def test_a_new_folder_replaces_the_old_one_and_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    for folder in ("new", "new.tmp"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old").write_text("x")
    with files.atomic_folder(tmp_path / "new") as temporary:
        (temporary / "all").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["all"]


def test_a_folder_is_removed_whether_it_exists_or_not(tmp_path: Path) -> None:
    for folder in ("a", "a.tmp"):
        (tmp_path / folder / "inside").mkdir(parents=True)
    files.remove_folder(tmp_path / "a")
    files.remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_says_already_what_is_wrong_passes(tmp_path: Path) -> None:
    """Also one that quotes the words of a full disk."""
    error = ExportError("the export must be written to disk; it cannot be (No space left on device (os error 28))")
    with pytest.raises(ExportError) as raised, files.reporting_full_disk(tmp_path / "x"):
        raise error
    assert raised.value is error


def test_a_reader_opens_its_file_again_after_some_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, original = tmp_path / "a.safetensors", [], files.open_tensors
    files.save_tensors(path, {name: torch.arange(4.0) + i for i, name in enumerate("abcd")}, {})
    monkeypatch.setattr(files, "_BYTES_MAPPED", 32)
    monkeypatch.setattr(files, "open_tensors", lambda path: opened.append(path) or original(path))
    reader = files.TensorReader(path)
    assert [reader.read(name)[0].item() for name in "abcd"] == [0, 1, 2, 3]
    assert opened == [path] * 2


def test_a_reader_says_which_file_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="must be a safetensors file; there is none"):
        files.TensorReader(tmp_path / "a.safetensors").read("a")
    files.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(RunError, match="a.safetensors must be a readable safetensors file: .*b"):
        files.TensorReader(tmp_path / "a.safetensors").read("b")
