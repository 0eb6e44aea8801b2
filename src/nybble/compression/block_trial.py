"""BlockTrial: a float32 copy of a decoder block with random weights, to find out how its modules depend on each other.

The copy runs the block's own code on random hidden states. Which channels a module reads does not depend on the
weights, and random weights have no dead channels and no outliers that would hide a dependence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nybble.compression.chain import Arguments
from nybble.models.norms import own_weight

_SEED = 0
# Smallest and largest factor of a trial.
_FACTORS = (1.5, 4.0)
# An input is multiplied by one factor for all tokens if what remains is below this part of it; float32 leaves 1e-6.
_MAX_REMAINDER = 1e-4
# An input that does not change in a trial, and one that changes by no factor of a channel.
SAME, OTHERWISE = -1, -2


@dataclass(frozen=True)
class Scaling:
    """Outputs that are multiplied during a run.

    Attributes:
        source: name of the module whose outputs are multiplied.
        factor_R: one factor for each of its channels.
        undone_in: names of modules that divide their inputs by the factors before they use them.
    """

    source: str
    factor_R: Tensor
    undone_in: frozenset[str]


class TrialRun:
    """What one run of a block passes through its modules that have a weight of one or two axes.

    Attributes:
        outputs: all that the block returns, and the tensors in its arguments, which may have changed.
        inputs: module name -> its inputs [N, I] in all calls, in the order of the first calls.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        # All tensors are kept, so that no address is used twice.
        self._read: dict[str, list[Tensor]] = {}
        self._written: dict[str, Tensor] = {}

    def width(self, source: str) -> int:
        """Number of channels in the output of a module; 0 if it has no single output."""
        return self._written[source].shape[-1] if source in self._written else 0

    def reads_output(self, reader: str, source: str) -> bool:
        """Whether a module was called with the very tensor that another one returned."""
        written, read = self._written.get(source), self._read.get(reader, [])
        return written is not None and any(
            tensor.data_ptr() == written.data_ptr() and tensor.shape[-1] == written.shape[-1] for tensor in read
        )

    def record_input(self, name: str, tensor: Tensor) -> None:
        """Keep an input, and a copy of its numbers in case the block changes it in place."""
        x_NI = tensor.flatten(0, -2).clone()
        self._read.setdefault(name, []).append(tensor)
        self.inputs[name] = torch.cat([self.inputs[name], x_NI]) if name in self.inputs else x_NI

    def record_output(self, name: str, tensor: Tensor) -> None:
        """Keep an output."""
        self._written[name] = tensor


class BlockTrial:
    """A float32 copy of a block with random weights.

    Args:
        block: the 16-bit decoder block; it does not change.
        arguments: its arguments besides the hidden states, for one sequence.
        hidden_BTD: hidden states of that sequence; only the shape and the device count.

    Attributes:
        modules: module name -> module, for every module with a weight of one or two axes.
        weights: module name -> its random weight.
        biases: module name -> its random bias, where there is one.
    """

    def __init__(self, block: nn.Module, arguments: Arguments, hidden_BTD: Tensor) -> None:
        self._generator = torch.Generator(hidden_BTD.device).manual_seed(_SEED)
        self._block = copy.deepcopy(block).float().eval()
        self.modules = {
            name: module
            for name, module in self._block.named_modules()
            if (weight := own_weight(module)) is not None and weight.ndim <= 2
        }
        self.weights = {name: module.get_parameter("weight") for name, module in self.modules.items()}
        self.biases: dict[str, Tensor] = {
            name: bias
            for name, module in self.modules.items()
            if isinstance(bias := getattr(module, "bias", None), nn.Parameter)
        }
        self._randomize()
        self._arguments = arguments
        # Large beside biases and attention outputs, which all tokens share: then no ReLU is off for all tokens.
        self._hidden_BTD = 4 * self.normal(*hidden_BTD.shape)

    def pattern(self, name: str) -> str:
        """A module name without indices, mlp.experts.*.up_proj; those of an nn.Sequential stay, whose layers differ."""
        parts = name.split(".")
        parents = (self._block.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
        return ".".join(
            "*" if part.isdigit() and not isinstance(parent, nn.Sequential) else part
            for part, parent in zip(parts, parents, strict=True)
        )

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator, device=self._generator.device)

    def permutation(self, count: int) -> Tensor:
        """The numbers below `count` in random order."""
        return torch.randperm(count, generator=self._generator, device=self._generator.device)

    @torch.no_grad()
    def run(self, changed: Mapping[str, Tensor] | None = None, scaling: Scaling | None = None) -> TrialRun:
        """Run the block.

        Args:
            changed: name of a parameter -> what takes its place in this run.
            scaling: outputs to multiply.
        """
        run, handles = TrialRun(), []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(_before(run, name, scaling), with_kwargs=True))
            handles.append(module.register_forward_hook(_after(run, name, scaling)))
        try:
            # New containers for each run, because blocks may leave keys and values for later blocks in them.
            args, kwargs = _to_float32(self._arguments)
            output = functional_call(self._block, dict(changed or {}), (self._hidden_BTD.clone(), *args), kwargs)
            run.outputs = list(_tensors((output, args, kwargs)))
        finally:
            for handle in handles:
                handle.remove()
        return run

    def channels_read(
        self, source: str, start: int, end: int, undone_in: frozenset[str], before: TrialRun
    ) -> dict[str, Tensor]:
        """Multiply channels of a source by different factors, and look for the factors in the inputs of all modules.

        Args:
            source: name of the module.
            start, end: its channels from `start` to before `end` are multiplied.
            undone_in: see Scaling.
            before: a run without factors.

        Returns:
            Module name -> for each of its inputs the channel whose factor it has for all tokens, SAME or OTHERWISE.
        """
        low, high = map(math.log, _FACTORS)
        steps_K = (self.permutation(end - start) + 0.5) / (end - start)
        factor_R = torch.ones(len(self.weights[source]), device=steps_K.device)
        factor_R[start:end] = (low + steps_K * (high - low)).exp()
        after = self.run(scaling=Scaling(source, factor_R, undone_in))
        return {
            name: _channels(x_NI, after.inputs[name], factor_R, start, end)
            for name, x_NI in before.inputs.items()
            if name in after.inputs
        }

    @torch.no_grad()
    def _randomize(self) -> None:
        """Give outputs of about 1 for inputs of about 1 to all modules. Other vectors keep their values."""
        for parameter in self._block.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.copy_(self.normal(*parameter.shape) / parameter[0].numel() ** 0.5)
        for weight in self.weights.values():
            if weight.ndim == 1:  # a norm: from 0.5 to 1.5
                weight.copy_(torch.rand(weight.shape, generator=self._generator, device=weight.device) + 0.5)
        for bias in self.biases.values():
            bias.copy_(self.normal(*bias.shape) / 16)


def _channels(before_NI: Tensor, after_NI: Tensor, factor_R: Tensor, start: int, end: int) -> Tensor:
    """For each input the channel between `start` and `end` whose factor it has for all tokens, SAME or OTHERWISE."""
    if before_NI.shape != after_NI.shape or not len(before_NI):  # tokens went elsewhere
        return torch.full(before_NI.shape[1:], OTHERWISE, device=before_NI.device)
    square_I = before_NI.square().sum(0)
    ratio_I = (before_NI * after_NI).sum(0) / square_I
    remainder_I = (after_NI - ratio_I * before_NI).square().sum(0) / square_I
    constant_I = remainder_I <= _MAX_REMAINDER**2
    sorted_K, order_K = factor_R[start:end].sort()
    gap = (_FACTORS[1] / _FACTORS[0]) ** (1 / (end - start)) - 1
    place_I = torch.bucketize(ratio_I, ((sorted_K[1:] + sorted_K[:-1]) / 2))
    near_I = (ratio_I / sorted_K[place_I] - 1).abs() <= gap / 4
    same_I = (ratio_I - 1).abs() <= _MAX_REMAINDER
    other = torch.full_like(order_K[place_I], OTHERWISE)
    channel_I = torch.where(near_I, start + order_K[place_I], torch.where(same_I, SAME, other))
    return torch.where(constant_I, channel_I, OTHERWISE)


def _before(run: TrialRun, name: str, scaling: Scaling | None) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that records the first floating-point input of a module, and undoes the scaling where it should."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return None
        run.record_input(name, args[0])
        if scaling is None or name not in scaling.undone_in:
            return None
        return (args[0] / scaling.factor_R, *args[1:]), kwargs

    return hook


def _after(run: TrialRun, name: str, scaling: Scaling | None) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that scales the output of the source, and records the output of every module."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):  # a router with several outputs
            return None
        scaled = scaling is not None and scaling.source == name
        result = output * scaling.factor_R if scaled and scaling is not None else output
        run.record_output(name, result)
        return result

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _to_float32(value: Any) -> Any:
    """Convert the floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _to_float32(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to_float32(item) for item in value)
    return value
