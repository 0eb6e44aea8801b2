"""Whether a model can be compressed, before the expensive part."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.compress import awq
from nybble.compress.chain import check_chain
from nybble.errors import ModelError

log = logging.getLogger("nybble")


def check_model(model: Any, names: Iterable[str], input_ids: Tensor, steps: tuple[str, ...]) -> None:
    """Raise OptionError or ModelError, before the expensive part, for a model that these steps cannot compress; input_ids [2, T] are any text."""
    names = list(names)
    _check_called(model, names, input_ids)
    if "awq" in steps:
        awq.check_family(model.config)
    if steps:
        check_chain(model, names, input_ids)


def _check_called(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Raise ModelError for a layer whose weight the model reads without calling it: another layer cannot take its place."""
    called: set[str] = set()
    around = {name.rpartition(".")[0] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in {*names, *around}
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    read = [
        name for name in names if name not in called and name.rpartition(".")[0] in called
    ]  # an expert without tokens is in no module that was called
    if read:
        raise ModelError(
            f"{type(model).__name__} reads the weight of {read[0]} without calling the layer ({len(read)} such), so it cannot get 4 bits"
        )
