"""Tasks of lm-eval: which rows are used for what, and how they are rendered."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.errors import DataError, OptionError
from nybble.evaluation import lm_eval
from nybble.tasks import lm_eval_source
from nybble.tasks.dataset import Question, TaskDataset, TaskRequest
from nybble.tasks.lm_eval_source import LmEvalSource, render_question
from tests.helpers.questions import request


class FakeTask:
    """What nybble reads of lm-eval's task objects."""

    multiple_input = False

    def __init__(
        self,
        target: object = 0,
        output_type: str = "multiple_choice",
        choices: list[str] | None = None,
        rows: int = 100,
        **splits: str,
    ) -> None:
        self.OUTPUT_TYPE, self.target, self.choices, self.num_rows = output_type, target, choices, rows
        names = dict.fromkeys(("training_split", "validation_split", "test_split")) | splits
        self.config = SimpleNamespace(target_delimiter=" ", doc_to_choice=choices, task="fake", **names)

    def has_training_docs(self) -> bool:
        return self.config.training_split is not None

    def training_docs(self) -> list[dict[str, str]]:
        return [{"text": f"train{i} train{i} train{i}"} for i in range(self.num_rows)]

    def validation_docs(self) -> list[dict[str, str]]:
        return [{"text": f"valid{i}"} for i in range(7)]

    def fewshot_context(self, row: dict[str, str], count: int, gen_prefix: str | None) -> str:
        assert count == 0
        return f"{row.get('text', 'ask')} {gen_prefix}"

    def doc_to_prefix(self, row: object) -> str:
        return "it is"

    def doc_to_target(self, row: object) -> object:
        return self.target

    def doc_to_text(self, row: object) -> object:
        return 1

    def doc_to_choice(self, row: object) -> list[str] | None:
        return self.choices

    def construct_requests(self, row: object, prompt: str) -> list[Any]:
        conditional = [SimpleNamespace(args=(prompt, f" {choice}")) for choice in self.choices or ()]
        return [*conditional, SimpleNamespace(args=("", "unconditional"))]


def load(task: FakeTask, monkeypatch: pytest.MonkeyPatch, seed: int = 0, num_train_samples: int = 0) -> TaskDataset:
    monkeypatch.setattr(lm_eval, "open_task", lambda name, data_dir: task)
    monkeypatch.setattr(lm_eval, "main_metric", lambda task: "acc_norm")
    return LmEvalSource().load(request("fake", seed, num_train_samples))


def test_completions_are_rendered() -> None:
    task = FakeTask(["one", "two"], "generate_until")
    assert render_question(task, {}) == Question.with_completion("ask it is", " one")
    task = FakeTask(1, "generate_until", ["no", "yes"])
    assert render_question(task, {}) == Question.with_completion("ask it is", " yes")


@pytest.mark.parametrize("target", [1, "b"])
def test_choices_are_rendered_without_unconditional_requests(target: object) -> None:
    question = render_question(FakeTask(target, choices=["aaa", "b", ""]), {})
    assert question == Question(("ask it is",) * 3, (" aaa", " b", " "), 1, (3, 1, 1))


def test_label_of_a_task_with_several_prompts_is_its_text() -> None:
    task = FakeTask(0, choices=["a", "b"])
    task.multiple_input = True
    assert render_question(task, {}).label == 1


def test_unscored_validation_split_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask(0, choices=["a", "b"], training_split="train", validation_split="validation", test_split="test")
    dataset = load(task, monkeypatch)
    assert [question.prompts[0] for question in dataset.held_out] == [f"valid{i} it is" for i in range(7)]
    assert len({question.prompts[0] for question in dataset.train}) == 100
    assert (dataset.metric, dataset.scored) == ("acc_norm", ())


def test_training_rows_are_held_out_where_the_validation_split_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask(0, choices=["a", "b"], training_split="train", validation_split="validation")
    dataset = load(task, monkeypatch)
    held_out, train = ({question.prompts[0] for question in part} for part in (dataset.held_out, dataset.train))
    assert (len(held_out), len(train)) == (10, 90)
    assert not held_out & train
    assert not any(prompt.startswith("valid") for prompt in held_out | train)
    monkeypatch.setattr(lm_eval_source, "MAX_HELD_OUT", 4)
    assert len(load(task, monkeypatch).held_out) == 4


def test_number_and_order_of_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask(0, choices=["a", "b"], training_split="train", test_split="test")
    everything = load(task, monkeypatch)
    assert load(task, monkeypatch, num_train_samples=3).train == everything.train[:3]
    assert load(task, monkeypatch, seed=1).held_out != everything.held_out


def test_near_duplicates_of_held_out_rows_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = FakeTask(0, choices=["a", "b"], training_split="train", test_split="test")
    pairs = [" ".join(f"word{pair}of{k}" for k in range(8)) for pair in range(20)]
    rows = [{"text": f"{pair} {number}"} for pair in pairs for number in (1, 2)]
    monkeypatch.setattr(task, "training_docs", lambda: rows)
    with caplog.at_level("INFO", logger="nybble"):
        dataset = load(task, monkeypatch)
    held_out, train = (
        [question.prompts[0].split(" ")[0] for question in part] for part in (dataset.held_out, dataset.train)
    )
    assert len(held_out) == 4
    assert not set(held_out) & set(train)
    left_out = 2 * len(set(held_out)) - 4
    assert len(train) == 36 - left_out
    assert f"left out {left_out} training rows that nearly repeat held-out rows" in caplog.text


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (FakeTask(), "--task must have a training split; fake has none"),
        (FakeTask(output_type="loglikelihood_rolling", training_split="a"), "must have the output type"),
        (FakeTask(training_split="train", validation_split="train"), "must be scored on other rows than it trains on"),
        (
            FakeTask(training_split="test", test_split="test", validation_split="validation"),
            "must be scored on other rows than it trains on; fake has the single split test",
        ),
        (FakeTask([0, 1], choices=["a", "b"], training_split="a", test_split="b"), "must have one right answer a row"),
    ],
)
def test_unsuitable_task_is_refused(task: FakeTask, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=message):
        load(task, monkeypatch)


def test_few_training_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask(0, choices=["a", "b"], rows=9, training_split="train", test_split="test")
    with pytest.raises(DataError, match="must have at least 10 training rows"):
        load(task, monkeypatch)


def test_row_that_cannot_be_rendered_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FakeTask(5, choices=["a", "b"], training_split="train", test_split="test")  # no such choice
    with pytest.raises(DataError, match=r"a row of fake must be one that lm-eval can render; it cannot \(ValueError"):
        load(task, monkeypatch)


@pytest.mark.slow  # reading lm-eval's index of tasks takes a quarter of a minute
def test_real_tasks_are_split(shared_data: Path) -> None:
    def load_real(name: str, seed: int, count: int) -> TaskDataset:
        return LmEvalSource().load(TaskRequest(name, str(shared_data), seed, count))

    arc = load_real("arc_challenge", 0, 50)
    assert (len(arc.train), len(arc.held_out), arc.metric) == (50, 299, "acc_norm")
    gsm8k = load_real("gsm8k", 0, 100)
    assert (len(gsm8k.train), len(gsm8k.held_out), gsm8k.metric) == (100, 500, "exact_match,strict-match")
    assert not {question.prompts for question in gsm8k.train} & {question.prompts for question in gsm8k.held_out}
    assert load_real("gsm8k", 1, 100).train != gsm8k.train
