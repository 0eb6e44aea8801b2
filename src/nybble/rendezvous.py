"""How the processes of torchrun and accelerate launch meet: what the environment says, and waiting for the others.

torch waits in C++, where Python handles no signal. So a thread waits, while the main thread looks out for Ctrl-C: a
process can be ended like any other until all are there.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from nybble.errors import RunError, first_line

# Processes import torch at different speeds, and a process on another machine may start minutes later.
_JOIN_TIMEOUT = timedelta(minutes=10)
# The first process may be alone for hours. That a process died shows in its connection, or in the launcher's signal.
_COLLECTIVE_TIMEOUT = timedelta(days=7)
_LOOK_EVERY = 0.1  # seconds between two looks at the thread

_waiting: threading.Thread | None = None


@dataclass(frozen=True)
class Meeting:
    """Where the processes met.

    Attributes:
        store: key-value store that all of them reach, of this start alone.
        index: number of this process, from 0.
        count: number of processes.
    """

    store: Any
    index: int
    count: int


def launched() -> int:
    """Number of processes that the launcher says it started; 1 without a launcher."""
    return max(1, environment_number("WORLD_SIZE", 1))


def environment_number(name: str, default: int) -> int:
    """A whole number that the launcher put into the environment; the default where it is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def launcher_holds_store() -> bool:
    """Whether the store is the launcher's (torchrun, accelerate launch) and outlives the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_waiting() -> bool:
    """Whether this process still waits for others, where an interrupted `meet` left it."""
    return _waiting is not None and _waiting.is_alive()


def meet() -> Meeting:
    """Wait for the other processes, and connect to them.

    Raises:
        RunError: they cannot be reached.
    """
    rank, size = environment_number("RANK", 0), launched()
    if rank >= size:
        raise RunError(
            f"RANK must be below WORLD_SIZE; it is {rank} of {size}; start the processes with torchrun or accelerate "
            "launch"
        )
    found: list[Meeting] = []
    failed: list[Exception] = []

    def wait() -> None:
        try:
            found.append(_meet())
        except Exception as error:
            failed.append(error)

    global _waiting
    _waiting = threading.Thread(target=wait, daemon=True)
    _waiting.start()
    while _waiting.is_alive():
        _waiting.join(_LOOK_EVERY)  # a signal is handled here
    if failed:
        if not isinstance(failed[0], RuntimeError | ValueError | OSError):
            raise failed[0]
        raise RunError(
            f"the {size} processes must reach each other; they do not ({first_line(failed[0])}); start them with "
            "torchrun or accelerate launch, and on several machines name an address and port of the first that is open"
        ) from failed[0]
    return found[0]


def _meet() -> Meeting:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(iter(rendezvous("env://", timeout=_JOIN_TIMEOUT)))
    # torchrun may start the processes again, with the same store, which knows how the first ones ended. On several
    # machines each counts its own restarts, so there the store counts how often this rank was started.
    start = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    if environment_number("GROUP_WORLD_SIZE", 1) > 1:
        start = store.add(f"starts of rank {rank}", 1)
    store = PrefixStore(f"start {start}", store)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
    )
    return Meeting(PrefixStore("nybble", store), rank, size)
