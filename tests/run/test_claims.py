"""Claims on work: one process has a claim, and frees it however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from nybble.errors import RunError
from nybble.run.claims import claimed


def test_what_is_claimed_is_free_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "task" / "run"
    with claimed(path) as first, claimed(path) as second, claimed(path.with_name("other")) as third:
        assert (first, second, third) == (True, False, True)
    with claimed(path) as again:
        assert again
    assert not path.exists()


def test_a_killed_process_leaves_no_claim(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from nybble.run.claims import claimed\n"
        "with claimed(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with claimed(tmp_path / "run") as free:
            assert not free
        other.kill()
        with claimed(tmp_path / "run", wait=True) as free:
            assert free


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file must be writable"), claimed(tmp_path / "file" / "run"):
        pass
