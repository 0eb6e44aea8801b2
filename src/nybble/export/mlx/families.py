"""What mlx-lm takes for granted about a model type, and config.json as mlx-lm reads it.

mlx-lm reads few fields of a configuration, and computes the same whatever the others say. Refused (ExportError):

- a model type that mlx-lm has no code for;
- a field with another value than mlx-lm computes with;
- rotary embeddings of a type that mlx-lm does not compute as transformers does;
- attention windows of fewer than 1024 tokens, where mlx-lm attends to all tokens;
- mixtures of experts whose code in mlx-lm is not known here, or computes otherwise;
- layers of gpt-oss that are all of one kind;
- layers of Gemma 3 in another order than mlx-lm has: every p-th attends to all tokens.

Facts of mlx-lm 0.32.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.errors import ExportError
from nybble.export.places import Place
from nybble.export.stacks import expert_width, num_experts, stack_places
from nybble.export.transformers_folder import FLOAT16_OVERFLOWS
from nybble.export.yarn import truncation_limit

_SILU = {"hidden_act": "silu"}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "longrope"})

_SHORTEST_WINDOW = 1024
"""Tokens up to which an export must be right, if a longer context changes what the model attends to."""


@dataclass(frozen=True)
class MLXFamily:
    """Facts about mlx-lm's code for a model type.

    Attributes:
        assumed: field of the configuration that mlx-lm does not read -> the value that it computes with.
        rope_types: types of rotary embeddings that it computes as transformers does.
        experts: modules of transformers -> the same modules as mlx-lm names them, for mixtures of experts.
        interleaved_gate: gates and ups take turns in the rows of an expert's gate_up_proj.
        windows: whether it attends to sliding windows, in the layers that `_unmet_order` allows.
    """

    assumed: Mapping[str, Any] = field(default_factory=dict)
    rope_types: frozenset[str] = _ROPE_TYPES
    windows: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    interleaved_gate: bool = False


_STACKED = {".mlp.experts.": ".mlp.switch_mlp."}
_ALL_LAYERS = {"mlp_only_layers": [], "decoder_sparse_step": 1}
_DEFAULT_ROPE = frozenset({"default"})
_FAMILIES = {
    "llama": MLXFamily(_SILU),
    "mistral": MLXFamily(_SILU),
    "qwen2": MLXFamily(_SILU),
    "qwen3": MLXFamily(_SILU | {"attention_bias": False}),
    "gemma2": MLXFamily(_GEMMA | {"tie_word_embeddings": True}, frozenset({"default"})),
    "gemma3_text": MLXFamily(
        _GEMMA
        | {"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
        frozenset({"default", "linear"}),
        windows=True,
    ),
    "phi3": MLXFamily(_SILU, frozenset({"default", "longrope"})),
    "mixtral": MLXFamily(
        _SILU, _DEFAULT_ROPE, experts={".mlp.experts.": ".mlp.switch_mlp.", ".mlp.": ".block_sparse_moe."}
    ),
    "qwen2_moe": MLXFamily(
        _SILU | _ALL_LAYERS | {"norm_topk_prob": False, "qkv_bias": True, "tie_word_embeddings": False},
        _DEFAULT_ROPE,
        experts=_STACKED,
    ),
    "qwen3_moe": MLXFamily(_SILU | {"attention_bias": False}, _DEFAULT_ROPE, experts=_STACKED),
    "olmoe": MLXFamily(_SILU | {"clip_qkv": None}, experts=_STACKED),
    "granitemoe": MLXFamily(
        _SILU,
        experts={
            ".block_sparse_moe.experts.": ".block_sparse_moe.switch_mlp.",
            ".block_sparse_moe.router.": ".block_sparse_moe.router.layer.",
        },
    ),
    "gpt_oss": MLXFamily(
        _SILU | {"attention_bias": True, "tie_word_embeddings": False, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        frozenset({"default", "yarn"}),
        windows=True,
        experts={".mlp.experts.": ".mlp.experts."},
        interleaved_gate=True,
    ),
    "glm4_moe": MLXFamily(_SILU | {"n_group": 1, "topk_group": 1, "tie_word_embeddings": False}, experts=_STACKED),
}


def check_model(config: Any) -> None:
    """Check that mlx-lm computes the model as transformers does.

    Args:
        config: transformers configuration.

    Raises:
        ExportError: one of the reasons at the top of this file.
    """
    needed, found = _unmet(config)
    if needed:
        raise ExportError(f"an export to MLX needs {needed}; {config.model_type} has {found}; remove mlx from --export")


def _unmet(config: Any) -> tuple[str, Any]:
    """What mlx-lm needs and what the model has instead; "" if nothing is missing."""
    if not _has_code(config.model_type):
        return "a model type that mlx-lm has code for", "none"
    family = _FAMILIES.get(config.model_type, MLXFamily())
    if num_experts(config) and not family.experts:
        known = sorted(name for name in _FAMILIES if _FAMILIES[name].experts)
        return f"experts of {', '.join(known)}", "others, which mlx-lm computes otherwise, or whose layout is not known"
    for name, value in family.assumed.items():
        if (found := getattr(config, name, value)) != value:
            return f"{name} = {value}", found
    if config.model_type == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "soft caps of attention and logits", "none"
    for rope in _ropes(config).values():
        if (kind := rope.get("rope_type", "default")) not in family.rope_types:
            return f"rotary embeddings of type {', '.join(sorted(family.rope_types))}", kind
        if kind == "yarn" and (other := _other_yarn_factor(rope)):
            return "yarn whose attention factor follows from its factor", other
    window = _window(config)
    if window is not None and not family.windows and window < _SHORTEST_WINDOW:
        return f"attention to at least {_SHORTEST_WINDOW} tokens in every layer", f"windows of {window}"
    return _unmet_order(config)


def _other_yarn_factor(rope: Mapping[str, Any]) -> str:
    """What makes the attention factor of transformers another than that of mlx-lm, which ignores `attention_factor` and
    uses `mscale` alone; "" if nothing does."""
    given, factor = rope.get("attention_factor"), float(rope.get("factor") or 1.0)
    if given is not None and not math.isclose(given, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0, rel_tol=1e-6):
        return f"attention_factor {given}"
    if (rope.get("mscale") or 1.0) != 1.0 and not rope.get("mscale_all_dim"):
        return f"mscale {rope['mscale']} without mscale_all_dim"
    return ""


def _unmet_order(config: Any) -> tuple[str, Any]:
    """The same for the order of layers with full attention and with sliding windows."""
    if config.model_type == "gpt_oss" and len(set(config.layer_types)) == 1:
        return "full attention in some layers and sliding windows in others", f"{config.layer_types[0]} in all"
    if config.model_type == "gemma3_text" and full_attention_period(config) is None:
        return "full attention in every p-th layer", ", ".join(config.layer_types)
    return "", None


def places(config: Any) -> Callable[[str], list[Place]]:
    """Return the function: module or parameter of a model -> where its rows are in mlx-lm's names.

    Args:
        config: transformers configuration.
    """
    family, width = _FAMILIES.get(config.model_type, MLXFamily()), expert_width(config)

    def find(name: str) -> list[Place]:
        found = stack_places(name, width, family.interleaved_gate)
        for old, new in family.experts.items():
            found = [replace(place, tensor=place.tensor.replace(old, new)) for place in found]
        return found

    return find


def _has_code(model_type: str) -> bool:
    from mlx_lm.utils import MODEL_REMAPPING

    return importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}") is not None


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Parameters of the rotary embeddings by the type of layer; "" is the key where all layers have the same."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    by_layer = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    return by_layer or {"": parameters}


def _window(config: Any) -> int | None:
    """Length of the sliding window of any layer; None if all layers attend to all tokens."""
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None)


def full_attention_period(config: Any) -> int | None:
    """Return p, if exactly the layers p, 2 p, ... attend to all tokens, counted from 1; None for another order."""
    full = [kind == "full_attention" for kind in config.layer_types]
    period = full.index(True) + 1 if any(full) else len(full) + 1
    return period if full == [(i + 1) % period == 0 for i in range(len(full))] and any(full) else None


def overflows_in_float16(config: Any) -> bool:
    """Whether the activations of the model exceed the range of float16."""
    return config.model_type in FLOAT16_OVERFLOWS


def limits(config: Any) -> tuple[str, ...]:
    """Say what an export cannot do, in sentences; see `Exporter.limits`.

    Args:
        config: transformers configuration.
    """
    sentences = []
    window = _window(config)
    if window is not None and not _FAMILIES.get(config.model_type, MLXFamily()).windows:
        sentences.append(
            f"the MLX export is right up to {window} tokens: beyond them this model attends to a sliding window, and "
            "mlx-lm to all tokens"
        )
    for rope in _ropes(config).values():
        if rope.get("rope_type") == "longrope":
            sentences.append(
                f"the MLX export is right up to {rope['original_max_position_embeddings']} tokens: beyond them this "
                "model changes its rotary embeddings, and the export keeps those of short contexts"
            )
    if (limit := truncation_limit(config, "mlx-lm", "MLX")) is not None:
        sentences.append(limit)
    if overflows_in_float16(config):
        sentences.append(
            f"activations of {config.model_type} exceed the range of float16, so mlx-lm computes this export in float32"
        )
    return tuple(sentences)


def mlx_config(config: Any, tied: bool) -> dict[str, Any]:
    """Return the fields of config.json that mlx-lm reads and that transformers 5 writes otherwise.

    mlx-lm uses the long factors of longrope for every length, transformers the short ones up to the original length.
    The short factors are written for both.

    Args:
        config: transformers configuration that `check_model` accepts.
        tied: whether the head is tied to the embedding.
    """
    ropes = _ropes(config)
    rope = ropes.get("full_attention") or next(iter(ropes.values()))
    fields: dict[str, Any] = {"tie_word_embeddings": tied, "rope_scaling": None}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if hasattr(config, "num_experts"):  # transformers writes it as num_local_experts
        fields["num_experts"] = config.num_experts
    kind = rope.get("rope_type", "default")
    if kind != "default":
        fields["rope_scaling"] = rope | {"type": kind}
    if kind == "longrope":
        fields["rope_scaling"]["long_factor"] = rope["short_factor"]
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if "sliding_attention" in ropes:
        fields["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        fields["sliding_window_pattern"] = full_attention_period(config)
    return fields
