"""Choice of device and dtype, and free memory, with CUDA and MPS replaced by stand-ins."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nybble.errors import ModelError
from nybble.models import device as devices

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
HAS_BFLOAT16 = devices.has_bfloat16  # conftest.py replaces the function while tests run


def test_explicit_dtypes() -> None:
    assert devices.pick_dtype("float16", CPU) == torch.float16
    assert devices.pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert devices.pick_dtype("float32", CUDA) == torch.float32


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_dtype_is_bfloat16_where_it_is_fast(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: fast)
    assert devices.pick_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("available", [True, False])
def test_automatic_device_is_cuda_or_cpu(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == (CUDA if available else CPU)


@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_products_of_bfloat16_are_exact(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    x = (torch.randn(512, 96, generator=torch.Generator().manual_seed(0)) * scale).bfloat16()
    exact = x.double().T @ x.double()
    with pytest.raises(ZeroDivisionError), devices.products_of_bfloat16(CPU):
        assert setting.fp32_precision == "bf16"
        found = x.float().T @ x.float()
        raise ZeroDivisionError
    assert setting.fp32_precision == before
    assert ((found - exact).norm() / exact.norm()).item() < 2e-6
    with devices.products_of_bfloat16(CUDA):
        assert setting.fp32_precision == before


def test_a_named_device_that_works_is_chosen() -> None:
    assert devices.pick_device("cpu") == CPU


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_accelerators_are_chosen_by_the_same_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert devices.pick_device(kind) == torch.device(kind)
    assert current == ([CUDA] if kind == "cuda" else [])


@pytest.mark.parametrize(
    ("cuda", "mps", "choices"),
    [
        (False, False, "auto or cpu"),
        (True, False, "auto, cpu or cuda"),
        (False, True, "auto, cpu or mps"),
    ],
)
def test_an_unusable_device_is_refused_with_the_usable_ones(
    cuda: bool, mps: bool, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    with pytest.raises(ModelError, match=rf"^--device warp is not usable on this machine \(.*\); choose {choices}$"):
        devices.pick_device("warp")
    with pytest.raises(ModelError, match=r"--device meta is not usable on this machine \(it has no memory\)"):
        devices.pick_device("meta")


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_bfloat16_on_processors(amx: bool, avx512: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert HAS_BFLOAT16(CPU) is expected
    assert HAS_BFLOAT16(MPS) is False


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_on_cuda_must_be_in_hardware(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert HAS_BFLOAT16(CUDA) is supported
    assert asked == [False]


def test_free_memory_of_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 100))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 200)
    assert devices.free_memory(CPU) == 1000
    assert devices.free_memory(CUDA) == 70
    assert devices.free_memory(MPS) == 700
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500))
    assert devices.free_memory(MPS) == 500


def test_total_memory_of_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=50))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 100))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    assert [devices.total_memory(device) for device in (CPU, CUDA, MPS)] == [1050, 100, 900]


def test_each_of_several_processes_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(devices.processes, "local_count", lambda: 4)
    monkeypatch.setattr(devices.processes, "local_index", lambda: 3)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    third = torch.device("cuda:3")
    assert devices.pick_device("auto") == devices.pick_device("cuda") == third
    assert current == [third, third]
    assert devices.pick_device("cpu") == CPU
    for shared in ("cuda:1", "mps"):
        with pytest.raises(ModelError, match=r"is not usable .* \(each process needs a device of its own\)"):
            devices.pick_device(shared)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert devices.free_memory(CPU) == 250
