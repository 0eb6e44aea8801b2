"""Help: every command and option is spoken of, few options are basic, and the names of options change knowingly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.cli.help import USAGE, help_text
from nybble.options.base import describe_type
from nybble.options.commands import COMMANDS

SNAPSHOT = Path(__file__).parent / "options.txt"
# Names of the reference's examples, which are kept as they are.
REFERENCE_NAMES = {
    "pretrained", "output_dir", "fast_eval", "task", "lr", "epochs", "batch_size", "eval_batch_size", "lora_rank_space",
    "eval_only", "resume", "custom_rank_config", "num_min_loss_configs",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_speaks_of_every_option_by_group(name: str) -> None:
    kind, text = COMMANDS[name], help_text(COMMANDS[name], everything=True)
    joined = " ".join(text.split())
    for group in kind.groups().values():
        assert f"{group.TITLE}:" in text
    for option, field in kind.fields().items():
        flag = option.upper() if option == kind.positional() else f"--{'no_' if field.default is True else ''}{option}"
        assert re.search(rf"(^|\s){re.escape(flag)}(\s|$)", text), flag
        assert " ".join(field.metadata["help"].split())[:40] in re.sub(r"(?<=\w)- (?=\w)", "-", joined), option


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_at_most_20_basic_options_and_fits_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kind, text = COMMANDS[name], help_text(COMMANDS[name], everything=False)
    basic = [option for option, field in kind.fields().items() if field.metadata["basic"]]
    assert len(basic) <= 20
    shown = set(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)) - {"config", "help"}
    positional = {kind.positional()} if kind.positional() else set()
    assert {option.removeprefix("no_") for option in shown} | positional == set(basic)
    assert max(map(len, text.splitlines())) <= 80
    hidden = len(kind.fields()) - len(basic)
    assert (f"({hidden} more)" in text) == (hidden > 0)


def test_usage_speaks_of_every_command() -> None:
    for name, kind in COMMANDS.items():
        assert re.search(rf"^  {name}\b", USAGE, flags=re.MULTILINE), name
        assert kind.__doc__
    assert max(map(len, USAGE.splitlines())) <= 80


def test_required_options_say_so() -> None:
    assert "Required. Hub id" in help_text(COMMANDS["distill"], everything=False)


def test_the_names_of_the_reference_are_kept() -> None:
    assert COMMANDS["tune"].fields().keys() >= REFERENCE_NAMES


def options_snapshot() -> str:
    """Every option of every command: group, name, type, default, whether it is basic."""
    lines = []
    for name, kind in COMMANDS.items():
        types = kind.types()
        for group in kind.groups().values():
            for field in kind.fields().values():
                if field.name in group.__dataclass_fields__:
                    basic = "basic" if field.metadata["basic"] else "more"
                    lines.append(
                        " | ".join(
                            (
                                name,
                                group.TITLE,
                                field.name,
                                describe_type(types[field.name]),
                                repr(field.default),
                                basic,
                            )
                        )
                    )
    return "\n".join(lines) + "\n"


def test_options_are_those_of_the_snapshot() -> None:
    """Options are an interface. To change them knowingly: python -m tests.cli.test_help"""
    assert options_snapshot() == SNAPSHOT.read_text(encoding="utf-8")


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from nybble.cli.main import main; main([]); main(['distill', '--help']); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


if __name__ == "__main__":
    SNAPSHOT.write_text(options_snapshot(), encoding="utf-8")
