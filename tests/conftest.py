"""Shared by all tests: threads as the command line has them, real data where it is, the real model once a session."""

import gc
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # runtime.set_openmp_spin
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """What imports and the collection of tests made is not searched for cycles again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets, where the checkout has them beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def needs_openvino() -> None:
    """For tests that export: a bare GPU machine has no OpenVINO."""
    pytest.importorskip("openvino", reason="the extra openvino")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models compute in float32 on every machine, also where `--dtype auto` takes bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_smollm2":
            patch.setattr("nybble.models.device.has_bfloat16", lambda device: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _found_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs share the tokens of a long text, and the versions of the installed packages."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in ("test_packing", "test_machine"):
            from tests.helpers import once

            patch.setattr("nybble.data.packing.tokenize", once.tokenize)
            patch.setattr("nybble.run.machine.package_versions", once.package_versions)
        yield
