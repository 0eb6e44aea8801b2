"""The table and the sentence say what results.json says."""

import copy
from typing import Any

import pytest

from nybble.report import comparison as report_comparison
from nybble.report import run as report_run

RESULTS: dict[str, Any] = {
    "model": "Small",
    "command": "nybble distill --pretrained small",
    "seed": 0,
    "seconds": {"load": 1.0, "train": 120.0},
    "peak_memory_bytes": {"cpu": 2_000_000_000},
    "machine": {"versions": {"torch": "2.13.0"}},
    "layers": {"int4": 7, "int8": 1, "tied": True},
    "codes_changed": 0.0625,
    "validation": [{"step": 0, "token_perplexity": 15.0, "kl_to_teacher": 0.5}],
    "models": {
        "16bit": {"token_perplexity": 10.0, "kl_to_teacher": 0.0, "bytes": 400_000_000},
        "compressed": {"token_perplexity": 14.0, "kl_to_teacher": 0.5, "bytes": 100_000_000},
        "tuned": {"token_perplexity": 11.0, "kl_to_teacher": 0.2, "bytes": 100_000_000},
        "openvino": {"token_perplexity": 12.0, "kl_to_teacher": 0.25, "bytes": 110_000_000},
    },
}


def changed(**rows: dict[str, float]) -> dict[str, Any]:
    results = copy.deepcopy(RESULTS)
    for row, values in rows.items():
        results["models"][row.removeprefix("_")] |= values
    return results


def test_improvement_is_the_share_of_the_damage_repaired() -> None:
    assert report_run.improvement(RESULTS["models"], "tuned") == pytest.approx(0.75)
    assert report_run.improvement(RESULTS["models"], "openvino") == pytest.approx(0.5)


def test_word_perplexity_goes_first_where_all_have_it() -> None:
    words = changed(
        _16bit={"word_perplexity": 20.0}, compressed={"word_perplexity": 30.0}, tuned={"word_perplexity": 29.0}
    )
    assert report_run.improvement(words["models"], "tuned") == pytest.approx(0.1)
    assert report_run.improvement(words["models"], "openvino") == pytest.approx(0.5)


def test_no_damage_no_improvement() -> None:
    assert report_run.improvement(changed(compressed={"token_perplexity": 9.9})["models"], "tuned") is None


def test_sentence() -> None:
    assert report_run.sentence(RESULTS) == (
        "Small in 4 bits (OpenVINO): token perplexity 12.00, against 14.00 before tuning and 10.00 in 16 bit: 50% of the damage repaired, "
        "in 2.0 minutes of training; 110 MB, 3.6 times smaller than 16 bit."
    )
    assert "tuning made it worse" in report_run.sentence(changed(openvino={"token_perplexity": 15.0}))
    better = changed(openvino={"token_perplexity": 9.5, "kl_to_teacher": 0.07})
    assert (
        "in 16 bit: less than the 16-bit model's, to which the KL is 0.070 (0.500 before tuning), in 2.0 minutes"
        in report_run.sentence(better)
    )


def test_markdown_table() -> None:
    text = report_run.markdown(RESULTS)
    assert "| 4 bit, tuned (torch) | 11.000 | 0.2000 | 100.0 MB | 75% |" in text
    assert "| all | 121.0 |" in text
    assert "Peak memory: 2.00 GB (cpu)." in text
    assert "Training in 4 bits changed 6.2% of the codes (7 layers)." in text
    assert "    nybble distill --pretrained small" in text


def test_markdown_says_of_every_layer_what_the_page_says() -> None:
    error = {"rtn": 0.02, "compressed": 0.01, "weight": 0.1, "clipped": 0.0}
    layers = {
        "layer_errors": {"q": error, "k": error},
        "layer_codes_changed": {"q": 0.0123},
        "layer_scales_moved": {"q": 0.0345, "k": 0.01},
    }
    decoder = {
        "decoder_errors": {"compressed": [0.031, 0.042], "tuned": [0.021, 0.032]},
        "block_losses": {"0": [0.02, 0.01], "1": [0.03, 0.02]},
    }
    text = report_run.markdown(RESULTS | layers | decoder)
    assert (
        "| layer | output error, rtn | compressed | weight error | clipped | codes changed by training | scales moved by training |"
        in text
    )
    assert "| q | 2.000% | 1.000% | 10.00% | 0.000% | 1.23% | 3.45% |" in text
    assert "| k | 2.000% | 1.000% | 10.00% | 0.000% | - | 1.00% |" in text
    assert "| decoder layer | error, compressed | error, tuned (torch) | reconstruction, before | after |" in text
    assert "| 1 | 4.200% | 3.200% | 3.000% | 2.000% |" in text


def test_lm_eval_metrics_become_columns() -> None:
    headings, lines = report_run.rows(changed(tuned={"task:arc_easy acc_norm": 0.4567}))
    assert headings == ["model", "token perplexity", "KL to 16 bit", "arc_easy acc_norm", "size", "repaired"]
    assert lines[2] == ["4 bit, tuned (torch)", "11.000", "0.2000", "0.4567", "100.0 MB", "75%"]
    assert lines[0][3] == "-"


COMPRESSED: dict[str, Any] = {
    key: value for key, value in RESULTS.items() if key not in ("codes_changed", "validation")
} | {
    "kind": "compress",
    "method": "awq+se",
    "models": {
        "16bit": {"token_perplexity": 10.0, "kl_to_teacher": 0.0, "bytes": 400_000_000},
        "compressed": {"token_perplexity": 12.5, "kl_to_teacher": 0.3, "bytes": 100_000_000},
    },
}


def test_runs_on_the_same_text_are_compared_against_the_best_compression_without_training() -> None:
    blockwise = COMPRESSED | {
        "method": "awq+blockwise",
        "models": {"compressed": {"token_perplexity": 11.5, "kl_to_teacher": 0.2, "bytes": 1}},
    }
    (comparison,) = report_comparison.compare_runs({"tuned": RESULTS, "awq": COMPRESSED, "bw": blockwise})
    assert [entry.label for entry in comparison.entries] == [
        "16 bit", "4 bit, rtn (start)", "4 bit, distilled from rtn", "4 bit, distilled from rtn (OpenVINO)", "4 bit, awq+se", "4 bit, awq+blockwise",
    ]  # fmt: skip
    assert comparison.baseline is not None
    assert comparison.baseline.label == "4 bit, awq+se"  # neither rtn, which is worse, nor block-wise, which is trained
    headings, lines = report_comparison.comparison_rows(comparison)
    assert headings[-1] == "repaired"
    assert [line[-1] for line in lines] == ["-", "-60%", "60%", "20%", "-", "40%"]  # of 12.5 - 10.0


def test_another_text_or_model_is_another_comparison() -> None:
    runs = {"one": RESULTS, "two": RESULTS | {"test": "other"}, "three": RESULTS | {"model": "Large"}}
    found = [(comparison.model, comparison.measured_on) for comparison in report_comparison.compare_runs(runs)]
    own, other = "Perplexity and KL on the test split.", "Perplexity and KL on other."
    assert found == [("Small", own), ("Small", other), ("Large", own)]


def test_a_tuned_start_is_no_baseline() -> None:
    first = RESULTS | {"method": "rtn", "lora_rank": 0}
    second = changed(compressed={"token_perplexity": 11.0}, tuned={"token_perplexity": 10.5}) | {
        "method": "rtn (runs/first)",
        "start_tuned": True,
    }
    (both,) = report_comparison.compare_runs({"first": first, "second": second})
    assert both.baseline is not None
    assert (both.baseline.run, both.value(both.baseline)) == ("first", 14.0)
    (named,) = report_comparison.compare_runs({"third": RESULTS | {"method": "rtn (runs/no-blockwise)"}})
    assert named.baseline is not None, "what a folder is called says nothing"
    (alone,) = report_comparison.compare_runs({"second": second})
    assert alone.baseline is None
    assert "4 bit, tuned before" in [row[0] for row in report_run.rows(second)[1]]
    assert [row[1] for row in report_comparison.published_rows(report_comparison.compare_runs({"first": first}))[1]][
        :3
    ] == [
        "16 bit",
        "INT4, best PTWC (rtn)",
        "INT4, QAT",
    ]


def test_runs_whose_16_bit_models_disagree_are_not_compared() -> None:
    close, far, fewer = (
        changed(_16bit=values) for values in ({"token_perplexity": 10.05}, {"token_perplexity": 12.0}, {"tokens": 7})
    )
    comparisons = report_comparison.compare_runs({"a": RESULTS, "close": close, "far": far, "fewer": fewer})
    assert [list(comparison.runs) for comparison in comparisons] == [["a", "close"], ["far"], ["fewer"]]


def test_figures_of_a_few_documents_say_so_and_are_not_compared_with_those_of_all() -> None:
    few = RESULTS | {"task_limit": 2}
    whole, tried = report_comparison.compare_runs({"all": RESULTS, "few": few})
    assert (list(whole.runs), list(tried.runs)) == (["all"], ["few"])
    said = "Word perplexity and tasks on the first 2 documents only (--task_limit)."
    assert [said in text for text in (report_comparison.explained(tried), report_run.markdown(few))] == [True, True]
    assert [said in text for text in (report_comparison.explained(whole), report_run.markdown(RESULTS))] == [
        False,
        False,
    ]


def test_equal_labels_are_told_apart_by_the_run() -> None:
    labels = [
        entry.label for entry in report_comparison.compare_runs({"one": COMPRESSED, "two": COMPRESSED})[0].entries
    ]
    assert labels == ["16 bit", "4 bit, awq+se, one", "4 bit, awq+se, two"]


def test_the_best_of_a_task_is_the_highest() -> None:
    def tuned(score: float) -> dict[str, Any]:
        models = {
            "16bit": {"task:arc acc": 0.5, "bytes": 1},
            "compressed": {"task:arc acc": 0.4, "bytes": 1},
            "tuned": {"task:arc acc": score, "bytes": 1},
        }
        return COMPRESSED | {"kind": "tune", "task": {"name": "arc", "metric": "acc", "space": [4]}, "models": models}

    runs = report_comparison.compare_runs({"low": tuned(0.55), "high": tuned(0.65)})
    assert runs[0].metric == "task:arc acc"
    assert [line[1:3] for line in report_comparison.published_rows(runs)[1]] == [
        ["16 bit", "0.500"],
        ["INT4, best PTWC (awq+se)", "0.400"],
        ["INT4, QAT + LoRA", "0.650"],
    ]
    assert [entry.label for entry in runs[0].entries if entry.tuned] == [
        "4 bit, tuned on arc from awq+se, low",
        "4 bit, tuned on arc from awq+se, high",
    ]


def test_published_table() -> None:
    headings, lines = report_comparison.published_rows(
        report_comparison.compare_runs({"tuned": RESULTS, "awq": COMPRESSED, "other": RESULTS | {"model": "Large"}})
    )
    assert headings == ["model", "precision", "token perplexity", "improvement"]
    assert lines == [
        ["Small", "16 bit", "10.000", "-"],
        ["Small", "INT4, best PTWC (awq+se)", "12.500", "-"],
        ["Small", "INT4, QAT + LoRA", "12.000", "20.0%"],  # what is deployed, 12.0, not the better 11.0 of torch
        ["Large", "16 bit", "10.000", "-"],
        ["Large", "INT4, best PTWC (rtn)", "14.000", "-"],
        ["Large", "INT4, QAT + LoRA", "12.000", "50.0%"],
        ["mean", "", "", "35.0%"],
    ]


def test_ranks_are_written_once_where_they_are_the_same() -> None:
    assert [report_run.ranks_written(ranks) for ranks in ((4, 4), (4, 2, 4), (4,))] == ["4 everywhere", "4 2 4", "4"]


def test_published_table_takes_the_baseline_in_the_same_runtime() -> None:
    exported = COMPRESSED | {
        "models": COMPRESSED["models"] | {"openvino": {"token_perplexity": 13.0, "kl_to_teacher": 0.3, "bytes": 1}}
    }
    lines = report_comparison.published_rows(report_comparison.compare_runs({"tuned": RESULTS, "awq": exported}))[1]
    assert [line[2:] for line in lines[1:3]] == [["13.000", "-"], ["12.000", "33.3%"]]


def test_published_table_shows_the_mean_of_seeds_and_their_spread() -> None:
    def run(seed: int, perplexity: float, **options: Any) -> dict[str, Any]:
        return changed(openvino={"token_perplexity": perplexity}) | {
            "options": {"seed": seed, "output_dir": f"runs/{seed}", "scale_lr": 1e-3} | options
        }

    runs = {
        "awq": COMPRESSED,
        "a": run(0, 11.0),
        "b": run(1, 12.0),
        "c": run(2, 11.5),
        "other": run(0, 11.2, scale_lr=1e-2),
    }
    lines = report_comparison.published_rows(report_comparison.compare_runs(runs))[1]
    assert lines[2] == ["Small", "INT4, QAT + LoRA", "11.200", "52.0%"], (
        "better than the mean of the three, though not than the luckiest"
    )
    del runs["other"]
    lines = report_comparison.published_rows(report_comparison.compare_runs(runs))[1]
    assert lines[2] == ["Small", "INT4, QAT + LoRA, 3 seeds", "11.500 (11.000 to 12.000)", "40.0% (20.0% to 60.0%)"]
    assert lines[3][-1] == "40.0%"
    runs["d"] = run(3, 11.5, microbatch=2, cache="recompute", data_dir="elsewhere")
    assert "4 seeds" in report_comparison.published_rows(report_comparison.compare_runs(runs))[1][2][1], (
        "how fast, and where, is no recipe"
    )
    runs["again"] = run(3, 11.5)
    assert "5 runs of 4 seeds" in report_comparison.published_rows(report_comparison.compare_runs(runs))[1][2][1]


def test_a_16_bit_model_with_adapters_is_not_published_as_int4() -> None:
    models = {"16bit": {"task:arc acc": 0.5, "bytes": 1}, "lora16": {"task:arc acc": 0.9, "bytes": 1}}
    task = {"kind": "tune", "task": {"name": "arc", "metric": "acc", "space": [4]}}
    nls = models | {"compressed": {"task:arc acc": 0.4, "bytes": 1}, "tuned": {"task:arc acc": 0.6, "bytes": 1}}
    lines = report_comparison.published_rows(
        report_comparison.compare_runs(
            {"lora": COMPRESSED | task | {"models": models}, "nls": COMPRESSED | task | {"models": nls}}
        )
    )[1]
    assert [line[1:3] for line in lines] == [
        ["16 bit", "0.500"],
        ["INT4, best PTWC (awq+se)", "0.400"],
        ["INT4, QAT + LoRA", "0.600"],
    ]


def test_a_choice_by_the_test_rows_is_said_wherever_its_figure_stands() -> None:
    models = {
        row: {"task:arc acc": value, "bytes": 1} for row, value in (("16bit", 0.5), ("compressed", 0.4), ("tuned", 0.6))
    }
    found = {
        "kind": "tune",
        "task": {"name": "arc", "metric": "acc", "space": [8, 4]},
        "models": models,
        "selected_on": "test",
        "chosen": [8, 4],
    }
    published = (
        COMPRESSED
        | found
        | {"configuration": [8, 4], "candidates": [{"configuration": [8, 4]}, {"configuration": [4, 4]}]}
    )
    assert (
        report_comparison.published_rows(report_comparison.compare_runs({"nls": published}))[1][-1][1]
        == "INT4, QAT + NLS, chosen on test rows"
    )
    assert "ranks chosen by this very score" in report_run.sentence(published)
    others = (
        {"selected_on": "held_out"},
        {"configuration": [4, 4], "applied": [4, 4]},
        {"candidates": published["candidates"][:1]},
    )
    for honest in (
        published | other for other in others
    ):  # a search has chosen by other rows since; there was nothing to choose
        assert (
            report_comparison.published_rows(report_comparison.compare_runs({"nls": honest}))[1][-1][1]
            == "INT4, QAT + NLS"
        )
        assert "this very score" not in report_run.sentence(honest)


@pytest.mark.parametrize(("applied", "said"), [({"applied": [4, 4]}, "found by nybble search"), ({}, "given")])
def test_ranks_that_took_the_place_of_those_chosen_are_named(applied: dict[str, Any], said: str) -> None:
    row = {"why": "largest", "configuration": [8, 8], "score": 0.5, "accuracy": None, "behind": 0.0, "error": 0.0}
    found = {
        "task": {"name": "arc", "metric": "acc", "space": [8, 4]},
        "selected_on": "held_out",
        "chosen": [8, 8],
        "candidates": [row],
    }
    assert "In place are" not in report_run._candidates_markdown(RESULTS | found | {"configuration": [8, 8]})
    assert f"In place: 4 everywhere, {said}." in report_run._candidates_markdown(
        RESULTS | found | {"configuration": [4, 4]} | applied
    )


def test_a_search_says_whether_its_figures_are_of_16_bit_adapters() -> None:
    task = {"task": {"scored_by": "share"}}
    assert "16-bit weights" not in report_run.search_note(RESULTS | task)
    learnt = RESULTS | task | {"models": RESULTS["models"] | {"learnt": {}}}
    assert report_run.search_note(learnt).endswith(
        "All of the adapters on 16-bit weights, before these were compressed."
    )


def test_what_learnt_before_it_was_compressed_is_called_so() -> None:
    results = copy.deepcopy(RESULTS) | {
        "kind": "tune",
        "method": "se",
        "task": {"name": "arc_easy", "metric": "acc", "space": [8, 4]},
    }
    results["models"]["learnt"] = {"token_perplexity": 13.0, "kl_to_teacher": 0.1, "bytes": 400_000_000}
    for row, value in (("16bit", 0.5), ("learnt", 0.8), ("compressed", 0.6), ("tuned", 0.7), ("openvino", 0.75)):
        results["models"][row]["task:arc_easy acc"] = value
    results["seconds"]["train scales"] = 60.0
    (comparison,) = report_comparison.compare_runs({"one": results})
    assert [entry.label for entry in comparison.entries] == [
        "16 bit", "16 bit, tuned on arc_easy", "4 bit, tuned on arc_easy, then se", "4 bit, tuned on arc_easy before and after se",
        "4 bit, tuned on arc_easy before and after se (OpenVINO)",
    ]  # fmt: skip
    assert [entry.label for entry in comparison.shipped] == [
        "4 bit, tuned on arc_easy before and after se (OpenVINO)"
    ], "none in 16 bit, none on the way"
    assert comparison.untrained == []
    assert report_run.sentence(results).startswith(
        "Small in 4 bits (OpenVINO): arc_easy acc 0.7500, against 0.8000 tuned in 16 bit and 0.5000 without tuning, in 3.0 "
    )


def test_the_report_of_a_16_bit_model_does_not_speak_of_4_bits() -> None:
    models = {"16bit": {"task:arc acc": 0.5, "bytes": 1}, "lora16": {"task:arc acc": 0.9, "bytes": 1}}
    found = COMPRESSED | {"kind": "tune", "task": {"name": "arc", "metric": "acc", "space": [4]}, "models": models}
    assert report_run.markdown(found).splitlines()[0] == "# Small: 16-bit LoRA, tuning on arc"
