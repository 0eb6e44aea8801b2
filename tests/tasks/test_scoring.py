"""Scores of models on questions."""

import math
from pathlib import Path

import pytest
import torch

from nybble.evaluation import lm_eval
from nybble.evaluation.lm_eval import LmEvalConfig
from nybble.tasks import scoring
from nybble.tasks.dataset import Question, TaskDataset
from nybble.tasks.lm_eval_source import render_question
from nybble.tasks.scoring import QuestionScores
from tests.helpers.questions import MIXED_QUESTIONS, ExportedModel, choice_question
from tests.helpers.tiny import make_model, make_tokenizer


def test_score_is_the_share_of_the_label_among_the_choices() -> None:
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    question = choice_question("ask", "yes", "no, never", label=1)
    sums = []
    for choice in question.choices:
        ids = torch.tensor([tokenizer("ask" + choice).input_ids])
        log_q = model(ids).logits[0].log_softmax(-1)
        sums.append(sum(float(log_q[t - 1, ids[0, t]]) for t in range(3, ids.shape[1])))
    # The mean length is 6, the temperature 4.
    for length_normalized, values in ((False, sums), (True, [sums[0] * 6 / 3 / 4, sums[1] * 6 / 9 / 4])):
        expected = float(torch.tensor(values, dtype=torch.float64).log_softmax(0)[1])
        scores = scoring.score_questions(model, tokenizer, [question] * 3, length_normalized, 64)
        assert scores.log_likelihoods == pytest.approx([expected] * 3, abs=1e-5)
        assert scores.correct == (values[1] > values[0],) * 3
    completion = Question.with_completion("ask", " yes")
    scores = scoring.score_questions(model, tokenizer, [completion], False, 64)
    assert scores.log_likelihoods == pytest.approx([sums[0] / 4], abs=1e-5)  # 4 tokens
    assert scores.correct == ()


def test_scores_do_not_depend_on_grouping_or_export(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model("smollm"), make_tokenizer(begin=True)
    questions = [*MIXED_QUESTIONS, *MIXED_QUESTIONS[::-1]]
    together = scoring.score_questions(model, tokenizer, questions, True, 64)
    exported = scoring.score_questions(ExportedModel(model), tokenizer, questions, True, 64)
    monkeypatch.setattr(scoring, "MAX_TOKENS", 50)
    apart = scoring.score_questions(model, tokenizer, questions, True, 64)
    for scores in (exported, apart):
        assert scores.log_likelihoods == pytest.approx(together.log_likelihoods, abs=1e-4)
        assert scores.correct == together.correct
    assert together.log_likelihoods[:4] == pytest.approx(together.log_likelihoods[:3:-1], abs=1e-4)
    assert len(together.correct) == 8


def test_confidently_wrong_rows_do_not_dominate_the_score() -> None:
    timid = QuestionScores(tuple(map(math.log, (0.5, 0.5, 0.4, 0.4))), (True, True, False, False))
    bold = QuestionScores(tuple(map(math.log, (0.7, 0.7, 0.6, 0.01))), (True, True, True, False))
    assert bold.log_likelihood < timid.log_likelihood
    assert bold.scores == pytest.approx((0.7, 0.7, 0.6, 0.01))
    assert bold.score == pytest.approx(0.5025)
    assert bold.accuracy == 0.75
    assert bold.better_by(timid)[0] == pytest.approx(0.0525)
    assert bold.better_by(timid)[1] == pytest.approx(float(torch.tensor([0.2, 0.2, 0.2, -0.39]).std()) / 2)


def test_scores_without_alternatives_are_log_likelihoods() -> None:
    one, other = QuestionScores((-1.0, -2.0, -3.0), ()), QuestionScores((-1.5, -2.5, -3.5), ())
    assert one.better_by(other) == (0.5, 0.0)
    assert one.accuracy is None
    assert one.score == one.log_likelihood == -2.0
    unequal = QuestionScores((-2.0, -2.0, -5.0), ())  # differences 1, 0, 2: variance 1, that of their mean 1 / 3
    assert one.better_by(unequal) == (1.0, pytest.approx(math.sqrt(1 / 3)))
    assert QuestionScores((-1.0,), ()).better_by(QuestionScores((-3.0,), ())) == (2.0, 0.0)


def test_task_is_measured_on_its_scored_questions() -> None:
    model, tokenizer = make_model("smollm"), make_tokenizer()
    train = [choice_question("ask", "a", "b")]
    dataset = TaskDataset("folder/own.jsonl", "acc", train, train, MIXED_QUESTIONS)
    columns = scoring.measure_task(model, tokenizer, dataset, 3, 64)
    scores = scoring.score_questions(model, tokenizer, MIXED_QUESTIONS[:3], False, 64)
    assert columns == {
        "task:own acc": scores.accuracy,
        "task:own log_likelihood": scores.log_likelihood,
        "documents:own": 3,
    }
    assert next(iter(columns)) == "task:own acc", "the first column is the task's metric"
    normalized = TaskDataset("own", "acc_norm", train, train, MIXED_QUESTIONS)
    assert next(iter(scoring.measure_task(model, tokenizer, normalized, 3, 64))) == "task:own acc_norm"
    completions = TaskDataset("own", "log_likelihood", train, train, [Question.with_completion("ask", " yes")])
    assert list(scoring.measure_task(model, tokenizer, completions, None, 64)) == [
        "task:own log_likelihood",
        "documents:own",
    ]
    assert scoring.measure_task(model, tokenizer, TaskDataset("arc_easy", "acc", train, train), None, 64) == {}


@pytest.mark.slow  # reading lm-eval's index of tasks takes a quarter of a minute
@pytest.mark.parametrize("name", ["openbookqa", "winogrande", "arc_easy"])
def test_accuracy_is_that_of_lm_eval(name: str, shared_data: Path) -> None:
    model, tokenizer, count = make_model("smollm", max_position_embeddings=512), make_tokenizer(begin=True), 12
    task = lm_eval.open_task(name, str(shared_data))
    metric = lm_eval.main_metric(task)
    rows = list(task.test_docs() if task.has_test_docs() else task.validation_docs())[:count]
    questions = [render_question(task, row) for row in rows]
    accuracy = scoring.score_questions(model, tokenizer, questions, metric == "acc_norm", 512).accuracy
    config = LmEvalConfig((name,), 4, count, str(shared_data))
    expected = lm_eval.run_tasks(model, tokenizer, config)[name][metric]
    assert accuracy == pytest.approx(expected)
    assert 0 < expected < 1, "a score at the end of the scale would say little"
