"""Experts in a traced graph: all experts of a layer as one weight [E, O, I].

Which experts a token needs is not known when a model is traced. The graph therefore lets every expert compute every
token, and weighs those that the router did not choose by zero:

    tokens [N, D], once for each expert [E, N, D]   ->   gate and up   ->   activation   ->   down   ->   [E, N, D]
    output [N, D] = sum over experts of routing weight [E, N, 1] * outputs

OpenVINO's CPU and GPU plugins know this pattern, with gate and up as two products, and run it as GatherMatmul, which
computes the chosen experts only. Mixtures with an activation of their own get the same numbers by the dense products.

A weight of the graph is a stack of some rows of all experts: PATH.*.gate_up_proj.0 are the gates, .1 the rows behind
them. A projection whose experts have different schemes, or stay in 16 bits, is no stack: each expert computes its own
product.

JetMoe sorts tokens by expert, and splits them at numbers that a trace would keep. Its routers do not sort here: each
row keeps its place, and the number of its expert goes to the experts in place of the sizes. All of them compute all
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from nybble.export.places import Place
from nybble.models.experts import DenseExperts, RoutedAndIdentityExperts, RoutedExperts, SortedExperts, SplitExperts
from nybble.quant.scheme import QuantScheme

_ANY_EXPERT = ".*."
"""Stands for the number of the expert in the name of a stack."""


def graph_weights(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme]
) -> dict[str, list[Place]]:
    """Return the weights of the graph of a model.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
        shapes: name of every quantized module -> [O, I].
        schemes: name of every quantized module -> scheme.

    Returns:
        Name in the graph -> where its rows are in memory. Modules that are in no stack keep their names.
    """
    weights = {name: [Place(name, name)] for name in shapes}
    for path, experts in _mixtures(model):
        for leaf in dict(experts.get_submodule("0").named_children()) or [""]:
            modules = [_module(path, i, leaf) for i in range(experts.split_count)]
            if len({schemes.get(name) for name in modules}) > 1 or modules[0] not in schemes:
                continue
            for name in modules:
                del weights[name]
            parts = 2 if leaf == "gate_up_proj" and _has_plain_gate(experts) else 1
            for part in range(parts):
                name = _stack(path, leaf, part)
                weights[name] = stack_places(name, (experts.split_count, shapes[modules[0]][0] // parts))
    return weights


def stack_places(name: str, shape: Sequence[int]) -> list[Place]:
    """Return where the rows of a weight of the graph are in memory.

    Args:
        name: of a stack in the graph, or of a module.
        shape: of the stack, [E, O, ...].
    """
    path, is_stack, leaf = name.partition(_ANY_EXPERT)
    if not is_stack:
        return [Place(name, name)]
    leaf, _, part = leaf.rpartition(".")
    count, rows = shape[0], slice(int(part) * shape[1], (int(part) + 1) * shape[1])
    return [Place(name, _module(path, i, leaf), rows, i) for i in range(count)]


def _module(path: str, i: int, leaf: str) -> str:
    """Name of a linear layer of an expert, which may be one itself."""
    return f"{path}.{i}.{leaf}".removesuffix(".")


def _stack(path: str, leaf: str, part: int = 0) -> str:
    """Name of a stack in the graph."""
    return path + _ANY_EXPERT + f"{leaf}.{part}".removeprefix(".")


def trace_experts(model: nn.Module, weight_of: Callable[[str], Tensor], names: Collection[str]) -> None:
    """Let the mixtures of a model compute as the top of this file says, in place.

    Args:
        model: transformers.PreTrainedModel after `linearize`.
        weight_of: name of a graph weight -> its values [E, O, I].
        names: of all graph weights.
    """
    for path, experts in _mixtures(model):
        traced = _TracedExperts(path, experts, weight_of, names)
        is_sorted = isinstance(experts, SortedExperts)
        experts.forward = traced.forward_rows if is_sorted else traced.forward  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(getattr(module, "input_linear", None), SortedExperts):
            module.router.forward = partial(_route_unsorted, module.router)  # type: ignore[union-attr]


def _route_unsorted(router: Any, hidden_ND: Tensor) -> tuple[Tensor, ...]:
    """Forward of a router of JetMoe that leaves the choices in the order of the tokens; see the top of this file."""
    logits_NE = router.layer(hidden_ND).float()
    best_NK, index_NK = logits_NE.topk(router.top_k, dim=1)
    experts = index_NK.flatten()
    order = torch.arange(experts.shape[0])
    return order, order.div(router.top_k, rounding_mode="floor"), best_NK.softmax(1).flatten(), experts, logits_NE


def _mixtures(model: nn.Module) -> list[tuple[str, SplitExperts]]:
    """Paths and modules of the mixtures that can be traced here."""
    known = (RoutedExperts, DenseExperts, SortedExperts)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, known)]


def _has_plain_gate(experts: SplitExperts) -> bool:
    """Whether the first half of the rows of gate_up_proj are gates, and an activation is all that happens to them."""
    plain = isinstance(experts, DenseExperts | RoutedAndIdentityExperts)
    return plain or getattr(type(experts), "_apply_gate", None) is _default_apply_gate


class _TracedExperts:
    """Forward of one mixture; see the top of this file."""

    def __init__(self, path: str, experts: Any, weight_of: Callable[[str], Tensor], names: Collection[str]) -> None:
        self.experts, self.path, self.weight_of, self.names = experts, path, weight_of, names

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

    def forward_rows(self, inputs_MI: Tensor, expert_M: Tensor) -> Tensor:
        """Outputs [M, O] of the expert of each row."""
        count = self.experts.split_count
        (outputs_EMO,) = self._products(inputs_MI.expand(count, -1, -1), "")
        chosen_EM = expert_M == torch.arange(count)[:, None]
        return (outputs_EMO * chosen_EM[..., None]).sum(0)

    def _outputs(self, hidden_END: Tensor) -> Tensor:
        """Outputs [E, N, D] of all experts."""
        experts = self.experts
        if not hasattr(experts.get_submodule("0"), "gate_up_proj"):
            inner = experts.act_fn(*self._products(hidden_END, "up_proj"))
        elif _has_plain_gate(experts):
            gate, up = self._products(hidden_END, "gate_up_proj", parts=2)
            inner = experts.act_fn(gate) * up
        else:
            inner = experts._apply_gate(*self._products(hidden_END, "gate_up_proj"))
        (output,) = self._products(inner, "down_proj")
        return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output  # type: ignore[no-any-return]

    def _products(self, hidden_ENI: Tensor, projection: str, parts: int = 1) -> list[Tensor]:
        """Products of all experts with a projection, plus their biases if they have any: `parts` of the rows each."""
        layers: list[Any] = [expert.get_submodule(projection) for expert in self.experts.experts()]
        if _stack(self.path, projection) not in self.names:
            outputs_ENO = torch.stack([layer(hidden_ENI[i]) for i, layer in enumerate(layers)])
            return list(outputs_ENO.chunk(parts, dim=-1))
        products = [
            torch.matmul(hidden_ENI, self.weight_of(_stack(self.path, projection, part)).transpose(1, 2))
            for part in range(parts)
        ]
        if layers[0].bias is None:
            return products
        biases = torch.stack([layer.bias for layer in layers])[:, None].chunk(parts, dim=-1)  # type: ignore[misc]
        return [product + bias for product, bias in zip(products, biases, strict=True)]
