"""Command line to options."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

import nybble
from nybble.cli.parse import parse
from nybble.errors import OptionError, RunError
from nybble.options.base import Command
from nybble.options.commands import COMMANDS, DistillOptions, EvalOptions, ReportOptions, TuneOptions
from nybble.options.toml import to_toml
from nybble.run.marker import write_marker
from nybble.run.results import RunResults


def test_flags_take_underscores_and_dashes() -> None:
    given = "distill --pretrained m --lora_rank 7 --batch-size=4 --eval_tasks arc_easy wikitext --report-to none"
    assert parse(given.split()) == DistillOptions.of(
        pretrained="m", lora_rank=7, batch_size=4, eval_tasks=("arc_easy", "wikitext"), report_to=()
    )


def test_switches_can_be_turned_off() -> None:
    assert parse(["search", "run"]).flat()["random_baseline"] is True
    assert parse(["search", "run", "--no_random_baseline"]).flat()["random_baseline"] is False


def test_none_is_no_value() -> None:
    options = parse(["compress", "--pretrained", "m", "--limit", "none", "--export", "none"])
    assert (options.flat()["limit"], options.flat()["export"]) == (None, ())


def test_flags_are_stronger_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('pretrained = "m"\nlr = 0.5\nseed = 3\neval_tasks = "none"\n')
    options = parse(["distill", "--config", str(tmp_path / "recipe.toml"), "--lr", "0.25"])
    assert options == DistillOptions.of(pretrained="m", lr=0.25, seed=3, eval_tasks=())


def saved_run(folder: Path, options: DistillOptions | TuneOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_marker(folder)
    (folder / "config.toml").write_text(to_toml(options))
    RunResults(command=options.NAME).save(folder)


def test_resume_starts_from_the_options_of_the_run(tmp_path: Path) -> None:
    saved = DistillOptions.of(
        pretrained="m", lr=0.125, num_train_samples=64, eval_tasks=(), output_dir=str(tmp_path), overwrite=True
    )
    saved_run(tmp_path, saved)
    (tmp_path / "r.toml").write_text("epochs = 3\n")
    options = parse(["distill", "--resume", "--output_dir", str(tmp_path), "--config", str(tmp_path / "r.toml")])
    assert options == saved.replace(resume=True, overwrite=False, epochs=3)


def test_the_functions_of_python_resume_by_the_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = DistillOptions.of(pretrained="m", lr=0.125, output_dir=str(tmp_path))
    saved_run(tmp_path, saved)
    started: list[Command] = []

    def workflow(options: Command, callbacks: Sequence[object]) -> Path:
        started.append(options)
        return tmp_path

    monkeypatch.setattr("nybble.workflows.distill.distill", workflow)
    assert nybble.distill(output_dir=str(tmp_path), resume=True, epochs=3).path == tmp_path
    assert started == [saved.replace(resume=True, epochs=3)]


def test_resume_finds_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = DistillOptions.of(pretrained="org/Model-1.5B", lr=0.125)
    saved_run(saved.folder, saved)
    assert parse(["distill", "--pretrained", "org/Model-1.5B", "--resume"]).flat()["lr"] == 0.125


def test_a_folder_with_a_config_that_is_no_run_gives_no_options(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("lr = 0.125\n")
    resumed = parse(["distill", "--pretrained", "m", "--resume", "--output_dir", str(tmp_path)])
    assert resumed.flat()["lr"] == DistillOptions.of(pretrained="m").training.lr


def test_a_folder_without_a_run_cannot_say_what_to_begin(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--resume must find a run in .*nowhere; there is none; check --output_dir"):
        parse(["distill", "--resume", "--output_dir", str(tmp_path / "nowhere")])


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path, TuneOptions.of(pretrained="m", task="t"))
    with pytest.raises(RunError, match="--resume must continue a run of nybble distill; .* was begun by nybble tune"):
        parse(["distill", "--resume", "--output_dir", str(tmp_path)])


def test_only_a_flag_allows_code_that_comes_with_a_model(tmp_path: Path) -> None:
    saved_run(tmp_path, DistillOptions.of(pretrained="m"))
    with (tmp_path / "config.toml").open("a") as file:
        file.write("trust_remote_code = true\n")
    resumed = ["distill", "--resume", "--output_dir", str(tmp_path)]
    assert parse(resumed).flat()["trust_remote_code"] is False
    assert parse([*resumed, "--trust_remote_code"]).flat()["trust_remote_code"] is True


def test_ranks_that_were_given_are_not_those_that_are_tried(tmp_path: Path) -> None:
    saved_run(tmp_path, TuneOptions.of(pretrained="m", task="t", custom_rank_config=(4, 4)))
    resumed = ["tune", "--resume", "--output_dir", str(tmp_path)]
    assert parse(resumed).flat()["custom_rank_config"] == (4, 4)
    assert parse([*resumed, "--eval_only"]).flat()["custom_rank_config"] == ()


def test_what_is_looked_at_is_given_by_position() -> None:
    assert parse(["eval", "runs/demo", "--eval_tasks", "wikitext", "--data_dir", "data"]) == EvalOptions.of(
        target="runs/demo", eval_tasks=("wikitext",), data_dir="data"
    )
    assert parse(["report", "a", "b", "--table"]) == ReportOptions.of(runs=("a", "b"), table=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("distil", "unknown command distil; did you mean distill?; the commands are compress, distill, tune, compare,"),
        ("distill --pretraind m", "unknown flag --pretraind of nybble distill; did you mean --pretrained?; see nybble"),
        ("distill --batch_sizes 3", "unknown flag --batch_sizes of nybble distill; did you mean --batch_size?"),
        ("distill --config", "argument --config: expected one argument; see nybble distill --help"),
        ("distill --eval_tasks", "argument --eval_tasks: expected at least one argument; see nybble distill --help"),
        ("distill stray", "unrecognized arguments: stray; see nybble distill --help"),
        ("distill --lora_rank x", "--lora_rank must be a whole number; got x"),
        ("distill --lr x", "--lr must be a number; got x"),
        ("distill --dtype int3", "--dtype must be one of auto, bfloat16, float16, float32; got 'int3'"),
        ("eval m --split x", "--split must be one of train, validation, test; got 'x'"),
        ("chat m --temperature nan", "--temperature must be a number; got nan"),
        ("tune --lora_rank_space 8 x", "--lora_rank_space must be a whole number; got x"),
    ],
)
def test_wrong_flags_are_named(arguments: str, words: str) -> None:
    with pytest.raises(OptionError) as error:
        parse(arguments.split())
    assert words in str(error.value)


def test_every_option_can_be_given_by_its_flag() -> None:
    """Whatever the command, a flag with the option's default gives the options that no flag gives."""
    for name, kind in COMMANDS.items():
        needed = ["x"] if "pretrained" not in kind.fields() else []
        plain = parse([name, *needed])
        for field in kind.fields().values():
            if field.metadata["required"] or field.default is None or field.default is dataclasses.MISSING:
                continue
            value = field.default
            if isinstance(value, bool):
                flag = [f"--{'' if value else 'no_'}{field.name}"]
            else:
                flag = [f"--{field.name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
            if flag[1:] or isinstance(value, bool):
                given = parse([name, *needed, *(flag if flag[1:] != [] or isinstance(value, bool) else [])])
                assert given == plain, flag
            else:
                assert parse([name, *needed, flag[0], "none"]) == plain, flag
