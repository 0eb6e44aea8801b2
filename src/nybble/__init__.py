"""nybble: 4-bit language models that keep their accuracy.

The public surface; everything else may change. No import here does work beyond importing torch.
"""

from nybble.config import DistillOptions
from nybble.distill import distill
from nybble.errors import NybbleError
from nybble.grid import Grid, dequantize, fake_quantize, min_max, quantize
from nybble.layers import FakeQuantizedLoRALinear
from nybble.quantized import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "DistillOptions",
    "FakeQuantizedLoRALinear",
    "Grid",
    "NybbleError",
    "QuantizedWeight",
    "dequantize",
    "distill",
    "fake_quantize",
    "min_max",
    "quantize",
]
