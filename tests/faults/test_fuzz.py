"""Damaged files and random command lines end in success or one line; see tests/helpers/fuzz.py."""

from pathlib import Path

import pytest

from tests.helpers import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_is_damaged_can_be_read_before(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name != "run":
        folder.mkdir()
    assert fuzz.TARGETS[name].make(folder)
    fuzz.TARGETS[name].read(folder)


@pytest.mark.slow  # a minute
def test_a_minute_without_a_traceback() -> None:
    counts, failed = fuzz.run(sorted(fuzz.TARGETS), seconds=60, seed=0)
    assert failed == []
    assert all(count["read"] and count["refused"] for count in counts.values()), counts
