"""Memory that control groups leave to a process, read from trees of files as Linux has them."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nybble import container

GB = 10**9


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GB, 50 of them free, whose control groups are in tmp_path/groups."""
    memory = SimpleNamespace(total=64 * GB, available=50 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(container, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(container, "_OWN", tmp_path / "cgroup")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def memory() -> tuple[int, int]:
    return container.total_memory() // GB, container.available_memory() // GB


def test_without_groups_it_is_that_of_the_machine(tmp_path: Path) -> None:
    assert memory() == (64, 50)
    (tmp_path / "cgroup").write_text("0::/\n")
    assert memory() == (64, 50)
    write(tmp_path / "groups", memory_max="max", memory_current=14 * GB, memory_stat="inactive_file 0")
    assert memory() == (64, 50)


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    """Its files in the cache are given up when memory is asked for."""
    for path in ("/", "/system.slice/docker-1f.scope", "/../../kubepods/pod7"):
        (tmp_path / "cgroup").write_text(f"0::{path}\n")
        stat = f"anon 1\ninactive_file {2 * GB}\nactive_file {GB}"
        write(tmp_path / "groups", memory_max=8 * GB, memory_current=5 * GB, memory_stat=stat)
        assert memory() == (8, 6)


def test_the_groups_above_count_too(tmp_path: Path) -> None:
    """SLURM limits a job, and perhaps a step of it."""
    (tmp_path / "cgroup").write_text("1:name=systemd:/x\n0::/slurm/job_4/step_0\n")
    job = tmp_path / "groups" / "slurm" / "job_4"
    write(job, memory_max=16 * GB, memory_current=15 * GB, memory_stat="inactive_file 0")
    write(job / "step_0", memory_max=12 * GB, memory_current=2 * GB, memory_stat="inactive_file 0")
    assert memory() == (12, 1)
    write(job / "step_0", memory_max="max")
    assert memory() == (16, 1)


def test_version_1(tmp_path: Path) -> None:
    """No limit is a number there, larger than any memory."""
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/docker/1f\n0::/\n")
    group = tmp_path / "groups" / "memory" / "docker" / "1f"
    files = {"memory_usage_in_bytes": 3 * GB, "memory_stat": f"inactive_file 7\ntotal_inactive_file {GB}"}
    write(group, memory_limit_in_bytes=2**63 - 4096, **files)
    assert memory() == (64, 50)
    write(group, memory_limit_in_bytes=4 * GB)
    assert memory() == (4, 2)


def test_processors(tmp_path: Path) -> None:
    """cpu.max has a quota of microseconds in a period; version 1 has two files."""
    assert container.processor_limit() == float("inf")
    (tmp_path / "cgroup").write_text("3:cpu,cpuacct:/docker/1f\n0::/kubepods/pod7\n")
    write(tmp_path / "groups" / "kubepods" / "pod7", cpu_max="max 100000")
    assert container.processor_limit() == float("inf")
    write(tmp_path / "groups" / "kubepods", cpu_max="350000 100000")
    assert container.processor_limit() == 3.5
    old = tmp_path / "groups" / "cpu" / "docker" / "1f"
    write(old, cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert container.processor_limit() == 3.5
    write(old, cpu_cfs_quota_us=50000)
    assert container.processor_limit() == 0.5


def test_a_group_that_is_used_up_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    write(tmp_path / "groups", memory_max=4 * GB, memory_current=5 * GB, memory_stat="")
    assert memory() == (4, 0)
