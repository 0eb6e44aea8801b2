"""Rotary embeddings of a transformers configuration as fields and tensors of GGUF.

    default     rope.freq_base
    linear      rope.scaling.type, rope.scaling.factor
    yarn        the same, and the original context length
    llama3      rope_freqs.weight: frequency / scaled frequency, [D / 2]
    longrope    rope_factors_long.weight and rope_factors_short.weight [D / 2], the original context length and the
                factor of the attention
    dynamic     as default, which is right up to the context length

Everything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nybble.export.yarn import truncation_limit

_YARN = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1}
"""Parameters of yarn that llama.cpp takes from nowhere, and what they are in its formula."""

SHORTEST_CONTEXT = 256
"""llama.cpp rounds the length of a context up to a multiple of this."""

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeFields:
    """What a file says about rotary embeddings.

    Attributes:
        fields: key without the architecture and a dot -> value.
        tensors: name of a tensor -> float32 [D / 2].
        limit: a sentence about the texts for which the file is right; None for all.
    """

    fields: dict[str, int | float | str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    limit: str | None = None


def rope_fields(config: Any, rope_freqs: bool, long_rope: bool, partial_rope: bool) -> RopeFields | str:
    """Return what a file says about the rotary embeddings of a model, or what llama.cpp cannot compute of them.

    Args:
        config: transformers configuration.
        rope_freqs: the architecture reads rope_freqs.weight.
        long_rope: the architecture reads longrope factors.
        partial_rope: the architecture rotates a part of a head.

    Returns:
        The fields; or a text that names what cannot be computed.
    """
    parameters = config.rope_parameters
    sliding = parameters.get("sliding_attention")
    if sliding is not None and sliding["rope_type"] != "default":
        return f"rotary embeddings of the type {sliding['rope_type']} in sliding layers"
    full = parameters.get("full_attention", parameters)
    kind, part = full["rope_type"], full.get("partial_rotary_factor") or 1.0
    if part != 1 and not partial_rope:
        return f"rotary embeddings of a part ({part}) of a head"
    size = int(part * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads))
    fields: dict[str, int | float | str] = {
        "rope.freq_base": float(full["rope_theta"]),
        "rope.dimension_count": size,
    }
    if sliding is not None:
        fields["rope.freq_base_swa"] = float(sliding["rope_theta"])
    if kind == "default":
        return RopeFields(fields)
    if kind == "linear":
        return RopeFields(fields | {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])})
    if kind == "yarn":
        return _yarn(config, full, fields)
    if kind == "dynamic":
        return RopeFields(
            fields,
            limit=f"the GGUF export is right up to {config.max_position_embeddings} tokens: beyond them this model "
            "changes its rotary embeddings, and llama.cpp does not",
        )
    if kind == "llama3" and rope_freqs:
        return RopeFields(fields, {"rope_freqs.weight": _llama3_factors(config, float(full["rope_theta"]), size)})
    if kind == "longrope" and long_rope:
        return _longrope(config, full, fields)
    return f"rotary embeddings of the type {kind}"


def _yarn(config: Any, full: dict[str, Any], fields: dict[str, int | float | str]) -> RopeFields | str:
    latent = hasattr(config, "kv_lora_rank")  # llama.cpp then takes mscale for equal to mscale_all_dim
    scale = full.get("mscale_all_dim") or None
    known = _YARN | {"mscale": scale if latent else None, "mscale_all_dim": scale if latent else None}
    for name, value in known.items():
        if (found := full.get(name)) != value and found is not None:
            return f"rotary embeddings of the type yarn with {name} {found}"
    if latent and scale is None:
        return "rotary embeddings of the type yarn without mscale_all_dim"
    fields |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(full["factor"]),
        "rope.scaling.original_context_length": int(full[_ORIGINAL]),
    }
    if latent:
        fields["rope.scaling.yarn_log_multiplier"] = 0.1 * float(full["mscale_all_dim"])
    return RopeFields(fields, limit=truncation_limit(config, "llama.cpp", "GGUF"))


def _llama3_factors(config: Any, base: float, size: int) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return frequencies / scaled


def _longrope(config: Any, full: dict[str, Any], fields: dict[str, Any]) -> RopeFields | str:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    original = int(full[_ORIGINAL])
    if original < SHORTEST_CONTEXT:
        return f"rotary embeddings for contexts of {original} tokens"
    fields |= {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(attention_factor),
    }
    tensors = {
        f"rope_factors_{name}.weight": torch.tensor(full[f"{name}_factor"], dtype=torch.float32)
        for name in ("long", "short")
    }
    limit = (
        f"llama.cpp chooses the rotary embeddings of the GGUF export by the size of the context, not by the length of "
        f"the text: for texts of up to {original} tokens run it with a context (-c) of at most {original}"
    )
    return RopeFields(fields, tensors, limit)
