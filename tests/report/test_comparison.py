"""Runs side by side: what is compared with what, and the names of models."""

import pytest

from nybble.options.commands import CompressOptions, DistillOptions, TuneOptions
from nybble.report.comparison import (
    NO_RECIPE,
    Comparison,
    compare_runs,
    comparison_markdown,
    comparison_note,
    comparison_rows,
)
from nybble.report.published import published_rows
from nybble.run.results import LayerCounts, RunResults
from tests.helpers.runs import compressed, distilled, measured, metrics, task_results, tuned


def one(runs: dict[str, RunResults]) -> Comparison:
    (comparison,) = compare_runs(runs, {})
    return comparison


def labels(comparison: Comparison) -> list[str]:
    return [entry.label for entry in comparison.entries]


def test_models_are_compared_with_the_best_compression_without_training() -> None:
    blockwise = compressed(method="awq+blockwise", models={"compressed": metrics(11.5, 0.2, 1)})
    comparison = one({"distilled": distilled(), "awq": compressed(), "blockwise": blockwise})
    assert labels(comparison) == [
        "16-bit", "INT4, rtn, before training", "INT4, rtn, distilled", "INT4, rtn, distilled (Toy)", "INT4, awq+se",
        "INT4, awq+blockwise",
    ]  # fmt: skip
    assert comparison.baselines["INT4"].label == "INT4, awq+se", "nor rtn, which is worse, nor block-wise"
    headings, rows = comparison_rows(comparison)
    assert headings[-1] == "recovered"
    assert [row[-1] for row in rows] == ["-", "-", "60%", "20%", "-", "40%"], "of 12.5 - 10.0"


def test_exports_ship_in_the_place_of_their_model() -> None:
    results = distilled()
    results.models["second"] = metrics(11.5, 0.2, 1)
    shipped = [entry.label for entry in one({"run": results}).shipped]
    assert shipped == ["INT4, rtn, before training", "INT4, rtn, distilled (Toy)", "INT4, rtn, distilled (second)"]


def test_another_text_or_model_is_another_comparison() -> None:
    runs = {"one": distilled(), "two": distilled(test_data="other"), "three": distilled(model="Large")}
    found = compare_runs(runs, {})
    assert [(comparison.model, list(comparison.runs)) for comparison in found] == [
        ("Small", ["one"]),
        ("Small", ["two"]),
        ("Large", ["three"]),
    ]
    assert "were measured on other." in found[1].measured_on


def test_scores_of_a_few_documents_are_not_compared_with_those_of_all() -> None:
    few = distilled(limit=2)
    few.models["tuned"]["task:arc_easy acc"] = 0.5
    whole, part = compare_runs({"all": distilled(), "few": few}, {})
    assert (list(whole.runs), list(part.runs)) == (["all"], ["few"])
    assert "on the first 2 documents only (--limit)." in comparison_note(part)
    assert "documents" not in comparison_note(whole)


def test_16_bit_models_that_score_differently_are_not_compared() -> None:
    close, far, fewer = (
        measured(distilled(), full=values)
        for values in ({"token_perplexity": 10.05}, {"token_perplexity": 12.0}, {"tokens": 7})
    )
    comparisons = compare_runs({"a": distilled(), "close": close, "far": far, "fewer": fewer}, {})
    assert [list(comparison.runs) for comparison in comparisons] == [["a", "close"], ["far"], ["fewer"]]


def test_a_run_that_measured_nothing_has_no_comparison() -> None:
    assert compare_runs({"new": compressed(models={})}, {}) == []


def test_equal_labels_are_told_apart_by_the_run() -> None:
    assert labels(one({"one": compressed(), "two": compressed()})) == [
        "16-bit",
        "INT4, awq+se, one",
        "INT4, awq+se, two",
    ]


def test_models_are_compared_with_those_of_as_many_bits() -> None:
    wide = LayerCounts(7, 1, True, precision="INT8")
    narrow = LayerCounts(7, 1, True, precision="INT3")
    eight = compressed(layers=wide, models={"compressed": metrics(10.1, 0.01, 1)})
    comparison = one({"eight": eight, "three": distilled(layers=narrow)})
    assert {precision: entry.run for precision, entry in comparison.baselines.items()} == {
        "INT8": "eight", "INT3": "three",
    }  # fmt: skip
    assert comparison.recovered_share(comparison.entries[-1]) == pytest.approx(0.5)
    assert [row[1] for row in published_rows([comparison])[1]] == [
        "16-bit", "INT8, best PTWC (awq+se)", "INT3, best PTWC (rtn)", "INT3, QAT + LoRA", "",
    ]  # fmt: skip


def test_a_start_that_was_trained_before_is_no_baseline() -> None:
    second = measured(distilled(init_from="runs/first", init_trained=True), compressed={"token_perplexity": 11.0})
    both = one({"first": distilled(), "second": second})
    baseline = both.baselines["INT4"]
    assert (baseline.run, both.value(baseline)) == ("first", 14.0)
    assert "INT4, rtn from runs/first, trained before this run" in labels(both)
    assert not one({"second": second}).baselines
    named = one({"third": distilled(init_from="runs/no-blockwise")})
    assert named.baselines, "the name of a folder does not say how it was compressed"


def test_the_labels_of_a_model_that_was_tuned_in_16_bit_first() -> None:
    scores = {"16bit": 0.5, "tuned16": 0.8, "compressed": 0.6, "tuned": 0.7, "toy": 0.75}
    comparison = one({"one": tuned(scores, task_results(name="rows/arc.jsonl", metric="acc"), method="se")})
    assert labels(comparison) == [
        "16-bit", "16-bit, tuned on arc", "INT4, tuned on arc, then se", "INT4, tuned on arc, then se, scales trained",
        "INT4, tuned on arc, then se, scales trained (Toy)",
    ]  # fmt: skip
    assert [entry.row for entry in comparison.shipped] == ["toy"]
    assert comparison.untrained == []


def test_tasks_are_compared_by_their_score() -> None:
    scores = {"16bit": 0.5, "compressed": 0.4, "tuned": 0.6}
    comparison = one({"low": tuned(scores), "high": tuned(scores | {"tuned": 0.65})})
    assert comparison.metric == "task:arc acc"
    assert "recovered" not in comparison_rows(comparison)[0]
    assert "Recovered" not in comparison_note(comparison)
    assert comparison.recovered_share(comparison.baselines["INT4"]) is None
    better = one({"run": tuned(scores | {"compressed": 0.7})})
    assert [better.recovered_share(entry) for entry in better.entries] == [None] * 3, "scores have no damage to recover"


def test_perplexities_are_compared_by_words_where_all_models_have_them() -> None:
    assert one({"a": distilled()}).metric == "token_perplexity"
    words = {row: {"word_perplexity": 30.0} for row in ("full", "compressed", "tuned", "toy")}
    assert one({"a": measured(distilled(), **words)}).metric == "word_perplexity"


def test_runs_that_differ_in_speed_or_place_share_a_recipe() -> None:
    def recipe(**options: object) -> str:
        return compare_runs({"run": distilled()}, {"run": {"lr": 1e-3} | options})[0].entries[1].recipe

    same = recipe(seed=1, output_dir="runs/1", microbatch_size=2, weight_cache="recompute", save_steps=1, method="auto")
    assert same == recipe()
    assert recipe(lr=1e-2) != recipe()
    assert compare_runs({"run": distilled()}, {})[0].entries[1].recipe == "run", "options are not known"


@pytest.mark.parametrize("name", NO_RECIPE)
def test_what_a_recipe_leaves_out_are_options(name: str) -> None:
    assert any(name in kind.fields() for kind in (CompressOptions, DistillOptions, TuneOptions))


def test_nothing_is_recovered_where_nothing_was_trained() -> None:
    models = {"16bit": metrics(10.0, 0.0, 2), "compressed": metrics(12.5, 0.2, 1), "toy": metrics(12.6, 0.2, 1)}
    comparison = one({"awq": compressed(models=models)})
    assert "recovered" not in comparison_rows(comparison)[0]
    assert "Recovered" not in comparison_note(comparison)


def test_markdown_has_the_comparison_and_the_reports_of_its_runs() -> None:
    text = comparison_markdown(compare_runs({"a<b": distilled(), "awq": compressed()}, {}))
    assert text.startswith("# Small: 2 runs\n\n| model |")
    assert "Recovered: share of the damage to token perplexity that training repairs, (compressed - trained) /" in text
    assert "compressed is the best model of its bits without training: INT4, awq+se." in text
    assert "\n## a&lt;b: Small: INT4 distillation (rtn)\n" in text
    assert "\n## awq: Small: INT4 compression (awq+se)\n" in text
    assert "a<b" not in text
    assert comparison_markdown(compare_runs({"awq": compressed()}, {})).startswith("# Small: 1 run\n")
