"""Tables of rank configurations."""

from nybble.report.ranks import (
    candidate_rows,
    candidates_note,
    eval_only_rows,
    front_rows,
    replacement_text,
    score_label,
    score_note,
    search_note,
    search_rows,
)
from tests.helpers.runs import candidate, distilled, measured, measured_ranks, searched, task_results


def test_candidates_and_their_distance_to_the_best() -> None:
    candidates = [
        candidate("median", [4, 4], behind=0.01, error=0.002),
        candidate("largest", [8, 8], accuracy=None),
    ]
    task = task_results(candidates=candidates, chosen=[8, 8])
    assert candidate_rows(task) == (
        ["candidate", "share", "behind the best", "accuracy", "rank per decoder layer"],
        [
            ["median", "0.3000", "0.0100 +- 0.0020", "0.500", "4 everywhere"],
            ["largest", "0.3000", "chosen", "-", "8 everywhere"],
        ],
    )


def test_scores_on_test_rows_have_a_column() -> None:
    headings, rows = candidate_rows(task_results(candidates=[candidate("a", [8, 4], test=0.7)], chosen=[4, 4]))
    assert headings[4] == "test"
    assert rows[0][4:] == ["0.7000", "8 4"]


def test_the_note_says_which_rows_and_weights_candidates_were_chosen_on() -> None:
    task = task_results()
    note = candidates_note(distilled(), task)
    assert note.startswith("The configuration was chosen from the ranks 8 4 on held-out rows. Share: ")
    assert "on held-out rows, with the adapters on 16-bit weights." in candidates_note(
        measured(distilled(), tuned16={}), task
    )


def test_the_score_is_named() -> None:
    share, likelihood = task_results(), task_results(scored_by="log-likelihood")
    assert (score_label(share), score_label(likelihood)) == ("share", "log-likelihood")
    assert score_note(share).startswith("Share: probability")
    assert score_note(likelihood).startswith("Log-likelihood: ")


def test_rows_of_a_search() -> None:
    headings, rows = search_rows(searched())
    assert headings[3:5] == ["behind the best (fresh rows)", "accuracy (fresh rows)"]
    assert rows[0] == ["heuristics", "0.3000", "0.2500", "0.0200 +- 0.0100", "-", "8", "4 everywhere"]
    assert rows[1][4] == "0.500"
    search = searched()
    search.winners[0].fresh = None
    headings, rows = search_rows(search)
    assert headings[3] == "behind the best (rows searched)"
    assert rows[0][2] == "-"


def test_the_note_of_a_search_says_which_weights_its_scores_are_of() -> None:
    assert "16-bit weights" not in search_note(distilled(), task_results())
    note = search_note(measured(distilled(), tuned16={}), task_results())
    assert note.endswith("All scores are those of the adapters on 16-bit weights, before compression.")


def test_rows_of_the_front() -> None:
    assert front_rows(searched())[1] == [["0.3500", "12", "8 4"], ["0.3000", "8", "4 everywhere"]]


def test_rows_of_tested_configurations() -> None:
    task = task_results(tested=[measured_ranks([2, 2], 0.625)])
    assert eval_only_rows(task) == (["acc", "rank per decoder layer"], [["0.6250", "2 everywhere"]])


def test_the_origin_of_a_replacement() -> None:
    assert replacement_text(task_results(replaced_by_search=True)) == "found by nybble search"
    assert replacement_text(task_results()) == "given by --custom_rank_config"
