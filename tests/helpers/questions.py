"""Questions, task files and task data for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nybble.tasks import encoding
from nybble.tasks.dataset import Question, TaskDataset, TaskRequest
from nybble.tasks.task_data import Objective, TaskData, right_answers


def choice_question(prompt: str, *choices: str, label: int = 0) -> Question:
    """A question whose choices follow the same prompt after a space."""
    lengths = tuple(len(choice) for choice in choices)
    return Question((prompt,) * len(choices), tuple(f" {choice}" for choice in choices), label, lengths)


# Two choices whose difference lies in the prompt, as in WinoGrande.
PARTIAL_PROMPTS = Question(
    ("the cat sat on the mat because the cat", "the cat sat on the mat because the mat"),
    (" was tired", " was tired"),
    0,
    (3, 3),
)

MIXED_QUESTIONS = (
    choice_question("a question of some length:", "yes", "no, never", label=1),
    choice_question("short", "a", "b", "cd"),
    Question(("x", "y"), (" a", " b"), 0, (1, 1)),  # the choices have no prefix in common
    PARTIAL_PROMPTS,
)


def request(task: str | Path, seed: int = 0, num_train_samples: int = 0) -> TaskRequest:
    """A request for a task whose data are not in a data folder."""
    return TaskRequest(str(task), None, seed, num_train_samples)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered_rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Distinct rows with two choices, whose labels alternate."""
    return [{"prompt": f"row {i}", "choices": ["a", "bc"], "answer": i % 2} | changes for i in range(count)]


def make_task_data(
    tokenizer: Any, questions: Sequence[Question], objective: Objective, metric: str = "acc", seq_len: int = 64
) -> TaskData:
    """Task data whose training rows are also its held-out rows."""
    dataset = TaskDataset("toy", metric, questions, questions)
    choices = encoding.encode_choices(tokenizer, questions, seq_len) if objective == "choices" else []
    texts = (
        right_answers(questions, choices) if choices else encoding.encode_right_answers(tokenizer, questions, seq_len)
    )
    return TaskData(dataset, objective, texts, choices, questions, [])


class ExportedModel:
    """A model as exports present themselves: it returns logits, and has neither an accessible head nor a cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def get_output_embeddings(self) -> None:
        return None

    def __call__(self, input_ids: Any) -> Any:
        return SimpleNamespace(logits=self.model(input_ids=input_ids).logits)
