"""Memory and processors of the machine, or what a container or a batch system leaves this process of them.

Docker, Kubernetes and SLURM set limits by control groups of Linux. The system's own counts know nothing of them: a
process in a container of 8 GB and 4 processors on a machine of 64 GB and 32 processors sees 64 and 32. It is killed
when it takes 9 GB, and its 32 threads wait for each other.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/index.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Names in memory.stat of cached files, which count as used and are given up on demand; those of version 1, if it has
# them, count the groups below too.
_CACHED = (("total_inactive_file", "inactive_file"), ("total_active_file", "active_file"))


def total_memory() -> int:
    """Bytes that the processes here may use together: of the machine, or of the smallest group that they are in."""
    return min((int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())))


def available_memory() -> int:
    """Bytes that can still be taken without swapping: of the machine, or of a group if it has less."""
    return min((int(psutil.virtual_memory().available), *(free for _, free in _memory_limits())))


def processor_limit() -> float:
    """Processors that the processes here may keep busy together by their groups; infinity without a limit."""
    limits = [float("inf")]
    for group in _groups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
                limits += [quota / period] if quota > 0 else []
    return min(limits)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, free bytes) of each group that limits this process."""
    for group in _groups("memory"):
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text()) for name in names)
                yield limit, max(0, limit - used + _cached(group))


def _cached(group: Path) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    counts = {name: int(count) for name, _, count in (line.partition(" ") for line in lines) if count}
    return sum(next((counts[name] for name in names if name in counts), 0) for names in _CACHED)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process, and of those above them, of both versions."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, absolute = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, path = _GROUPS / (controller if controllers else ""), Path(absolute.lstrip("/"))
        # Inside of a container the path is the machine's, and the group itself is mounted at the root.
        inside = path if (root / path).is_dir() and ".." not in path.parts else Path()
        yield from (root / group for group in (inside, *inside.parents))
