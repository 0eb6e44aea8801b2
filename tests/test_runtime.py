"""Settings of the whole process, on Linux and on platforms that lack them."""

import ast
import ctypes
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nybble import runtime

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_openmp_threads_spin_briefly_unless_the_user_decides(
    chosen: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    runtime.set_openmp_spin()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize(
    ("limit", "given", "expected"),
    [(3.5, None, "3"), (0.5, None, "1"), (8.0, None, None), (float("inf"), None, None), (2.0, "6", "6")],
)
def test_a_container_gets_no_more_threads_than_it_may_keep_busy(
    limit: float, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(runtime.container, "processor_limit", lambda: limit)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    runtime.set_openmp_threads()
    assert os.environ.pop("OMP_NUM_THREADS", None) == expected


class Recorder:
    """A C library that records calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append(("mallopt", parameter, value))

    def malloc_trim(self, padding: int) -> None:
        self.calls.append(("malloc_trim", padding))


# M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h
KEPT = [("mallopt", -4, 2**16), ("mallopt", -3, 2**25), ("mallopt", -1, 2**31 - 1), ("mallopt", -2, 2**26)]


def test_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    runtime.keep_freed_memory()
    runtime.hand_back_freed_memory()
    assert library.calls == [*KEPT, ("malloc_trim", 0)]


def test_allocator_settings_of_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    returned = [("mallopt", -4, 2**16), ("mallopt", -3, 2**16), ("mallopt", -1, 2**16), ("mallopt", -2, 0)]
    for keeps in (False, True):
        monkeypatch.setattr(runtime, "_keeps_freed_memory", keeps)
        library.calls.clear()
        with runtime.returning_freed_memory():
            # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h
            assert library.calls == returned
        assert library.calls == returned + (KEPT if keeps else []), "a notebook keeps the allocator that it had"
        library.calls.clear()
        with runtime.returning_freed_memory():
            with runtime.returning_freed_memory():
                pass
            assert library.calls == returned * 2, "the end of an inner block changes nothing"
        assert library.calls == returned * 2 + (KEPT if keeps else [])


def test_a_training_between_readings_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorder()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(runtime, "_keeps_freed_memory", True)
    returned = [("mallopt", -4, 2**16), ("mallopt", -3, 2**16), ("mallopt", -1, 2**16), ("mallopt", -2, 0)]
    with runtime.keeping_freed_memory():
        assert library.calls == [], "it is kept anyway"
    with runtime.returning_freed_memory():
        with runtime.keeping_freed_memory():
            assert library.calls == returned + KEPT
        assert library.calls == [*returned, *KEPT, *returned]
    monkeypatch.setattr(runtime, "_keeps_freed_memory", False)
    library.calls.clear()
    with runtime.returning_freed_memory(), runtime.keeping_freed_memory():
        assert library.calls == returned, "a notebook keeps the allocator that it had"


@glibc_only
@pytest.mark.slow
def test_memory_that_was_kept_is_returned_during_an_export() -> None:
    """Tensors of 16 MB, written and freed, between others that stay: their pages are the system's again, as those of
    larger tensors always are."""
    code = """
import re, torch
from pathlib import Path
from nybble import runtime
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
def freed(size):
    before = resident()
    kept = [(torch.ones(size), torch.ones(1 << 18)) for _ in range(4)]
    kept = [small for _, small in kept]
    return resident() - before
runtime.keep_freed_memory()
small, large = freed(1 << 22), freed(1 << 24)
with runtime.returning_freed_memory():
    print(small, large, freed(1 << 22))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, large, returned = map(int, done.stdout.split())
    assert kept > 50
    assert large < 20
    assert returned < 20


@glibc_only
def test_the_allocator_of_this_machine_takes_the_settings() -> None:
    """In a process of its own, because they cannot be taken back. mallopt returns 1 where it accepts a value."""
    code = "from nybble import runtime; runtime.keep_freed_memory(); print(runtime._glibc().mallopt(-4, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("kind", ["darwin", "win32", "musl", "other libc"])
def test_platforms_without_glibc_are_left_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if kind == "other libc":
            return object()
        raise OSError(name)

    monkeypatch.setattr(sys, "platform", "linux" if kind in ("musl", "other libc") else kind)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert runtime._glibc() is None
    runtime.keep_freed_memory()
    runtime.hand_back_freed_memory()


def test_cudnn_attention_is_disabled() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime.disable_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def imported_at_the_top(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is imported."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


def test_runtime_is_imported_without_torch() -> None:
    """`set_openmp_spin` has to run before torch is loaded."""
    program = "import sys, nybble.runtime; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("part", ["runtime.py", "files.py", "models", "export"])
def test_no_file_needs_a_unix_module(part: str) -> None:
    path = Path(runtime.__file__).with_name(part)
    for file in [path] if path.is_file() else path.rglob("*.py"):
        assert not imported_at_the_top(file) & {"fcntl", "grp", "pwd", "resource", "termios"}, file


@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.slow
def test_openvino_has_no_telemetry_once_exports_are_imported() -> None:
    """Its package would start a process that inherits the lock of the run and sends data without being asked."""
    program = "import nybble.export, openvino.tools.ovc; print(type(openvino.tools.ovc.telemetry).__module__)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "openvino.tools.ovc.telemetry_stub"


def test_a_repeated_signal_does_not_disturb_the_end() -> None:
    """A launcher of several processes repeats the signal that the terminal has sent to all of them."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(runtime.Interrupted), runtime.interrupt_on_signals(only_once=True):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                ended_in_order = True
        os.kill(os.getpid(), signal.SIGTERM)  # and while the line is printed
        assert ended_in_order
    finally:
        with runtime.interrupt_on_signals():
            pass
        signal.signal(signal.SIGTERM, before)
