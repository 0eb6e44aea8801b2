"""Recipes are valid options of their command, and the documentation describes each."""

from pathlib import Path

import pytest

from nybble.cli.parse import parse
from nybble.options.base import Command
from nybble.options.commands import DistillOptions
from nybble.options.toml import CONFIG, run_values, to_toml
from tests.helpers.pages import DOCS, RECIPES

COMMANDS = {"tune_published": (["tune", "--task", "arc_easy"], ["compare", "--tasks", "arc_easy", "openbookqa"])}


def options_of(recipe: Path, command: list[str]) -> Command:
    return parse([*command, "--pretrained", "m", "--config", str(recipe)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_survive_the_run_folder(recipe: Path, tmp_path: Path) -> None:
    for command in COMMANDS.get(recipe.stem, (["distill"],)):
        options = options_of(recipe, command)
        options.check()
        (tmp_path / CONFIG).write_text(to_toml(options), encoding="utf-8")
        assert type(options).of(**run_values(type(options), tmp_path)) == options


def test_the_standard_recipe_is_the_defaults_written_down() -> None:
    (recipe,) = (path for path in RECIPES if path.stem == "standard")
    assert options_of(recipe, ["distill"]) == DistillOptions.of(pretrained="m", method="awq+se+gptq", group_size=64)


def test_every_recipe_has_a_section() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for recipe in RECIPES:
        assert f"\n## {recipe.stem}\n" in text
        assert f"recipes/{recipe.name}" in text
