"""nybble: 4-bit language models that keep their accuracy.

The public names; everything else may change between versions. Each is imported when it is first used, so that the
command line can set up the process before torch starts its threads, and `nybble --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.api import Comparison, Run, compare, compress, distill, tune
    from nybble.callbacks import Callback
    from nybble.compression.init import QuantizedInit
    from nybble.errors import NybbleError
    from nybble.options.commands import CompareOptions, CompressOptions, DistillOptions, TuneOptions
    from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
    from nybble.quant.fake_quant import fake_quantize
    from nybble.quant.grid import dequantize, min_max_qparams, quantize
    from nybble.quant.scheme import QuantScheme
    from nybble.quant.weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "CompareOptions",
    "Comparison",
    "CompressOptions",
    "DistillOptions",
    "FakeQuantizedLoRALinear",
    "NybbleError",
    "QuantScheme",
    "QuantizedInit",
    "QuantizedWeight",
    "Run",
    "TuneOptions",
    "compare",
    "compress",
    "dequantize",
    "distill",
    "fake_quantize",
    "min_max_qparams",
    "quantize",
    "tune",
]

_MODULES = {
    "api": ("Comparison", "Run", "compare", "compress", "distill", "tune"),
    "callbacks": ("Callback",),
    "compression.init": ("QuantizedInit",),
    "errors": ("NybbleError",),
    "options.commands": ("CompareOptions", "CompressOptions", "DistillOptions", "TuneOptions"),
    "qat.fake_quant_lora": ("FakeQuantizedLoRALinear",),
    "quant.fake_quant": ("fake_quantize",),
    "quant.grid": ("dequantize", "min_max_qparams", "quantize"),
    "quant.scheme": ("QuantScheme",),
    "quant.weight": ("QuantizedWeight",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module nybble has no attribute {name}")
    return getattr(import_module(f"nybble.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
