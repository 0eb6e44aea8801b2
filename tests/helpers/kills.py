"""Runs a command again and again in a folder, killed (SIGKILL) at one rename after the other.

A process of its own forks a child for every attempt: what takes seconds, the imports, is done once. No thread of torch
has started when it forks.

    python -m tests.helpers.kills START WORK COMMAND...     RUN in COMMAND stands for the run folder

START is a run folder; every attempt begins with a copy of it in WORK/run. After each kill the same command runs
undisturbed. Prints a JSON object: "clean", what the undisturbed command leaves, and "kills", a list of what is left
after each kill and continuation: exit code, digests of the shipped files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PATCHED = ("replace", "rename")


def kills(start: Path, work: Path, command: Sequence[str], every: int = 1) -> dict[str, Any]:
    """What the program above prints. `every`: kill at each rename, or at every second, third, ..."""
    arguments = [sys.executable, "-m", "tests.helpers.kills", str(start), str(work), str(every), *command]
    ended = subprocess.run(arguments, capture_output=True, timeout=600, check=False, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr.decode()
    found: dict[str, Any] = json.loads(ended.stdout.decode().splitlines()[-1])
    return found


def _kill_at(count: int) -> None:
    """Let this process kill itself just before the count-th rename of a file or folder."""
    left = count

    def killing(original: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        return rename

    for name in _PATCHED:
        setattr(os, name, killing(getattr(os, name)))


def _run(command: Sequence[str], output: Path, killed_at: int) -> int:
    """Exit code of a forked child that runs a command; negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    with contextlib.suppress(BaseException), output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        if killed_at:
            _kill_at(killed_at)
        from nybble.cli.main import main

        code = main(list(command))
    os._exit(code)


def _left(run: Path, code: int, output: Path) -> dict[str, Any]:
    files = sorted(
        file
        for file in run.rglob("*")
        if file.is_file() and ("quantized" in file.parts or file.name == "openvino_model.bin")
    )
    digests = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    results = json.loads((run / "results.json").read_text())
    names = sorted(entry.name for entry in run.iterdir())
    said = output.read_text().strip().splitlines()
    return {"code": code, "files": digests, "models": results["models"], "names": names, "said": (said or [""])[-1]}


def _main(start: Path, work: Path, every: int, command: Sequence[str]) -> None:
    import optuna  # noqa: F401
    import torch
    import transformers

    import nybble.workflows.search
    import nybble.workflows.tune

    assert transformers.AutoModelForCausalLM
    assert nybble.workflows.search
    torch.set_num_threads(1)
    run, output = work / "run", work / "output"
    shutil.copytree(start, run, dirs_exist_ok=True)
    clean = _left(run, _run(command, output, 0), output)
    left, at = [], 1
    while True:
        shutil.rmtree(run)
        shutil.copytree(start, run)
        killed = _run(command, output, at)
        if killed != -signal.SIGKILL:
            break
        left.append(_left(run, _run(command, output, 0), output) | {"at": at})
        at += every
    print(json.dumps({"clean": clean, "kills": left}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
