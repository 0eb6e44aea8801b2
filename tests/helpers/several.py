"""Several processes of nybble on this machine, with the environment that torchrun gives them.

`launch_program` starts each as a program of its own. `Launcher` forks them from a server that has imported torch and
transformers (but started no thread of torch), which takes a second instead of ten.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str


def _environment(index: int, count: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a process."""
    launcher = {
        "RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    return {name: str(value) for name, value in launcher.items()}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch_program(program: str, count: int = 2) -> list[Ended]:
    """Run Python code in several processes."""
    port, pipe = _free_port(), subprocess.PIPE
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=ROOT,
            env=os.environ | _environment(i, count, port),
        )
        for i in range(count)
    ]
    try:
        texts = [process.communicate(timeout=240) for process in started]
        return [Ended(process.returncode, *text) for process, text in zip(started, texts, strict=True)]
    finally:
        for process in started:
            process.kill()


class Launcher:
    """Runs commands of nybble in several processes.

    Args:
        folder: for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._launches = folder, 0
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.helpers.several"]
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()

    def start(
        self, commands: Sequence[Sequence[str]], code: str = "", number: int | None = None, apart: bool = False
    ) -> list[int]:
        """Start a process for each list of arguments; returns their ids.

        Args:
            code: Python that runs before the command, in process `number`; None = in all of them.
            apart: they do not know of each other.
        """
        self._launches += 1
        port, count = _free_port(), len(commands)
        children = [
            {
                "arguments": list(arguments),
                "environment": _environment(0, 1, port) if apart else _environment(i, count, port),
                "code": code if number in (None, i) else "",
                "output": str(self._output(i)),
            }
            for i, arguments in enumerate(commands)
        ]
        return [int(process) for process in self._ask({"start": children})]

    def wait(self, started: Sequence[int], timeout: float = 240) -> list[Ended]:
        """Wait for all of them; those that do not end in time are killed, and the test fails."""
        codes = self._ask({"wait": started, "timeout": timeout})
        assert None not in codes, f"not ended after {timeout} s: {codes}"
        texts = [[Path(f"{self._output(i)}.{end}").read_text() for end in ("out", "err")] for i in range(len(started))]
        return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]

    def run(self, arguments: Sequence[str], count: int = 2, code: str = "", number: int | None = None) -> list[Ended]:
        """Run one command in several processes. `code`, `number`: see `start`."""
        return self.wait(self.start([arguments] * count, code, number))

    def _output(self, index: int) -> Path:
        return self._folder / f"{self._launches}-{index}"

    def _ask(self, request: dict[str, Any]) -> list[Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: list[Any] = json.loads(self._server.stdout.readline())
        return answer


def lines_of(ended: Sequence[Ended]) -> list[str]:
    """What the processes say together that nybble itself says on stderr."""
    return [line for process in ended for line in process.err.splitlines() if line.startswith("nybble: ")]


def _start(child: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    exit_code = 70
    with contextlib.suppress(BaseException):
        for descriptor, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{child['output']}.{end}", os.O_CREAT | os.O_WRONLY), descriptor)
        os.environ.update(child["environment"])
        exec(child["code"], {})
        from nybble.cli.main import main

        exit_code = main(child["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def _wait(process: int, until: float) -> int | None:
    """Exit code of a child; None if it had to be killed."""
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _serve() -> None:
    import torch
    import transformers

    import nybble.workflows.compress
    import nybble.workflows.distill
    import nybble.workflows.tune  # noqa: F401

    assert transformers.AutoModelForCausalLM
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = [_start(child) for child in request["start"]]
        else:
            until = time.monotonic() + request["timeout"]
            answer = [_wait(process, until) for process in request["wait"]]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
