"""Every command, flag and make target that the documentation names exists."""

import re
from pathlib import Path

import pytest

from nybble.cli.parse import parse
from nybble.options.commands import COMMANDS
from tests.helpers.pages import DOCS, PAGES, README, ROOT, flags, nybble_commands, shell_lines

WITHOUT_OPTIONS = {"env"}
# Flags of the command line itself.
OWN_FLAGS = {"config", "help", "help_all", "version"}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if nybble_commands(page)], ids=page_name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named relative to it
    for arguments in nybble_commands(page):
        if arguments[0] not in WITHOUT_OPTIONS:
            parse(arguments).check()


def test_the_readme_shows_the_commands_that_train() -> None:
    assert {arguments[0] for arguments in nybble_commands(README)} >= {"compress", "distill", "tune"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_flags_exist(page: Path) -> None:
    known = {name for kind in COMMANDS.values() for name in kind.fields()} | OWN_FLAGS
    # --no_NAME switches a flag off; "--help-all" is found as help.
    unknown = {flag for flag in flags(page) if flag not in known and flag.removeprefix("no_") not in known}
    assert unknown - {"no"} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_commands_exist(page: Path) -> None:
    named = re.findall(r"`nybble ([a-z]+)", page.read_text(encoding="utf-8"))
    assert set(named) <= {*COMMANDS, *WITHOUT_OPTIONS}


def test_every_command_has_a_section_in_the_reference() -> None:
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for name in (*COMMANDS, *WITHOUT_OPTIONS):
        assert f"\n## nybble {name} " in text


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    lines = "\n".join(line.split("#")[0] for line in shell_lines(page))
    named = re.findall(r"^make ([\w-]+)", lines, re.MULTILINE)
    named += re.findall(r"`make ([\w-]+)`", page.read_text(encoding="utf-8"))
    assert set(named) <= targets


def test_the_makefile_describes_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = set(re.findall(r"^# make ([\w-]+)", makefile, re.MULTILINE))
    assert described == {
        "demo", "test", "quick", "lint", "fuzz", "format", "bench", "bench-peers", "peers", "docs", "docs-serve",
        "clean",
    }  # fmt: skip
    assert described <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
