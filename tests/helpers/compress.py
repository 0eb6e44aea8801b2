"""Command lines and options of a compression that takes a second."""

from pathlib import Path
from typing import Any

from nybble.options.commands import CompressOptions

# No exports and no tasks; the smallest amounts of text.
FLAGS = [
    "--data", "python-docs", "--seq_len", "32", "--num_calibration_samples", "16", "--group_size", "32",
    "--num_test_samples", "4", "--eval_tasks", "none", "--export", "none",
]  # fmt: skip


def compress_command(model: Path, run: Path, *more: str) -> list[str]:
    """`nybble compress --method rtn` of the model in a folder; flags in `more` win."""
    return ["compress", "--pretrained", str(model), "--output_dir", str(run), *FLAGS, "--method", "rtn", *more]


def compress_options(model: Path, run: Path, **changes: Any) -> CompressOptions:
    """A compression on the calibration text that `distill_options` gives."""
    base = {
        "pretrained": str(model), "output_dir": str(run), "data": ("python-docs",), "method": "rtn", "seq_len": 32,
        "num_calibration_samples": 8, "num_test_samples": 4, "eval_tasks": (), "export": (), "group_size": 32,
    }  # fmt: skip
    return CompressOptions.of(**base | changes)
