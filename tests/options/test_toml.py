"""Options in files: what is written is read again; what may not be in a file is refused."""

from pathlib import Path

import pytest

from nybble.errors import OptionError
from nybble.options.commands import DistillOptions
from nybble.options.toml import recipe_values, run_values, to_toml


@pytest.mark.parametrize(
    "text",
    ["m", 'C:\\new "quoted"', "line\nbreak\ttab\x01\x1f\x7f\x80", "\u65e5\u672c \U0001f600", "a = 1 # no comment"],
)
def test_options_survive_toml(text: str, tmp_path: Path) -> None:
    options = DistillOptions.of(
        pretrained=text, eval_tasks=("a", text), data=(), seed=5, lr=1e-5, scale_lr=3.0, max_grad_norm=float("inf")
    )
    (tmp_path / "config.toml").write_text(to_toml(options), encoding="utf-8")
    assert DistillOptions.of(**recipe_values(DistillOptions, tmp_path / "config.toml")) == options


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"lr = ", "must be a TOML file; it is not valid: "),
        (b"\xff", "must be a TOML file; it is not valid: "),
        (b"batchsize = 3\n", "batchsize is no option of nybble distill; did you mean batch_size?"),
        (b"lr = 'x'\n", "lr must be a number; got 'x'"),
        (b"group_size = 32\ngroup-size = 64\n", "must give each option once; group-size is there as group_size too"),
        (b"trust_remote_code = true\n", "remove trust_remote_code, and give it as a flag if you trust the model"),
    ],
)
def test_wrong_files_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(OptionError) as error:
        recipe_values(DistillOptions, path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"--config {path}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"must be a TOML file; it cannot be read \(No such file or directory\)"):
        recipe_values(DistillOptions, tmp_path / "nowhere.toml")


def test_names_may_have_dashes(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("batch-size = 3\n")
    assert recipe_values(DistillOptions, tmp_path / "r.toml") == {"batch_size": 3}


def test_none_is_a_word_for_no_value(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('limit = "none"\neval_tasks = "none"\n')
    assert recipe_values(DistillOptions, tmp_path / "r.toml") == {"limit": None, "eval_tasks": ()}


def test_a_run_never_allows_code_that_comes_with_a_model(tmp_path: Path) -> None:
    assert "trust_remote_code" not in to_toml(DistillOptions.of(pretrained="m", trust_remote_code=True))
    (tmp_path / "config.toml").write_text('pretrained = "m"\ntrust_remote_code = true\n')
    assert run_values(DistillOptions, tmp_path) == {"pretrained": "m"}


def test_what_one_start_was_told_is_not_written() -> None:
    text = to_toml(DistillOptions.of(pretrained="m", resume=True, overwrite=True))
    assert "resume" not in text
    assert "overwrite" not in text
