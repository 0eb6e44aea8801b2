"""Mixtures of experts in GGUF: fields, what llama.cpp does not compute of them, and where the rows of each expert are.

llama.cpp has one tensor [E, O, I] for each projection of all experts of a layer, with gate and up apart:

    mlp.experts.3.gate_up_proj [2 F, D]   ->   blk.N.ffn_gate_exps [3] and blk.N.ffn_up_exps [3], each [F, D]
    mlp.experts.3.down_proj    [D, F]     ->   blk.N.ffn_down_exps [3]

The gates are the first half of the rows of gate_up_proj; in gpt_oss they are every other row. Biases go the same way.
All experts of a tensor have one type of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nybble.export.containers import four_or_eight_bits
from nybble.models.selection import LayerSelection
from nybble.quant.weight import QuantizedWeight

_EXPERT = re.compile(
    r"(?P<path>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_up_proj|down_proj)(?P<kind>\.weight|\.bias)?"
)
_SIGMOID = 2
"""llama.cpp's number for routers with sigmoids (expert_gating_func)."""

_RENAMES = (
    (".block_sparse_moe.", ".mlp."),
    (".gate.moe_statics.", ".moe_statics."),
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".self_attn.sinks", ".self_attn.sinks.weight"),
)
"""Part of a name in transformers 5 -> the same part as the table of the package gguf has it."""


@dataclass(frozen=True)
class Place:
    """Where rows of a parameter are in the file.

    Attributes:
        tensor: name in the file.
        expert: number of the matrix in the tensor; None where the tensor is no stack.
        rows: which rows of the parameter these are.
    """

    tensor: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def parameter_places(
    name_of: Callable[[str], str | None], expert_width: int, interleaved_gate: bool
) -> Callable[[str], list[Place]]:
    """Return the function: name of a parameter in transformers -> where its rows are, empty if there is no tensor.

    Args:
        name_of: name of a parameter -> name in the file, as the package gguf has them.
        expert_width: rows of the gates of an expert, F.
        interleaved_gate: gates and ups take turns in the rows of gate_up_proj.
    """
    halves = (slice(0, None, 2), slice(1, None, 2))
    if not interleaved_gate:
        halves = (slice(0, expert_width), slice(expert_width, None))

    def places(parameter: str) -> list[Place]:
        match = _EXPERT.fullmatch(parameter)
        if match is None:
            for old, new in _RENAMES:
                parameter = parameter.replace(old, new)
            wanted = {parameter: Place("")}
        else:
            path, kind = match["path"].replace(".block_sparse_moe.", ".mlp."), match["kind"] or ""
            number = int(match["number"])
            wanted = {f"{path}.down_proj{kind}": Place("", number)}
            if match["leaf"] == "gate_up_proj":
                parts = zip(("gate_proj", "up_proj"), halves, strict=True)
                wanted = {f"{path}.{leaf}{kind}": Place("", number, rows) for leaf, rows in parts}
        found = {name_of(name): place for name, place in wanted.items()}
        return [Place(name, place.expert, place.rows) for name, place in found.items() if name is not None]

    return places


def take_rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Return some rows of a weight."""
    return QuantizedWeight(weight.codes_OI[rows], weight.scale_OG[rows], weight.zero_point_OG[rows], weight.scheme)


def join_rows(parts: Sequence[tuple[slice, QuantizedWeight]]) -> QuantizedWeight:
    """Put rows of weights with one scheme together: pairs of the rows in the result, and the weight that they are."""
    if len(parts) == 1:
        return parts[0][1]

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


def stack_arrays(parts: Sequence[Callable[[], NDArray[Any]]]) -> NDArray[Any]:
    """Read arrays one at a time into one array with an axis in front."""
    first = parts[0]()
    stack = np.empty((len(parts), *first.shape), first.dtype)
    stack[0] = first
    for i, read in enumerate(parts[1:], start=1):
        stack[i] = read()
    return stack


def num_experts(config: Any) -> int:
    """Return the number of experts of a layer; 0 for a model without mixtures."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def expert_width(config: Any) -> int:
    """Return the rows of the gates of an expert, F; 0 for a model without mixtures."""
    width: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return width if num_experts(config) else 0


def shared_width(config: Any) -> int:
    """Return the rows of the gates of the shared experts together; 0 if there are none."""
    count = getattr(config, "n_shared_experts", None) or getattr(config, "moe_num_shared_experts", None) or 0
    width: int = getattr(config, "shared_expert_intermediate_size", None) or count * expert_width(config)
    return width


def dense_layers(config: Any) -> int | None:
    """Return how many layers without experts come first; None if there are such layers between the others."""
    step = getattr(config, "decoder_sparse_step", None) or getattr(config, "moe_layer_interval", None) or 1
    start = getattr(config, "first_k_dense_replace", None) or getattr(config, "moe_layer_start_index", None) or 0
    end = getattr(config, "moe_layer_end_index", None) or config.num_hidden_layers - 1
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    mixed = [i not in dense and start <= i <= end and (i + 1) % step == 0 for i in range(config.num_hidden_layers)]
    first = mixed.index(True) if any(mixed) else len(mixed)
    return first if all(mixed[first:]) else None


def expert_fields(config: Any) -> dict[str, int | float | str]:
    """Return the fields that describe the mixtures of a model: key without the architecture and a dot -> value.

    Fields that an architecture does not read are harmless.
    """
    if not num_experts(config):
        return {}
    fields: dict[str, int | float | str] = {
        "expert_count": num_experts(config),
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": expert_width(config),
        "leading_dense_block_count": dense_layers(config) or 0,
        "interleave_moe_layer_step": 1,
    }
    if shared := shared_width(config):
        fields["expert_shared_feed_forward_length"] = shared
        fields["expert_shared_count"] = getattr(config, "n_shared_experts", 1)
    if hasattr(config, "routed_scaling_factor"):
        fields["expert_weights_scale"] = float(config.routed_scaling_factor)
        fields["expert_weights_norm"] = bool(config.norm_topk_prob)
        fields["expert_gating_func"] = _SIGMOID
    return fields


def expert_problems(config: Any, assumed: Mapping[str, Any], leading_dense: bool) -> Iterator[str]:
    """Yield what llama.cpp does not compute of the mixtures of a model, as the object of "this model has".

    Args:
        config: transformers configuration.
        assumed: field -> the value that llama.cpp computes with.
        leading_dense: the architecture has layers without experts before the others.
    """
    for name, value in assumed.items():
        if (found := getattr(config, name, value)) != value:
            yield f"{name} {found}"
    if num_experts(config):
        dense = dense_layers(config)
        if dense is None or dense == config.num_hidden_layers or (dense and not leading_dense):
            yield "layers without experts where llama.cpp has experts"


def stack_problem(config: Any, selection: LayerSelection) -> str | None:
    """Return why the experts of a layer do not fit into one tensor; None if they do."""
    stacks: dict[tuple[str, str], list[str]] = {}
    for name in selection.int4:
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault((match["path"], match["leaf"]), []).append(name)
    for (path, leaf), names in stacks.items():
        if len(names) != num_experts(config):
            return f"{len(names)} of {num_experts(config)} quantized in {path}.*.{leaf}"
        schemes = [four_or_eight_bits(selection.schemes[name]) for name in names if name in selection.schemes]
        if len({(scheme.bits, scheme.symmetric) for scheme in schemes}) > 1:
            return f"{' and '.join(sorted({str(scheme) for scheme in schemes}))} in {path}.*.{leaf}"
    return None
