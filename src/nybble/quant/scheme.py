"""QuantScheme: bits, group size, symmetric or not."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import OptionError


@dataclass(frozen=True)
class QuantScheme:
    """How a weight is quantized.

    Attributes:
        bits: width of a code: 4 or 8.
        group_size: weights per scale along the input axis; None = the whole row.
        symmetric: zero is fixed at the middle code (8 or 128) instead of chosen per group.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size

    def __str__(self) -> str:
        to_groups = "per row" if self.group_size is None else f"group {self.group_size}"
        return f"uint{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {to_groups}"


INT8_PER_ROW = QuantScheme(bits=8, group_size=None, symmetric=True)


def check_group_size(name: str, in_features: int, group_size: int) -> None:
    """Raise OptionError, naming the layer and the sizes that do work, unless group_size divides in_features."""
    if group_size <= 0 or in_features % group_size:
        powers = [k for k in (16, 32, 64, 128, 256) if in_features % k == 0]
        choices = powers or [k for k in range(1, in_features + 1) if in_features % k == 0 and k <= 256][-5:]
        raise OptionError(
            f"in_features must be a multiple of group_size: layer {name} has in_features={in_features}, "
            f"got group_size={group_size}; choose {', '.join(map(str, choices))}"
        )
