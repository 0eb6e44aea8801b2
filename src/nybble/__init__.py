"""nybble: 4-bit language models that keep their accuracy.

The public surface; everything else may change. Names are imported when they are first used, so that the command line can set up the
process before torch starts its threads, and answers --help at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.errors import NybbleError
    from nybble.options.commands import CompressOptions, DistillOptions, TuneOptions
    from nybble.qat.layers import FakeQuantizedLoRALinear
    from nybble.quant.fake_quant import fake_quantize
    from nybble.quant.grid import dequantize, min_max_qparams, quantize
    from nybble.quant.scheme import QuantScheme
    from nybble.quant.weight import QuantizedWeight

__version__ = "0.1.0"

_HOME = {
    "CompressOptions": "options.commands",
    "DistillOptions": "options.commands",
    "FakeQuantizedLoRALinear": "qat.layers",
    "NybbleError": "errors",
    "QuantScheme": "quant.scheme",
    "QuantizedWeight": "quant.weight",
    "TuneOptions": "options.commands",
    "dequantize": "quant.grid",
    "fake_quantize": "quant.fake_quant",
    "min_max_qparams": "quant.grid",
    "quantize": "quant.grid",
}

__all__ = [
    "CompressOptions",
    "DistillOptions",
    "FakeQuantizedLoRALinear",
    "NybbleError",
    "QuantScheme",
    "QuantizedWeight",
    "TuneOptions",
    "dequantize",
    "fake_quantize",
    "min_max_qparams",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module nybble has no attribute {name}")
    return getattr(import_module(f"nybble.{_HOME[name]}"), name)
