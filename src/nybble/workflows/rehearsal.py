"""Try the end of a run at its beginning: a small twin of the model is trained, saved and exported in seconds.

What an architecture does not allow (a layer that cannot be trained, a module that cannot be saved, an export that
cannot be traced) shows in these steps, and not after hours of work.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nybble.compression.init import QuantizedInit
from nybble.errors import ExportError, ModelError, NybbleError, describe_error
from nybble.export.base import EXPORTERS
from nybble.models.checkpoint import open_checkpoint
from nybble.models.head import last_hidden_states
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.selection import select_layers
from nybble.qat.absorb import absorb_layers
from nybble.qat.insert import insert_fake_quant_layers, quantize_embeddings
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

log = logging.getLogger("nybble")

# At most; a smaller vocabulary stays as it is.
_VOCABULARY = 512
_TOKENS = 16


def rehearse(
    loaded: LoadedModel,
    scheme: QuantScheme,
    formats: Sequence[str],
    trains: bool,
    trust_remote_code: bool,
    optional: Collection[str] = (),
) -> tuple[str, ...]:
    """Take a twin of the model through the steps of a run.

    Args:
        loaded: the model; it is not changed.
        scheme: of the 4-bit layers.
        formats: names of the exports that are asked for.
        trains: whether adapters are trained.
        trust_remote_code: whether to run Python code that comes with the model.
        optional: formats that are left out, with a warning, where they cannot hold the model.

    Returns:
        The formats without those that are left out.

    Raises:
        ModelError: the architecture does not allow a step.
        ExportError: a format that is not optional cannot hold the model.
    """
    kept = []
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="nybble-") as scratch:
        twin = make_twin(loaded, scheme)
        if twin is None:
            log.info("%s has no small twin; training and export are not tried beforehand", loaded.name)
            return tuple(formats)
        folder = Path(scratch) / "quantized"
        with _step("trained" if trains else "compressed", twin):
            weights = _compress(twin, scheme, trains)
        with _step("saved", twin):
            save_quantized(folder, twin, weights)
        for name in formats:
            with _step("loaded", twin):
                checkpoint = open_checkpoint(folder, trust_remote_code)
                checkpoint.build()
            (Path(scratch) / name).mkdir()
            try:
                EXPORTERS[name].export(checkpoint, Path(scratch) / name)
            except ExportError as error:
                if name not in optional:
                    raise
                log.warning("there is no export to %s: %s", EXPORTERS[name].label, error)
            else:
                kept.append(name)
    return tuple(kept)


def make_twin(loaded: LoadedModel, scheme: QuantScheme) -> LoadedModel | None:
    """Return a random model of the same class with as few layers as have all types of layers, and a small vocabulary.

    Args:
        loaded: the model.
        scheme: of the 4-bit layers; rows of the twin are multiples of its groups.

    Returns:
        The twin, on the device and in the dtype of the model, with its tokenizer and files. None where the
        configuration cannot be made small.
    """
    config = copy.deepcopy(loaded.model.config)
    layers = config.num_hidden_layers
    kept = _layers_with_all_types(getattr(config, "layer_types", None) or [], layers)
    try:
        for key, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == layers:
                setattr(config, key, type(getattr(config, key))(value[:kept]))  # a list, or a tuple
            elif key.endswith("_token_id") and isinstance(value, int):
                setattr(config, key, value % _VOCABULARY)
        config.num_hidden_layers, config.vocab_size = kept, min(config.vocab_size, _VOCABULARY)
        width = 2 * (scheme.group_size or 32)
        if isinstance(getattr(config, "intermediate_size", None), int) and config.intermediate_size > width:
            config.intermediate_size = width
        model = linearize(type(loaded.model)(config)).to(loaded.model.dtype).to(loaded.model.device).eval()
        finite = bool(model(input_ids=_token_ids(model), use_cache=False).logits.isfinite().all())
    except Exception as error:  # a configuration has rules of its own for what goes together
        log.debug("no twin: %s", describe_error(error))
        return None
    return replace(loaded, model=model.requires_grad_(False)) if finite else None


def _layers_with_all_types(types: Sequence[str], layers: int) -> int:
    """How many of the first layers have all types; at least 2, where there are as many."""
    return max(min(2, layers), *(types.index(kind) + 1 for kind in set(types)), 0)


def _token_ids(model: Any) -> torch.Tensor:
    count: int = model.config.vocab_size
    return (torch.arange(2 * _TOKENS, device=model.device) % count).view(2, _TOKENS)


def _compress(twin: LoadedModel, scheme: QuantScheme, trains: bool) -> dict[str, QuantizedWeight]:
    """Round to nearest; with `trains`, take the gradients of adapters of rank 1 and absorb them."""
    model = twin.model
    selection = select_layers(model)
    inits = {}
    for name in selection.int4:
        weight_OI = model.get_submodule(name).weight.detach().float()
        inits[name] = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme))
    weights = quantize_embeddings(model, selection.int8)
    if trains:
        layers = insert_fake_quant_layers(model, inits, scheme, rank=1, seed=0)
        last_hidden_states(model, _token_ids(model)).float().square().mean().backward()
        return weights | absorb_layers(model, dict(layers))
    return weights | {name: init.quantized(scheme) for name, init in inits.items()}


@contextmanager
def _step(done: str, twin: LoadedModel) -> Iterator[None]:
    """Turn an error of the model's own code into a ModelError."""
    try:
        yield
    except NybbleError:
        raise
    except Exception as error:
        raise ModelError(
            f"{twin.name} must be a model that can be {done} layer by layer; a twin with few layers cannot be "
            f"({describe_error(error)}); choose another model"
        ) from error
