"""Mixtures of experts as nn.Linear layers.

transformers stores each projection of all experts of a layer as one parameter, [E, O, I] or, transposed, [E, I, O].
`split_experts` replaces these parameters by one nn.Linear for each expert and projection, so that everything that
works on linear layers works on experts too:

    mlp.experts.gate_up_proj [E, 2 F, D]   ->   mlp.experts.0.gate_up_proj.weight [2 F, D], mlp.experts.1. ...
    mlp.experts.down_proj    [E, D, F]     ->   mlp.experts.0.down_proj.weight    [D, F],   ...

The linear layers share the memory of the parameter unless it is transposed. Each is called with the tokens that the
router sends to its expert, and not called at all if there are none.

Three kinds of modules are known: those of transformers' experts interface (routed: most families), LongCat's, which
have identity experts beside the routed ones, and those that get their inputs sorted by expert (Llama 4, JetMoe).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class SplitExperts(nn.Module):
    """Base class of a module after the split. Its children "0", "1", ... are the experts.

    Attributes:
        split_count: number of experts, E.
    """

    split_count: int

    def experts(self) -> Iterator[nn.Module]:
        """The experts in their order."""
        return (self.get_submodule(str(i)) for i in range(self.split_count))


class RoutedExperts(SplitExperts):
    """Experts of transformers' experts interface: each token goes through its K best experts.

    Each expert has gate_up_proj (up_proj in a mixture without gates) and down_proj.
    """

    def forward(self, hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Compute the weighted sum of the experts' outputs.

        Args:
            hidden_ND: N tokens.
            index_NK: experts of each token, int64. E and above stands for no expert.
            weight_NK: their weights.

        Returns:
            [N, D] in the dtype of hidden_ND. The sum is taken in the order of the K experts, so equal inputs give equal
            outputs to the bit on every device.
        """
        tokens, top_k = index_NK.shape
        # Tokens sorted by expert: row j of the sorted order is the choice order[j] of all N * K choices.
        order = index_NK.flatten().argsort(stable=True)
        counts = index_NK.flatten().bincount(minlength=self.split_count).tolist()
        parts = hidden_ND[order.div(top_k, rounding_mode="floor")].split(counts)
        outputs = [self.compute_expert(i, part) for i, part in enumerate(parts) if len(part)]
        sorted_outputs = torch.cat(outputs) if outputs else hidden_ND
        choices_NKD = sorted_outputs[order.argsort()].view(tokens, top_k, hidden_ND.shape[1])
        return (choices_NKD * weight_NK[..., None]).sum(1).to(hidden_ND.dtype)

    def compute_expert(self, i: int, hidden_MD: Tensor) -> Tensor:
        """Outputs [M, D] of expert i for the M tokens that are routed to it."""
        if i >= self.split_count:
            return self.compute_no_expert(hidden_MD)
        expert: Any = self.get_submodule(str(i))
        if self.has_gate:
            inner = self._apply_gate(expert.gate_up_proj(hidden_MD))  # type: ignore[operator]
        else:
            inner = self.act_fn(expert.up_proj(hidden_MD))  # type: ignore[operator]
        output: Tensor = expert.down_proj(inner)
        return self.post_expert_norm(output) if self.has_post_expert_norm else output  # type: ignore[operator,no-any-return]

    def compute_no_expert(self, hidden_MD: Tensor) -> Tensor:
        """Outputs for the choices that stand for no expert."""
        return torch.zeros_like(hidden_MD)


class RoutedAndIdentityExperts(RoutedExperts):
    """LongCat's experts: the numbers E and above stand for an expert that returns its inputs."""

    has_gate, has_post_expert_norm = True, False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[operator,no-any-return]

    def compute_no_expert(self, hidden_MD: Tensor) -> Tensor:
        """See RoutedExperts.compute_no_expert."""
        return hidden_MD


class DenseExperts(SplitExperts):
    """Llama 4's experts: every expert gets every token, and those that are not routed to it are zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the experts' outputs: [E * N, D] -> [E * N, D], N rows for each expert.

        An expert has no bias, so its output for a zero token is zero; it is called with the other tokens only.
        """
        outputs = []
        for expert, hidden_ND in zip(self.experts(), hidden_states.chunk(self.split_count), strict=True):
            routed_N = hidden_ND.ne(0).any(-1)
            output_ND = torch.zeros_like(hidden_ND)
            if bool(routed_N.any()):
                gate, up = expert.gate_up_proj(hidden_ND[routed_N]).chunk(2, dim=-1)  # type: ignore[operator]
                output_ND = output_ND.index_put((routed_N,), expert.down_proj(up * self.act_fn(gate)))  # type: ignore[operator]
            outputs.append(output_ND)
        return torch.cat(outputs)


class SortedExperts(SplitExperts):
    """JetMoe's parallel experts: one linear layer an expert, inputs sorted by expert."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """Compute the experts' outputs.

        Args:
            inputs: [N, I], the tokens of expert 0, then those of expert 1, ...
            expert_size: number of tokens of each expert.

        Returns:
            [N, O] in the same order.
        """
        parts = zip(self.experts(), inputs.split(expert_size), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)])


def split_experts(model: nn.Module) -> None:
    """Replace the 3-D parameters of all known mixtures in a model by nn.Linear layers, in place.

    Args:
        model: transformers.PreTrainedModel, also on the meta device.
    """
    for module in list(model.modules()):
        kind = _kind_of(module)
        if kind is not None:
            _split(module, kind)


@dataclass(frozen=True)
class Stack:
    """A parameter that holds a projection, or its biases, of all experts of a layer, before the split.

    Attributes:
        path: of the module that the experts are in.
        leaf: name of the projection in an expert; "" where an expert is one linear layer.
        count: number of experts, E. The parameter may have more entries, which are not used.
        shape: of the projection of one expert in memory after the split: [O, I], or [O] of biases.
        transposed: each entry is [I, O].
    """

    path: str
    leaf: str
    count: int
    shape: tuple[int, ...]
    transposed: bool

    def module(self, i: int) -> str:
        """Name of the linear layer of expert i after the split."""
        return f"{self.path}.{i}.{self.leaf}".removesuffix(".")


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacked parameters of a model that is not split yet: name of the parameter -> what it holds."""
    found = {}
    for path, module in model.named_modules():
        kind = _kind_of(module)
        if kind is not None:
            stacked = _stacked(module)
            transposed = _is_transposed(module, kind)
            count = min(len(parameter) for parameter in stacked.values())
            for name, parameter in stacked.items():
                shape = tuple(parameter.shape[1:])
                leaf = "" if kind is SortedExperts else name
                found[f"{path}.{name}"] = Stack(path, leaf, count, shape[::-1] if transposed else shape, transposed)
                bias = module._parameters.get(f"{name}_bias")
                if bias is not None:
                    found[f"{path}.{name}_bias"] = Stack(path, leaf, count, tuple(bias.shape[1:]), False)
    return found


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module with three axes."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}


def _is_transposed(module: nn.Module, kind: type[SplitExperts]) -> bool:
    return kind is DenseExperts or bool(getattr(module, "is_transposed", False))


def _kind_of(module: nn.Module) -> type[SplitExperts] | None:
    """The class that `module` becomes; None if it is no mixture with 3-D parameters that is known here."""
    stacked = _stacked(module).keys()
    if stacked in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
        if hasattr(module, "is_transposed"):  # set by transformers' experts interface
            return RoutedExperts
        return {"LongcatFlashExperts": RoutedAndIdentityExperts, "Llama4TextExperts": DenseExperts}.get(
            type(module).__name__
        )
    return SortedExperts if stacked == {"weight"} and type(module).__name__ == "JetMoeParallelExperts" else None


def _split(module: nn.Module, kind: type[SplitExperts]) -> None:
    """Replace the 3-D parameters of one module, and give it the class `kind` beside its own."""
    stacked = _stacked(module)
    count = min(len(parameter) for parameter in stacked.values())  # LongCat's gate_up_proj also has identity experts
    transposed = _is_transposed(module, kind)
    biases = {name: module._parameters.pop(f"{name}_bias", None) for name in stacked}
    for name in stacked:
        del module._parameters[name]
    for i in range(count):
        layers = {
            name: _linear(weight[i].T if transposed else weight[i], None if biases[name] is None else biases[name][i])  # type: ignore[index]
            for name, weight in stacked.items()
        }
        module.add_module(str(i), layers["weight"] if kind is SortedExperts else nn.ModuleDict(layers))
    original = type(module)
    module.__class__ = type(original.__name__, (kind, original), {"__module__": original.__module__})
    module.split_count = count  # type: ignore[assignment]


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer with this weight, whose memory it shares if it is contiguous."""
    linear = nn.Linear(
        weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta", dtype=weight_OI.dtype
    )
    linear.weight = nn.Parameter(weight_OI.detach().contiguous(), requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach().clone(), requires_grad=False)
    return linear
