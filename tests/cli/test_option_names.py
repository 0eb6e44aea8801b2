"""Options that messages, docstrings and comments speak of exist."""

import re
from pathlib import Path

from nybble.options.commands import COMMANDS

SOURCE = Path(__file__).parents[2] / "src" / "nybble"
# Not options of a command, or of pip.
OTHERS = {"help", "help-all", "help_all", "version", "config", "flags", "no_", "no"}
KNOWN = {name for kind in COMMANDS.values() for name in kind.fields()} | OTHERS
# Lines of model cards that run other programs.
OTHER_PROGRAMS = re.compile(r"^(?:vllm|python -m vllm\S*|llama-\w+|ollama) .*$", re.MULTILINE)
FILES = sorted(SOURCE.rglob("*.py"))


def test_every_option_that_is_named_exists() -> None:
    unknown = {}
    for path in FILES:
        named = re.findall(r"(?<![\w-])--([a-z]\w+(?:-all)?)", OTHER_PROGRAMS.sub("", path.read_text()))
        if wrong := [name for name in named if name not in KNOWN and name.removeprefix("no_") not in KNOWN]:
            unknown[path] = wrong
    assert unknown == {}
