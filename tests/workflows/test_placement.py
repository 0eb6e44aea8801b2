"""What cannot work on a model whose decoder blocks stay on disk is refused before the model is read."""

from pathlib import Path

import pytest

from nybble import processes
from nybble.errors import OptionError
from nybble.options.commands import CompressOptions
from nybble.workflows.placement import stays_on_disk


def options(tmp_path: Path, **changes: object) -> CompressOptions:
    return CompressOptions.of(pretrained=str(tmp_path), output_dir=str(tmp_path / "run"), offload="disk", **changes)


def test_an_average_of_bits_takes_a_gradient(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--bits 4.5 needs the model in memory, as the choice"):
        stays_on_disk(options(tmp_path, bits=4.5))


def test_several_processes_choose_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model does not fit in one of them, it stays on disk in all."""
    automatic = options(tmp_path).replace(offload="auto")
    for others, expected in (([False, False], False), ([False, True], True)):
        monkeypatch.setattr(processes, "gather", lambda fits_not, others=others: others)
        assert stays_on_disk(automatic) == expected
