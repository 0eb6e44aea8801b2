"""What a finished run warns of."""

import pytest

from nybble.run.results import Candidate, Metrics, RunResults, TaskResults, Training
from nybble.workflows.judge import judge_distillation, judge_tuning


def tuned(learned: str, compressed: str, shipped: str) -> RunResults:
    """Results of a tune on four test rows; each model is given as the rows it has right, such as 1100."""
    rows = {"16bit": "1100", "tuned16": learned, "compressed": compressed, "tuned": shipped}
    models: dict[str, Metrics] = {
        row: {"task:t acc": right.count("1") / 4, "right:t acc": right} for row, right in rows.items()
    }
    return RunResults(command="tune", models=models, task=TaskResults("t", "acc", [4, 2], "choices", "share", 64))


def test_a_tuning_that_helped_warns_of_nothing() -> None:
    assert judge_tuning(tuned("1110", "1100", "1101")) == []


def test_what_tuning_made_worse_is_reported_with_its_error() -> None:
    (adapters,) = judge_tuning(tuned("0010", "1000", "1000"))
    rows = "0.5000 before, 0.2500 after (row by row -0.2500 +- 0.4787)"
    assert adapters == f"the adapters made t acc on the test rows worse: {rows}"
    (scales,) = judge_tuning(tuned("1111", "1111", "1110"))
    rows = "1.0000 before, 0.7500 after (row by row -0.2500 +- 0.2500)"
    assert scales == f"training in 4 bits made t acc on the test rows worse: {rows}"


def test_trainings_whose_start_was_kept_are_reported() -> None:
    results = tuned("1100", "1100", "1100")
    results.trainings = [Training("", [], [], 0), Training("scales", [], [], 0)]
    first, second = judge_tuning(results)
    assert first.startswith("no epoch of the training was better on held-out rows")
    assert second.startswith("no epoch of the training in 4 bits was better on held-out rows")


def test_ranks_chosen_on_test_rows_are_reported() -> None:
    results = tuned("1100", "1100", "1100")
    assert results.task is not None
    results.task.selected_on = "test"
    results.task.candidates = [Candidate("median", [2], 0.5, None, None, 0.0, 0.0) for _ in range(2)]
    (warning,) = judge_tuning(results)
    assert warning.startswith("the ranks were chosen on the test rows")


def distilled(kl: float, best_step: int = 4) -> RunResults:
    models: dict[str, Metrics] = {
        "16bit": {"kl_to_teacher": 0.0, "token_perplexity": 10.0},
        "compressed": {"kl_to_teacher": 0.2, "token_perplexity": 12.0},
        "tuned": {"kl_to_teacher": kl, "token_perplexity": 11.0},
    }
    return RunResults(command="distill", models=models, trainings=[Training("", [], [], best_step)])


def test_distillation_says_what_it_recovered() -> None:
    results = distilled(0.05)
    assert judge_distillation(results) == []
    assert results.improvement["tuned"] == pytest.approx(0.5), "of the loss of perplexity"


def test_a_runtime_is_no_harm_that_training_did() -> None:
    results = distilled(0.1)
    results.exports["toy"], results.models["toy"] = {}, results.models["tuned"] | {"kl_to_teacher": 0.3}
    assert judge_distillation(results) == []


def test_distillation_that_did_harm_or_nothing_is_reported() -> None:
    useless, harmful = judge_distillation(distilled(0.3, best_step=0))
    assert useless.startswith("no step of the training was better on the validation text")
    assert "0.2000 before training, 0.3000 after" in harmful
