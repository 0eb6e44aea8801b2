"""How weights are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.options.base import Group, option


@dataclass(frozen=True, kw_only=True)
class SchemeOptions(Group):
    """The INT4 scheme of the linear layers."""

    TITLE: ClassVar[str] = "Scheme"

    group_size: int = option(64, "Weights that share a scale and a zero point.", basic=True)

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""
        self.require("group_size", lambda value: value >= 1, "at least 1")
