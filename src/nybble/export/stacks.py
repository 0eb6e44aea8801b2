"""Stacks of experts: formats that hold a projection of all experts of a layer as one tensor [E, O, I].

GGUF and MLX have such tensors, with gate and up apart, where memory has one linear layer for each expert:

    mlp.experts.3.gate_up_proj [2 F, D]   ->   mlp.experts.gate_proj [3] and mlp.experts.up_proj [3], each [F, D]
    mlp.experts.3.down_proj    [D, F]     ->   mlp.experts.down_proj [3]

The gates are the first half of the rows of gate_up_proj; in gpt_oss they are every other row. Biases go the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

from nybble.export.places import Place
from nybble.models.selection import LayerSelection
from nybble.quant.scheme import QuantScheme

_EXPERT = re.compile(
    r"(?P<path>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_up_proj|down_proj)(?P<kind>\.weight|\.bias)?"
)


def stack_places(name: str, expert_width: int, interleaved_gate: bool = False) -> list[Place]:
    """Return where the rows of a module or parameter are; all of them under its own name if it is not of an expert.

    Args:
        name: in memory: a module, or a parameter that ends in .weight or .bias.
        expert_width: rows of the gates of an expert, F.
        interleaved_gate: gates and ups take turns in the rows of gate_up_proj.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return [Place(name, name)]
    path, number, kind = match["path"], int(match["number"]), match["kind"] or ""
    if match["leaf"] == "down_proj":
        return [Place(f"{path}.down_proj{kind}", name, matrix=number)]
    halves = (slice(0, expert_width), slice(expert_width, None))
    if interleaved_gate:
        halves = (slice(0, None, 2), slice(1, None, 2))
    leaves = ("gate_proj", "up_proj")
    return [Place(f"{path}.{leaf}{kind}", name, rows, number) for leaf, rows in zip(leaves, halves, strict=True)]


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
