"""Tiny quantized models in folders, as a run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.selection import select_layers
from nybble.quant.grid import min_max_qparams, quantize
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight
from tests.helpers.tiny import make_model, make_tokenizer


def quantize_to_nearest(model: Any, scheme: QuantScheme) -> dict[str, QuantizedWeight]:
    """Round every layer of a model; the model is not changed."""
    selection = select_layers(model)
    quantized = {}
    for name in (*selection.int4, *selection.int8):
        of_layer = scheme if name in selection.int4 else INT8_PER_ROW
        weight_OI = model.get_submodule(name).weight.detach().float()
        scale_OG, zero_point_OG = min_max_qparams(weight_OI, of_layer)
        codes_OI = quantize(weight_OI, scale_OG, zero_point_OG, of_layer)
        quantized[name] = QuantizedWeight(codes_OI, scale_OG, zero_point_OG.byte(), of_layer)
    return quantized


def save_checkpoint(
    folder: Path, model: Any, scheme: QuantScheme | None = None, tokenizer: Any = None
) -> QuantizedCheckpoint:
    """Round a model to nearest and write it to `folder`, which does not exist."""
    quantized = quantize_to_nearest(model, scheme or QuantScheme(group_size=32))
    save_quantized(folder, LoadedModel(model, tokenizer or make_tokenizer(), "tiny"), quantized)
    return open_checkpoint(folder)


def make_checkpoint(
    folder: Path, family: str, scheme: QuantScheme | None = None, **changes: Any
) -> QuantizedCheckpoint:
    """A random model of a family of tiny.py, rounded to nearest in groups of 32, in `folder`."""
    return save_checkpoint(folder, make_model(family, **changes), scheme)
