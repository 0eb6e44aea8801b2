"""Options of the scheme: values, rules of --layer, flags that can be repeated, and tables of recipes."""

from pathlib import Path
from typing import Any

import pytest

from nybble.cli.parse import parse
from nybble.errors import OptionError
from nybble.options.commands import CompressOptions
from nybble.options.scheme import LayerRule, SchemeOptions
from nybble.options.toml import CONFIG, run_values, to_toml

COMMAND = ["compress", "--pretrained", "m"]


def parsed(*flags: str) -> CompressOptions:
    options = parse([*COMMAND, *flags])
    assert isinstance(options, CompressOptions)
    options.check()
    return options


def test_flags_of_patterns_add_up_and_survive_the_run_folder(tmp_path: Path) -> None:
    options = parsed(
        "--layer", "lm_head:bits=4", "--layer", "*.up:group_size=-1", "a:symmetric=true", "--ignore", "*.g"
    )
    assert options.scheme.layer == ("lm_head:bits=4", "*.up:group_size=-1", "a:symmetric=true")
    assert options.scheme.layer_rules() == (
        LayerRule("lm_head", bits=4),
        LayerRule("*.up", group_size=-1),
        LayerRule("a", symmetric=True),
    )
    (tmp_path / CONFIG).write_text(to_toml(options))
    assert CompressOptions.of(**run_values(CompressOptions, tmp_path)) == options
    assert parsed("--group_size", "-1").scheme.group_size == -1


def test_other_lists_are_replaced_by_a_later_flag() -> None:
    assert parsed("--export", "gguf", "--export", "onnx").evaluation.export == ("onnx",)


def test_a_recipe_has_rules_in_a_table(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('bits = 3\n[layer]\nlm_head = {bits = 8}\n"*.down" = {bits = 4, symmetric = true}\n')
    rules = parsed("--config", str(recipe)).scheme.layer_rules()
    assert rules == (LayerRule("lm_head", bits=8), LayerRule("*.down", bits=4, symmetric=True))
    recipe.write_text("[layer]\nlm_head = 8\n")
    with pytest.raises(OptionError, match="--layer must be PATTERN:KEY=VALUE .*; got lm_head=8; for example lm_head:b"):
        parsed("--config", str(recipe))


@pytest.mark.parametrize(
    "rule",
    ["lm_head", ":bits=4", "a:bits=5", "a:bits", "a:group_size=0", "a:group_size=-2", "a:symmetric=yes", "a:rank=3",
     "a:bits=4,", "a:bits=4;group_size=32"],
)  # fmt: skip
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(OptionError, match="--layer must be PATTERN:KEY=VALUE"):
        SchemeOptions(layer=("b:bits=4", rule)).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "--bits must be 2, 3, 4 or 8, or an average from 2 to 8; got 9"),
        ({"group_size": 0}, r"--group_size must be at least 1, or -1 \(whole row\); got 0"),
        ({"group_size": -2}, "got -2"),
        ({"target": "npu", "group_size": 64}, "--target npu needs --group_size 128 or -1; got 64"),
    ],
)
def test_values_outside_of_their_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SchemeOptions(**values).check()


@pytest.mark.parametrize(
    ("bits", "neighbours"), [(4, (4, 4)), (4.0, (4, 4)), (4.5, (4, 8)), (5, (4, 8)), (3.01, (3, 4)), (2.5, (2, 3))]
)
def test_an_average_has_the_bits_below_and_above(bits: float, neighbours: tuple[int, int]) -> None:
    options = parsed("--bits", str(bits)).scheme
    assert options.neighbouring_bits == neighbours
    assert options.is_average == (neighbours[0] != neighbours[1])


def test_compare_has_4_bits() -> None:
    for flags in (["--bits", "3"], ["--bits", "4.5"], ["--layer", "a:bits=3"]):
        with pytest.raises(OptionError, match="nybble compare must compare models in 4 bits"):
            parse(["compare", "--pretrained", "m", "--tasks", "arc_easy", *flags]).check()


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(OptionError, match="--target must be one of any, npu; got 'tpu'"):
        parsed("--target", "tpu")
