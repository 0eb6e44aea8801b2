"""Files that are written tensor by tensor, compared with the safetensors library and with bytes."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.errors import RunError
from nybble.export import safetensors_writer as module
from nybble.export.safetensors_writer import read_metadata, weight_blocks, written_by
from nybble.models.tensor_writer import TensorLayout, safetensors_writer
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor], order: list[str] | None = None) -> None:
    layouts = {name: TensorLayout.of(tensor) for name, tensor in tensors.items()}
    with safetensors_writer(path, layouts, {"format": "pt", "nybble": "toy"}) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


def header(path: Path) -> Any:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), length


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6), st.randoms())
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, Any], random: Any
) -> None:
    kinds.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("written")
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    order = list(tensors)
    random.shuffle(order)
    write(folder / "own.safetensors", tensors, order)
    assert header(folder / "own.safetensors")[1] % 8 == 0, "tensors begin at a multiple of 8"
    read = load_file(folder / "own.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    """Same order, offsets and data; the library writes the header's metadata in any order."""
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in zip("dbca", DTYPES[:4], strict=True)}
    tensors["flags"] = torch.tensor([True, False, True])
    write(tmp_path / "own", tensors)
    save_file(tensors, tmp_path / "library", {"format": "pt", "nybble": "toy"})
    (own, length), (library, other_length) = header(tmp_path / "own"), header(tmp_path / "library")
    assert own == library
    assert (tmp_path / "own").read_bytes()[8 + length :] == (tmp_path / "library").read_bytes()[8 + other_length :]


def test_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "file", {"b": torch.tensor([258], dtype=torch.int16), "a": torch.tensor([7], dtype=torch.uint8)})
    text = (
        b'{"__metadata__":{"format":"pt","nybble":"toy"},"b":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}'
    )
    text += b" " * (-len(text) % 8)
    assert (tmp_path / "file").read_bytes() == len(text).to_bytes(8, "little") + text + b"\x02\x01\x07"


def test_a_tensor_is_written_block_by_block(tmp_path: Path) -> None:
    tensor_OI = torch.randn(7, 4)
    with safetensors_writer(tmp_path / "file", {"a": TensorLayout.of(tensor_OI)}, {}) as writer:
        writer.write_blocks("a", (tensor_OI[i : i + 2] for i in range(0, 7, 2)))
    assert torch.equal(load_file(tmp_path / "file")["a"], tensor_OI)


def test_strided_tensors_are_written_in_row_major_order(tmp_path: Path) -> None:
    tensor_OI = torch.randn(4, 3).T
    write(tmp_path / "file", {"a": tensor_OI})
    assert torch.equal(load_file(tmp_path / "file")["a"], tensor_OI)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "tensors that were not written"),
        ({"a": torch.zeros(3)}, "a must have 8 bytes; it has 12"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, "a must be torch.float32; it is torch.int32"),
    ],
)
def test_a_tensor_that_does_not_fit_its_layout_is_our_mistake(
    tmp_path: Path, written: dict[str, Tensor], message: str
) -> None:
    with (
        pytest.raises(AssertionError, match=message),
        safetensors_writer(tmp_path / "file", {"a": TensorLayout(torch.float32, (2,))}, {}) as writer,
    ):
        for name, tensor in written.items():
            writer.write(name, tensor)


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="a was written already"),
        safetensors_writer(tmp_path / "file", {"a": TensorLayout(torch.float32, (2,))}, {}) as writer,
    ):
        writer.write("a", torch.zeros(2))
        writer.write("a", torch.zeros(2))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="file must fit on the disk; .*No space left on device"),
        safetensors_writer(tmp_path / "file", {"a": TensorLayout(torch.float32, (2,))}, {}),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_blocks_of_rows_are_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", 20)
    scheme = QuantScheme(group_size=4)
    codes_OI, scale_OG = torch.randint(0, 16, (7, 8)).byte(), torch.rand(7, 2)
    weight = QuantizedWeight(codes_OI, scale_OG, torch.randint(0, 16, (7, 2)).byte(), scheme)
    blocks = list(weight_blocks(weight))
    assert [len(block.codes_OI) for block in blocks] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([block.dequantize() for block in blocks]), weight.dequantize())


def test_files_of_others_are_not_taken_for_exports(tmp_path: Path) -> None:
    assert written_by(tmp_path) == ""
    path = tmp_path / module.MODEL_FILE
    path.write_bytes(b"12345678 no safetensors file")
    assert written_by(tmp_path) == ""
    save_file({"a": torch.zeros(2)}, path)
    assert written_by(tmp_path) == ""
    write(path, {"a": torch.zeros(2)})
    assert written_by(tmp_path) == "toy"
    assert read_metadata(tmp_path) == {"format": "pt", "nybble": "toy"}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "nybble": "toy"}
