"""Rotary embeddings of the type yarn in runtimes that round the ends of its ramp to whole dimensions.

Between two dimensions, yarn goes from the frequencies of short contexts to those of long ones. transformers rounds the
ends of this ramp unless the configuration has `truncate: false`, as that of gpt-oss has. llama.cpp and mlx-lm always
round them, for every file of such a model, and nothing in a file can change that.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def truncated_yarn(config: Any) -> Any:
    """Return the configuration of a model whose ramp is rounded; the configuration itself if nothing has to change."""
    if not _is_free(config):
        return config
    config = copy.deepcopy(config)
    config.rope_parameters["truncate"] = True
    return config


def truncation_limit(config: Any, runtime: str, label: str) -> str | None:
    """Say what rounding the ramp changes, in a sentence; None if it changes nothing.

    Args:
        config: transformers configuration.
        runtime: that rounds it.
        label: of the export format.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not _is_free(config):
        return None
    frequencies = [ROPE_INIT_FUNCTIONS["yarn"](c, torch.device("cpu"))[0] for c in (config, truncated_yarn(config))]
    angle = 1000 * float((frequencies[0] - frequencies[1]).abs().max())
    return (
        f"{runtime} rounds the ends of the ramp of yarn to whole dimensions, and this model does not (truncate False): "
        f"in the {label} export, rotary angles differ by up to {angle:.2g} radians after 1000 tokens"
    )


def _is_free(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "yarn" and not rope.get("truncate", True)
