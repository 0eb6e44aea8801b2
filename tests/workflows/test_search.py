"""search on a run of tune: it continues, compares with random draws, and --apply survives an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.errors import RunError
from nybble.options.commands import SearchOptions
from nybble.run.results import Phase, read_results
from nybble.workflows import quantize_tuned
from nybble.workflows import tune as tune_module
from nybble.workflows.search import search
from nybble.workflows.tune import tune
from tests.helpers.distill import interrupt_after, shipped_bytes
from tests.helpers.tune import task_of, tune_options, write_letters

optuna = pytest.importorskip("optuna", reason="the extra search")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    write_letters(folder / "letters.jsonl", 120)  # 12 held out
    tune(tune_options(folder, epochs=1, num_selection_samples=8))
    return folder / "run"


def searched(run: Path, **options: Any) -> None:
    search(SearchOptions.of(run=str(run), **{"sampler": "random", "num_trials": 3} | options))


def choose_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """tune proposes the smallest ranks alone, so that there is something better to be found."""
    monkeypatch.setattr(tune_module, "propose_candidates", lambda *given: {(1, 1): "the smallest"})


def test_a_search_continues_and_compares(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched(trained, sampler="tpe", random_baseline=False)
    searched(trained, sampler="tpe", num_trials=5)
    task = task_of(trained)
    assert task.search is not None
    assert task.search.trials == 5
    assert [winner.by for winner in task.search.winners] == ["heuristics (tune)", "tpe", "random"]
    assert task.search.winners[0].configuration == task.configuration
    assert all(winner.fresh is not None for winner in task.search.winners)
    scores = {winner.by: winner.score for winner in task.search.winners}
    assert scores["tpe"] >= scores["heuristics (tune)"], "tune's candidates are the first trials"
    assert "Best on 4 fresh rows" in capsys.readouterr().out
    assert "tpe" in (trained / "report.md").read_text()


@pytest.mark.slow
def test_nsga2_reports_a_front(trained: Path) -> None:
    searched(trained, sampler="nsga2", num_trials=4)
    task = task_of(trained)
    assert task.search is not None
    assert task.search.front
    assert task.search.front[0].score == max(point.score for point in task.search.front)


def test_the_winner_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    changes = {"epochs": 1, "method": "se", "lora_rank_space": (8, 1)}
    with monkeypatch.context() as patch:
        choose_the_smallest(patch)
        tune(tune_options(tmp_path, **changes, export=("hf",)))
    (run / "hf" / "notes.txt").write_text("mine")
    before, first = shipped_bytes(run), read_results(run)
    searched(run, num_trials=8, apply=True)
    results, task = read_results(run), task_of(run)
    assert task.search is not None
    best = max(task.search.winners, key=lambda winner: winner.score)
    assert task.configuration == best.configuration != [1, 1]
    assert task.chosen == [1, 1], "tune's own choice stays on record"
    assert task.replaced_by_search
    assert results.phase == Phase.FINISHED
    assert shipped_bytes(run) != before
    assert (run / "hf" / "notes.txt").read_text() == "mine"
    assert results.models["tuned"]["kl_to_teacher"] > 0.3 * first.models["tuned"]["kl_to_teacher"]
    searched(run, num_trials=1, sampler="tpe", apply=True)
    in_place = task_of(run)
    assert in_place.search is not None
    assert "in place" in [winner.by for winner in in_place.search.winners]
    tune(tune_options(tmp_path, resume=True, eval_only=True, **changes))
    assert task_of(run).tested[-1].configuration == in_place.configuration


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["training", "discarding", "merging", "saving"])
def test_killed_on_the_way_it_ends_as_a_run_that_was_given_these_ranks(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {
        "epochs": 1, "scale_epochs": 2, "method": "se", "lora_rank_space": (8, 1), "quantize": "after",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        choose_the_smallest(patch)
        tune(tune_options(tmp_path, **changes))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_in == "training":
            interrupt_after(3, patch)
        else:
            name = {"discarding": "checkpoint_names", "merging": "merge_adapters", "saving": "save_quantized"}
            patch.setattr(quantize_tuned, name[killed_in], killed)
        with pytest.raises(KeyboardInterrupt):
            searched(run, num_trials=8, apply=True)
    assert not (run / "quantized").exists()
    assert not read_results(run).phase.reached(Phase.QUANTIZED)
    searched(run, num_trials=8, apply=True)  # the same command continues
    task = task_of(run)
    assert task.configuration != task.chosen
    given = {"output_dir": str(tmp_path / "given"), "custom_rank_config": tuple(task.configuration or ())}
    tune(tune_options(tmp_path, **changes | given))
    assert shipped_bytes(run) == shipped_bytes(tmp_path / "given")
    assert read_results(run).models == read_results(tmp_path / "given").models
    assert not (run / "compress").exists()


@pytest.mark.slow
def test_an_interrupted_replacement_is_finished_by_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, changes = tmp_path / "run", {"epochs": 1, "lora_rank_space": (8, 1)}
    with monkeypatch.context() as patch:
        choose_the_smallest(patch)
        tune(tune_options(tmp_path, **changes))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_tuned, "save_quantized", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        searched(run, num_trials=8, apply=True)
    tune(tune_options(tmp_path, resume=True, **changes))
    results, task = read_results(run), task_of(run)
    assert results.phase == Phase.FINISHED
    assert task.configuration != [1, 1]
    assert task.replaced_by_search


@pytest.mark.slow
def test_ranks_that_were_replaced_can_still_be_measured(tmp_path: Path) -> None:
    run, changes = tmp_path / "run", {"epochs": 1, "lora_rank_space": (8, 1), "custom_rank_config": (8, 1)}
    tune(tune_options(tmp_path, **changes))
    command = ["tune", "--output_dir", str(run), "--resume", "--eval_only"]
    assert main([*command, "--custom_rank_config", "1", "1"]) == 0
    assert main(command) == 0
    assert [tested.configuration for tested in task_of(run).tested] == [[1, 1], [8, 1]]


def test_refusals(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(tmp_path)]) == 2
    assert "must be a run folder; it has no nybble-run.json" in capsys.readouterr().err
    assert main(["search", str(trained), "--seed", "-1"]) == 2
    assert "--seed must be from 0 to 2^32 - 1" in capsys.readouterr().err
    assert main(["search", str(trained), "--num_trials", "0"]) == 2
    assert "--num_trials must be at least 1" in capsys.readouterr().err
    tune(tune_options(tmp_path, epochs=1, lora_rank_space=(4,)))
    with pytest.raises(RunError, match="has the single rank 4; there is nothing to search"):
        searched(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    saved["task"]["configuration"] = None  # as it is before the end of training
    (tmp_path / "run" / "results.json").write_text(json.dumps(saved))
    with pytest.raises(RunError, match="must be a finished run of nybble tune"):
        searched(tmp_path / "run")
