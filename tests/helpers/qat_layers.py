"""Small layers of nybble.qat with parameters as after training, and what a forward saves for its backward."""

import torch
from torch import Tensor, nn

from nybble.compression.init import QuantizedInit
from nybble.qat.fake_quant_lora import FakeQuantizedLoRALinear
from nybble.qat.fixed_codes import FixedCodesLinear
from nybble.qat.lora import LoRALinear
from nybble.quant.grid import min_max_qparams
from nybble.quant.scheme import QuantScheme

SCHEME = QuantScheme(group_size=16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUTS, INPUTS, RANK = 24, 64, 8


def weight_and_bias(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """A random weight with a standard deviation of 0.1, and a random bias or None."""
    weight_OI = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    return weight_OI, torch.randn(shape[0], generator=generator).to(dtype) if bias else None


def fake_quant_layer(
    shape: tuple[int, int] = (OUTPUTS, INPUTS),
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    trained: bool = True,
    seed: int = 0,
) -> FakeQuantizedLoRALinear:
    """A layer compressed by round-to-nearest; if `trained`, with random adapters and scales moved by about 10 %."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI, bias_O = weight_and_bias(shape, dtype, bias, generator)
    init = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, SCHEME))
    layer = FakeQuantizedLoRALinear(init, SCHEME, bias_O, rank, dtype, generator)
    if trained:
        nn.init.normal_(layer.lora_b, 0, 0.1, generator=generator)
        nn.init.normal_(layer.log_scale_shift, 0, 0.1, generator=generator)
    return layer


def fixed_codes_layer(
    shape: tuple[int, int] = (OUTPUTS, INPUTS),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    trained: bool = True,
    seed: int = 0,
) -> FixedCodesLinear:
    """A layer compressed by round-to-nearest; if `trained`, with scales moved by about 10 %."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI, bias_O = weight_and_bias(shape, dtype, bias, generator)
    quantized = QuantizedInit(weight_OI, *min_max_qparams(weight_OI, SCHEME)).quantized(SCHEME)
    layer = FixedCodesLinear(quantized, bias_O, dtype, generator)
    if trained:
        nn.init.normal_(layer.log_scale_shift, 0, 0.1, generator=generator)
    return layer


def lora_layer(
    shape: tuple[int, int] = (OUTPUTS, INPUTS),
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    trained: bool = True,
    seed: int = 0,
) -> LoRALinear:
    """A layer with a 16-bit (or float32) weight; if `trained`, with random adapters."""
    generator = torch.Generator().manual_seed(seed)
    layer = LoRALinear(*weight_and_bias(shape, dtype, bias, generator), rank, dtype, generator)
    if trained:
        nn.init.normal_(layer.lora_b, 0, 0.1, generator=generator)
    return layer


def saved_tensor_sizes(layer: nn.Module, inputs: Tensor) -> list[int]:
    """Numbers of elements of the tensors that a forward keeps for its backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs)
    return sizes
