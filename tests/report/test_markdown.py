"""report.md holds what results.json holds."""

import pytest

from nybble.report.markdown import run_markdown
from nybble.run.results import RunResults, Training
from tests.helpers.runs import (
    candidate,
    compressed,
    distilled,
    measured_ranks,
    searched,
    task_results,
    tuned,
    with_everything,
)

SCORES = {"16bit": 0.5, "compressed": 0.4, "tuned": 0.6}


def test_the_report_of_a_distilled_run() -> None:
    lines = run_markdown(distilled()).splitlines()
    assert lines[0] == "# Small: INT4 distillation (rtn)"
    for line in (
        "| INT4, distilled (torch) | 11.000 | 0.2000 | 100.0 MB | 75% |",
        "## Validation",
        "| 0 | 15.000 | 0.5000 |",
        "| all | 121.0 |",
        "Peak memory: 2.00 GB (cpu). Training in INT4 changed 6.2% of the codes, and scales by 2.50% (root mean "
        "square) in 7 layers.",
        "    nybble distill --pretrained small",
        "Seed 0. torch 2.13.0",
    ):
        assert line in lines, line


def test_the_report_has_a_section_per_kind_of_layer() -> None:
    text = run_markdown(with_everything())
    assert "## Errors per decoder layer" in text
    assert "## Errors per linear layer (blockwise)" in text
    assert "| model.layers.0.self_attn.q_proj | 1.000% | 0.500% | 10.00% | 0.000% | 1.23% | 3.45% |" in text


def test_the_report_of_a_tuned_run_has_its_configurations() -> None:
    task = task_results(
        candidates=[candidate("largest", [8, 8])],
        chosen=[8, 8],
        configuration=[8, 8],
        tested=[measured_ranks([2, 2], 0.625)],
    )
    task.search = searched()
    text = run_markdown(tuned(SCORES, task))
    assert text.startswith("# Small: INT4 tuning on arc (awq+se)\n")
    for part in ("## Configurations", "| largest | 0.3000 | chosen |", "## Search\n\nThe first 6 trials of each",
                 "## Score against sum of ranks", "## Tested configurations", "| 0.6250 | 2 everywhere |"):  # fmt: skip
        assert part in text, part
    task.search.front = []
    assert "Score against sum of ranks" not in run_markdown(tuned(SCORES, task))


@pytest.mark.parametrize(("by_search", "origin"), [(True, "found by nybble search"), (False, "given by")])
def test_a_configuration_that_replaces_the_chosen_one_is_named(by_search: bool, origin: str) -> None:
    task = task_results(candidates=[candidate("largest", [8, 8])], chosen=[8, 8], configuration=[8, 8])
    assert "The model ships with" not in run_markdown(tuned(SCORES, task))
    task.configuration, task.replaced_by_search = [4, 4], by_search
    assert f"The model ships with the ranks 4 everywhere, {origin}" in run_markdown(tuned(SCORES, task))


def test_two_trainings_are_told_apart() -> None:
    validation = [{"step": 0.0, "loss": 0.5}]
    trainings = [Training(validation=validation), Training("scales", validation=validation)]
    text = run_markdown(tuned(SCORES, trainings=trainings))
    assert "## Validation of adapters\n" in text
    assert "## Validation of scales and norms\n" in text


@pytest.mark.parametrize(
    ("results", "title"),
    [
        (compressed(), "# Small: INT4 compression (awq+se)"),
        (distilled(init_from="runs/a"), "# Small: INT4 distillation (rtn from runs/a)"),
        (tuned({"16bit": 0.5, "lora16": 0.9}, command="lora"), "# Small: 16-bit LoRA tuning on arc"),
    ],
)
def test_titles(results: RunResults, title: str) -> None:
    assert run_markdown(results).splitlines()[0] == title


def test_in_a_page_about_several_runs_headings_are_one_level_lower() -> None:
    lines = run_markdown(distilled(), "first").splitlines()
    assert lines[0] == "## first: Small: INT4 distillation (rtn)"
    assert "### Cost" in lines
    assert not any(line.startswith("# ") for line in lines)


def test_names_and_warnings_are_escaped() -> None:
    results = distilled(
        model="<script>m</script>", method="a|b", test_data="*x*", warnings=["one <b>", "two"], command_line="a\nb <c>"
    )
    results.machine["versions"] = {"<i>": "1"}
    text = run_markdown(results, "<img src=x onerror=y>")
    for raw in ("<script>", "<img", "<i>", "one <b>"):
        assert raw not in text
    assert r"(a\|b)" in text
    assert r"\*x\*" in text
    assert "**Warning:** one &lt;b&gt;\n\n**Warning:** two\n" in text
    assert "\n    a\n    b <c>\n" in text, "all lines of the command stay in a code block"
