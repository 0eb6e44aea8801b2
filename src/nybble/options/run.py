"""Where a run goes, and whether it is new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nybble.errors import OptionError
from nybble.options.base import Group, option


@dataclass(frozen=True, kw_only=True)
class RunOptions(Group):
    """The run folder."""

    TITLE: ClassVar[str] = "Run"

    output_dir: str | None = option(
        None,
        "Run folder. Default: runs/MODEL-compress or MODEL-METHOD, MODEL-distill, MODEL-TASK (tune), MODEL-compare.",
        basic=True,
    )
    seed: int = option(0, "Seed of everything random: adapters, choice and order of the data.", basic=True)
    resume: bool = option(False, "Continue the run in output_dir where it stopped.", basic=True)
    overwrite: bool = option(False, "Delete the run in output_dir first.", basic=True)

    def check(self) -> None:
        """Raise OptionError for values outside of their range, or that contradict each other."""
        self.require("seed", lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1")
        if self.resume and self.overwrite:
            raise OptionError("--resume and --overwrite contradict each other; give one of them")
