"""Stacks of experts: formats that hold a projection of all experts of a layer as one tensor [E, O, I].

GGUF and MLX have such tensors, with gate and up apart, where memory has one linear layer for each expert:

    mlp.experts.3.gate_up_proj [2 F, D]   ->   mlp.experts.gate_proj [3] and mlp.experts.up_proj [3], each [F, D]
    mlp.experts.3.down_proj    [D, F]     ->   mlp.experts.down_proj [3]

The gates are the first half of the rows of gate_up_proj; in gpt_oss they are every other row. Biases go the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

_EXPERT = re.compile(
    r"(?P<path>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_up_proj|down_proj)(?P<kind>\.weight|\.bias)?"
)


@dataclass(frozen=True)
class Place:
    """Where rows of a module or parameter are in a file.

    Attributes:
        tensor: name in the file.
        expert: number of the matrix in the tensor; None where the tensor is no stack.
        rows: which rows of the module or parameter these are.
    """

    tensor: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def stack_places(name: str, expert_width: int, interleaved_gate: bool = False) -> list[Place]:
    """Return where the rows of a module or parameter are; all of them under its own name if it is not of an expert.

    Args:
        name: in memory: a module, or a parameter that ends in .weight or .bias.
        expert_width: rows of the gates of an expert, F.
        interleaved_gate: gates and ups take turns in the rows of gate_up_proj.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return [Place(name)]
    path, number, kind = match["path"], int(match["number"]), match["kind"] or ""
    if match["leaf"] == "down_proj":
        return [Place(f"{path}.down_proj{kind}", number)]
    halves = (slice(0, expert_width), slice(expert_width, None))
    if interleaved_gate:
        halves = (slice(0, None, 2), slice(1, None, 2))
    return [
        Place(f"{path}.{leaf}{kind}", number, rows) for leaf, rows in zip(("gate_proj", "up_proj"), halves, strict=True)
    ]


def take_rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Return some rows of a weight."""
    return QuantizedWeight(weight.codes_OI[rows], weight.scale_OG[rows], weight.zero_point_OG[rows], weight.scheme)


def join_rows(parts: Sequence[tuple[slice, QuantizedWeight]]) -> QuantizedWeight:
    """Put rows of weights with one scheme together: pairs of the rows in the result, and the weight that they are."""

    def join(leaf: str) -> Tensor:
        return join_tensors([(rows, getattr(weight, leaf)) for rows, weight in parts])

    return QuantizedWeight(join("codes_OI"), join("scale_OG"), join("zero_point_OG"), parts[0][1].scheme)


def join_tensors(parts: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """Put rows of matrices together: pairs of the rows in the result, and the matrix that they are."""
    if len(parts) == 1:
        return parts[0][1]
    joined = parts[0][1].new_empty(sum(len(part) for _, part in parts), parts[0][1].shape[1])
    for rows, part in parts:
        joined[rows] = part
    return joined


def num_experts(config: Any) -> int:
    """Return the number of experts of a layer; 0 for a model without mixtures."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def expert_width(config: Any) -> int:
    """Return the rows of the gates of an expert, F; 0 for a model without mixtures."""
    if not num_experts(config):
        return 0
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def stack_problem(config: Any, selection: LayerSelection, kind_of: Callable[[QuantScheme], Hashable]) -> str | None:
    """Return why the experts of a layer do not fit into one tensor, as the object of "this model has"; None if they do.

    Args:
        config: transformers configuration.
        selection: layers that are quantized, with their schemes.
        kind_of: scheme -> what all experts of a tensor must have in common.
    """
    stacks: dict[tuple[str, str], list[str]] = {}
    for name in selection.linears:
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault((match["path"], match["leaf"]), []).append(name)
    for (path, leaf), names in stacks.items():
        if len(names) != num_experts(config):
            return f"{len(names)} of {num_experts(config)} quantized in {path}.*.{leaf}"
        schemes = {selection.schemes[name] for name in names if name in selection.schemes}
        if len({kind_of(scheme) for scheme in schemes}) > 1:
            return f"{' and '.join(sorted(map(str, schemes)))} in {path}.*.{leaf}"
    return None
