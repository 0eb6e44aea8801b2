"""One shape for all weights: `linearize` gives a model nn.Linear layers where transformers has something else.

Everything after it (planning, compression, adapters, storage, exports) knows linear layers only. It is called wherever
a model is built: when it is loaded, and when quantized/ is read, whose tensors have the names of the linear layers.
"""

from __future__ import annotations

from torch import nn

from nybble.models.experts import split_experts


def linearize(model: nn.Module) -> None:
    """Replace stacked experts by nn.Linear layers, in place.

    Args:
        model: transformers.PreTrainedModel, also on the meta device.
    """
    split_experts(model)
