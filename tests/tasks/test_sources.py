"""The registry of task sources, with a toy source from outside of the package."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nybble.errors import DataError, OptionError
from nybble.tasks import sources
from nybble.tasks.dataset import TaskDataset, TaskRequest
from nybble.tasks.sources import TASK_SOURCES, TaskSource
from nybble.tasks.task_data import TaskDataConfig, encode_task
from tests.helpers.questions import choice_question, numbered_rows, request, write_rows
from tests.helpers.tiny import make_tokenizer


class SumSource:
    """Toy source: "sums:N" has the sums of two numbers below N."""

    name = "sums"

    def matches(self, task: str) -> bool:
        return task.startswith("sums:")

    def load(self, request: TaskRequest) -> TaskDataset:
        top = int(request.task.removeprefix("sums:"))
        questions = [
            choice_question(f"{a} + {b} =", str(a + b), str(a + b + 1)) for a in range(top) for b in range(top)
        ]
        train = questions[0::3][: request.num_train_samples or None]
        return TaskDataset(request.task, "acc", train, questions[1::3], questions[2::3])


@pytest.fixture
def toy() -> Iterator[TaskSource]:
    yield TASK_SOURCES.register("sums", SumSource())
    TASK_SOURCES.unregister("sums")


def test_built_in_sources() -> None:
    assert sources.find_source("folder/own.jsonl").name == "jsonl"
    assert sources.find_source("openbookqa").name == "lm-eval"
    assert sources.find_source("sums:4").name == "lm-eval", "names that no source claims are left to lm-eval"
    assert not sources.is_scored_by_lm_eval("own.jsonl")
    assert sources.is_scored_by_lm_eval("openbookqa")


def test_jsonl_file_is_loaded(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", numbered_rows(20))
    assert len(sources.load_task(request(path)).train) == 16


def test_toy_source_is_loaded_and_encoded(toy: TaskSource) -> None:
    assert sources.find_source("sums:4") is toy
    assert not sources.is_scored_by_lm_eval("sums:4")
    config = TaskDataConfig(objective="auto", seq_len=32, batch_size=2, num_selection_samples=3, seed=0)
    dataset = sources.load_task(request("sums:4", num_train_samples=4))
    data = encode_task(dataset, config, make_tokenizer())
    assert data.dataset.train[0].prompts[0] == "0 + 0 ="
    assert (data.objective, len(data.choices), len(data.held_out), len(data.fresh)) == ("choices", 4, 3, 2)


def test_empty_dataset_is_refused(toy: TaskSource) -> None:
    with pytest.raises(DataError, match="must have training rows and held-out rows; it has 1 and 0"):
        sources.load_task(request("sums:1"))


def test_task_of_two_sources_is_refused(toy: TaskSource) -> None:
    TASK_SOURCES.register("more-sums", SumSource())
    try:
        with pytest.raises(OptionError, match="sums:4 is claimed by sums and more-sums"):
            sources.load_task(request("sums:4"))
    finally:
        TASK_SOURCES.unregister("more-sums")
