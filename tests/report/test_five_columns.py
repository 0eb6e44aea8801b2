"""compare.json is read as it was written; a comparison with other options is not replaced."""

import json
from pathlib import Path

import pytest

from nybble.errors import RunError
from nybble.options.commands import CompareOptions
from nybble.report.figures import Figure
from nybble.report.five_columns import (
    COLUMNS,
    FILE,
    NLS_RUN,
    NO_SETTING,
    check_same_setting,
    is_comparison,
    note_setting,
    read_comparison,
    setting_of,
    setting_text,
)
from nybble.run.marker import write_marker
from nybble.run.results import RESULTS
from tests.helpers.runs import compare_options, known, write_columns

ROW = dict.fromkeys(COLUMNS, known("01"))


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    figures = {"a": dict.fromkeys(COLUMNS, known("0110")), "b": dict.fromkeys(COLUMNS, Figure(0.25, 8))}
    assert not is_comparison(tmp_path)
    write_columns(tmp_path, figures, seed=3, epochs=2)
    assert is_comparison(tmp_path)
    found = read_comparison(tmp_path)
    assert found.figures == figures
    assert (found.model, found.seed, found.setting["epochs"]) == ("m", 3, 2)
    assert (found.dtype, found.ptwc) == ("float32", "awq+se+gptq")
    assert found.objectives == {"a": "choices", "b": "choices"}
    assert json.loads((tmp_path / FILE).read_text())["figures"]["a"]["BF16"] == {
        "value": 0.5,
        "error": pytest.approx(0.2887, abs=1e-4),
        "documents": 4,
        "right": "0110",
    }


@pytest.mark.parametrize("name", NO_SETTING)
def test_what_a_setting_leaves_out_are_options(name: str) -> None:
    assert name in CompareOptions.fields()


def test_seeds_share_a_setting(tmp_path: Path) -> None:
    first, second = (compare_options(tmp_path / name, seed=seed, tasks=(name,)) for seed, name in enumerate("ab"))
    assert setting_of(first) == setting_of(second)
    assert setting_of(first) != setting_of(first.replace(epochs=4))
    assert json.loads(json.dumps(setting_of(first))) == setting_of(first), "as JSON gives it back"


def test_tasks_that_are_compared_one_after_the_other_stay_together(tmp_path: Path) -> None:
    write_columns(tmp_path, {"a": ROW}, epochs=2)
    write_columns(tmp_path, {"b": ROW}, epochs=2)
    assert list(read_comparison(tmp_path).figures) == ["a", "b"]
    (tmp_path / "a" / NLS_RUN / RESULTS).unlink()
    write_columns(tmp_path, {"c": ROW}, epochs=2)
    assert list(read_comparison(tmp_path).figures) == ["b", "c"], "the runs of a are gone"
    write_columns(tmp_path, {"d": ROW}, epochs=3)
    assert list(read_comparison(tmp_path).figures) == ["d"], "another setting"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 3}, "--epochs 2, got 3"),
        ({"pretrained": "n"}, "--pretrained m, got n"),
        ({"seed": 7}, "--seed 0, got 7"),
        ({"export": ()}, "--export openvino, got none"),
    ],
)
def test_a_comparison_with_other_options_is_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    write_columns(tmp_path, {"a": ROW}, epochs=2)
    same = {"epochs": 2, "eval_batch_size": 3}
    check_same_setting(tmp_path, compare_options(tmp_path, **same))
    with pytest.raises(RunError, match=f"it holds one of a with {words}; choose another folder, or add --overwrite"):
        check_same_setting(tmp_path, compare_options(tmp_path, **same | changes))


def test_a_comparison_that_another_process_began_has_its_options(tmp_path: Path) -> None:
    note_setting(tmp_path, compare_options(tmp_path, epochs=2))
    check_same_setting(tmp_path, compare_options(tmp_path, epochs=3))  # nothing was made
    (tmp_path / "a" / NLS_RUN).mkdir(parents=True)
    write_marker(tmp_path / "a" / NLS_RUN)
    check_same_setting(tmp_path, compare_options(tmp_path, epochs=2))
    with pytest.raises(RunError, match=r"it holds one that was begun with --epochs 2, got 3; choose another folder"):
        check_same_setting(tmp_path, compare_options(tmp_path, epochs=3))


def test_a_limit_that_is_not_finite_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    unlimited = compare_options(tmp_path, max_grad_norm=float("inf"))
    write_columns(tmp_path, {"a": ROW}, max_grad_norm=float("inf"))
    check_same_setting(tmp_path, unlimited)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace('"Infinity"', "Infinity"))  # as it was written once
    assert text != (tmp_path / FILE).read_text()
    check_same_setting(tmp_path, unlimited)


def test_an_overwritten_comparison_with_other_options_is_gone(tmp_path: Path) -> None:
    write_columns(tmp_path, {"a": ROW}, epochs=2)
    note_setting(tmp_path, compare_options(tmp_path, epochs=2))
    assert is_comparison(tmp_path)
    note_setting(tmp_path, compare_options(tmp_path, epochs=3))
    assert not is_comparison(tmp_path)
    check_same_setting(tmp_path, compare_options(tmp_path, epochs=3))


def test_what_cannot_be_read_may_be_replaced(tmp_path: Path) -> None:
    check_same_setting(tmp_path, compare_options(tmp_path))
    (tmp_path / FILE).write_text("{}")
    check_same_setting(tmp_path, compare_options(tmp_path))
    write_columns(tmp_path, {"b": ROW})
    assert list(read_comparison(tmp_path).figures) == ["b"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"figures": {"a": {"BF16": [0.5, 12]}}}', '{"figures": 1}'])
def test_a_damaged_comparison_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=r"compare\.json must be a comparison written by this version of nybble compare"):
        read_comparison(tmp_path)


def test_values_are_written_as_on_the_command_line() -> None:
    assert [setting_text(value) for value in ([8, 4], [], 1e-4, None)] == ["8 4", "none", "0.0001", "None"]
