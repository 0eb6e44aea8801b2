"""Peak memory of a process; versions and hardware."""

import subprocess
import sys

import numpy as np
import pytest

from nybble.run.machine import describe_machine

ALLOCATE_AND_RELEASE = """
import numpy as np
from nybble.run.machine import peak_memory
np.ones(400 << 20, np.uint8)
print(peak_memory()["cpu"])
"""


@pytest.mark.slow
def test_peak_memory_counts_what_was_released_and_nothing_of_the_parent_process() -> None:
    """On Linux, ru_maxrss of a process starts at the memory of the process that started it."""
    held = np.ones(1 << 30, np.uint8)
    command = [sys.executable, "-c", ALLOCATE_AND_RELEASE]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 400 << 20 < int(done.stdout) < len(held)


def test_the_machine_is_described_with_the_versions_of_all_libraries() -> None:
    machine = describe_machine()
    assert machine["versions"]["nybble"] != "not installed"
    assert machine["versions"]["torch"].split("+")[0].count(".") == 2
    assert machine["threads"] >= 1
    assert machine["cores"] >= 1
    assert machine["processor"]
    assert machine["memory"].endswith(" GB")
