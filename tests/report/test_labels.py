"""Names of models, metrics and formats."""

import pytest

from nybble.report.labels import (
    before_and_after,
    format_label,
    metric_cell,
    metric_columns,
    metric_label,
    ordered_rows,
    ranks_text,
    row_label,
)
from tests.helpers.runs import compressed, distilled, tuned


def test_the_exporter_names_its_format() -> None:
    assert [format_label(name) for name in ("toy", "plain", "unknown")] == ["Toy", "plain", "unknown"]


def test_exports_stand_last_in_the_order_of_measurement() -> None:
    models: dict[str, dict[str, float]] = {row: {} for row in ("toy", "tuned", "zeta", "alpha", "16bit", "compressed")}
    assert ordered_rows(models) == ["16bit", "compressed", "tuned", "toy", "zeta", "alpha"]


def test_labels_say_what_the_run_did() -> None:
    rows = ("16bit", "lora16", "tuned16", "compressed", "tuned", "toy")
    assert [row_label(distilled(), row) for row in rows] == [
        "16-bit", "16-bit + LoRA", "16-bit, tuned", "INT4, compressed", "INT4, distilled (torch)",
        "INT4, distilled (Toy)",
    ]  # fmt: skip
    assert row_label(tuned({}), "toy") == "INT4, tuned (Toy)"
    assert row_label(compressed(), "toy") == "INT4, compressed (Toy)"
    assert row_label(distilled(init_trained=True), "compressed") == "INT4, trained before this run"


def test_columns_stand_in_a_fixed_order() -> None:
    models = {"16bit": {"bytes": 1, "tokens": 3}, "tuned": {"task:b acc": 1, "kl_to_teacher": 1, "word_perplexity": 2}}
    assert metric_columns(models) == ["word_perplexity", "kl_to_teacher", "task:b acc", "bytes"]
    assert metric_columns(models, "task:b acc") == ["task:b acc", "word_perplexity", "kl_to_teacher", "bytes"]
    assert metric_columns(models, "task:c acc") == metric_columns(models)
    assert [metric_label(c) for c in ("kl_to_teacher", "task:b acc")] == ["KL divergence to 16-bit", "b acc"]


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("bytes", 123_456_789, "123.5 MB"),
        ("kl_to_teacher", 0.123456, "0.1235"),
        ("task:arc acc", 0.5, "0.5000"),
        ("token_perplexity", 12.3456, "12.346"),
        ("token_perplexity", None, "-"),
    ],
)
def test_cells(column: str, value: float | None, text: str) -> None:
    assert metric_cell(column, value) == text


def test_equal_ranks_are_written_once() -> None:
    assert [ranks_text(ranks) for ranks in ((4, 4), (4, 2, 4), (4,))] == ["4 everywhere", "4 2 4", "4"]


def test_two_scores_are_compared_row_by_row_where_rows_are_known() -> None:
    column = "task:arc acc"
    before, after = ({column: score} for score in (0.5, 0.75))
    assert before_and_after(before, after, column) == "0.5000 before, 0.7500 after"
    rows = ({"right:arc acc": right} for right in ("0011", "0111"))
    before, after = (score | right for score, right in zip((before, after), rows, strict=True))
    assert before_and_after(before, after, column) == "0.5000 before, 0.7500 after (row by row +0.2500 +- 0.2500)"
    shorter = after | {"right:arc acc": "011"}
    assert "row by row" not in before_and_after(before, shorter, column), "rows of another number of documents"
