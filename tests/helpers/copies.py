"""Copies of folders that several tests share, for a test that changes its own."""

import shutil
from pathlib import Path


def copy_run(folder: Path, to: Path) -> Path:
    """Copy a folder with a run and what the run reads; the copy of the run reads the copies."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    for recipe in to.rglob("*.toml"):
        recipe.write_text(recipe.read_text().replace(str(folder), str(to)))
    return to
