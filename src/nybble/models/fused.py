"""Which linear layers runtimes compute as one, so that they need one scheme."""

from __future__ import annotations

from typing import Any

from torch import nn

from nybble.models.experts import SplitExperts

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # LFM2
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek V2 and V3
    ("in_proj_qkv", "in_proj_z"),  # linear attention of Qwen3.5
    ("in_proj_b", "in_proj_a"),
)
"""Names of linear layers of one module that vLLM computes as one (its packed_modules_mapping)."""


def fused_layers(model: Any) -> list[list[str]]:
    """Return the names of the linear layers that vLLM, which fuses most, computes as one.

    All projections of all experts of a layer are one group.

    Args:
        model: transformers.PreTrainedModel after `linearize`, also on the meta device.
    """
    groups = []
    for parent, module in model.named_modules():
        if isinstance(module, SplitExperts):
            groups.append([f"{parent}.{name}" for name, part in module.named_modules() if isinstance(part, nn.Linear)])
        else:
            leaves = (
                [leaf for leaf in names if isinstance(getattr(module, leaf, None), nn.Linear)] for names in _FUSED
            )
            groups += [[f"{parent}.{leaf}" for leaf in found] for found in leaves if len(found) > 1]
    return groups
