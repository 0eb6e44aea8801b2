"""Command lines of a compression that takes a second."""

from pathlib import Path

# No exports and no tasks; the smallest amounts of text.
FLAGS = [
    "--data", "python-docs", "--seq_len", "32", "--num_calibration_samples", "16", "--group_size", "32",
    "--num_test_samples", "4", "--eval_tasks", "none", "--export", "none",
]  # fmt: skip


def compress_command(model: Path, run: Path, *more: str) -> list[str]:
    """`nybble compress --method rtn` of the model in a folder; flags in `more` win."""
    return ["compress", "--pretrained", str(model), "--output_dir", str(run), *FLAGS, "--method", "rtn", *more]
