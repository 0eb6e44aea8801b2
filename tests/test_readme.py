"""What the README shows runs: its commands parse, its Python executes, its files exist."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from nybble.cli import main
from nybble.compress.methods import automatic_method
from nybble.options.commands import DistillOptions, from_toml, to_toml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    return re.findall(r"^    (nybble .*)$", README, flags=re.MULTILINE)


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(commands()) >= 6
    for command in commands():
        arguments = shlex.split(command)[1:]
        if arguments != ["env"]:
            main.parse(arguments)


def test_flags_in_the_text_exist() -> None:
    from dataclasses import fields

    known = {field.name for kind, _ in main.COMMANDS.values() for field in fields(kind)} | {"config", "help"}
    for flag in re.findall(r"--([a-z_]+)", README):
        assert flag in known or flag.removeprefix("no_") in known, flag


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_options_of_a_command(recipe: Path, tmp_path: Path) -> None:
    command = "tune --task arc_easy" if recipe.stem.startswith("tune") else "distill"
    options, _ = main.parse([*command.split(), "--pretrained", "m", "--config", str(recipe)])
    options.check()
    (tmp_path / "config.toml").write_text(to_toml(options))
    assert type(options)(**from_toml(type(options), tmp_path / "config.toml")) == options, "a run can be gone on with"


def test_the_standard_recipe_says_what_the_defaults_are() -> None:
    options = DistillOptions(**{"pretrained": "m"} | from_toml(DistillOptions, ROOT / "recipes" / "standard.toml"))
    assert options == DistillOptions(pretrained="m", start=options.start)
    assert options.start == automatic_method(SimpleNamespace(model_type="llama"), adapters=True)


def test_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_continuous_integration_calls_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in README
