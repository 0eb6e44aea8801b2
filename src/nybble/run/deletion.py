"""Delete a run, and nothing that other people put into its folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from nybble.errors import RunError
from nybble.files import file_sizes
from nybble.models.positions_file import POSITIONS_FILE
from nybble.run.results import read_results

log = logging.getLogger("nybble")


def delete_run(path: Path, own: Sequence[str], lock: str) -> None:
    """Delete what a run wrote; other files in its folder stay and are named.

    Args:
        path: the run folder.
        own: names of what runs write beside their exports, in the order in which they are deleted.
        lock: name of the file that stays.
    """
    exports: set[str] = set()
    noted: dict[str, dict[str, int]] = {}
    with suppress(RunError):  # damaged results: the exports stay
        results = read_results(path)
        exports, noted = set(results.exports), results.files
    for name in (*exports, *own):
        for entry in (path / f"{name}.tmp", path / f"{name}.old.tmp", path / name):
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
            elif entry.is_dir() and entry.name in noted:
                _delete_files(entry, (*noted[name], POSITIONS_FILE))
            elif entry.is_dir():
                shutil.rmtree(entry)
    if left := sorted(entry.name for entry in path.iterdir() if entry.name != lock):
        log.info("%s: left in place, because no run wrote it: %s", path, ", ".join(left))


def _delete_files(folder: Path, names: Collection[str]) -> None:
    """Delete files of a folder; then the folders inside, and itself, if nothing is left in them.

    `names` come from a file, which may name anything: what is deleted is looked for in the folder.
    """
    for name in file_sizes(folder):
        if name in names:
            (folder / name).unlink()
    inside = sorted((entry for entry in folder.rglob("*") if entry.is_dir() and not entry.is_symlink()), reverse=True)
    for entry in (*inside, folder):
        with suppress(OSError):
            entry.rmdir()
