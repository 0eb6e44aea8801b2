"""Experts in a traced graph: all experts of a layer as one weight [E, O, I].

Which experts a token needs is not known when a model is traced. The graph therefore lets every expert compute every
token, and weighs those that the router did not choose by zero:

    tokens [N, D], once for each expert [E, N, D]   ->   gate and up   ->   activation   ->   down   ->   [E, N, D]
    output [N, D] = sum over experts of routing weight [E, N, 1] * outputs

OpenVINO's CPU and GPU plugins know this pattern, with gate and up as two products, and run it as GatherMatmul, which
computes the chosen experts only. Mixtures with an activation of their own get the same numbers by the dense products.

A weight of the graph is a stack of some rows of all experts: PATH.*.gate_up_proj.0 are the gates, .1 the rows behind
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from nybble.models.experts import DenseExperts, RoutedAndIdentityExperts, RoutedExperts, SplitExperts
from nybble.quant.weight import QuantizedWeight

ANY_EXPERT = ".*."
"""Stands for the number of the expert in the name of a stack."""


@dataclass(frozen=True)
class GraphWeight:
    """A quantized weight as the graph holds it.

    Attributes:
        shape: (O, I), or (E, O, I) for a stack.
        modules: names of the quantized modules that it is read from: one, or one for each expert.
        rows: the first row that is taken of each, and the row behind the last.
    """

    shape: tuple[int, ...]
    modules: tuple[str, ...]
    rows: tuple[int, int]

    def read(self, quantized: Mapping[str, QuantizedWeight]) -> QuantizedWeight:
        """Codes, scales and zero points of the rows, one expert after the other: [E * O, ...]."""
        return stack_rows([quantized[name] for name in self.modules], slice(*self.rows))


def stack_rows(weights: Sequence[QuantizedWeight], rows: slice = slice(None)) -> QuantizedWeight:
    """Put some rows of weights with one scheme and one width below each other."""
    codes_OI, scale_OG, zero_point_OG = (
        torch.cat([getattr(weight, leaf)[rows] for weight in weights])
        for leaf in ("codes_OI", "scale_OG", "zero_point_OG")
    )
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, weights[0].scheme)


def graph_weights(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, GraphWeight]:
    """Return the weights of the graph of a model.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
        shapes: name of every quantized module -> [O, I].

    Returns:
        Name in the graph -> weight. Modules outside of mixtures keep their names.
    """
    weights = {name: GraphWeight(shape, (name,), (0, shape[0])) for name, shape in shapes.items()}
    for path, experts in _mixtures(model):
        for leaf in dict(experts.get_submodule("0").named_children()):
            modules = tuple(f"{path}.{i}.{leaf}" for i in range(experts.split_count))
            rows, columns = shapes[modules[0]]
            for name in modules:
                del weights[name]
            step = rows // 2 if leaf == "gate_up_proj" and _has_plain_gate(experts) else rows
            for part, start in enumerate(range(0, rows, step)):
                shape = (experts.split_count, step, columns)
                name = f"{path}{ANY_EXPERT}{leaf}.{part}"
                weights[name] = GraphWeight(shape, modules, (start, start + step))
    return weights


def trace_experts(model: nn.Module, weight_of: Callable[[str], Tensor]) -> None:
    """Let the mixtures of a model compute as the top of this file says, in place.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
        weight_of: name of a graph weight -> its values [E, O, I].
    """
    for path, experts in _mixtures(model):
        experts.forward = _TracedExperts(path, experts, weight_of).forward  # type: ignore[method-assign]


def modules_of_stacks(counts: Mapping[str, int]) -> dict[str, list[tuple[str, int]]]:
    """Return where the rows of each expert's modules are.

    Args:
        counts: name of a stack -> number of experts.

    Returns:
        Module name -> stacks that hold its rows, in their order, and the number of the expert in each.
    """
    modules: dict[str, list[tuple[str, int]]] = {}
    for stack in sorted(counts):
        path, _, leaf = stack.partition(ANY_EXPERT)
        for i in range(counts[stack]):
            modules.setdefault(f"{path}.{i}.{leaf.rpartition('.')[0]}", []).append((stack, i))
    return modules


def _mixtures(model: nn.Module) -> list[tuple[str, SplitExperts]]:
    """Paths and modules of the mixtures that can be traced here."""
    known = (RoutedExperts, DenseExperts)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, known)]


def _has_plain_gate(experts: SplitExperts) -> bool:
    """Whether the first half of the rows of gate_up_proj are gates, and an activation is all that happens to them."""
    plain = isinstance(experts, DenseExperts | RoutedAndIdentityExperts)
    return plain or getattr(type(experts), "_apply_gate", None) is _default_apply_gate


class _TracedExperts:
    """Forward of one mixture; see the top of this file."""

    def __init__(self, path: str, experts: Any, weight_of: Callable[[str], Tensor]) -> None:
        self.experts, self.path, self.weight_of = experts, path, weight_of

    def forward(self, hidden: Tensor, index_NK: Tensor | None = None, weight_NK: Tensor | None = None) -> Tensor:
        """See RoutedExperts.forward, and DenseExperts.forward where there is no index."""
        count = self.experts.split_count
        if index_NK is None or weight_NK is None:
            outputs_END = self._outputs(hidden.view(count, -1, hidden.shape[-1]))
            return outputs_END.reshape(-1, hidden.shape[-1])
        width = hidden.shape[-1]
        outputs_END = self._outputs(hidden.repeat(count, 1).view(count, -1, width))
        identity = isinstance(self.experts, RoutedAndIdentityExperts)
        slots = self.experts.total_experts if identity else count
        routing_NE = torch.zeros(hidden.shape[0], slots, dtype=weight_NK.dtype).scatter(1, index_NK, weight_NK)
        routing_EN1 = routing_NE[:, :count].transpose(0, 1) if identity else routing_NE.transpose(0, 1)
        routing_EN1 = routing_EN1.reshape(count, -1)[..., None]
        output = (outputs_END.view(count, -1, width) * routing_EN1).sum(0)
        return output + hidden * routing_NE[:, count:].sum(1, keepdim=True) if identity else output

    def _outputs(self, hidden_END: Tensor) -> Tensor:
        """Outputs [E, N, D] of all experts."""
        experts = self.experts
        if hasattr(experts.get_submodule("0"), "gate_up_proj"):
            if _has_plain_gate(experts):
                inner = experts.act_fn(self._product(hidden_END, "gate_up_proj.0"))
                inner = inner * self._product(hidden_END, "gate_up_proj.1")
            else:
                inner = experts._apply_gate(self._product(hidden_END, "gate_up_proj.0"))
        else:
            inner = experts.act_fn(self._product(hidden_END, "up_proj.0"))
        output = self._product(inner, "down_proj.0")
        return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output  # type: ignore[no-any-return]

    def _product(self, hidden_ENI: Tensor, name: str) -> Tensor:
        """Product with one stack, plus the experts' biases if they have any."""
        output = torch.matmul(hidden_ENI, self.weight_of(f"{self.path}{ANY_EXPERT}{name}").transpose(1, 2))
        projection = name.rpartition(".")[0]
        biases = [expert.get_submodule(projection).bias for expert in self.experts.experts()]
        return output if biases[0] is None else output + torch.stack(biases)[:, None]
