"""Local data of two lm-eval tasks, and an index of the few tasks that these tests name."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = json.dumps({"page": "= Water =\n\nWater is wet, and so is rain.\n"}) + "\n"


@pytest.fixture(autouse=True, scope="package")
def _few_tasks() -> Iterator[None]:
    """Reading the configurations of all of lm-eval's tasks takes a quarter of a minute."""
    import lm_eval.tasks

    from nybble.evaluation.local_tasks import task_manager

    all_tasks = Path(lm_eval.tasks.__file__).parent
    folders = [all_tasks / name for name in ("anli", "arc", "ruler", "squadv2", "wikitext", "winogrande")]
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(lm_eval.tasks.TaskManager, include_path=folders, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", few)
        task_manager.cache_clear()
        yield
    task_manager.cache_clear()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder for --data_dir with arc_easy (3 training, 2 validation and 5 test rows) and wikitext (one test page)."""
    arc = tmp_path / "arc" / "ARC-Easy"
    arc.mkdir(parents=True)
    question = {
        "question": "What is wet?",
        "choices": {"text": ["fire", "water", "sand"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    for split, count in (("train", 3), ("validation", 2), ("test", 5)):
        rows = [json.dumps(question | {"id": str(i)}) + "\n" for i in range(count)]
        (arc / f"{split}.jsonl").write_text("".join(rows))
    wikitext = tmp_path / "wikitext" / "document_level"
    wikitext.mkdir(parents=True)
    (wikitext / "test.jsonl").write_text(PAGE)
    return tmp_path
