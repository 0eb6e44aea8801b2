"""search in two processes gives the study of one; compare, started twice, makes each column once."""

import shutil
from pathlib import Path

import pytest

from nybble.cli.main import main
from nybble.nls.study import storage_file
from nybble.report import five_columns
from nybble.run.results import Phase, read_results
from tests.helpers.distill import shipped_bytes
from tests.helpers.several import Launcher, lines_of
from tests.helpers.tiny import save_model
from tests.helpers.tune import tune_options, write_letters

optuna = pytest.importorskip("optuna", reason="the extra search")
pytestmark = pytest.mark.slow  # every process imports transformers


def trials_of(run: Path) -> list[object]:
    """What a study of a run holds, without times."""
    url = f"sqlite:///{storage_file(run)}"
    names = optuna.get_all_study_names(url)
    studies = [optuna.load_study(study_name=name, storage=url) for name in sorted(names)]
    return [(trial.state, trial.params, trial.values) for study in studies for trial in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "hill", "nsga2"])
def test_search_in_two_processes(sampler: str, tmp_path: Path, launcher: Launcher) -> None:
    from nybble.workflows.tune import tune

    write_letters(tmp_path / "letters.jsonl", 120)
    one, two = tmp_path / "run", tmp_path / "two"
    tune(tune_options(tmp_path, epochs=1, num_selection_samples=8, dtype="float32"))
    shutil.copytree(one, two)
    for trials in ("3", "6"):  # the second search continues
        command = ["--num_trials", trials, "--sampler", sampler, "--apply"]
        assert main(["search", str(one), *command]) == 0
        ended = launcher.run(["search", str(two), *command])
        assert [process.code for process in ended] == [0, 0], ended
        assert (ended[1].out, ended[1].err) == ("", "")
    assert trials_of(one) == trials_of(two) != []
    assert shipped_bytes(one) == shipped_bytes(two)
    found = [read_results(run).task for run in (one, two)]
    assert found[0] == found[1]


def test_a_search_that_fails_ends_both_processes(tmp_path: Path, launcher: Launcher) -> None:
    from nybble.workflows.tune import tune

    write_letters(tmp_path / "letters.jsonl", 120)
    tune(tune_options(tmp_path, epochs=1, num_selection_samples=8, dtype="float32"))
    (tmp_path / "run" / "search.db").write_text("no database")
    ended = launcher.run(["search", str(tmp_path / "run")])
    assert [process.code for process in ended] == [2, 2]
    assert len(lines_of(ended)) == 1
    assert "must hold the trials of nybble search" in lines_of(ended)[0]


def test_compare_started_twice(tmp_path: Path, shared_data: Path, launcher: Launcher) -> None:
    model = save_model(tmp_path / "model", "smollm", max_position_embeddings=512)
    command = [
        "compare", "--pretrained", str(model), "--tasks", "openbookqa", "--data_dir", str(shared_data),
        "--num_train_samples", "48", "--epochs", "1", "--batch_size", "8", "--microbatch_size", "4",
        "--lora_rank_space", "4", "2", "--num_selection_samples", "10", "--limit", "12", "--export", "none",
        "--method", "se", "--report_to", "none", "--num_test_samples", "1", "--num_min_loss_configs", "4",
        "--seq_len", "128", "--fast_eval", "--dtype", "float32",
    ]  # fmt: skip
    ended = launcher.wait(launcher.start([[*command, "--output_dir", str(tmp_path / "runs")]] * 2, apart=True))
    assert [process.code for process in ended] == [0, 0], ended
    assert any("waiting for other processes, which make" in process.out for process in ended)
    assert list(five_columns.read_comparison(tmp_path / "runs").figures["openbookqa"]) == list(five_columns.COLUMNS)
    for name in ("qat-nls", "qat-lora", "lora", "ptwc"):
        path = tmp_path / "runs" / "openbookqa" / name
        assert read_results(path).phase == Phase.FINISHED
        assert sum(f"{path}\n" in process.out for process in ended) == 1, "one process makes a column"
