"""Facts about model families that configurations do not say, as a table. Code branches on these facts, never on names.

A family that is not in the table gets `DEFAULT`; `losses.Head.verify` then checks on real logits that the default is true, so a
wrong fact is an error before training starts and not a silent loss of quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AWQMapping:
    """`source` makes the inputs of `layers`; names within a decoder block. What it makes may be divided by any factors, one a channel, if the layers' columns
    are multiplied with them.

    Attributes:
        source: a norm, or a linear layer whose last outputs are (times something else) the inputs of `layers`.
        layers: all layers that read it.
        heads: the outputs are the values of attention, which grouped heads share.
    """

    source: str
    layers: tuple[str, ...]
    heads: bool = False


def _llama_mappings(before_mlp: str = "post_attention_layernorm", fused: bool = False) -> tuple[AWQMapping, ...]:
    """Of a decoder block with norm, attention, norm, gated MLP."""
    qkv = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
    return (
        AWQMapping("input_layernorm", tuple(f"self_attn.{name}" for name in qkv)),
        AWQMapping(f"self_attn.{qkv[-1]}", ("self_attn.o_proj",), heads=True),
        AWQMapping(before_mlp, tuple(f"mlp.{name}" for name in gate_up)),
        AWQMapping(f"mlp.{gate_up[-1]}", ("mlp.down_proj",)),
    )


@dataclass(frozen=True)
class ModelFamily:
    """Attributes name fields of the configuration, or None where the family has no such thing.

    Attributes:
        softcap: logits = cap * tanh(logits / cap).
        logit_scale: logits are multiplied with it.
        logit_divisor: logits are divided by it.
        feeds: what feeds which layers in a decoder block, for folding scales; empty = not known.
        norm_offset: a norm multiplies with its weight plus this.
        exported: True where the whole flow with the OpenVINO export is tested (tests/test_families.py); else False, or the reason why not.
    """

    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    feeds: tuple[AWQMapping, ...] = ()
    norm_offset: float = 0.0
    exported: bool | str = False


DEFAULT = ModelFamily()

FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily(feeds=_llama_mappings(), exported=True),  # Llama 2 and 3.x, SmolLM, SmolLM2
    "mistral": ModelFamily(feeds=_llama_mappings(), exported=True),
    "qwen2": ModelFamily(feeds=_llama_mappings(), exported=True),
    "qwen3": ModelFamily(feeds=_llama_mappings(), exported=True),
    "gemma2": ModelFamily(
        softcap="final_logit_softcapping",
        feeds=_llama_mappings("pre_feedforward_layernorm"),
        norm_offset=1.0,
        exported=True,
    ),
    "gemma3_text": ModelFamily(
        softcap="final_logit_softcapping",
        feeds=_llama_mappings("pre_feedforward_layernorm"),
        norm_offset=1.0,
        exported=True,
    ),
    "gemma": ModelFamily(norm_offset=1.0),
    "vaultgemma": ModelFamily(norm_offset=1.0),
    "phi3": ModelFamily(feeds=_llama_mappings(fused=True), exported=True),
    "granite": ModelFamily(logit_divisor="logits_scaling"),
    "cohere": ModelFamily(logit_scale="logit_scale"),
    "cohere2": ModelFamily(logit_scale="logit_scale"),
}


def family_of(config: Any) -> ModelFamily:
    """The table's row for a transformers configuration."""
    return FAMILIES.get(config.model_type, DEFAULT)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(multiplier, soft cap or None): logits = cap(multiplier * head(hidden))."""
    family = family_of(config)
    multiplier = 1.0
    if family.logit_scale is not None:
        multiplier *= getattr(config, family.logit_scale)
    if family.logit_divisor is not None:
        multiplier /= getattr(config, family.logit_divisor)
    return multiplier, getattr(config, family.softcap) if family.softcap is not None else None
