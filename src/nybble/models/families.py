"""Facts about model families that a transformers configuration does not state, as a registry.

The key is the `model_type` of the configuration. Other code branches on these facts and never on names. A model type
that is not registered gets `DEFAULT`. Another package adds its family through the entry point group "nybble.families"
(see registry.py), or in the same process:

    FAMILIES.register("my_model", ModelFamily(norm_offset=1.0))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.registry import Registry


@dataclass(frozen=True)
class AWQMapping:
    """A module and the linear layers that read its output. Names are relative to a decoder block.

    AWQ divides the output channels of `source` by factors and multiplies the columns of `layers` by the same factors.

    Attributes:
        source: a norm, or a linear layer whose last rows produce the input of `layers`, up to an elementwise product.
        layers: all linear layers that read this output.
        value_projection: `source` is the value projection of attention, whose heads are shared by groups of query
            heads. Query heads of one group then need equal factors.
    """

    source: str
    layers: tuple[str, ...]
    value_projection: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """Facts about one family.

    Attributes:
        awq_mappings: sources of the linear layers in a decoder block, for AWQ. Empty means not known: AWQ is refused.
        norm_offset: a norm multiplies by (weight + norm_offset).
    """

    awq_mappings: tuple[AWQMapping, ...] = ()
    norm_offset: float = 0.0


DEFAULT = ModelFamily()
"""Facts of a model type that is not registered."""


def _llama_mappings(
    mlp_norm: str = "post_attention_layernorm", fused_projections: bool = False
) -> tuple[AWQMapping, ...]:
    """Mappings of a decoder block with norm, attention, norm and gated MLP.

    Args:
        mlp_norm: name of the norm whose output the MLP reads.
        fused_projections: query, key and value are one layer, and so are gate and up. Their last rows are the values
            and the up projection.
    """
    qkv = ("qkv_proj",) if fused_projections else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if fused_projections else ("gate_proj", "up_proj")
    return (
        AWQMapping("input_layernorm", tuple(f"self_attn.{name}" for name in qkv)),
        AWQMapping(f"self_attn.{qkv[-1]}", ("self_attn.o_proj",), value_projection=True),
        AWQMapping(mlp_norm, tuple(f"mlp.{name}" for name in gate_up)),
        AWQMapping(f"mlp.{gate_up[-1]}", ("mlp.down_proj",)),
    )


_LLAMA = ModelFamily(awq_mappings=_llama_mappings())
_GEMMA_WITH_MLP_NORM = ModelFamily(
    awq_mappings=_llama_mappings(mlp_norm="pre_feedforward_layernorm"),
    norm_offset=1.0,
)

FAMILIES: Registry[ModelFamily] = Registry("model family", "nybble.families")

for _name, _facts in {
    "llama": _LLAMA,  # Llama 2 and 3.x, SmolLM, SmolLM2
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA_WITH_MLP_NORM,
    "gemma3_text": _GEMMA_WITH_MLP_NORM,
    "gemma": ModelFamily(norm_offset=1.0),
    "vaultgemma": ModelFamily(norm_offset=1.0),
    "phi3": ModelFamily(awq_mappings=_llama_mappings(fused_projections=True)),
}.items():
    FAMILIES.register(_name, _facts)


def family_of(config: Any) -> ModelFamily:
    """Return the facts for a transformers configuration: those of its model_type, or DEFAULT."""
    name = config.model_type
    return FAMILIES[name] if name in FAMILIES else DEFAULT  # noqa: SIM401 - a registry has no get with a default
