"""What llama.cpp computes for each architecture that nybble exports to, and what of a configuration goes into the file.

A model type of transformers is exported as an architecture of llama.cpp, whose graph is fixed in its source. The table
MODEL_TYPES holds the facts in which graphs differ. What a configuration asks for beyond that is refused in `problem`
or, where the file is right for some texts, said in `limits`.

Facts: https://github.com/ggml-org/llama.cpp, src/models/*.cpp and conversion/*.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.export.gguf.experts import expert_fields, expert_problems
from nybble.export.gguf.latent import latent_fields, latent_problems
from nybble.export.gguf.rope import RopeFields, rope_fields

Value = int | float | str

_SHORTEST_WINDOW = 512
"""A sliding window that llama.cpp does not apply must have this many tokens: then common prompts fit into it."""


@dataclass(frozen=True)
class Architecture:
    """Facts about an architecture of llama.cpp.

    Attributes:
        name: as `general.architecture` holds it.
        activation: function of the gated MLP.
        interleaved_rope: rotary pairs are neighbours (2i, 2i + 1), where transformers pairs i with i + D / 2. The rows
            of the query and key projections are reordered within each head.
        rope_freqs: it reads frequency factors of rotary embeddings from rope_freqs.weight.
        long_rope: it reads longrope factors.
        partial_rope: it computes rotary embeddings of a part of a head.
        free_head_dim: heads times their size need not be the hidden size.
        sliding_period: of sliding and full layers where the file does not say: the last layer of a period is full. None
            for an architecture without sliding windows.
        own_head: it reads a head that is not tied to the embedding.
        scale_from_hidden: number of layers at which queries are scaled by hidden size / heads, not by the head size.
        equal_heads: there must be as many heads of keys and values as of queries.
        query_norm: there are norms of queries, which can take up another scale.
        softcaps: it caps attention scores and logits.
        biases: it reads biases of all linear layers. (Those of qwen2 are no choice.)
        norm_offset: transformers adds it to the weights of norms, and the file holds the sums.
        multipliers: it multiplies embeddings, attention scores, residuals and logits by numbers of the file (Granite).
        interleaved_gate: gates and ups take turns in the rows of an expert's gate_up_proj.
        leading_dense: it has layers without experts before those with experts.
        assumed: field of a configuration -> the value that it computes with.
    """

    name: str
    activation: str = "silu"
    interleaved_rope: bool = False
    rope_freqs: bool = False
    long_rope: bool = False
    partial_rope: bool = False
    free_head_dim: bool = True
    sliding_period: int | None = None
    own_head: bool = True
    scale_from_hidden: int | None = None
    equal_heads: bool = False
    query_norm: bool = False
    softcaps: bool = False
    biases: bool = False
    norm_offset: float = 0.0
    multipliers: bool = False
    interleaved_gate: bool = False
    leading_dense: bool = False
    assumed: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Architecture("llama", interleaved_rope=True, rope_freqs=True, biases=True)
_GELU = "gelu_pytorch_tanh"

MODEL_TYPES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", query_norm=True),
    "gemma2": Architecture(
        "gemma2", activation=_GELU, sliding_period=2, own_head=False, scale_from_hidden=46, softcaps=True, norm_offset=1
    ),
    "gemma3_text": Architecture(
        "gemma3", activation=_GELU, sliding_period=6, scale_from_hidden=62, query_norm=True, norm_offset=1
    ),
    "phi3": Architecture("phi3", long_rope=True, partial_rope=True, free_head_dim=False),
    "mixtral": _LLAMA,
    "qwen2_moe": Architecture("qwen2moe", free_head_dim=False, assumed={"norm_topk_prob": False, "qkv_bias": True}),
    "qwen3_moe": Architecture("qwen3moe", query_norm=True, assumed={"norm_topk_prob": True}),
    "olmoe": Architecture(
        "olmoe", free_head_dim=False, equal_heads=True, assumed={"norm_topk_prob": False, "clip_qkv": None}
    ),
    "granitemoe": Architecture("granitemoe", interleaved_rope=True, rope_freqs=True, biases=True, multipliers=True),
    "glm4_moe": Architecture(
        "glm4moe", partial_rope=True, biases=True, leading_dense=True, assumed={"n_group": 1, "topk_group": 1}
    ),
    "ernie4_5_moe": Architecture("ernie4_5-moe", free_head_dim=False, leading_dense=True, assumed={"use_bias": False}),
    "gpt_oss": Architecture(
        "gpt-oss",
        sliding_period=2,
        biases=True,
        interleaved_gate=True,
        assumed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "deepseek_v2": Architecture("deepseek2", leading_dense=True),
    "deepseek_v3": Architecture("deepseek2", leading_dense=True, assumed={"rope_interleave": True}),
}
"""Model type of transformers -> architecture that computes it."""

ARCHITECTURES = {architecture.name: architecture for architecture in MODEL_TYPES.values()}


def head_dim(config: Any) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def sliding_window(config: Any) -> int | None:
    """Return the number of tokens that sliding layers attend to; None where it is no limit."""
    window: int | None = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = window is not None and "sliding_attention" in layers and window < config.max_position_embeddings
    return window if used else None


def query_factor(config: Any) -> float:
    """Return the factor of the query norms that gives the scale of the configuration to llama.cpp's attention."""
    architecture, scalar = MODEL_TYPES[config.model_type], getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return 1.0
    divisor = head_dim(config)
    if config.num_hidden_layers == architecture.scale_from_hidden:
        divisor = config.hidden_size // config.num_attention_heads
    return float((divisor / scalar) ** 0.5)


def architecture_rope(config: Any) -> RopeFields | str:
    """Return what a file says about rotary embeddings; see `rope_fields`."""
    architecture = MODEL_TYPES[config.model_type]
    return rope_fields(config, architecture.rope_freqs, architecture.long_rope, architecture.partial_rope)


def problem(config: Any, tied: bool) -> str | None:
    """Return what of a configuration llama.cpp does not compute, as the object of "this model has"; None if nothing.

    Args:
        config: transformers configuration of a type in MODEL_TYPES.
        tied: whether the head is tied to the embedding.
    """
    return next(_problems(config, MODEL_TYPES[config.model_type], tied), None)


def _problems(config: Any, architecture: Architecture, tied: bool) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    width = config.num_attention_heads * head_dim(config)
    if activation != architecture.activation:
        yield f"the activation {activation}"
    if not tied and not architecture.own_head:
        yield "a head that is not tied to the embedding"
    if not architecture.free_head_dim and width != config.hidden_size:
        yield f"attention heads of {width} numbers together for a hidden size of {config.hidden_size}"
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim(config)
    # The head size too: a small twin of the model (rehearsal.py) has another number of layers.
    if not architecture.query_norm and (query_factor(config) != 1 or scalar != head_dim(config)):
        yield f"query_pre_attn_scalar {scalar}"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, None) and not architecture.biases:
            yield name
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (getattr(config, name, None) is not None) != architecture.softcaps:
            yield f"{name} {getattr(config, name, None)}"
    if isinstance(fields := architecture_rope(config), str):
        yield fields
    yield from _attention_problems(config, architecture)
    yield from latent_problems(config)
    yield from expert_problems(config, architecture.assumed, architecture.leading_dense)


def _attention_problems(config: Any, architecture: Architecture) -> Iterator[str]:
    window = sliding_window(config)
    if architecture.equal_heads and config.num_key_value_heads != config.num_attention_heads:
        yield f"{config.num_key_value_heads} heads of keys and values for {config.num_attention_heads} of queries"
    if getattr(config, "use_bidirectional_attention", None):
        yield "bidirectional attention"
    if architecture.sliding_period is None:
        if window is not None and window < _SHORTEST_WINDOW:
            yield f"a sliding window of {window} tokens"
    elif (period := _period(config.layer_types)) is None:
        yield "sliding and full layers without a period"
    elif period == 1:
        yield "full attention in all layers"


def _period(layer_types: list[str]) -> int | None:
    """Return n where every n-th layer has full attention and the others slide, 0 where all slide; None otherwise."""
    full = [kind == "full_attention" for kind in layer_types]
    period = full.index(True) + 1 if any(full) else 0
    regular = all(is_full == (period > 0 and (i + 1) % period == 0) for i, is_full in enumerate(full))
    return period if regular else None


def limits(config: Any) -> tuple[str, ...]:
    """Return in sentences for which texts and contexts an exported file computes what the model does, if not for all.

    Args:
        config: transformers configuration of a type in MODEL_TYPES.
    """
    architecture = MODEL_TYPES[config.model_type]
    found = []
    if architecture.sliding_period is None and (window := sliding_window(config)) is not None:
        found.append(
            f"the GGUF export is right up to {window} tokens: this model attends to the last {window} tokens, and "
            "llama.cpp attends to all tokens"
        )
    fields = architecture_rope(config)
    if isinstance(fields, RopeFields) and fields.limit is not None:
        found.append(fields.limit)
    return tuple(found)


def metadata(config: Any) -> dict[str, Value]:
    """Return the fields that describe the model: key without the architecture and a dot -> value.

    Args:
        config: transformers configuration for which `problem` found nothing.
    """
    architecture, size = MODEL_TYPES[config.model_type], head_dim(config)
    fields: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": size,
        "attention.value_length": size,
    }
    rope = architecture_rope(config)
    assert isinstance(rope, RopeFields), rope
    fields |= rope.fields
    fields |= latent_fields(config) | expert_fields(config)
    if architecture.multipliers:
        fields["embedding_scale"] = float(config.embedding_multiplier)
        fields["attention.scale"] = float(config.attention_multiplier)
        fields["residual_scale"] = float(config.residual_multiplier)
        fields["logit_scale"] = float(config.logits_scaling)
    if architecture.softcaps:
        fields["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        fields["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture.sliding_period is not None:
        period = _period(config.layer_types)
        assert period is not None
        fields["attention.sliding_window"] = config.sliding_window
        if period != architecture.sliding_period:  # older versions of llama.cpp do not read it
            fields["attention.sliding_window_pattern"] = period
    return fields
