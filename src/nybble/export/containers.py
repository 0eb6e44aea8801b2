"""How an export format holds weights whose own scheme it does not have: as codes of another scheme, exactly.

Codes of 2 and 3 bits, minus their zero point, fit the signed range of 4 bits, so symmetric 4-bit codes hold them. A
group that a format does not have is held as several smaller groups with the same scale and zero point. The weights are
equal to the last bit (`QuantizedWeight.recoded`); the file is larger than codes of the own scheme would be.

Layers that stay in 16 bits are held in a type of 16 bits only where it has the same values: those of a bfloat16 model
do not always fit float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nybble.models.checkpoint import QuantizedCheckpoint
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme


def four_or_eight_bits(scheme: QuantScheme) -> QuantScheme:
    """Return the scheme with 4 or 8 bits that holds weights of a scheme."""
    return scheme if scheme.bits in (4, 8) else QuantScheme(4, scheme.group_size, symmetric=True)


def split_groups(scheme: QuantScheme, columns: int, sizes: Sequence[int]) -> QuantScheme | None:
    """Return the scheme with the largest of some group sizes that holds weights of a scheme.

    Args:
        scheme: of the weight.
        columns: weights in a row.
        sizes: group sizes of a format.

    Returns:
        None if no size divides the groups.
    """
    group_size = scheme.group_size or columns
    fitting = [size for size in sizes if group_size % size == 0]
    return replace(scheme, group_size=max(fitting)) if fitting else None


def as_held(checkpoint: QuantizedCheckpoint, containers: Mapping[str, QuantScheme]) -> QuantizedCheckpoint:
    """Return a checkpoint whose quantized weights have other schemes; they are recoded when they are read.

    Args:
        checkpoint: the model.
        containers: name of every quantized module -> scheme.
    """
    read = checkpoint.quantized.__getitem__
    return replace(
        checkpoint,
        quantized=LazyMapping(checkpoint.quantized, lambda name: read(name).recoded(containers[name])),
        selection=replace(checkpoint.selection, schemes=containers),
    )


def widened(schemes: Mapping[str, QuantScheme], containers: Mapping[str, QuantScheme]) -> dict[str, int]:
    """Count the weights that are held in more bits than their codes have: "2 bits in 4" -> number of weights."""
    counts: dict[str, int] = {}
    for name, scheme in schemes.items():
        if containers[name].bits > scheme.bits:
            words = f"{scheme.bits} bits in {containers[name].bits}"
            counts[words] = counts.get(words, 0) + 1
    return counts


def exact_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float16 or bfloat16, whichever has all values of the tensors, float16 if both have; else float32."""
    dtypes = [torch.float16, torch.bfloat16]
    for tensor in tensors:
        dtypes = [dtype for dtype in dtypes if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)]
    return [*dtypes, torch.float32][0]
