"""Memory of the machine, or what a container or a batch system leaves this process of it (Linux control groups).

Docker, Kubernetes and SLURM limit memory by control groups. The system's own count knows nothing of them: a process in
a container of 8 GB on a machine of 64 GB sees 64, and is killed when it takes 9.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Version:
    """Names of the files of a control group.

    Attributes:
        root: where all groups are mounted.
        limit, usage: files with bytes.
        cached: keys in memory.stat of cached files, which count as used and are given up on demand.
    """

    root: Path
    limit: str
    usage: str
    cached: tuple[str, ...]


def total_memory() -> int:
    """Bytes that the processes here may use together: of the machine, or of the smallest group that they are in."""
    return min((int(psutil.virtual_memory().total), *(limit for limit, _ in _groups())))


def available_memory() -> int:
    """Bytes that can still be taken without swapping: of the machine, or of a group if it has less."""
    return min((int(psutil.virtual_memory().available), *(free for _, free in _groups())))


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, free bytes) of each group that limits this process."""
    for version, path in _own_groups():
        # Inside of a container the path is the machine's, and the group itself is mounted at the root.
        inside = path if (version.root / path).is_dir() and ".." not in path.parts else Path()
        for group in (inside, *inside.parents):
            with suppress(OSError, ValueError):  # no such file, or "max": no limit
                folder = version.root / group
                limit, used = (int((folder / name).read_text()) for name in (version.limit, version.usage))
                yield limit, max(0, limit - used + _cached(folder, version))


def _own_groups() -> Iterator[tuple[_Version, Path]]:
    """Both versions, each with the path of the group of this process below its root."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, absolute = line.split(":", 2)
        path = Path(absolute.lstrip("/"))
        if not controllers:
            yield _Version(_GROUPS, "memory.max", "memory.current", ("inactive_file", "active_file")), path
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield _Version(_GROUPS / "memory", *names, ("total_inactive_file", "total_active_file")), path


def _cached(group: Path, version: _Version) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    counts = dict(line.partition(" ")[::2] for line in lines)
    return sum(int(counts.get(key, 0)) for key in version.cached)
