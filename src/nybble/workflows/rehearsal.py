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
from nybble.errors import ExportError, ModelError, NybbleError, OptionError, describe_error, without_remedy
from nybble.export.base import EXPORTERS
from nybble.models.checkpoint import open_checkpoint
from nybble.models.composite import text_config
from nybble.models.head import last_hidden_states
from nybble.models.linearize import linearize
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import save_quantized
from nybble.models.schemes import assign_schemes, linear_scheme
from nybble.models.selection import select_layers
from nybble.options.scheme import SchemeOptions
from nybble.qat.absorb import absorb_layers
from nybble.qat.insert import insert_fake_quant_layers, quantize_embeddings
from nybble.quant.grid import min_max_qparams
from nybble.quant.weight import QuantizedWeight
from nybble.training.mixed_precision import choice_groups

log = logging.getLogger("nybble")

# At most; a smaller vocabulary stays as it is.
_VOCABULARY = 512
_TOKENS = 16

# Names in configurations, across families.
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DEPTHS = ("num_hidden_layers", "depth")  # of towers for images and audio
_DENSE_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")


def rehearse(
    loaded: LoadedModel,
    options: SchemeOptions,
    formats: Sequence[str],
    trains: bool,
    trust_remote_code: bool,
    optional: Collection[str] = (),
) -> tuple[str, ...]:
    """Take a twin of the model through the steps of a run.

    Args:
        loaded: the model; it is not changed.
        options: of the scheme.
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
        twin = make_twin(loaded, options)
        if twin is None:
            log.info("%s has no small twin; training and export are not tried beforehand", loaded.name)
            return tuple(formats)
        folder = Path(scratch) / "quantized"
        with _step("trained" if trains else "compressed", twin):
            weights = _compress(twin, options, trains)
        with _step("saved", twin):
            save_quantized(folder, twin, weights)
        for name in formats:
            with _step("loaded", twin):
                checkpoint = open_checkpoint(folder, trust_remote_code)
                checkpoint.build()
            (Path(scratch) / name).mkdir()
            try:
                with _step(f"exported to {name}", twin):
                    EXPORTERS[name].export(checkpoint, Path(scratch) / name)
            except (ExportError, OptionError) as error:
                if name not in optional:
                    raise
                log.warning("there is no export to %s: %s", EXPORTERS[name].label, without_remedy(error))
            else:
                kept.append(name)
    return tuple(kept)


def make_twin(loaded: LoadedModel, options: SchemeOptions) -> LoadedModel | None:
    """Return a random model of the same class with as few layers as have all types of layers, and a small vocabulary.

    Args:
        loaded: the model.
        options: of the scheme; rows of the twin are multiples of its groups.

    Returns:
        The twin, on the device and in the dtype of the model, with its tokenizer and files. None where the
        configuration cannot be made small.
    """
    whole = copy.deepcopy(loaded.model.config)
    config = text_config(whole)
    try:
        if config is not whole:
            _make_parts_small(whole)
        layers = config.num_hidden_layers
        kept = _layers_with_all_types(getattr(config, "layer_types", None) or [], layers)
        for key, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == layers:
                setattr(config, key, type(getattr(config, key))(value[:kept]))  # a list, or a tuple
        _make_token_ids_small(config)
        config.num_hidden_layers, config.vocab_size = kept, min(config.vocab_size, _VOCABULARY)
        for key, most in _largest(config, 2 * (linear_scheme(options).group_size or 32)).items():
            if isinstance(getattr(config, key, None), int) and getattr(config, key) > most:
                setattr(config, key, most)
        model = linearize(type(loaded.model)(whole)).to(loaded.model.dtype).to(loaded.model.device).eval()
        finite = bool(model(input_ids=_token_ids(model), use_cache=False).logits.isfinite().all())
    except Exception as error:  # a configuration has rules of its own for what goes together
        log.debug("no twin: %s", describe_error(error))
        return None
    return replace(loaded, model=model.requires_grad_(False)) if finite else None


def _make_parts_small(config: Any) -> None:
    """Give the parts of a model beside its text model one layer each, in place."""
    _make_token_ids_small(config)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        for key in _DEPTHS:
            if part is not None and part is not text_config(config) and isinstance(getattr(part, key, None), int):
                setattr(part, key, 1)


def _make_token_ids_small(config: Any) -> None:
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            setattr(config, key, value % _VOCABULARY)


def _largest(config: Any, width: int) -> dict[str, int]:
    """Field of a configuration -> the largest number that a twin needs.

    Two experts for each group of experts and expert of a token are enough, and one layer without experts.
    """
    of_a_token = max((getattr(config, key, None) or 0 for key in _EXPERTS_OF_A_TOKEN), default=0)
    experts = max(4, of_a_token, 2 * (getattr(config, "n_group", None) or 1) * of_a_token)
    return dict.fromkeys(_WIDTHS, width) | dict.fromkeys(_EXPERTS, experts) | dict.fromkeys(_DENSE_LAYERS, 1)


def _layers_with_all_types(types: Sequence[str], layers: int) -> int:
    """How many of the first layers have all types; at least 2, where there are as many."""
    return max(min(2, layers), *(types.index(kind) + 1 for kind in set(types)), 0)


def _token_ids(model: Any) -> torch.Tensor:
    count: int = model.get_input_embeddings().num_embeddings
    return (torch.arange(2 * _TOKENS, device=model.device) % count).view(2, _TOKENS)


def _compress(twin: LoadedModel, options: SchemeOptions, trains: bool) -> dict[str, QuantizedWeight]:
    """Round to nearest; with `trains`, take the gradients of adapters of rank 1 and absorb them."""
    model = twin.model
    everything = select_layers(model)
    # Of an average both widths are tried: every second group of layers that runtimes compute as one is raised.
    raised = {name for group in choice_groups(model, everything.linears)[::2] for name in group}
    selection = assign_schemes(everything, model, replace(options, strict_group_size=False), raised)
    schemes, inits = selection.schemes, {}
    for name in selection.linears:
        weight_OI = model.get_submodule(name).weight.detach().float()
        inits[name] = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, schemes[name]))
    weights = quantize_embeddings(model, {name: schemes[name] for name in selection.embeddings})
    if trains:
        layers = insert_fake_quant_layers(model, inits, schemes, rank=1, seed=0)
        last_hidden_states(model, _token_ids(model)).float().square().mean().backward()
        return weights | absorb_layers(model, dict(layers))
    return weights | {name: init.quantized(schemes[name]) for name, init in inits.items()}


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
