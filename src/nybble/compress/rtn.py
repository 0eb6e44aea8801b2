"""Round-to-nearest: the range of each group spread over all codes. No data, no search."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nybble.compress.init import QuantizedInit
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme


def compress(model: Any, names: Iterable[str], scheme: QuantScheme) -> dict[str, QuantizedInit]:
    """Layer name -> Start; the weights are the model's own tensors."""
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    return {name: QuantizedInit(weight_OI, *min_max_qparams(weight_OI, scheme)) for name, weight_OI in weights.items()}
