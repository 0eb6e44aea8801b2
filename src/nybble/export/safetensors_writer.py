"""safetensors files of exports: how they are written (tensor_writer.py), and by which texts they are recognized.

The key "__metadata__" of the header holds "format", which transformers and MLX write too, and "nybble", the name of the
export format, by which a folder is recognized.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nybble.quant.weight import QuantizedWeight

MODEL_FILE = "model.safetensors"
"""Name of a file that is not split, for transformers, vLLM and mlx-lm."""

_BLOCK_VALUES = 1 << 23
"""Weights that are dequantized at once: 32 MB in float32, so that memory does not depend on the size of a layer."""


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield consecutive blocks of rows of a matrix [O, I], each of some million values."""
    rows = max(1, _BLOCK_VALUES // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def weight_blocks(weight: QuantizedWeight) -> Iterator[QuantizedWeight]:
    """Yield a weight [O, I] as consecutive blocks of rows."""
    codes_OI, scale_OG, zero_point_OG = weight.codes_OI, weight.scale_OG, weight.zero_point_OG
    for part in row_blocks(codes_OI.shape):
        yield QuantizedWeight(codes_OI[part], scale_OG[part], zero_point_OG[part], weight.scheme)


def read_metadata(folder: Path) -> dict[str, str]:
    """Return the texts in the header of FOLDER/model.safetensors; {} where the file is missing or damaged."""
    try:
        with safe_open(folder / MODEL_FILE, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def written_by(folder: Path) -> str:
    """Return the export format that nybble wrote to FOLDER/model.safetensors; "" if another program wrote the file."""
    return read_metadata(folder).get("nybble", "")
