"""What must hold before several processes share a run: they are the same, and there is work for each of them."""

from __future__ import annotations

import platform
import zlib
from pathlib import Path

import nybble
from nybble import processes, rendezvous
from nybble.errors import OptionError
from nybble.options.base import Command
from nybble.run.machine import package_versions


def check_processes(options: Command) -> None:
    """Check the processes that torchrun or accelerate launch started; one process passes.

    Raises:
        OptionError: they were not joined, differ in options, versions or code, or are more than a batch has sequences.
    """
    launched, count = rendezvous.launched(), processes.count()
    if launched > 1 and count == 1:
        raise OptionError(
            f"nybble {options.NAME} must run in one process when Python calls it; it was started in {launched}; use "
            f"torchrun with -m nybble {options.NAME}"
        )
    shard = options.flat().get("shard", False)
    if shard and count == 1:
        raise OptionError(
            "--shard divides the weights among several processes; there is one; start them with torchrun or accelerate "
            "launch, or leave --shard out"
        )
    if count == 1:
        return
    facts = {f"--{name}": str(value) for name, value in options.flat().items()}
    facts |= {f"version of {name}": version for name, version in package_versions().items()}
    facts |= {"version of python": platform.python_version(), "code of nybble": _code()}
    processes.check_same(facts)
    batch = options.flat().get("batch_size", count)
    if batch < count:
        raise OptionError(
            f"--batch_size must be at least the number of processes; it is {batch}, with {count} processes; start "
            "fewer of them, or raise --batch_size"
        )
    if shard and batch % count:
        raise OptionError(
            f"--batch_size must be divisible by the number of processes with --shard, as they compute together; it is "
            f"{batch}, with {count} processes"
        )


def _code() -> str:
    """Checksum of the source files of nybble."""
    crc = 0
    for file in sorted(Path(nybble.__file__).parent.rglob("*.py")):
        crc = zlib.crc32(file.read_bytes(), crc)
    return f"{crc:08x}"
