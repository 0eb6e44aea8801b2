"""QuantScheme: bits, group size and symmetry of a quantized weight, and which schemes a row of weights can have."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.errors import OptionError


@dataclass(frozen=True)
class QuantScheme:
    """How a weight matrix [O, I] is quantized.

    Attributes:
        bits: width of a code in bits: 2, 3, 4 or 8.
        group_size: number of weights along the input axis that share a scale; None means the whole row.
        symmetric: True fixes the zero point at the middle code (2, 4, 8 or 128) and chooses the sign of the scale
            (`signed_scales`); False chooses the zero point per group and has positive scales. 8 bits are symmetric:
            scale * (code - 128) has at most 14 significant bits, and rounding it to bfloat16 keeps the code, which it
            would not with another zero point.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    @property
    def max_code(self) -> int:
        """Largest code: 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def middle_code(self) -> int:
        """Zero point of a symmetric scheme: 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    @property
    def signed_scales(self) -> bool:
        """Whether a scale may be negative: symmetric codes of less than 8 bits.

        Codes minus their zero point reach one step further on the negative side, with 2 bits -2 .. 1. A negative scale
        turns this side to where the larger weights of a group are. With 8 bits, -128 .. 127, the sides hardly differ.
        """
        return self.symmetric and self.bits < 8

    def num_groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights, which group_size must divide (`check_scheme`)."""
        return 1 if self.group_size is None else in_features // self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Bits of a weight as exported, with its share of a scale and, unless it is fixed, of a zero point."""
        of_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + of_group * self.num_groups(in_features) / in_features

    def __str__(self) -> str:
        grouping = "per row" if self.group_size is None else f"group {self.group_size}"
        return f"uint{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {grouping}"


# Scheme of the embedding and of lm_head, unless another one is asked for.
INT8_PER_ROW = QuantScheme(bits=8, group_size=None, symmetric=True)

BITS = (2, 3, 4, 8)

# Bits -> weights that fill whole bytes: a row has a multiple of them.
CODES_PER_UNIT = {2: 4, 3: 8, 4: 2, 8: 1}

_COMMON_GROUP_SIZES = (16, 32, 64, 128, 256)
# Group sizes that every runtime computes are powers of two. Smaller groups than this cost more than they gain.
_SMALLEST_FALLBACK = 16


def fallback_group_size(in_features: int, group_size: int) -> int | None:
    """Return the group size of a layer whose rows `group_size` does not divide.

    Returns:
        The largest power of two from 16 to group_size that divides in_features; else the largest multiple of 8 up to
        group_size that does; else None, the whole row.
    """
    fitting = [size for size in range(8, group_size + 1, 8) if in_features % size == 0]
    powers = [size for size in fitting if size >= _SMALLEST_FALLBACK and size & (size - 1) == 0]
    return max(powers or fitting, default=None)


def check_scheme(layer_name: str, in_features: int, scheme: QuantScheme) -> None:
    """Check that a scheme fits the rows of a layer.

    Args:
        layer_name: name of the layer, for the error message.
        in_features: weights per row of the layer.
        scheme: bits and group size.

    Raises:
        OptionError: the codes of a row do not fill whole bytes; or the group size does not divide a row. The message
            lists the common sizes that are divisors or, if there are none, the five largest even divisors up to 256.
    """
    unit, group_size = CODES_PER_UNIT[scheme.bits], scheme.group_size
    if in_features % unit:
        raise OptionError(
            f"in_features must be a multiple of {unit}, as {unit} codes of {scheme.bits} bits fill whole bytes: layer "
            f"{layer_name} has in_features={in_features}; remove --strict_group_size, which leaves it in 16 bits"
        )
    if group_size is not None and in_features % group_size:
        common = [size for size in _COMMON_GROUP_SIZES if in_features % size == 0]
        choices = common or [size for size in range(2, min(in_features, 256) + 1, 2) if in_features % size == 0][-5:]
        raise OptionError(
            f"in_features must be a multiple of group_size: layer {layer_name} has in_features={in_features}, "
            f"got group_size={group_size}; choose {', '.join(map(str, choices))}, or remove --strict_group_size"
        )
