"""Checks that a model can be compressed, made before the expensive part of a run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nybble.compression.chain import check_chain, first_forward
from nybble.compression.methods import combine
from nybble.errors import ModelError, OptionError
from nybble.models.composite import text_config
from nybble.models.experts import SplitExperts
from nybble.models.head import states_and_logits
from nybble.quant.grid import below_grid
from nybble.quant.scheme import QuantScheme

log = logging.getLogger("nybble")

_FEW_GROUPS = 0.01
"""Share of the groups of a layer that may be too small without a warning: single dead channels are common."""

_MOST_FROM_LATER_TOKENS = 1e-2
"""Relative difference of a state that later tokens may cause: rounding, where they change the shapes of products."""

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
        ModelError: the model is not causal; it changes its weights, uses the weight of a layer without calling the
            layer, or has layers that text does not reach; or a method needs calibration text, and the decoder blocks
            are no chain.
    """
    names, combination = list(names), combine(methods)
    _check_forward(model, names, input_ids)
    if combination.needs_calibration:
        check_chain(model, names, input_ids)
    combination.check(model, names)


def warn_of_small_weights(weights: Iterable[tuple[str, Tensor]], schemes: Mapping[str, QuantScheme]) -> None:
    """Warn of layers whose weights are too small for the scale grid: they lose most of their accuracy.

    Args:
        weights: layer path and weight [O, I] of each layer.
        schemes: layer path -> how it will be quantized.
    """
    counts: dict[str, int] = {}
    small = []
    for name, weight in weights:
        small_OG = below_grid(weight.detach(), schemes[name])
        counts[name] = int(small_OG.sum())
        if counts[name] > _FEW_GROUPS * small_OG.numel():
            small.append(name)
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
    stated = (getattr(text_config(model.config), field, None) for field in _POSITIONS)
    most = next((number for number in stated if number), seq_len)
    if seq_len <= most:
        return
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(most <= table.num_embeddings <= most + 2 for table in tables):  # OPT has two rows more than positions
        raise OptionError(f"--seq_len must be at most {most}, the learned positions of {name}; got {seq_len}")
    try:  # tables of computed positions (GPT-J, CTRL) and masks (MPT) end too, but not in every model
        if not words.weight.is_meta:  # the empty model of an export computes nothing
            model.base_model(input_ids=words.weight.new_zeros(1, seq_len, dtype=torch.int64), use_cache=False)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise OptionError(f"--seq_len must be at most {most}, the positions of {name}; got {seq_len}") from error
    log.warning("--seq_len %d is more than the %d positions that %s was trained for", seq_len, most, name)


@torch.no_grad()
def _check_forward(model: Any, names: Sequence[str], input_ids: Tensor) -> None:
    """Raise ModelError for weights that a forward changes (RWKV), for layers that it does not call, and for states that
    depend on later tokens, as in encoders.

    A layer whose weight is used without a call has no place for another layer. One that text never reaches is part of
    cross-attention or of an encoder for images. An expert that gets no token is neither: others of its list are called.
    """
    row_1T = input_ids[:1].to(model.device)
    half = row_1T.shape[1] // 2
    other_1T = torch.cat([row_1T[:, :half], (row_1T[:, half:] + 1) % model.get_input_embeddings().num_embeddings], 1)
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    try:
        with first_forward(model):
            states_BTD = states_and_logits(model, torch.cat([row_1T, other_1T]))[0].float()
    finally:
        for handle in handles:
            handle.remove()
    bypassed = [name for name in names if name not in called and name.rpartition(".")[0] in called]
    if bypassed:
        patterns = dict.fromkeys(f'--ignore "*.{name.rpartition(".")[2]}"' for name in bypassed)
        raise ModelError(
            f"{type(model).__name__} must call the layers that get 4 bits; it uses the weight of {bypassed[0]} without "
            f"calling the layer ({len(bypassed)} such layers); leave them in 16 bits with {' '.join(patterns)}"
        )
    unreached = [name for name in names if name not in called and not _is_unchosen(model, name, called)]
    if unreached:
        raise ModelError(
            f"{type(model).__name__} must be a language model alone; text does not reach {len(unreached)} layers "
            f"(first: {unreached[0]}), which read an encoder or images; choose a decoder-only language model"
        )
    one, two = states_BTD
    difference_T = (one - two)[:half].norm(dim=-1) / one[:half].norm(dim=-1)
    if bool((difference_T > _MOST_FROM_LATER_TOKENS).any()):
        raise ModelError(
            f"{type(model).__name__} must predict a token from the tokens before it; its states change by "
            f"{float(difference_T.max()):.2g} with later tokens; choose a causal model (config.json of a decoder made "
            "from an encoder says is_decoder)"
        )


def _is_unchosen(model: Any, name: str, called: Collection[str]) -> bool:
    """Whether a layer that is not called is part of an expert, one of several in a list or in a mixture."""
    parts = name.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if any(isinstance(model.get_submodule(path), SplitExperts) for path in paths):
        return True
    lists = {path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict)}
    outermost = next(path for path in paths if path not in called and path not in lists)
    parent = outermost.rpartition(".")[0]
    return parent in lists and any(other.startswith(parent + ".") for other in called)
