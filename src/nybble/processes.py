"""The processes of one command, as `torchrun -m nybble` and `accelerate launch -m nybble` start them.

All processes run the same workflow with the same options. What is costly is divided (`share`), and its sums are added
up (`add_up`); what is written is written by the first process alone (nybble.files, run folder, console); and what
only one can do is done by `on_first`, while the others wait for its result.

Everything travels by collective operations: gloo for the CPU, NCCL for GPUs. They are polled, so that a waiting process
still handles signals, and notices when another one ends. The first process that ends with an error notes this in the
key-value store of the launcher and prints its line; the others end with the same exit code and print nothing.

A command in one process changes nothing here: `count` is 1, nothing is sent, and torch.distributed is not imported.
"""

from __future__ import annotations

import os
import pickle  # of values that other processes of this command send
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nybble import rendezvous
from nybble.errors import OptionError, RunError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 5e-5, 5e-3  # seconds between two looks at an operation
_CHECK_EVERY = 0.2  # seconds between two looks into the store
_LINGER = 15.0  # seconds that a process with the store waits for the others at the end
_ENDED, _LEFT = "ended", "left"


@dataclass
class _Group:
    """This process among those of the command.

    Attributes:
        store: key-value store that all processes reach.
        index: number of this process, from 0.
        count: number of processes.
        alone: this process does what only one can do.
        sent: kind of transfer -> bytes that this process has handed over.
    """

    store: Any
    index: int
    count: int
    alone: bool = False
    sent: Counter[str] = field(default_factory=Counter)


_group: _Group | None = None


def count() -> int:
    """Number of processes that divide the work here; 1 inside `on_first`."""
    return 1 if _group is None or _group.alone else _group.count


def index() -> int:
    """Number of this process, from 0."""
    return 0 if _group is None else _group.index


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return index() == 0


def local_index() -> int:
    """Number of this process on its machine, from 0: its GPU."""
    return 0 if _group is None else rendezvous.environment_number("LOCAL_RANK", 0)


def local_count() -> int:
    """Number of processes on this machine, which share its memory."""
    return 1 if _group is None else rendezvous.environment_number("LOCAL_WORLD_SIZE", 0) or _group.count


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that the launcher started; nothing with one process.

    Raises:
        RunError: the others cannot be reached.
    """
    global _group
    if rendezvous.launched() == 1:
        yield
        return
    met = rendezvous.meet()
    _group = _Group(met.store, met.index, met.count)
    import torch.distributed as dist

    with _quiet_but_first():
        yield
    with _peers_alive():
        dist.destroy_process_group()
    _leave(_group)


@contextmanager
def _quiet_but_first() -> Iterator[None]:
    """Discard what is printed here, by libraries too, unless this is the first process."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def check_same(facts: Mapping[str, str]) -> None:
    """Compare facts, such as versions, options and texts, with those of the first process.

    Raises:
        OptionError: a fact differs; it is named.
    """
    for i, others in enumerate(given := gather(dict(facts))):
        for name in given[0]:
            if others.get(name) != given[0][name]:
                raise OptionError(
                    f"all processes must have the same {name}; process 0 has {given[0][name]}, process {i} has "
                    f"{others.get(name)}; start them with the same command, environment and files"
                )


def checksum(tensors: Iterable[Tensor]) -> str:
    """CRC-32 of the bits of tensors, for `check_same`; "" with one process."""
    crc = 0
    for tensor in tensors if count() > 1 else ():
        crc = zlib.crc32(tensor.detach().cpu().float().numpy().tobytes(), crc)
    return f"{crc:08x}" if count() > 1 else ""


def share(total: int) -> range:
    """Which of `total` pieces of work this process does: every `count`-th."""
    return range(index() if count() > 1 else 0, total, count())


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    import torch

    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = gather_parts(torch.tensor(len(content))).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(content)] = content
    return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(gather_parts(padded), sizes, strict=True)]


def merge(shares: Sequence[T], total: int) -> list[T]:
    """Put the results of `share(total)` of all processes into their order."""
    parts = gather(list(shares))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def on_first(function: Callable[[], T]) -> T:
    """Call a function in the first process, alone meanwhile; all return its result. An error must end the command."""
    if _group is None or _group.alone:
        return function()
    import torch
    import torch.distributed as dist

    if is_first():
        _group.alone = True
        try:
            value = function()
        finally:
            _group.alone = False
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size = torch.tensor([len(content) if is_first() else 0])
    _finish(lambda: dist.broadcast(size, 0, async_op=True))
    if not is_first():
        content = torch.empty(int(size), dtype=torch.uint8)
    _finish(lambda: dist.broadcast(content, 0, async_op=True))
    return value if is_first() else pickle.loads(content.numpy().tobytes())  # type: ignore[no-any-return]


def wait() -> None:
    """Wait until all processes are here: what the first has written before can be read."""
    gather(None)


def add_up(tensors: Sequence[Tensor], what: str) -> None:
    """Add up tensors over all processes, in place. All processes then have the same bits.

    Tensors of one dtype and device travel in one buffer.

    Args:
        tensors: dense tensors of the same shapes in all processes.
        what: kind of transfer, for `bytes_sent`.
    """
    if _group is None or _group.alone:
        return
    import torch
    import torch.distributed as dist

    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        alone = len(same) == 1 and same[0].is_contiguous()
        buffer = same[0].detach().view(-1) if alone else torch.cat([tensor.detach().reshape(-1) for tensor in same])
        _finish(partial(dist.all_reduce, buffer, async_op=True))
        _group.sent[what] += buffer.nbytes
        parts = buffer.split([tensor.numel() for tensor in same])
        for tensor, summed in () if alone else zip(same, parts, strict=True):
            tensor.detach().copy_(summed.view_as(tensor))


def collect(tensor: Tensor, what: str) -> list[Tensor]:
    """Bring a tensor on the CPU, of one shape and dtype in all processes, to the first one.

    Returns: in the first process the tensors of all, in their order; in the others nothing.
    """
    if _group is None or _group.alone:
        return [tensor]
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(tensor) for _ in range(count())] if is_first() else []
    content, received = tensor.view(torch.uint8), [part.view(torch.uint8) for part in parts]  # gloo has no bfloat16
    _finish(lambda: dist.gather(content, received or None, 0, async_op=True))
    if not is_first():
        _group.sent[what] += content.nbytes
    return parts


def gather_parts(part: Tensor, what: str = "") -> Tensor:
    """The tensors of all processes, of one shape and dtype: [count, *shape]. `what`: see `add_up`; "" = uncounted."""
    if _group is None or _group.alone:
        return part[None]
    import torch.distributed as dist

    flat = part.contiguous().view(-1)
    whole = flat.new_empty(_group.count * len(flat))
    # torch 2.13 has a new name and warns of the old one.
    begin: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    _finish(lambda: begin(whole, flat, async_op=True))
    _group.sent.update({what: part.nbytes} if what else {})
    return whole.view(_group.count, *part.shape)


def bytes_sent() -> dict[str, int]:
    """Kind of transfer -> bytes that this process handed to it so far; empty with one process.

    A ring of N processes sends 2 (N - 1) / N times as many over each connection to add them up, and N - 1 times as many
    to gather them.
    """
    return {} if _group is None else dict(_group.sent)


def claim_end(code: int) -> int | None:
    """Note that this process ends with an exit code.

    Returns:
        None if this process has to say why; otherwise the exit code of the process that said it.
    """
    if _group is None:
        return None
    mine = f"{_group.index} {code}"
    try:
        said: str = _group.store.compare_set(_ENDED, "", mine).decode()
    except RuntimeError:  # the store went away with its process, of which one of the others speaks
        speaks = _group.index == 0 if rendezvous.launcher_holds_store() else _group.index <= 1
        return None if speaks else code
    return None if said == mine else int(said.split()[1])


def end(code: int) -> None:
    """End this process now, after an error, if there are several: threads of torch may wait for one that is gone."""
    if code and (_group is not None or rendezvous.is_waiting()):
        sys.stdout.flush()
        sys.stderr.flush()
        if _group is not None:
            _leave(_group)
        os._exit(code)


def _finish(begin: Callable[[], Any]) -> None:
    """Begin a collective operation, and wait for it. RunError if another process ended."""
    assert _group is not None
    with _peers_alive():
        work, pause, checked = begin(), _SHORTEST_PAUSE, time.monotonic()
        while not work.is_completed():
            if time.monotonic() - checked > _CHECK_EVERY:
                if _group.store.check([_ENDED]):
                    raise RuntimeError("another process has ended")
                checked = time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        work.wait()


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Turn what torch.distributed raises, in this block, when another process is gone into a RunError."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and the errors of the store are RuntimeErrors too
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).split(". ")[0]  # without gloo's place in its source
        raise RunError(
            f"all processes must live until the end; one was killed or cannot be reached ({reason}); the same command "
            "with --resume continues from the last checkpoint"
        ) from error


def _leave(group: _Group) -> None:
    """Wait a moment for the others, which may still look into the store, if this process holds it.

    torchrun and accelerate launch hold the store themselves.
    """
    until = time.monotonic() + _LINGER
    holds_store = group.index == 0 and not rendezvous.launcher_holds_store()
    try:
        left = group.store.add(_LEFT, 1)
        while holds_store and left < group.count and time.monotonic() < until:
            time.sleep(_LONGEST_PAUSE)
            left = group.store.add(_LEFT, 0)
    except RuntimeError:  # the store is gone: so is the process that held it
        return
