"""Rank configurations of a tuned run as tables: the candidates, what nybble search found, what --eval_only measured."""

from __future__ import annotations

from nybble.report.labels import ranks_text
from nybble.report.tables import Cells
from nybble.run.results import RunResults, SearchResults, TaskResults

BEHIND_NOTE = "Behind the best: mean difference row by row, and its standard error."
FRONT_NOTE = "Trials of nsga2 that no other trial of nsga2 beats in both score and sum of ranks."
EVAL_ONLY_NOTE = (
    "Each configuration was measured on the test rows by nybble tune --resume --eval_only. "
    "Do not choose by these scores."
)
_RANKS = "rank per decoder layer"


def score_label(task: TaskResults) -> str:
    """The heading of the score that configurations are compared by."""
    return task.scored_by


def score_note(task: TaskResults) -> str:
    """The score that configurations are compared by, in a sentence."""
    if task.scored_by == "share":
        return "Share: probability of the right answer relative to all choices, mean over rows."
    return "Log-likelihood: of the right answer, mean over rows."


def replacement_text(task: TaskResults) -> str:
    """Where the configuration comes from that ships instead of the one that tune chose."""
    return "found by nybble search" if task.replaced_by_search else "given by --custom_rank_config"


def candidate_rows(task: TaskResults) -> Cells:
    """A row per configuration that was compared after training."""
    on_test = task.candidates[0].test is not None
    rows = []
    for candidate in task.candidates:
        chosen = candidate.configuration == task.chosen
        row = [
            candidate.why,
            f"{candidate.score:.4f}",
            "chosen" if chosen else f"{candidate.behind:.4f} +- {candidate.error:.4f}",
            "-" if candidate.accuracy is None else f"{candidate.accuracy:.3f}",
        ]
        rows.append([*row, *([f"{candidate.test:.4f}"] if on_test else []), ranks_text(candidate.configuration)])
    test = ["test"] if on_test else []
    return ["candidate", score_label(task), "behind the best", "accuracy", *test, _RANKS], rows


def candidates_note(results: RunResults, task: TaskResults) -> str:
    """What the candidates were chosen from and by."""
    rows = task.selected_on.replace("_", "-")
    on_16_bit = ", with the adapters on 16-bit weights" if results.tuned_in_16_bit else ""
    return (
        f"The configuration was chosen from the ranks {' '.join(map(str, task.rank_space))} on {rows} rows{on_16_bit}. "
        f"{score_note(task)} {BEHIND_NOTE}"
    )


def search_rows(search: SearchResults) -> Cells:
    """A row per configuration that nybble search compared: tune's choice, what ships, the best of each sampler."""
    compared_on = "rows searched" if search.winners[0].fresh is None else "fresh rows"
    headings = [
        "found by", "rows searched", "fresh rows", f"behind the best ({compared_on})", f"accuracy ({compared_on})",
        "sum of ranks", _RANKS,
    ]  # fmt: skip
    rows = [
        [
            winner.by,
            f"{winner.score:.4f}",
            "-" if winner.fresh is None else f"{winner.fresh:.4f}",
            f"{winner.behind:.4f} +- {winner.error:.4f}",
            "-" if winner.accuracy is None else f"{winner.accuracy:.3f}",
            str(winner.rank_sum),
            ranks_text(winner.configuration),
        ]
        for winner in search.winners
    ]
    return headings, rows


def search_note(results: RunResults, task: TaskResults) -> str:
    """What the scores of a search are."""
    note = f"{score_note(task)} Fresh rows: neither tune nor a search chose by them. {BEHIND_NOTE}"
    if results.tuned_in_16_bit:
        note += " All scores are those of the adapters on 16-bit weights, before compression."
    return note


def front_rows(search: SearchResults) -> Cells:
    """A row per trial of nsga2 on the Pareto front of score and sum of ranks."""
    rows = [[f"{p.score:.4f}", str(p.rank_sum), ranks_text(p.configuration)] for p in search.front]
    return ["rows searched", "sum of ranks", _RANKS], rows


def eval_only_rows(task: TaskResults) -> Cells:
    """A row per configuration that --eval_only measured on the test rows."""
    return [task.metric, _RANKS], [[f"{tested.value:.4f}", ranks_text(tested.configuration)] for tested in task.tested]
