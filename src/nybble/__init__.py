"""nybble: 4-bit language models that keep their accuracy.

The public surface; everything else may change. Names are imported when they are first used, so that the command line can set up the
process before torch starts its threads, and answers --help at once. The flows are nybble.distill.distill(DistillOptions(...)),
nybble.tune.tune(TuneOptions(...)) and nybble.post_training.compress(CompressOptions(...)).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.config import CompressOptions, DistillOptions, TuneOptions
    from nybble.errors import NybbleError
    from nybble.grid import Grid, dequantize, fake_quantize, min_max, quantize
    from nybble.layers import FakeQuantizedLoRALinear
    from nybble.quantized import QuantizedWeight

__version__ = "0.1.0"

_HOME = {
    "CompressOptions": "config",
    "DistillOptions": "config",
    "FakeQuantizedLoRALinear": "layers",
    "Grid": "grid",
    "NybbleError": "errors",
    "QuantizedWeight": "quantized",
    "TuneOptions": "config",
    "dequantize": "grid",
    "fake_quantize": "grid",
    "min_max": "grid",
    "quantize": "grid",
}

__all__ = [
    "CompressOptions",
    "DistillOptions",
    "FakeQuantizedLoRALinear",
    "Grid",
    "NybbleError",
    "QuantizedWeight",
    "TuneOptions",
    "dequantize",
    "fake_quantize",
    "min_max",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module nybble has no attribute {name}")
    return getattr(import_module(f"nybble.{_HOME[name]}"), name)
