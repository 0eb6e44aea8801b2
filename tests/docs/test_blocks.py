"""Python code in the documentation runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes
from tests.helpers.pages import DOCS, PAGES, README, ROOT, code_blocks


def execute(block: str, name: str) -> dict[str, Any]:
    """The names that a block defines."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for block in code_blocks(page, "python"):
        compile(block, str(page.relative_to(ROOT)), "exec")


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(README, "python")
    assert blocks
    for block in blocks:
        execute(block, "README.md")
    assert "| 16-bit |" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", [QuantScheme(2, 8), QuantScheme(3, 24), QuantScheme(4, 8), INT8_PER_ROW], ids=str)
def test_the_reader_in_formats_reads_what_is_described_there(scheme: QuantScheme, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weight_OI = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    scale_OG, zero_point_OG = min_max_qparams(weight_OI, scheme)
    codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, scheme)
    stored = pack_codes(codes_OI, scheme.bits)
    tensors = {"a.weight.codes": stored, "a.weight.scale": scale_OG.half(),
               "a.weight.zero_point": zero_point_OG.to(torch.uint8)}  # fmt: skip
    note = {"format": "nybble-2", "schemes": {"a": {"bits": scheme.bits}}}
    save_file(tensors, tmp_path / "weights.safetensors", {"note": json.dumps(note)})

    (block,) = code_blocks(DOCS / "reference" / "formats.md", "python")
    read = execute(block, "formats.md")["read_weights"](tmp_path / "weights.safetensors")
    expected = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.to(torch.uint8), scheme).dequantize().numpy()
    assert np.array_equal(read["a"], expected)


def test_the_example_of_packing_in_formats_is_right() -> None:
    assert "So the codes 1, 2, 15, 0 are the bytes 0x21, 0x0F." in (DOCS / "reference" / "formats.md").read_text()
    assert pack_codes(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
