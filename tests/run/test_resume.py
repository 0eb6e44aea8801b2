"""What must be the same on --resume."""

from pathlib import Path

import pytest

from nybble.errors import RunError
from nybble.options.commands import DistillOptions
from nybble.options.toml import to_toml
from nybble.run.marker import write_marker
from nybble.run.results import RunResults
from nybble.run.resume import check_same_command, check_same_inputs, check_same_options, saved_options
from nybble.workflows.plan import keep_saved_choices

OPTIONS = DistillOptions.of(pretrained="m")


def save_run(folder: Path) -> Path:
    write_marker(folder)
    (folder / "config.toml").write_text(to_toml(OPTIONS))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "was"),
    [
        ("lr", 0.5, OPTIONS.training.lr),
        ("seed", 7, 0),
        ("pretrained", "other", "m"),
        ("lora_rank", 8, 256),
        ("eval_tasks", ("a", "b"), "wikitext"),
        ("data_dir", "x", None),
    ],
)
def test_another_option_is_named(field: str, value: object, was: object, tmp_path: Path) -> None:
    save_run(tmp_path)
    shown = " ".join(value) if isinstance(value, tuple) else value
    with pytest.raises(
        RunError, match=rf"--resume must use the options of the run .*: --{field} was {was}, got {shown}"
    ):
        check_same_options(tmp_path, OPTIONS.replace(**{field: value}))


def test_an_option_that_an_earlier_version_did_not_have_was_as_its_default_is(tmp_path: Path) -> None:
    file = save_run(tmp_path) / "config.toml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("kl_temperature")))
    check_same_options(tmp_path, OPTIONS)
    with pytest.raises(RunError, match="--kl_temperature was 1.0, got 2.0"):
        check_same_options(tmp_path, OPTIONS.replace(kl_temperature=2.0))


def test_a_run_from_before_base_weights_took_one_byte_goes_on_with_exact_ones(tmp_path: Path) -> None:
    file = save_run(tmp_path) / "config.toml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("base_weights")))
    again = OPTIONS.replace(output_dir=str(tmp_path), resume=True)
    assert keep_saved_choices(again).training.base_weights == "exact"
    check_same_options(tmp_path, again)
    with pytest.raises(RunError, match="--base_weights was exact, got fixed"):
        check_same_options(tmp_path, again.replace(base_weights="fixed"))


def test_what_changes_no_weights_may_change(tmp_path: Path) -> None:
    save_run(tmp_path)
    check_same_options(
        tmp_path,
        OPTIONS.replace(
            microbatch_size=1, weight_cache="recompute", save_steps=3, trust_remote_code=True, report_to=(), export=()
        ),
    )


def test_saved_options_need_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"must be a run folder; it has no nybble-run.json of nybble's"):
        saved_options(tmp_path)
    write_marker(tmp_path)
    with pytest.raises(RunError, match=r"must be a complete run; its config.toml is missing"):
        saved_options(tmp_path)
    (save_run(tmp_path) / "config.toml").write_text('export = "none"\n')
    assert saved_options(tmp_path) == {"export": []}


def test_a_run_belongs_to_its_command(tmp_path: Path) -> None:
    check_same_command(tmp_path, "distill")
    RunResults(command="tune").save(tmp_path)
    check_same_command(tmp_path, "tune")
    with pytest.raises(RunError, match="must continue a run of nybble distill; .* was begun by nybble tune"):
        check_same_command(tmp_path, "distill")


def test_inputs_that_changed_are_named() -> None:
    results = RunResults()
    check_same_inputs(results, {"model": "a", "training text": "b"})
    assert results.fingerprints == {"model": "a", "training text": "b"}
    check_same_inputs(results, {"model": "a"})
    assert results.fingerprints == {"model": "a", "training text": "b"}
    with pytest.raises(RunError, match="the model changed; bring it back, or start again"):
        check_same_inputs(results, {"model": "x", "training text": "b"})
    with pytest.raises(RunError, match="the model and the training text changed; bring them back"):
        check_same_inputs(results, {"model": "x", "training text": "y"})
