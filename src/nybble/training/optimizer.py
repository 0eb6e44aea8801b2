"""The optimizers: AdamW, with moments in float32 or in 8 bits, and their state as plain tensors for checkpoints.

Moments in 8 bits (https://arxiv.org/abs/2110.02861) are those of torchao: codes of a dynamic map and a scale for 256
values. A parameter has them if it has at least 4096 values, in whole blocks; the others keep float32.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nybble.errors import MissingExtraError, OptionError

Optim = Literal["adamw", "adamw_8bit"]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

BLOCK = 256
_MIN_VALUES = 4096
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign
_PARTS = ("codes", "scale")


def check_optimizer(optim: Optim, device: torch.device) -> None:
    """Raise NybbleError where the optimizer cannot be used on this machine.

    Raises:
        MissingExtraError: torchao is not installed.
        OptionError: the step is compiled, and there is no compiler.
    """
    if optim == "adamw":
        return
    _torchao()
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise OptionError("--optim adamw_8bit needs a C++ compiler on a CPU; there is none; use --optim adamw")


def make_optimizer(groups: list[dict[str, Any]], optim: Optim) -> Optimizer:
    """AdamW for groups of parameters with "params", "lr" and "weight_decay"."""
    if optim == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    optimizer: Optimizer = _torchao().AdamW8bit(groups, block_size=BLOCK)
    return optimizer


def set_learning_rates(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each group. AdamW8bit has it in a tensor, so that it is not compiled anew."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state of a parameter: "step", and "exp_avg" or "exp_avg.codes" and "exp_avg.scale", ..."""
    if parameter not in optimizer.state:
        return {}
    state, tensors = optimizer.state[parameter], {"step": optimizer.state[parameter]["step"]}
    for name in _MOMENTS:
        if _is_short(optimizer, parameter):
            tensors |= {f"{name}.{part}": getattr(state[name], part) for part in _PARTS}
        else:
            tensors[name] = state[name]
    return tensors


def state_layout(optimizer: Optimizer, parameter: nn.Parameter) -> Layout:
    """Dtype and shape of what `state_of` returns after a step."""
    shape = tuple(parameter.shape)
    layout: Layout = {"step": (torch.float32, ())}
    for name in _MOMENTS:
        if _is_short(optimizer, parameter):
            layout |= {f"{name}.codes": (torch.uint8, shape)}
            layout |= {f"{name}.scale": (torch.float32, (math.prod(shape) // BLOCK,))}
        else:
            layout[name] = (parameter.dtype, shape)
    return layout


def load_state(optimizer: Optimizer, parameter: nn.Parameter, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state_of` returned, bit for bit."""
    device = parameter.device
    state = {"step": tensors["step"].to(device if isinstance(optimizer, torch.optim.AdamW) else "cpu", copy=True)}
    for name, signed in _MOMENTS.items():
        if not _is_short(optimizer, parameter):
            state[name] = tensors[name].to(device, copy=True)
            continue
        state[name] = type(optimizer)._subclass_zeros(parameter, signed, BLOCK)  # type: ignore[attr-defined]
        for part in _PARTS:
            getattr(state[name], part).copy_(tensors[f"{name}.{part}"])
    optimizer.state[parameter] = state


def _is_short(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the moments of a parameter have 8 bits."""
    if isinstance(optimizer, torch.optim.AdamW):
        return False
    return parameter.numel() >= _MIN_VALUES and parameter.numel() % BLOCK == 0


def _torchao() -> Any:
    """The module with the optimizer."""
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    try:
        from torchao import optim
    except ImportError as error:
        raise MissingExtraError("8bit", "--optim adamw_8bit") from error
    return optim
