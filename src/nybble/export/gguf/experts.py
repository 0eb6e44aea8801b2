"""Mixtures of experts in GGUF: names, fields, and what llama.cpp does not compute of them.

llama.cpp has one tensor [E, O, I] for each projection of all experts of a layer (stacks.py):

    mlp.experts.3.gate_up_proj [2 F, D]   ->   blk.N.ffn_gate_exps [3] and blk.N.ffn_up_exps [3], each [F, D]
    mlp.experts.3.down_proj    [D, F]     ->   blk.N.ffn_down_exps [3]

All experts of a tensor have one type of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nybble.export.gguf.latent import LatentHeads, split_heads
from nybble.export.places import Place
from nybble.export.stacks import expert_width, num_experts, stack_places

_SOFTMAX, _SIGMOID = 1, 2
"""llama.cpp's numbers for the function of a router (expert_gating_func)."""

_RENAMES = (
    (".block_sparse_moe.", ".mlp."),
    (".gate.moe_statics.", ".moe_statics."),
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".self_attn.sinks", ".self_attn.sinks.weight"),
)
"""Part of a name in transformers 5 -> the same part as the table of the package gguf has it."""


def parameter_places(
    name_of: Callable[[str], str | None], width: int, interleaved_gate: bool, heads: LatentHeads | None
) -> Callable[[str], list[Place]]:
    """Return the function: name of a parameter in transformers -> where its rows are, empty if there is no tensor.

    Args:
        name_of: name of a parameter -> name in the file, as the package gguf has them.
        width: rows of the gates of an expert.
        interleaved_gate: gates and ups take turns in the rows of gate_up_proj.
        heads: of latent attention, if the model has it.
    """

    def places(parameter: str) -> list[Place]:
        found = []
        for place in stack_places(parameter, width, interleaved_gate):
            if heads is not None and (split := split_heads(place, heads, name_of)) is not None:
                return split
            name = place.tensor
            for old, new in _RENAMES:
                name = name.replace(old, new)
            if (tensor := name_of(name)) is not None:
                found.append(replace(place, tensor=tensor))
        return found

    return places


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
        softmax = hasattr(config, "topk_method")  # DeepSeek V2, which has norm_topk_prob without using it
        fields["expert_weights_scale"] = float(config.routed_scaling_factor)
        fields["expert_weights_norm"] = bool(config.norm_topk_prob) and not softmax
        fields["expert_gating_func"] = _SOFTMAX if softmax else _SIGMOID
        if not softmax and (config.n_group or 1) > 1:
            fields["expert_group_count"] = config.n_group
            fields["expert_group_used_count"] = config.topk_group
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
