"""Questions are what lm-eval asks, and their scores what lm-eval finds."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nybble.errors import DataError, OptionError
from nybble.evaluation import lm_eval
from nybble.models.head import LMHead
from nybble.tasks import dataset, encoding, scoring
from nybble.tasks.dataset import Question
from nybble.tasks.scoring import QuestionScores

from .tiny import FAMILIES, make_model, make_tokenizer


@pytest.mark.slow  # reading lm-eval's index takes a quarter of a minute
@pytest.mark.parametrize("name", ["openbookqa", "winogrande", "arc_easy"])
def test_scores_are_lm_evals(name: str, shared_data: Path) -> None:
    model, tokenizer, count = make_model("smollm", max_position_embeddings=512), make_tokenizer(begin=True), 12
    task = lm_eval.open_task(name, str(shared_data))
    rows = list(task.test_docs() if task.has_test_docs() else task.validation_docs())[:count]
    asked = [dataset._render(task, row) for row in rows]
    found = scoring.score_questions(
        model, LMHead.of(model), tokenizer, asked, lm_eval.metric_of(task) == "acc_norm", 512
    )
    theirs = lm_eval.run_tasks(model, tokenizer, [name], 4, count, str(shared_data))[name][lm_eval.metric_of(task)]
    assert found.accuracy == pytest.approx(theirs)
    assert 0 < theirs < 1, "a score at the end of the scale would say little"


def test_pairs_are_encoded_as_lm_eval_does() -> None:
    from lm_eval.models.huggingface import HFLM

    for begin in (False, True):
        tokenizer = make_tokenizer(begin)
        theirs = HFLM(pretrained=make_model("smollm"), tokenizer=tokenizer)
        for prompt, answer in (("a b", " c"), ("a b ", "c"), ("a b\n", " c d")):
            ids, count = encoding.encode_answer(tokenizer, prompt, answer)
            assert (ids[:count], ids[count:]) == tuple(theirs._encode_pair(prompt, answer))


def test_score_is_the_likelihood_of_the_right_answer_among_the_choices() -> None:
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    question = Question((("ask", " yes"), ("ask", " no, never")), 1, (3, 9))
    sums = []
    for prompt, answer in question.pairs:
        ids = torch.tensor([tokenizer(prompt + answer).input_ids])
        log_q = model(ids).logits[0].log_softmax(-1)
        sums.append(sum(float(log_q[t - 1, ids[0, t]]) for t in range(3, ids.shape[1])))
    for by_length, values in ((False, sums), (True, [sums[0] * 6 / 3 / 4, sums[1] * 6 / 9 / 4])):  # 6: mean length
        expected = float(torch.tensor(values, dtype=torch.float64).log_softmax(0)[1])
        found = scoring.score_questions(model, LMHead.of(model), tokenizer, [question] * 3, by_length, 64)
        assert found.log_likelihoods == pytest.approx([expected] * 3, abs=1e-5)
        assert found.correct == (values[1] > values[0],) * 3
    (alone,) = scoring.score_questions(
        model, LMHead.of(model), tokenizer, [Question((("ask", " yes"),), 0)], False, 64
    ).log_likelihoods
    assert alone == pytest.approx(sums[0] / 4, abs=1e-5)  # of 4 tokens


def test_log_probs_of_choices_are_those_of_whole_texts_and_differentiable() -> None:
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    asked = [
        Question((("ask", " yes"), ("ask", " no, never"), ("ask", " so")), 1, (3, 9, 2)),
        Question((("a longer question", " a"), ("another", " cd")), 0, (1, 2)),  # fewer choices, nothing in common
    ]
    texts = encoding.encode_choices(tokenizer, asked, 64)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    expected = torch.full((2, 3), -math.inf, dtype=torch.float64)
    for i, question in enumerate(asked):
        for c, (prompt, answer) in enumerate(question.pairs):
            ids = torch.tensor([tokenizer(prompt + answer).input_ids])
            log_q = model(ids).logits[0].log_softmax(-1)
            expected[i, c] = sum(log_q[t - 1, ids[0, t]] for t in range(len(tokenizer(prompt).input_ids), ids.shape[1]))
    found = scoring.choice_log_probs(model, LMHead.of(model), texts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    gold = torch.tensor([question.gold for question in asked])
    grads = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(scores, gold), weight)[0] for scores in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_choices_share_is_computed_once_and_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(family), make_tokenizer(begin=True)
    asked = [
        Question((("a question of some length:", " yes"), ("a question of some length:", " no, never")), 1, (3, 9)),
        Question((("short", " a"), ("short", " b"), ("short", " cd")), 0, (1, 1, 2)),
        Question((("x", " a"), ("y", " b")), 0, (1, 1)),  # nothing in common
        Question(
            (
                ("the cat sat on the mat because the cat", " was tired"),
                ("the cat sat on the mat because the mat", " was tired"),
            ),
            0,
            (3, 3),
        ),
        Question((("a question in the model's own", " words"),), 0),
    ] * 3
    shared = scoring.score_questions(model, LMHead.of(model), tokenizer, asked, True, 64)
    plain = scoring.score_questions(
        model, None, tokenizer, asked, True, 64
    )  # from the model's own logits, all texts whole
    assert shared.log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-4)
    assert shared.correct == plain.correct
    assert len(shared.correct) == 12
    monkeypatch.setattr(scoring, "_TOKENS", 50)
    assert scoring.score_questions(
        model, LMHead.of(model), tokenizer, asked, True, 64
    ).log_likelihoods == pytest.approx(plain.log_likelihoods, abs=1e-4)

    prompts, loss_mask, base = (
        [f"a question of {'very ' * (i % 3)}like length:" for i in range(40)],
        [0],
        model.base_model.forward,
    )
    alike = [
        Question(tuple((prompt, answer) for answer in (" yes", " no", " it depends", " never")), 0, (3, 2, 10, 5))
        for prompt in prompts
    ]

    def count(*args: Any, **kwargs: Any) -> Any:
        loss_mask[0] += kwargs["input_ids"].numel()
        return base(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", count)
    monkeypatch.setattr(scoring, "_TOKENS", 512)
    scoring.score_questions(model, LMHead.of(model), tokenizer, alike, True, 64)
    whole = sum(len(tokenizer(prompt + answer).input_ids) for question in alike for prompt, answer in question.pairs)
    windowed = 0 < (getattr(model.config, "sliding_window", None) or 0) < 64
    assert loss_mask[0] > whole if windowed else loss_mask[0] < 0.6 * whole, "a window shorter than a text: whole texts"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_go_through_what_choices_share(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = (
        {"sliding_window": 64} if getattr(make_model(family).config, "sliding_window", None) else {}
    )  # of the tests' 8 tokens nothing would be shared
    model, tokenizer = make_model(family, **window), make_tokenizer(begin=True)
    asked = [
        Question((("a question of some length:", " yes"), ("a question of some length:", " no, never")), 1, (3, 9)),
        Question((("short", " a"), ("short", " b"), ("short", " cd")), 0, (1, 1, 2)),
        Question(
            (
                ("the cat sat on the mat because the cat", " was tired"),
                ("the cat sat on the mat because the mat", " was tired"),
            ),
            0,
            (3, 3),
        ),
    ]
    texts = encoding.encode_choices(tokenizer, asked, 64)
    weight = next(m for m in model.modules() if type(m) is torch.nn.Linear).weight.requires_grad_()
    gold, found = torch.tensor([question.gold for question in asked]), []
    assert max(scoring._begins(model, LMHead.of(model), texts)) > 3
    for _ in range(2):
        scores = scoring.choice_log_probs(model, LMHead.of(model), texts)
        found.append((scores.detach(), *torch.autograd.grad(torch.nn.functional.cross_entropy(scores, gold), weight)))
        monkeypatch.setattr(scoring, "_begins", lambda model, head, texts: [0] * len(texts))
    (scores, grad), (plain, plain_grad) = found
    torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-3, atol=1e-3 * float(plain_grad.abs().max()))
    assert float(plain_grad.abs().max()) > 0


@pytest.mark.parametrize("family", [family for family, (_, options) in FAMILIES.items() if "sliding_window" in options])
def test_a_short_question_beside_a_long_one_keeps_its_prompt_in_the_window(family: str) -> None:
    model, tokenizer = make_model(family, sliding_window=64), make_tokenizer(begin=True)
    asked = [
        Question((("p" * 56, " a"), ("p" * 56, " b")), 0, (1, 1)),
        Question((("q" * 3, " " + "x" * 55), ("q" * 3, " " + "y" * 50)), 0, (55, 50)),
    ]
    texts = encoding.encode_choices(tokenizer, asked, 512)
    assert scoring._begins(model, LMHead.of(model), texts) == [56, 3]  # no text is longer than the window
    shared = scoring.choice_log_probs(model, LMHead.of(model), texts)
    plain = [
        scoring.score_questions(model, None, tokenizer, [question], False, 512).log_likelihood for question in asked
    ]
    assert [float(row.log_softmax(0)[0]) for row in shared] == pytest.approx(plain, abs=1e-3)


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="none of 0 has"):
        encoding.encode_right_answers(make_tokenizer(), [], 64)
    with pytest.raises(DataError, match="every answer must have tokens of its own; '' after 'ask' has none"):
        encoding.encode_choices(make_tokenizer(), [Question((("ask", " a"), ("ask", "")), 0, (1, 1))], 64)


def test_padding_changes_nothing() -> None:
    model, tokenizer = make_model("gemma2"), make_tokenizer(begin=True)
    head = LMHead.of(model)
    texts = [encoding.encode_answer(tokenizer, "p" * n, " answer") for n in (1, 20, 7)]
    together = encoding.pad_batch(texts)
    apart = [encoding.pad_batch([text]) for text in texts]
    with torch.no_grad():
        sums = together.sums(together.losses(model, head))
        torch.testing.assert_close(
            sums, torch.cat([batch.sums(batch.losses(model, head)) for batch in apart]), rtol=1e-5, atol=1e-4
        )
    assert together.loss_mask.sum(1).tolist() == [7, 7, 7]
    everything = encoding.pad_batch(texts, everything=True)
    assert everything.loss_mask.sum(1).tolist() == [len(ids) - 1 for ids, _ in texts]


class FakeTask:
    """What lm-eval's tasks answer to; `target` may be anything that they allow."""

    multiple_input = False

    def __init__(self, target: object, kind: str = "generate_until", choices: list[str] | None = None) -> None:

        self.OUTPUT_TYPE, self.target, self.choices = kind, target, choices
        self.config = SimpleNamespace(target_delimiter=" ", doc_to_choice=choices, task="fake")

    def fewshot_context(self, row: object, count: int, gen_prefix: str | None) -> str:
        assert count == 0
        return f"ask {gen_prefix}"

    def doc_to_prefix(self, row: object) -> str:
        return "it is"

    def doc_to_target(self, row: object) -> object:
        return self.target

    def doc_to_choice(self, row: object) -> list[str] | None:
        return self.choices

    def construct_requests(self, row: object, prompt: str) -> list[object]:
        return []


def test_targets_are_rendered_as_lm_eval_does() -> None:
    assert dataset._render(FakeTask(["one", "two"]), {}).pairs == (("ask it is", " one"),)
    assert dataset._render(FakeTask(1, choices=["no", "yes"]), {}).pairs == (("ask it is", " yes"),)
    with pytest.raises(OptionError, match="must have one right answer a row"):
        dataset._render(FakeTask([0, 1], "multiple_choice", ["a", "b"]), {})


def test_answers_in_the_models_own_words_end() -> None:
    tokenizer = make_tokenizer()
    alone, chosen = Question((("ask", " yes"),), 0), Question((("ask", " yes"), ("ask", " no")), 0, (3, 2))
    (own, _), (gold, _) = encoding.encode_right_answers(tokenizer, [alone, chosen], 64)
    assert own == [*gold, tokenizer.eos_token_id]


def test_answers_that_are_cut_off_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    asked = [
        Question((("ask", " yes"),), 0),
        Question((("ask", " " + "x" * 90),), 0),
        Question((("q" * 90, " yes"),), 0),
    ]
    short, long, none = (encoding.encode_answer(tokenizer, *question.pairs[0]) for question in asked)
    length = short.answered + short.first + 1  # as long as the short one with its end
    assert len(long.ids) > length
    assert none.first >= length
    texts = encoding.encode_right_answers(tokenizer, asked, length)
    assert [len(text.ids) for text in texts] == [length, length]
    assert "1 of 3 rows have no answer within" in caplog.text
    assert f"1 of 3 answers are learnt only up to token {length} (--seq_len)" in caplog.text
    caplog.clear()
    encoding.encode_right_answers(tokenizer, asked[:1], length)
    assert not caplog.text


def test_a_few_rows_that_are_confidently_wrong_do_not_outweigh_the_others() -> None:
    timid = QuestionScores(tuple(map(math.log, (0.5, 0.5, 0.4, 0.4))), (True, True, False, False))
    bold = QuestionScores(tuple(map(math.log, (0.7, 0.7, 0.6, 0.01))), (True, True, True, False))
    assert bold.log_likelihood < timid.log_likelihood
    assert bold.scores == pytest.approx((0.7, 0.7, 0.6, 0.01))
    assert bold.score == pytest.approx(0.5025)
    assert bold.better_by(timid)[0] == pytest.approx(0.0525)
    assert bold.better_by(timid)[1] == pytest.approx(float(torch.tensor([0.2, 0.2, 0.2, -0.39]).std()) / 2)


def test_candidates_without_choices_are_compared_row_by_row() -> None:
    one, other = QuestionScores((-1.0, -2.0, -3.0), ()), QuestionScores((-1.5, -2.5, -3.5), ())
    assert one.better_by(other) == (0.5, 0.0)
    assert QuestionScores(one.log_likelihoods, (True, False, True)).accuracy == pytest.approx(2 / 3)
    assert other.accuracy is None
    assert one.score == one.log_likelihood == -2.0
    unequal = QuestionScores(
        (-2.0, -2.0, -5.0), ()
    )  # differences 1, 0, 2: their variance is 1, that of their mean a third
    assert one.better_by(unequal) == (1.0, pytest.approx(math.sqrt(1 / 3)))
    assert QuestionScores((-1.0,), ()).better_by(QuestionScores((-3.0,), ())) == (2.0, 0.0)


def test_rows_that_nearly_repeat_are_found() -> None:
    twins = dataset.NearDuplicates(
        [
            {
                "sentence": "The trophy does not fit into the suitcase because _ is too large.",
                "choices": {"text": ["a b c d"]},
            }
        ]
    )
    assert twins.has({"sentence": "The trophy does not fit into the suitcase because _ is too small.", "other": 3})
    assert not twins.has({"sentence": "The suitcase is too small for the trophy and its large box of gold."})
    assert not dataset.NearDuplicates([]).has({"sentence": "anything at all"})


class Splits:
    """What lm-eval makes of a task with these splits."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, **splits: str) -> None:
        self.config = SimpleNamespace(**dict.fromkeys(("training_split", "validation_split", "test_split")) | splits)

    def has_training_docs(self) -> bool:
        return True

    def training_docs(self) -> list[dict[str, str]]:
        return [{"text": f"row {i}"} for i in range(100)]

    validation_docs = training_docs


def test_scored_rows_are_neither_trained_on_nor_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "metric_of", lambda task: "acc")
    monkeypatch.setattr(dataset, "_render", lambda task, row: Question(((row["text"], "a"),), 0))
    for task in (
        Splits(training_split="train", validation_split="train"),
        Splits(training_split="test", test_split="test", validation_split="validation"),
    ):
        monkeypatch.setattr(lm_eval, "open_task", lambda name, data_dir, task=task: task)
        with pytest.raises(OptionError, match="must be scored on other rows than it trains on"):
            dataset.load_task("any", None, 0)
    task = Splits(training_split="train", validation_split="validation", test_split="validation")
    monkeypatch.setattr(lm_eval, "open_task", lambda name, data_dir: task)
    found = dataset.load_task("any", None, 0)
    assert (len(found.train), len(found.held_out)) == (90, 10), "held out from training: validation is what is scored"
    monkeypatch.setattr(dataset, "_render", lambda task, row: row["no such column"])
    with pytest.raises(DataError, match=r"a row of any is not what lm-eval expects \(KeyError: 'no such column'\)"):
        dataset.load_task("any", None, 0)


@pytest.mark.slow
def test_held_out_rows_come_from_validation_or_are_kept_from_training(shared_data: Path) -> None:
    arc = dataset.load_task("arc_challenge", str(shared_data), 0, most=50)
    assert (len(arc.train), len(arc.held_out), arc.metric) == (50, 299, "acc_norm")
    maths = dataset.load_task("gsm8k", str(shared_data), 0, most=100)
    assert (len(maths.train), len(maths.held_out), maths.metric) == (100, 500, "exact_match,strict-match")
    assert not {q.pairs for q in maths.train} & {q.pairs for q in maths.held_out}
    assert [q.pairs for q in dataset.load_task("gsm8k", str(shared_data), 1, most=100).train] != [
        q.pairs for q in maths.train
    ]
