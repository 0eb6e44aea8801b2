"""Searching ranks: it goes on where it stopped, is compared with random draws, and judges on rows that it did not search on."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.errors import RunError
from nybble.options.commands import SearchOptions
from nybble.report.run import ranks_written
from nybble.run import resume
from nybble.tasks.scoring import QuestionScores
from nybble.workflows import lessons
from nybble.workflows import search as searching
from nybble.workflows.search import search
from nybble.workflows.tune import Trained, put_in_place, reopened, tune

from .test_families import interrupt_after
from .test_tune import codes, options, results, write_task
from .tiny import save_model

optuna = pytest.importorskip("optuna", reason="the extra search")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    write_task(folder / "letters.jsonl", 120)  # 12 held out
    tune(options(folder, epochs=3, select_rows=8))
    return folder / "run"


def study(run: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{run / 'search.db'}")


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "hill"])
def test_search_goes_on_and_compares(sampler: str, trained: Path) -> None:
    search(SearchOptions(run=str(trained), sampler=sampler, trials=3, random_draws=False))
    search(SearchOptions(run=str(trained), sampler=sampler, trials=7))
    trials = study(trained, f"{sampler}-0").trials
    assert len(trials) == 7 or sampler == "hill"  # which stops where every neighbour was tried
    assert len(trials) > 3
    assert len(study(trained, "random-0").trials) == 7
    found = results(trained)["search"]["winners"]
    assert [row["by"] for row in found] == ["heuristics (tune)", sampler, "random"]
    assert found[0]["configuration"] == results(trained)["configuration"]
    scores = {row["by"]: row["score"] for row in found}
    assert scores[sampler] >= scores["heuristics (tune)"], (
        "the heuristics' candidates are the first trials of every search"
    )
    assert all(row["fresh"] is not None for row in found)
    assert min(row["behind"] for row in found) == 0
    assert all(rank in (8, 4, 2) for row in found for rank in row["configuration"])

    written = (trained / "report.md").read_text()
    assert all(ranks_written(row["configuration"]) in written.split("## Search")[1] for row in found)

    assert main(["report", str(trained), "--out", str(trained / "page.html")]) == 0
    assert all(
        ranks_written(row["configuration"]) in (trained / "page.html").read_text().split("Search for ranks")[1]
        for row in found
    )

    front = results(trained)["search"]["front"]
    if sampler != "nsga2":
        assert front == []
        return
    scored = {tuple(int(trial.params[f"layer{i}"]) for i in range(2)): trial.values for trial in trials}
    beaten = {a for a, (p, n) in scored.items() for q, m in scored.values() if q >= p and m <= n and (q, m) != (p, n)}
    assert {tuple(row["configuration"]): [row["score"], row["rank_sum"]] for row in front} == {
        a: scored[a] for a in scored.keys() - beaten
    }
    shown = [
        written.split("Not beaten by another trial")[1],
        (trained / "page.html").read_text().split("Score against ranks")[1],
    ]
    assert all(ranks_written(row["configuration"]) in text for row in front for text in shown)
    assert front[0]["score"] == max(row["score"] for row in front) == scores[sampler]


def test_as_many_trials_of_each_are_compared(trained: Path) -> None:
    search(SearchOptions(run=str(trained), sampler="tpe", trials=6, random_draws=False, seed=11))
    search(SearchOptions(run=str(trained), sampler="tpe", trials=2, seed=11))
    assert len(study(trained, "random-11").trials) == 6, "as many as the search has had"
    assert results(trained)["search"]["trials"] == 6
    assert "The first 6 trials of each sampler." in (trained / "report.md").read_text()
    search(SearchOptions(run=str(trained), sampler="random", trials=9, seed=12))
    search(SearchOptions(run=str(trained), sampler="tpe", trials=4, seed=12))
    found = {row["by"]: row["score"] for row in results(trained)["search"]["winners"]}
    first = [
        trial.values[0]
        for trial in study(trained, "random-12").trials[:4]
        if trial.state == optuna.trial.TrialState.COMPLETE
    ]
    assert found["random"] == pytest.approx(max(first))


def test_an_interrupted_trial_is_tried_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(searching, "_score_unless_hopeless", interrupted)
        search(SearchOptions(run=str(trained), sampler="hill", trials=7, seed=13))
    search(SearchOptions(run=str(trained), sampler="hill", trials=7, seed=13, random_draws=False))
    trials = study(trained, "hill-13").trials
    assert [trial.state for trial in trials[:2]] == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE]
    done = [tuple(trial.params.values()) for trial in trials[1:]]
    assert {tuple(row["configuration"]) for row in results(trained)["candidates"]} <= set(done), (
        "tune's candidates, that one too"
    )
    assert len(done) == len(set(done))


def test_what_is_in_place_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(options(tmp_path, epochs=1, lora_rank_space=(8, 1), select_on="test"))
    chosen = results(tmp_path / "run")["configuration"]
    monkeypatch.setattr(
        searching,
        "_best",
        lambda study, count=None: SimpleNamespace(
            params={f"layer{i}": rank for i, rank in enumerate(chosen)}, values=[0.0]
        ),
    )
    monkeypatch.setattr(searching.tune, "put_in_place", lambda *_: pytest.fail("made again"))
    for apply in (True, False):
        search(SearchOptions(run=str(tmp_path / "run"), sampler="random", trials=1, apply=apply))
        said = capsys.readouterr().out
        assert "It is in place." in said
        assert "--apply ships it" not in said
    assert "chosen on the test rows" in results(tmp_path / "run")["warnings"][0]


def test_hill_climbing_moves_one_layer_by_one_place(trained: Path) -> None:
    search(SearchOptions(run=str(trained), sampler="hill", trials=12, random_draws=False, seed=5))
    trials = study(trained, "hill-5").trials
    space, first = [8, 4, 2], len({tuple(row["configuration"]) for row in results(trained)["candidates"]})
    best: dict[str, Any] = {}
    for trial in trials:
        if trial.number >= first:
            moved = [name for name in trial.params if trial.params[name] != best["params"][name]]
            assert len(moved) == 1
            assert abs(space.index(trial.params[moved[0]]) - space.index(best["params"][moved[0]])) == 1
        if trial.state == optuna.trial.TrialState.COMPLETE and (not best or trial.values[0] > best["value"]):
            best = {"params": trial.params, "value": trial.values[0]}


def test_no_row_is_scored_twice_for_a_configuration(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_mask, original = Counter[tuple[Any, ...]](), Trained.score

    def score(self: Trained, configuration: Any, rows: Any) -> Any:
        loss_mask.update((configuration, id(row)) for row in rows)
        return original(self, configuration, rows)

    monkeypatch.setattr(Trained, "score", score)
    monkeypatch.setattr(searching, "_compare", lambda trained, winners: [])
    with pytest.raises(IndexError):  # nothing is compared here
        search(SearchOptions(run=str(trained), sampler="hill", trials=20, random_draws=False, seed=7))
    assert set(loss_mask.values()) == {1}
    tried = [tuple(trial.params.values()) for trial in study(trained, "hill-7").trials]
    assert len(tried) == len(set(tried)) <= 9, "of 3 x 3 configurations each once at most"


@pytest.mark.parametrize("rising", [True, False])
def test_what_is_worse_than_most_is_given_up_on_a_quarter_of_the_rows(rising: bool, tmp_path: Path) -> None:
    loss_mask: dict[Any, int] = {}

    def score(configuration: Any, rows: Any) -> QuestionScores:
        loss_mask[configuration] = loss_mask.get(configuration, 0) + len(rows)
        place = list(loss_mask).index(configuration)
        return QuestionScores((float(place if rising else -place),) * len(rows), ())

    trained: Any = SimpleNamespace(lesson=SimpleNamespace(space=(8, 4, 2), count=2, held_out=range(8)), score=score)
    known = [(8, 8), (4, 4)]
    found = searching._run_study(trained, SearchOptions(run=str(tmp_path), trials=4), tmp_path, "hill", 4, known)
    assert list(loss_mask)[:2] == known
    rows = list(loss_mask.values())
    assert rows[:2] == [8, 8], "what tune had compared is never given up"
    assert rows[2:] == ([8, 8] if rising else [2, 2])
    states = {8: optuna.trial.TrialState.COMPLETE, 2: optuna.trial.TrialState.PRUNED}
    assert [trial.state for trial in found.trials] == [states[count] for count in rows]


def test_winners_are_judged_on_rows_that_nothing_was_chosen_by(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[Any], QuestionScores]] = []
    original = Trained.score

    def score(self: Trained, configuration: Any, rows: Any) -> QuestionScores:
        calls.append(([*rows], original(self, configuration, rows)))
        return calls[-1][1]

    monkeypatch.setattr(Trained, "score", score)
    search(SearchOptions(run=str(trained), sampler="random", trials=1, seed=11))
    *searched, by_tune, by_search = calls
    chosen_by, fresh = ({id(row) for rows, _ in part for row in rows} for part in (searched, [by_tune, by_search]))
    assert (len(chosen_by), len(fresh)) == (8, 4)
    assert not chosen_by & fresh
    assert [row["fresh"] for row in results(trained)["search"]["winners"]] == [
        found.score for _, found in (by_tune, by_search)
    ]


def test_the_winner_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "letters.jsonl", 120)
    with monkeypatch.context() as patch:
        patch.setattr(
            "nybble.workflows.tune.candidates", lambda job, lesson: {(1, 1): "the smallest"}
        )  # so that there is something better to be found
        tune(options(tmp_path, epochs=1, start="se", lora_rank_space=(8, 1)))
    before = codes(tmp_path / "run")
    results_ = results(tmp_path / "run")
    search(SearchOptions(run=str(tmp_path / "run"), sampler="random", trials=8, apply=True))
    found = results(tmp_path / "run")
    best = max(
        found["search"]["winners"], key=lambda row: row["score"]
    )  # all held-out rows were searched: none are fresh
    assert found["configuration"] == best["configuration"] != results_["configuration"]
    assert codes(tmp_path / "run") != before
    kl = found["models"]["tuned"]["kl_to_teacher"]
    assert kl > 0.3 * results_["models"]["tuned"]["kl_to_teacher"], "compared with the 16-bit model, not with itself"
    assert found["models"]["tuned"]["task:letters acc"] is not None
    assert found["chosen"] == results_["configuration"], "tune's own choice stays on record"
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"In place: {ranks_written(best['configuration'])}, found by nybble search" in report
    with monkeypatch.context() as patch:  # a search that finds less does not replace it
        patch.setattr(
            "nybble.workflows.search._best",
            lambda study, count=None: SimpleNamespace(params={"layer0": 1, "layer1": 1}, values=[0.0]),
        )
        search(SearchOptions(run=str(tmp_path / "run"), sampler="tpe", trials=1, apply=True))
    assert "in place" in [row["by"] for row in results(tmp_path / "run")["search"]["winners"]]
    assert results(tmp_path / "run")["configuration"] == best["configuration"]
    tune(options(tmp_path, epochs=1, start="se", lora_rank_space=(8, 1), resume=True, eval_only=True))
    assert results(tmp_path / "run")["tested"][-1]["configuration"] == best["configuration"]


@pytest.mark.parametrize("killed_in", ["discarding", "merging", "training", "saving"])
def test_a_winner_that_learnt_before_there_were_4_bits_is_put_in_place(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on the way, it ends as a run that was given these ranks."""
    write_task(tmp_path / "letters.jsonl", 120)
    changes: dict[str, Any] = {
        "epochs": 1,
        "scale_epochs": 2,
        "start": "se",
        "lora_rank_space": (8, 1),
        "adapters": "before",
    }
    with monkeypatch.context() as patch:
        patch.setattr("nybble.workflows.tune.candidates", lambda job, lesson: {(1, 1): "the smallest"})
        tune(options(tmp_path, **changes))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed_in == "discarding":
            patch.setattr(
                "nybble.workflows.tuning.checkpoints",
                lambda part="": killed() if part else ("last.safetensors", "best.safetensors"),
            )
        elif killed_in == "training":
            interrupt_after(3, patch)
        else:
            patch.setattr(
                {"merging": "nybble.qat.absorb.merge", "saving": "nybble.models.quantized_model.save_quantized"}[
                    killed_in
                ],
                killed,
            )
        with pytest.raises(KeyboardInterrupt):
            search(SearchOptions(run=str(tmp_path / "run"), sampler="random", trials=8, apply=True))
    assert not (tmp_path / "run" / "quantized").exists()
    if killed_in == "saving":
        with pytest.raises(RunError, match="must be a finished run of nybble tune"):
            search(SearchOptions(run=str(tmp_path / "run"), sampler="random", trials=8, apply=True))
    tune(options(tmp_path, resume=True, **changes))
    found = results(tmp_path / "run")
    assert found["configuration"] == found["applied"] != found["chosen"]
    tune(
        options(
            tmp_path, **changes | {"output_dir": str(tmp_path / "given"), "custom_rank_config": tuple(found["applied"])}
        )
    )
    assert codes(tmp_path / "run") == codes(tmp_path / "given")
    assert found["models"] == results(tmp_path / "given")["models"]
    assert not (tmp_path / "run" / "compress").exists()


def test_a_winner_in_place_leaves_no_blocks_and_no_seconds_of_what_it_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "epochs": 1,
        "start": "se",
        "lora_rank_space": (8, 1),
        "adapters": "before",
        "custom_rank_config": (8, 1),
    }
    tune(options(tmp_path, **given))
    saved = results(tmp_path / "run")
    saved["seconds"] |= {"compress": 1000.0, "train scales": 1000.0, "absorb": 1000.0}
    (tmp_path / "run" / "results.json").write_text(json.dumps(saved))
    with reopened(options(tmp_path, **given, resume=True)) as trained:
        put_in_place(trained, (1, 1))
    assert not (tmp_path / "run" / "compress").exists()
    found = results(tmp_path / "run")["seconds"]
    assert found["train"] == saved["seconds"]["train"]
    assert 0 < max(found[stage] for stage in ("compress", "train scales", "absorb")) < 1000


def test_a_winner_that_was_not_put_in_place_yet_still_has_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"epochs": 1, "lora_rank_space": (8, 1), "adapters": "before", "custom_rank_config": (8, 1)}
    given |= {"teacher": str(save_model(tmp_path / "teacher", "smollm", seed=1)), "resume": True}
    tune(options(tmp_path, **given))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nybble.workflows.tune._discard_4_bits", lambda job: (_ for _ in ()).throw(KeyboardInterrupt()))
        with reopened(options(tmp_path, **given)) as trained:
            put_in_place(trained, (1, 1))
    assert (tmp_path / "run" / "quantized").exists()
    seen = []
    original = lessons.prepare
    monkeypatch.setattr(lessons, "prepare", lambda *known: seen.append(original(*known)) or seen[-1])
    tune(options(tmp_path, **given))
    assert results(tmp_path / "run")["configuration"] == [1, 1]
    tune(options(tmp_path, **given))
    assert [lesson.teacher is not None for lesson in seen] == [True, False], (
        "and none where nothing is left to be learnt"
    )


def test_ranks_that_were_replaced_can_still_be_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"epochs": 1, "lora_rank_space": (8, 1), "custom_rank_config": (8, 1)}
    tune(options(tmp_path, **given))
    with reopened(options(tmp_path, **given, resume=True)) as trained:
        put_in_place(trained, (1, 1))
    command = [
        "tune",
        "--pretrained",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "run"),
        "--task",
        str(tmp_path / "letters.jsonl"),
        "--resume",
    ]
    assert main([*command, "--eval_only"]) == 0
    assert main([*command, "--eval_only", "--custom_rank_config", "8", "1"]) == 0
    assert [tested["configuration"] for tested in results(tmp_path / "run")["tested"]] == [[1, 1], [8, 1]]
    assert resume.read_options(tmp_path / "run")["custom_rank_config"] == [8, 1]


def test_exports_by_hand_are_made_again_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(options(tmp_path, epochs=1, lora_rank_space=(8, 1)))
    saved = results(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps(saved | {"exports": {"openvino": {}}}))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nybble.workflows.tune._save", killed)
        with reopened(options(tmp_path, epochs=1, lora_rank_space=(8, 1), resume=True)) as trained:
            put_in_place(trained, (1, 1))
    made: list[str] = []
    monkeypatch.setattr("nybble.workflows.stages.export_run", lambda run, kind, *_: made.append(kind) or killed())
    with pytest.raises(KeyboardInterrupt):
        tune(options(tmp_path, epochs=1, lora_rank_space=(8, 1), resume=True))
    assert made == ["openvino"]


def test_a_run_without_a_choice_is_told(tmp_path: Path) -> None:
    tune(options(tmp_path, epochs=1, custom_rank_config=(8, 2)))
    search(SearchOptions(run=str(tmp_path / "run"), sampler="hill", trials=3, random_draws=False))
    assert results(tmp_path / "run")["search"]["winners"][0]["configuration"] == [8, 2]
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    del saved["configuration"]  # as it is before the end of training
    (tmp_path / "run" / "results.json").write_text(json.dumps(saved))
    with pytest.raises(RunError, match="must be a finished run of nybble tune"):
        search(SearchOptions(run=str(tmp_path / "run")))


def test_sampled_configurations_differ_between_sittings(trained: Path) -> None:
    search(SearchOptions(run=str(trained), sampler="random", trials=4, seed=9))
    search(SearchOptions(run=str(trained), sampler="random", trials=8, seed=9))
    drawn = [tuple(trial.params.values()) for trial in study(trained, "random-9").trials]
    assert drawn[:4] != drawn[4:]
    search(SearchOptions(run=str(trained), sampler="tpe", trials=4, seed=2**32 - 1, random_draws=False))
    search(
        SearchOptions(run=str(trained), sampler="tpe", trials=5, seed=2**32 - 1, random_draws=False)
    )  # numpy knows no larger seeds


def test_refusals(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(tmp_path)]) == 2
    assert "must be a finished run of nybble tune; it is none" in capsys.readouterr().err
    assert main(["search", str(trained), "--seed", "-1"]) == 2
    assert "--seed must be from 0 to 2^32 - 1" in capsys.readouterr().err
    assert main(["search", str(trained), "--trials", "0"]) == 2
    assert "--trials must be at least 1" in capsys.readouterr().err
    tune(options(tmp_path, epochs=1, lora_rank_space=(4,)))
    with pytest.raises(RunError, match="has the single rank 4; there is nothing to search"):
        search(SearchOptions(run=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "results.json").read_text()).get("search") is None


def test_a_run_that_was_scored_otherwise_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "old")
    found = results(tmp_path / "old")
    del found["task"]["scored_by"]
    (tmp_path / "old" / "results.json").write_text(json.dumps(found))
    assert main(["search", str(tmp_path / "old")]) == 2
    assert "must be a run of this version of nybble tune" in capsys.readouterr().err
