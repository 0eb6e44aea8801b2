"""--init_from RUN: the 4-bit weights of a finished run take the place of a compression."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nybble.compression.init import QuantizedInit
from nybble.errors import ModelError, OptionError
from nybble.export.checks import NOTE, exporter_of
from nybble.models import positions_file, quantized_file, quantized_model
from nybble.models.layers_on_disk import LayersOnDisk, block_number, layers_on_disk
from nybble.models.loading import SMOLLM2, LoadedModel, check_model_path, model_fingerprint
from nybble.models.quantized_file import LazyMapping
from nybble.models.selection import LayerSelection
from nybble.options.scheme import WHOLE_ROW
from nybble.quant.position import weight_at_positions
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight
from nybble.run.complete import QUANTIZED, check_complete
from nybble.run.marker import is_run
from nybble.run.results import read_results

log = logging.getLogger("nybble")


def check_sixteen_bit(pretrained: str) -> None:
    """Check that a path leads to a 16-bit model and not to what nybble made of one.

    Raises:
        ModelError: nothing is there, or a run, or an export that is no 16-bit model.
    """
    path, exporter = Path(pretrained), None
    if pretrained != SMOLLM2 and path.exists():
        folder = path if path.is_dir() else path.parent
        exporter = exporter_of(folder) if (folder / NOTE).is_file() else None
        is_made = path.is_dir() and (is_run(path) or (path.name == QUANTIZED and is_run(path.parent)))
        if is_made or (exporter is not None and exporter.holds_codes):
            raise ModelError(
                f"--pretrained {pretrained} must be a 16-bit model; it is a 4-bit model that nybble made; name the "
                "model that it was made from; --init_from RUN goes on from the 4-bit weights of a run"
            )
    check_model_path(pretrained)
    if exporter is not None:
        log.warning("--pretrained %s is an export of nybble: its weights were rounded to 4 bits before", pretrained)


def check_finished(run: Path) -> None:
    """Raise OptionError unless this is the folder of a run whose 4-bit model is there."""
    if not is_run(run):
        raise OptionError(f"--init_from {run} must be the folder of a finished run; it is none")
    if not (run / QUANTIZED / quantized_file.WEIGHTS_FILE).is_file():
        raise OptionError(f"--init_from {run} must be a finished run; it has no 4-bit model; finish it with --resume")
    check_complete(run / QUANTIZED)


def check_fits(run: Path, loaded: LoadedModel, selection: LayerSelection) -> None:
    """Raise OptionError unless the quantized weights of a finished run fit this model and have these schemes."""
    results, layout = read_results(run), quantized_file.read_layout(run / QUANTIZED)
    other = results.model
    layers = {
        name: loaded.model.get_submodule(name).weight.shape for name in (*selection.linears, *selection.embeddings)
    }
    if {name: tuple(shape) for name, shape in layers.items()} != {
        n: layer.shape for n, layer in layout.quantized.items()
    }:
        raise OptionError(
            f"--init_from {run} must be of a model like {loaded.name}; it is of {other}, which has other "
            "quantized layers (--ignore must be that of the run)"
        )
    own = {n: tuple(t.shape) for n, t in quantized_model.unquantized_tensors(loaded.model, layers).items()}
    differing = sorted(name for name, _ in layout.others.items() ^ own.items())
    if differing:
        raise OptionError(
            f"--init_from {run} must be of a model like {loaded.name}; only one of it and {other} has "
            f"{', '.join(dict.fromkeys(differing[:3]))}"
        )
    _check_schemes(run, {name: layer.scheme for name, layer in layout.quantized.items()}, selection)
    same_dtype = results.dtype == str(loaded.model.dtype).removeprefix("torch.")
    before = results.fingerprints.get("model")
    if other != loaded.name:
        log.warning("--init_from %s was made of %s, and the 16-bit model is %s", run, other, loaded.name)
    elif same_dtype and before is not None and before != model_fingerprint(loaded.model):
        log.warning("--init_from %s was made of another %s, with other weights", run, other)


def _check_schemes(run: Path, schemes: Mapping[str, QuantScheme], selection: LayerSelection) -> None:
    """Raise OptionError, with the flags that are missing, unless a run has the schemes of this one."""
    several = len({schemes[name] for name in selection.linears}) > 1
    for name, scheme in selection.schemes.items():
        if schemes[name] == scheme:
            continue
        remedy = f"give --bits, --layer and the other options of the scheme as {run}/config.toml has them"
        if name in selection.linears and not several:
            remedy = f"add {_flags(schemes[name])}"
        raise OptionError(
            f"--init_from {run} must have the schemes of this run; {name} has {schemes[name]}, and this run has "
            f"{scheme}; {remedy}"
        )


def _flags(scheme: QuantScheme) -> str:
    """Options that give linear layers a scheme."""
    symmetric = " --symmetric" if scheme.symmetric and scheme.bits != 8 else ""
    return f"--bits {scheme.bits} --group_size {scheme.group_size or WHOLE_ROW}{symmetric}"


def method_of(run: Path) -> str:
    """How the weights of the run were compressed."""
    return read_results(run).method


def was_trained(run: Path) -> bool:
    """Whether the run, or the one that it started from, was trained end to end."""
    results = read_results(run)
    return results.trains or results.init_trained


def take_over(
    run: Path, loaded: LoadedModel, selection: LayerSelection
) -> tuple[Mapping[str, QuantizedInit], Mapping[str, QuantizedWeight]]:
    """Give the model the weights of a finished run, in place, and everything else that the run has (folded norms).

    Returns: where each 4-bit layer starts, with exactly the codes, scales and zero points of the run, and between the
    codes where the run has it, otherwise in the middle of the cells; and all quantized weights, those in 8 bits too.
    Both are dictionaries for a model in memory, and read from the run at each access for one on disk.

    Raises:
        RunError: the positions are damaged.
    """
    model, layers = loaded.model, layers_on_disk(loaded.model)
    quantized, others = quantized_file.open_weights(run / QUANTIZED)
    quantized = quantized if layers is not None else dict(quantized)
    positions = _open_positions(run, selection)

    def read(name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        return _start(quantized[layer], positions.get(layer), model.dtype) if layer in quantized else others[name]

    def init(name: str) -> QuantizedInit:
        if layers is not None and block_number(layers, name) is not None:
            weight_OI = read(f"{name}.weight").to(model.device, model.dtype)
        else:
            weight_OI = model.get_submodule(name).weight.detach()
        scales = quantized[name].scale_OG, quantized[name].zero_point_OG
        return QuantizedInit(weight_OI, *(tensor.to(model.device, torch.float32) for tensor in scales))

    places: dict[int | None, list[str]] = {}
    for name in (*(f"{name}.weight" for name in quantized), *others):  # all there are, as check_fits has seen
        places.setdefault(None if layers is None else block_number(layers, name), []).append(name)
    for name in places.pop(None, []):
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf).data.copy_(read(name))
    for i, own in places.items():
        if layers is not None and i is not None:
            layers.replace(i, partial(_block, layers, i, own, read))
    where = "positions between the codes too" if positions else "no positions between the codes"
    log.info("initial 4-bit weights: those of %s, %d layers; %s", run, len(selection.linears), where)
    if layers is not None:
        return LazyMapping(selection.linears, init), quantized
    return {name: init(name) for name in selection.linears}, quantized


def _block(layers: LayersOnDisk, i: int, names: Sequence[str], read: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
    """The tensors of block i by their names in it, read at each access, for LayersOnDisk.

    Args:
        names: in the model.
        read: a tensor by its name in the model.
    """
    prefix = layers.prefix(i)
    dtypes = {name: tensor.dtype for name, tensor in layers.modules[i].state_dict().items()}
    own = [name.removeprefix(prefix) for name in names]
    return LazyMapping(own, lambda name: read(prefix + name).to(layers.device, dtypes[name]))


def _open_positions(run: Path, selection: LayerSelection) -> Mapping[str, Tensor]:
    """Positions of the linear layers; empty where the run has none."""
    if not positions_file.has_positions(run / QUANTIZED):
        return {}
    layers = quantized_file.read_layout(run / QUANTIZED).quantized
    return positions_file.open_positions(run / QUANTIZED, {name: layers[name] for name in selection.linears})


def _start(weight: QuantizedWeight, position: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A weight [O, I] before rounding: at its stored position, or without one the value of its code."""
    if position is None:
        return weight.dequantize()
    weight_OI = position if position.is_floating_point() else weight_at_positions(position, weight)
    return QuantizedInit.with_codes(weight, weight_OI, dtype).weight_OI


def fingerprint(run: Path) -> str:
    """Of the 4-bit model of the run, and of its positions if there are any."""
    weights = quantized_file.weights_fingerprint(run / QUANTIZED)
    kept = positions_file.has_positions(run / QUANTIZED)
    return f"{weights} {positions_file.fingerprint(run / QUANTIZED)}" if kept else weights


def warn_of_centres(run: Path) -> None:
    """Say that adapters will move few codes, where the run has no positions."""
    if not positions_file.has_positions(run / QUANTIZED):
        log.warning(
            "--init_from %s keeps no positions of weights between their codes (an earlier version made it, or "
            "--keep_positions none): training starts from the middle of the cells, where it hardly moves a code; "
            "--lora_rank 0 trains scales and norms in less time, and nybble compress makes a run with positions",
            run,
        )
