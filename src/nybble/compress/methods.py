"""Names of compression methods."""

from __future__ import annotations

import logging
from typing import Any

from nybble.errors import OptionError
from nybble.models.families import family_of

METHODS = ("awq", "se", "gptq", "blockwise")


log = logging.getLogger("nybble")


def parse_method(method: str, option: str = "--method") -> tuple[str, ...]:
    """ "awq+se" -> ("awq", "se"); OptionError, listing what is valid, for anything else. "rtn" -> ()."""
    parts = tuple(method.split("+"))
    if parts == ("rtn",):
        return ()
    if any(part not in METHODS for part in parts) or parts != tuple(name for name in METHODS if name in parts):
        raise OptionError(
            f"{option} must be rtn, or one or more of {', '.join(METHODS)} in this order, joined by +; got {method}; awq+se+gptq, for example"
        )
    return parts


def automatic_method(config: Any, adapters: bool) -> str:
    """What training was measured to end best from (docs/log.md), as far as it can be applied to this family: where only scales are trained, what has the least
    KL; with adapters, whose codes are to move, what leaves the weights between their codes."""
    method = "se+gptq" if adapters else "se+blockwise"
    return f"awq+{method}" if family_of(config).feeds else method
