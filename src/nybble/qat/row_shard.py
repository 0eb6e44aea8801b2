"""Row shards: each of several processes keeps some rows of a weight, and a layer gathers codes when it computes.

    own rows -> codes of own rows -> packed codes of all rows -> W_q = scale * (codes - zero_point)

Groups run along the input axis, so rows are quantized independently of each other. Adapters and scales are whole in
every process, and their gradients are added up once per step as without shards. So nothing but codes travels: half a
byte for each 4-bit weight, where bfloat16 weights would take two. The backward pass gathers again
(fake_quant_lora.py).

All processes must compute the same layers in the same order. What is gathered names its layer, so that a difference is
noticed. torch's fully_shard (FSDP2) can gather codes too, in the hooks of a tensor subclass, and would gather those of
the next block meanwhile. It is not used, because it cannot be taken off a model again when training is done, and its
waits handle no signals; what it does for gradients is not needed, as no weight has one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble import processes
from nybble.quant.weight import pack_codes, unpack_codes

# Codes that every packed form holds in whole bytes, and bits in a byte.
_UNIT = 8


class RowShard:
    """The rows of a weight that this process keeps, and the codes of all rows.

    Args:
        shape: (O, I) of the weight.
        bits: of its codes.
        number: of the layer, the same in all processes.

    Attributes:
        own: rows of this process; the last processes may have fewer, or none.
    """

    def __init__(self, shape: tuple[int, int], bits: int, number: int) -> None:
        self.shape, self.bits, self.number = shape, bits, number
        self._rows = -(-shape[0] // processes.count())
        first = min(processes.index() * self._rows, shape[0])
        self.own = slice(first, min(first + self._rows, shape[0]))

    def pack(self, codes_OI: Tensor) -> Tensor:
        """Codes of the own rows as bytes, as many in every process."""
        return pack_codes(self._padded(codes_OI), self.bits)

    def codes(self, packed: Tensor) -> Tensor:
        """The codes [O, I] of all rows, from what `pack` made of the own ones in every process."""
        return self._whole(unpack_codes(self._gather(packed), self.bits))

    def codes_and_inside(self, packed: Tensor, inside_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The codes [O, I] of all rows, and a bool [O, I] for each weight.

        Args:
            packed: what `pack` made of the own codes.
            inside_OI: of the own rows.
        """
        place = torch.arange(_UNIT, dtype=torch.uint8, device=packed.device)
        bits = (self._padded(inside_OI.to(torch.uint8)).view(-1, _UNIT) << place).sum(-1, dtype=torch.uint8)
        parts = self._gather(torch.cat([packed, bits]))
        codes, bits = parts.split([len(packed), len(bits)], dim=-1)
        inside = (bits[..., None] >> place & 1).flatten(-2)
        return self._whole(unpack_codes(codes, self.bits)), self._whole(inside).bool()

    def rows(self, own: Tensor) -> Tensor:
        """All rows of a tensor [O, I] of which each process has its own."""
        padded = F.pad(own.flatten(), (0, self._rows * self.shape[1] - own.numel()))
        parts = self._gather(padded.view(torch.uint8))
        return self._whole(parts.contiguous().view(own.dtype))

    def _padded(self, own_OI: Tensor) -> Tensor:
        size = -(-self._rows * self.shape[1] // _UNIT) * _UNIT
        return F.pad(own_OI.flatten(), (0, size - own_OI.numel()))

    def _whole(self, parts: Tensor) -> Tensor:
        """[count, values of the rows of a process and padding] -> [O, I]."""
        columns = self.shape[1]
        return parts[:, : self._rows * columns].reshape(-1, columns)[: self.shape[0]]

    def _gather(self, part: Tensor) -> Tensor:
        """The bytes of all processes, [count, bytes]; AssertionError where one of them computes another layer."""
        tag = torch.tensor([self.number >> 8, self.number & 0xFF], dtype=torch.uint8, device=part.device)
        parts = processes.gather_parts(torch.cat([part, tag]), "codes")
        tags = parts[:, -2:].tolist()
        assert tags == [tag.tolist()] * len(tags), f"all processes must compute the same layer; they compute {tags}"
        return parts[:, :-2]
