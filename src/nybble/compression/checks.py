"""Checks that a model can be compressed, made before the expensive part of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compression.chain import check_chain
from nybble.compression.methods import combine
from nybble.errors import ModelError, OptionError
from nybble.models.selection import select_layers
from nybble.quant.grid import below_grid
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme

log = logging.getLogger("nybble")

_FEW_GROUPS = 0.01
"""Share of the groups of a layer that may be too small without a warning: single dead channels are common."""

_POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names in configurations of the length that a model was made for."""


def check_model(model: Any, names: Iterable[str], input_ids: Tensor, methods: tuple[str, ...]) -> None:
    """Refuse a model that these methods cannot compress.

    Args:
        model: a transformers model.
        names: paths of the layers that get 4 bits.
        input_ids: [2, T] token ids, any text.
        methods: names from `parse_method`.

    Raises:
        OptionError: a method cannot compress this model.
        ModelError: the model uses the weight of a layer without calling the layer; or a method needs calibration text,
            and the decoder blocks are no chain.
    """
    names, combination = list(names), combine(methods)
    _check_layers_are_called(model, names, input_ids)
    if combination.needs_calibration:
        check_chain(model, names, input_ids)
    combination.check(model, names)
    embeddings = select_layers(model).int8
    warn_of_small_weights({name: model.get_submodule(name).weight for name in embeddings}, INT8_PER_ROW)


def warn_of_small_weights(weights: Mapping[str, Tensor], scheme: QuantScheme) -> None:
    """Warn of layers whose weights are too small for the scale grid: they lose most of their accuracy.

    Args:
        weights: layer path -> weight [O, I].
        scheme: how they will be quantized.
    """
    layers = {name: below_grid(weight.detach(), scheme) for name, weight in weights.items()}
    counts = {name: int(small_OG.sum()) for name, small_OG in layers.items()}
    small = [name for name, count in counts.items() if count > _FEW_GROUPS * layers[name].numel()]
    if small:
        log.warning(
            "%d groups of weights in %d layers (first: %s) are too small for scales of at least 2^-14 and lose most of "
            "their accuracy; scale the weights of these layers up, and the norms or layers around them down",
            sum(counts[name] for name in small), len(small), ", ".join(small[:3]),
        )  # fmt: skip


@torch.no_grad()
def check_length(model: Any, name: str, seq_len: int) -> None:
    """Refuse sequences that are longer than the positions of a model; warn where it was trained on shorter ones.

    Args:
        model: a transformers model.
        name: of the model, for messages.
        seq_len: tokens in a sequence.

    Raises:
        OptionError: the model cannot compute so many positions.
    """
    stated = (getattr(model.config, field, None) for field in _POSITIONS)
    most = next((number for number in stated if number), seq_len)
    if seq_len <= most:
        return
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings <= most + 2 for table in tables):  # OPT has two rows more than positions
        raise OptionError(f"--seq_len must be at most {most}, the learned positions of {name}; got {seq_len}")
    try:  # tables of computed positions (GPT-J, CTRL) and masks (MPT) end too, but not in every model
        model.base_model(input_ids=words.weight.new_zeros(1, seq_len, dtype=torch.int64), use_cache=False)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise OptionError(f"--seq_len must be at most {most}, the positions of {name}; got {seq_len}") from error
    log.warning("--seq_len %d is more than the %d positions that %s was trained for", seq_len, most, name)


def _check_layers_are_called(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Raise ModelError for a layer whose weight is used without a call: no other layer can take its place.

    An expert that gets no token is not called either, but then the module around it is not called.
    """
    called: set[str] = set()
    parents = {name.rpartition(".")[0] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in {*names, *parents}
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    bypassed = [name for name in names if name not in called and name.rpartition(".")[0] in called]
    if bypassed:
        raise ModelError(
            f"{type(model).__name__} must call the layers that get 4 bits; it uses the weight of {bypassed[0]} without "
            f"calling the layer ({len(bypassed)} such layers); the model cannot be compressed"
        )
