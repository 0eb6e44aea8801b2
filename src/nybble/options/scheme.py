"""How weights are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nybble.errors import OptionError
from nybble.options.base import Group, option, with_help

_BITS = (2, 3, 4, 8)
_TRUTH = {"true": True, "false": False}
DEFAULT_GROUP_SIZE, NPU_GROUP_SIZE = 64, 128
# What --group_size calls a whole row.
WHOLE_ROW = -1


@dataclass(frozen=True)
class LayerRule:
    """Scheme of the layers that a pattern matches.

    Attributes:
        pattern: of module names, as fnmatch reads it.
        bits, group_size, symmetric: None leaves what the layer would have without the rule.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SchemeOptions(Group):
    """The quantization scheme of the layers."""

    TITLE: ClassVar[str] = "Scheme"

    bits: float = option(
        4,
        "Bits of a weight in the linear layers: 2, 3, 4 or 8; 8 bits are symmetric. Another number from 2 to 8, such "
        "as 4.5, is an average: the layers that are most sensitive on the training text get the next higher width, the "
        "others the next lower.",
        basic=True,
    )
    group_size: int | None = option(
        None,
        "Weights that share a scale and a zero point; -1: the whole row. Default: 64, with --target npu 128.",
    )
    symmetric: bool = option(False, "Fix the zero points in the middle of the codes.")
    layer: tuple[str, ...] = option(
        (),
        "Other schemes by pattern, such as lm_head:bits=4 or *.down_proj:bits=8,group_size=32,symmetric=true; the last "
        "pattern that matches a layer wins. Can be given several times; in a recipe it is a table.",
        repeat=True,
    )
    ignore: tuple[str, ...] = option(
        (), "Patterns of layers that stay in 16 bits, such as *.gate. Can be given several times.", repeat=True
    )
    strict_group_size: bool = option(
        False, "Refuse rows that --group_size does not divide, instead of taking smaller groups for these layers."
    )
    target: Literal["any", "npu"] = option(
        "any",
        "npu: what OpenVINO's NPU plugin computes: symmetric, groups of 128 or whole rows; embedding and head in 8 "
        "bits.",
    )

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        if not _BITS[0] <= self.bits <= _BITS[-1]:
            raise OptionError(f"--bits must be 2, 3, 4 or 8, or an average from 2 to 8; got {self.bits:g}")
        self.require(
            "group_size",
            lambda value: value is None or value >= 1 or value == WHOLE_ROW,
            "at least 1, or -1 (whole row)",
        )
        if self.target == "npu" and self.group_size not in (None, NPU_GROUP_SIZE, WHOLE_ROW):
            raise OptionError(f"--target npu needs --group_size {NPU_GROUP_SIZE} or -1; got {self.group_size}")
        if self.target == "npu" and self.is_average:
            raise OptionError(
                f"--target npu needs the same --bits in all layers: 2, 3, 4 or 8; got the average {self.bits:g}; give "
                "single layers others with --layer"
            )
        self.layer_rules()

    @property
    def neighbouring_bits(self) -> tuple[int, int]:
        """The largest number of bits up to --bits, and the smallest from there; equal unless it is an average."""
        return max(bits for bits in _BITS if bits <= self.bits), min(bits for bits in _BITS if bits >= self.bits)

    @property
    def is_average(self) -> bool:
        """Whether --bits is an average over layers of two widths."""
        return self.bits not in _BITS

    def layer_rules(self) -> tuple[LayerRule, ...]:
        """The rules of --layer.

        Raises:
            OptionError: one is no rule.
        """
        return tuple(map(_parse_rule, self.layer))


@dataclass(frozen=True, kw_only=True)
class CompareSchemeOptions(SchemeOptions):
    """Scheme of the models that are compared."""

    bits: float = with_help(SchemeOptions, "bits", "Must be 4, as in the published tables.", basic=False)
    layer: tuple[str, ...] = with_help(SchemeOptions, "layer", "Not for this command: all layers have 4 bits.")


def _parse_rule(text: str) -> LayerRule:
    pattern, colon, settings = text.rpartition(":")
    rule: dict[str, int | bool] = {}
    for setting in settings.split(","):
        key, _, value = (part.strip() for part in setting.partition("="))
        number = int(value) if value.removeprefix("-").isdecimal() else 0
        allowed = {
            "bits": number in _BITS,
            "group_size": number >= 1 or number == WHOLE_ROW,
            "symmetric": value in _TRUTH,
        }
        if not (pattern and colon and allowed.get(key)):
            raise OptionError(
                "--layer must be PATTERN:KEY=VALUE with the keys bits (2, 3, 4, 8), group_size (1 or more, -1: whole "
                f"row) and symmetric (true, false), separated by commas; got {text}; for example lm_head:bits=4"
            )
        rule[key] = _TRUTH[value] if key == "symmetric" else number
    return LayerRule(pattern, **rule)  # type: ignore[arg-type]
