"""Tiny quantized models in folders, as a run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nybble.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from nybble.quant.scheme import QuantScheme
from tests.helpers.rounding import GROUPS_OF_32, round_model_to_nearest
from tests.helpers.tiny import make_model, make_tokenizer


def save_checkpoint(
    folder: Path, model: Any, scheme: QuantScheme | None = None, tokenizer: Any = None
) -> QuantizedCheckpoint:
    """Round a model to nearest, in place, and write it to `folder`, which does not exist."""
    quantized = round_model_to_nearest(model, scheme or GROUPS_OF_32)
    save_quantized(folder, LoadedModel(model, tokenizer or make_tokenizer(), "tiny"), quantized)
    return open_checkpoint(folder)


def make_checkpoint(
    folder: Path, family: str, scheme: QuantScheme | None = None, **changes: Any
) -> QuantizedCheckpoint:
    """A random model of a family of tiny.py, rounded to nearest in groups of 32, in `folder`."""
    return save_checkpoint(folder, make_model(family, **changes), scheme)


def save_uneven_mixture(folder: Path, model: Any) -> QuantizedCheckpoint:
    """Like `save_checkpoint`, for a mixture after `linearize`: expert 0 stays in 16 bits, expert 1 gets 8 bits."""
    options = SchemeOptions(group_size=32, ignore=("*.experts.0.*",), layer=("*.experts.1.*:bits=8",))
    schemes = assign_schemes(select_layers(model), model, options).schemes
    quantized = round_model_to_nearest(model, schemes=schemes)
    save_quantized(folder, LoadedModel(model, make_tokenizer(), "tiny"), quantized)
    return open_checkpoint(folder)
