"""Latent attention (DeepSeek V2 and V3, Kimi K2) in GGUF: fields, and where the rows of the second projection are.

Keys and values of a token are projections of one latent vector of R numbers, which llama.cpp keeps in their place. It
therefore has the projection in two stacks with a matrix for each head:

    self_attn.kv_b_proj [H * (N + V), R]   ->   attn_k_b [H, R, N]    rows of the keys, transposed
                                                attn_v_b [H, V, R]    rows of the values

Groups of weights run along R. In attn_k_b a row is one weight of each of N groups, so blocks cannot hold it: it is
float16, which is exact for codes of up to 4 bits, or float32. In attn_v_b they are blocks as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nybble.export.places import Place

_PROJECTION = "kv_b_proj"


class LatentHeads(NamedTuple):
    """Heads of latent attention.

    Attributes:
        number: of heads, H.
        keys, values: rows of a head that make keys, N, and values, V.
    """

    number: int
    keys: int
    values: int


def latent_heads(config: Any) -> LatentHeads | None:
    """Return the heads of a model; None if it has no latent attention."""
    if not hasattr(config, "kv_lora_rank"):
        return None
    return LatentHeads(config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim)


def latent_widths(config: Any) -> list[int]:
    """Return the widths of rows that are held in blocks."""
    return [config.num_attention_heads * config.v_head_dim, config.kv_lora_rank, config.q_lora_rank or 0]


def latent_fields(config: Any) -> dict[str, int | float | str]:
    """Return the fields that describe latent attention: key without the architecture and a dot -> value.

    A model without it has none.
    """
    if latent_heads(config) is None:
        return {}
    rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + rotated,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        "attention.kv_lora_rank": rank,
    }


def heads_of_fields(number: Callable[[str], int]) -> LatentHeads:
    """Return the heads that a file describes; `number` reads a field of the architecture."""
    keys = number("attention.key_length_mla") - number("rope.dimension_count")
    return LatentHeads(number("attention.head_count"), keys, number("attention.value_length_mla"))


def latent_problems(config: Any) -> Iterator[str]:
    """Yield what llama.cpp does not compute of latent attention, as the object of "this model has"."""
    if latent_heads(config) is None:
        return
    lite = config.num_hidden_layers in (26, 27) or (config.num_hidden_layers == 48 and config.vocab_size == 128256)
    if lite and config.q_lora_rank:
        yield f"q_lora_rank {config.q_lora_rank} in {config.num_hidden_layers} layers"
    if getattr(config, "topk_method", None) == "group_limited_greedy" and (config.n_group or 1) > 1:
        yield f"groups of experts that are chosen by their best expert (n_group {config.n_group})"


def split_heads(place: Place, heads: LatentHeads, name_of: Callable[[str], str | None]) -> list[Place] | None:
    """Return where the rows of the second projection are; None for other places.

    Args:
        place: the whole of a parameter, under its own name.
        heads: of the model.
        name_of: name of a parameter -> name in the file.
    """
    if f".{_PROJECTION}." not in place.tensor:
        return None
    keys, values = (name_of(place.tensor.replace(_PROJECTION, leaf)) for leaf in ("k_b_proj", "v_b_proj"))
    assert keys is not None, place.tensor
    assert values is not None, place.tensor
    places = []
    for i in range(heads.number):
        first = i * (heads.keys + heads.values)
        middle, last = first + heads.keys, first + heads.keys + heads.values
        places += [Place(keys, place.name, slice(first, middle), i, transposed=True)]
        places += [Place(values, place.name, slice(middle, last), i)]
    return places
