"""Charts: axes, order and text. Their looks are for people."""

import math
import re
from functools import partial

import pytest

from nybble.report.comparison import compare_runs
from nybble.report.five_columns import COLUMNS
from nybble.run.results import Training
from tests.helpers.runs import LAYERS, candidate, distilled, known, measured, task_results, tuned, with_everything

pytest.importorskip("matplotlib", reason="the extra report")

from matplotlib.figure import Figure

from nybble.report import charts


@pytest.mark.parametrize(
    ("scores", "ends"),
    [
        ({"16bit": -6.96, "compressed": -7.2, "tuned": -3.5}, (-7.2 - 1.11, -3.5 + 1.11)),
        ({"16bit": -1.0, "compressed": -5.0, "tuned": -0.1}, (-5.0 - 1.47, 0.0)),
        ({"16bit": 0.25, "compressed": 0.2, "tuned": 0.5}, (0.11, 0.59)),
        ({"16bit": 0.5, "compressed": 0.5, "tuned": 0.5}, (0.35, 0.65)),
    ],
)
def test_bars_are_inside_the_axis(scores: dict[str, float], ends: tuple[float, float]) -> None:
    figure = Figure()
    (comparison,) = compare_runs({"run": tuned(scores)}, {})
    charts.draw_models(figure, comparison)
    axes = figure.axes[0]
    assert axes.get_xlim() == pytest.approx(ends)
    assert ("axis does not begin at 0" in axes.get_xlabel()) == (ends[0] > 0 or ends[1] < 0)


def test_models_whose_outputs_are_not_finite_are_drawn_without_a_bar() -> None:
    broken = measured(distilled(), tuned={"token_perplexity": math.nan, "kl_to_teacher": math.inf})
    (comparison,) = compare_runs({"good": distilled(), "broken": broken}, {})
    figure = Figure()
    charts.draw_models(figure, comparison)
    assert all(math.isfinite(end) for axes in figure.axes for end in axes.get_xlim())


def test_the_text_of_charts_is_escaped_and_no_mathematics() -> None:
    runs = {"<b>$a$": distilled(), "b": distilled()}
    (comparison,) = compare_runs(runs, {})
    svg = str(charts.draw(partial(charts.draw_models, comparison=comparison)))
    assert svg.startswith("<svg")
    assert "<b>" not in svg
    assert "&lt;b&gt;$a$" in svg


def test_equal_results_give_equal_charts() -> None:
    first, second = (charts.draw(partial(charts.draw_times, results=distilled())) for _ in range(2))
    assert first == second


def test_losses_of_a_task_and_its_validation_do_not_share_an_axis() -> None:
    validation = [{"step": 0, "loss": 0.5, "kl_to_teacher": 0.5, "token_perplexity": 9.0}]
    training = Training(steps=[{"step": 1, "loss": 2.0}], validation=validation, best_step=0)
    curves = {}
    for task in (task_results(), None):
        figure = Figure()
        charts.draw_training(figure, training, task)
        curves[task is not None] = [[line.get_label() for line in axes.lines[:-1]] for axes in figure.axes]
        assert list(figure.axes[0].lines[-1].get_xdata()) == [0, 0], "the best step"
    assert curves[False][0] == ["training", "validation"]
    assert curves[True][0] == ["training"]
    figure = Figure()
    charts.draw_training(figure, Training(steps=training.steps, validation=validation), task_results())
    assert len(figure.axes[1].lines) == 1, "the best step is not known"


def test_layers_are_mapped_to_decoder_layer_and_kind() -> None:
    results = with_everything()
    results.layer_errors[LAYERS[3]]["compressed"] = None
    figure = Figure()
    charts.draw_layer_maps(figure, results)
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == [
        "output error, round-to-nearest", "output error, blockwise", "codes changed by training",
        "scales moved by training",
    ]  # fmt: skip
    values = figure.axes[1].images[0].get_array()
    assert values is not None
    lines = [[float(value) for value in line] for line in values.filled(math.nan)]
    assert [line[0] for line in lines] == pytest.approx([0.005, 0.0005])
    assert lines[0][1] == pytest.approx(0.00005)
    assert math.isnan(lines[1][1])


def test_without_calibration_text_the_map_has_weight_errors() -> None:
    results = with_everything(changes=None)
    for error in results.layer_errors.values():
        error["rtn"] = error["compressed"] = None
    figure = Figure()
    charts.draw_layer_maps(figure, results)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["weight error"]


def test_decoder_layers_and_blocks() -> None:
    figure = Figure()
    charts.draw_decoder_errors(figure, with_everything())
    assert [line.get_label() for line in figure.axes[0].lines] == ["INT4, compressed", "INT4, distilled (torch)"]
    figure = Figure()
    charts.draw_block_losses(figure, with_everything())
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[0.02, 0.03], [0.01, 0.02]]


def test_a_bar_has_a_part_per_stage() -> None:
    figure = Figure()
    charts.draw_times(figure, distilled())
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0.0, 1.0), (1.0, 120.0)]


def test_a_task_has_a_bar_per_column() -> None:
    figure = Figure()
    charts.draw_tasks(figure, {task: dict.fromkeys(COLUMNS, known("0001")) for task in ("a", "b")})
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.25] * 10
    places = [bar.get_x() + bar.get_width() / 2 for bar in bars[::2]]
    assert places == pytest.approx([-0.32, -0.16, 0.0, 0.16, 0.32]), "around the first task"


def test_candidates_are_ordered_by_the_score_that_chose() -> None:
    candidates = [candidate("median", [4, 4]), candidate("least loss 1", [2, 4], score=0.31, error=0.1)]
    task = task_results(rank_space=[4, 2], candidates=candidates, chosen=[2, 4], configuration=[2, 4])
    figure = Figure()
    charts.draw_ranks(figure, task)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["least loss 1 (chosen)", "median"]
    assert figure.axes[1].get_xlabel() == "share (bars: error of the difference)"
    task.candidates[0].test, task.candidates[1].test = 0.7, 0.6
    task.chosen, task.configuration, task.replaced_by_search = [4, 4], [4, 2], True
    figure = Figure()
    charts.draw_ranks(figure, task)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["median (chosen)", "least loss 1", "ships (found by nybble search)"]
    assert figure.axes[1].get_xlabel() == "score on the test rows"


def test_long_labels_are_wrapped() -> None:
    (comparison,) = compare_runs({"run": distilled(init_from="runs/" + "x" * 60)}, {})
    svg = str(charts.draw(partial(charts.draw_models, comparison=comparison)))
    assert max(map(len, re.findall(r">([^<>]*x{5}[^<>]*)</text>", svg))) <= 44
