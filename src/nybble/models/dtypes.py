"""Parameters that keep float32 in a model of 16 bits, as transformers loads it: routers, their biases, some norms."""

from __future__ import annotations

import re
from typing import Any

import torch


def kept_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a parameter or buffer has where a model is loaded in another one.

    Args:
        model: transformers.PreTrainedModel; nothing but its class says which parameters these are.
        name: of the parameter.
        dtype: that the model is loaded in.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)
