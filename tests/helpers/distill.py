"""Options of a distillation that takes a second, and ways to interrupt a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nybble.models.quantized_file import WEIGHTS_FILE
from nybble.options.commands import DistillOptions
from nybble.training.trainer import Trainer

# A nybble that kill -9 ends just before the argv[2]-th time that a file named argv[1] would be put in its place.
KILLED_PROGRAM = """
import os, signal, sys
name, left, replace = sys.argv[1], int(sys.argv[2]), os.replace

def killing(source, target):
    global left
    left -= os.path.basename(target) == name
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killing
sys.argv[:3] = ["nybble"]
from nybble.cli.main import main
sys.exit(main())
"""


def distill_options(model: Path, run: Path, **changes: object) -> DistillOptions:
    """Options for a tiny model in a folder: four steps, a checkpoint after each, no tasks and no export."""
    base: dict[str, object] = {
        "pretrained": str(model), "output_dir": str(run), "data": ("python-docs",), "method": "rtn", "seq_len": 32,
        "num_train_samples": 8, "epochs": 2, "batch_size": 4, "microbatch_size": 2, "lr": 5e-3, "scale_lr": 5e-3,
        "norm_lr": 2e-3, "lora_rank": 4, "num_validation_samples": 4, "num_test_samples": 4, "eval_tasks": (),
        "export": (), "save_steps": 1, "report_to": (),
    }  # fmt: skip
    if "init_from" in changes:
        del base["method"]
    return DistillOptions.of(**base | changes)


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, in the middle of training step `steps` + 1."""
    original = Trainer.run

    def run(self: Trainer) -> Iterator[dict[str, float]]:
        for record in original(self):
            if record["step"] > steps:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(Trainer, "run", run)


def kill_at(name: str, count: int, arguments: Sequence[str]) -> None:
    """Run nybble in a process that is killed just before a file called `name` is put in place for the count-th time."""
    command = [sys.executable, "-c", KILLED_PROGRAM, name, str(count), *arguments]
    ended = subprocess.run(command, capture_output=True, timeout=120, env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def shipped_bytes(run: Path) -> bytes:
    """The 4-bit model of a run."""
    return (run / "quantized" / WEIGHTS_FILE).read_bytes()
