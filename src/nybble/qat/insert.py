"""Put layers that are trained in place of nn.Linear, and 8-bit weights into embedding and head.

Plain module replacement, no graph tracing: a new model family works as soon as transformers has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nybble.compress.init import QuantizedInit
from nybble.models.families import family_of
from nybble.qat.layers import CachedWeightLinear, FakeQuantizedLoRALinear, FixedCodesLinear, LoRALinear, RelativeShift
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import INT8_PER_ROW, QuantScheme
from nybble.quant.weight import QuantizedWeight

_ROWS = 4096  # of an embedding whose float32 copies exist at a time


def insert(
    model: Any, starts: Mapping[str, QuantizedInit], scheme: QuantScheme, rank: int, seed: int
) -> dict[str, FakeQuantizedLoRALinear]:
    """Replace every layer named in `starts`, in place; the layers take over weight and bias without a copy.

    Returns: name -> layer, in the order of `starts`. Until trained, the model computes with the compressed weights.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, start in starts.items():
        linear = model.get_submodule(name)
        layers[name] = FakeQuantizedLoRALinear(
            start.weight_OI,
            start.scale_OG,
            start.zero_point_OG,
            scheme,
            linear.bias,
            rank,
            linear.weight.dtype,
            generator,
        )
        model.set_submodule(name, layers[name])
    return layers


def insert_codes(model: Any, starts: Mapping[str, QuantizedWeight], seed: int) -> dict[str, FixedCodesLinear]:
    """Replace every layer named in `starts`, in place, by one that keeps its codes, on the layer's device; the layer's weight goes.

    Returns: name -> layer, in the order of `starts`. Until trained, the model computes with the compressed weights.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, start in starts.items():
        linear = model.get_submodule(name)
        layers[name] = FixedCodesLinear(start.to(linear.weight.device), linear.bias, linear.weight.dtype, generator)
        model.set_submodule(name, layers[name])
    return layers


def insert_adapters(model: Any, names: Iterable[str], rank: int, seed: int) -> dict[str, LoRALinear]:
    """Replace every layer named, in place, by one with adapters on its own 16-bit weight.

    Returns: name -> layer, in the order of `names`. Until trained, the model computes as before.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        layers[name] = LoRALinear(linear.weight.detach(), linear.bias, rank, linear.weight.dtype, generator)
        model.set_submodule(name, layers[name])
    return layers


@torch.no_grad()
def quantize_rows(model: Any, names: Iterable[str]) -> dict[str, QuantizedWeight]:
    """Round embedding and head to 8 bits a row, zero fixed at 128, in place. A tied head follows its embedding.

    Returns: module name -> the codes that ship.
    """
    quantized = {}
    for name in names:
        pieces = []
        for rows in model.get_submodule(name).weight.split(_ROWS):
            pieces.append(QuantizedInit(rows, *min_max_qparams(rows, INT8_PER_ROW)).quantized(INT8_PER_ROW))
            rows.copy_(pieces[-1].dequantize())
        codes, scale, zero = (
            torch.cat([getattr(piece, part) for piece in pieces]) for part in ("codes_OI", "scale_OG", "zero_point_OG")
        )
        quantized[name] = QuantizedWeight(codes, scale, zero, INT8_PER_ROW)
    return quantized


def _norms(model: Any) -> dict[str, Any]:
    """Modules that normalise and then multiply with a vector."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 1
    }


def train_norms(model: Any) -> dict[str, nn.Parameter]:
    """Make the weights of all norms trainable, in place. Returns: name -> what is trained, see ShiftedWeight."""
    offset, trained = family_of(model.config).norm_offset, {}
    for name, norm in _norms(model).items():
        shifted = RelativeShift(norm.weight.detach(), offset)
        norm.weight.requires_grad_(False)
        parametrize.register_parametrization(norm, "weight", shifted)
        trained[f"{name}.shift"] = shifted.shift
    return trained


def settle_norms(model: Any) -> None:
    """Make the trained weights of norms plain ones again, in place."""
    for norm in _norms(model).values():
        if parametrize.is_parametrized(norm, "weight"):
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=True)
            norm.weight.requires_grad_(False)


@contextmanager
def weight_cache(layers: Iterable[CachedWeightLinear], push: bool = True) -> Iterator[None]:
    """Make every weight once for all that happens inside; with `push`, send the collected gradients on at the end."""
    layers = list(layers)
    try:
        for layer in layers:
            layer.fill_weight_cache()
        yield
        if push:
            for layer in layers:
                layer.flush_weight_cache()
    finally:
        for layer in layers:
            layer.drop_weight_cache()
