"""nybble.evaluation.local_tasks: which files a task reads, and errors that say what is missing."""

import json
import os
from pathlib import Path

import datasets
import pytest

from nybble.errors import DataError, OptionError
from nybble.evaluation import local_tasks
from nybble.evaluation.local_tasks import data_location, is_group, local_task_configs, read_dataset


def write_rows(path: Path, *rows: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dataset_of(task: str, data_dir: Path) -> datasets.DatasetDict:
    return local_task_configs([task], data_dir)[0]["custom_dataset"](trust_remote_code=True)


def test_folders_are_named_after_data_set_and_subset() -> None:
    assert data_location("arc_easy") == ("arc", "ARC-Easy")
    assert data_location("winogrande") == ("winogrande", "winogrande_xl")
    assert data_location("wikitext")[0] == "wikitext/document_level"


def test_groups_are_told_from_tasks() -> None:
    assert is_group("ai2_arc")
    assert not is_group("arc_easy")


def test_groups_are_refused(data_dir: Path) -> None:
    with pytest.raises(
        OptionError, match="--eval_tasks must name single tasks with --data_dir; ai2_arc is a group of tasks"
    ):
        local_task_configs(["ai2_arc"], data_dir)


def test_tasks_that_load_their_data_themselves_are_refused(data_dir: Path) -> None:
    with pytest.raises(OptionError, match="--eval_tasks must name tasks whose data are in files .* squadv2 loads its"):
        local_task_configs(["squadv2"], data_dir)


def test_only_the_data_source_of_a_task_changes(data_dir: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    from nybble.evaluation.local_tasks import task_manager

    config = local_task_configs(["arc_easy"], data_dir)[0]
    original = load_yaml(task_manager().task_index["arc_easy"].yaml_path)
    assert not {"dataset_path", "dataset_name", "dataset_kwargs"} & config.keys()
    assert {key: config[key] for key in config if key != "custom_dataset"} == {
        key: value for key, value in original.items() if not key.startswith("dataset_")
    }


def test_a_split_may_have_several_files_and_splits_may_have_different_suffixes(data_dir: Path) -> None:
    folder = data_dir / "arc" / "ARC-Easy"
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").rename(folder / "train-00000-of-00002.jsonl")
    (folder / "train-00001-of-00002.jsonl").write_text("".join(rows[:2]))
    datasets.Dataset.from_json(str(folder / "test.jsonl")).to_parquet(folder / "test.parquet")
    (folder / "test.jsonl").unlink()
    splits = dataset_of("arc_easy", data_dir)
    assert (len(splits["train"]), len(splits["validation"]), len(splits["test"])) == (5, 2, 5)


def test_jsonl_comes_before_parquet(data_dir: Path) -> None:
    folder = data_dir / "arc" / "ARC-Easy"
    datasets.Dataset.from_json(str(folder / "train.jsonl")).to_parquet(folder / "test.parquet")
    assert len(dataset_of("arc_easy", data_dir)["test"]) == 5


def test_a_file_may_contain_the_split_as_a_word(tmp_path: Path) -> None:
    write_rows(tmp_path / "winogrande" / "my-dev.jsonl", {"sentence": "_"})
    assert len(dataset_of("winogrande", tmp_path)["validation"]) == 1


def test_splits_with_names_of_their_own_match_exactly(tmp_path: Path) -> None:
    for split in ("train_r1", "train_r2", "dev_r1"):
        write_rows(tmp_path / "anli" / f"{split}.jsonl", {"premise": "p", "hypothesis": split, "label": 0})
    with pytest.raises(
        DataError, match=r"the split that anli_r1 is scored on; .*anli has no test_r1; put test_r1.jsonl there"
    ):
        local_task_configs(["anli_r1"], tmp_path)
    write_rows(tmp_path / "anli" / "test_r1.jsonl", {"premise": "p", "hypothesis": "test_r1", "label": 0})
    splits = dataset_of("anli_r1", tmp_path)
    assert {split: rows["hypothesis"][:] for split, rows in splits.items()} == {
        split: [split] for split in ("train_r1", "dev_r1", "test_r1")
    }


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"must hold the data of winogrande in .*winogrande_xl; there are none; put files there named train",
    ):
        local_task_configs(["winogrande"], tmp_path)


def test_the_split_that_is_scored_must_be_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "winogrande" / "winogrande_xl" / "train.jsonl", {})
    with pytest.raises(
        DataError, match=r"winogrande is scored on; .*winogrande_xl has no validation; put validation.jsonl there"
    ):
        local_task_configs(["winogrande"], tmp_path)


def test_examples_are_not_taken_from_the_rows_that_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"dataset_path": "ai2_arc", "dataset_name": "ARC-Easy", "num_fewshot": 5, "fewshot_split": "train"}
    monkeypatch.setattr(local_tasks, "_task_config", lambda task: {"task": task, "test_split": "test", **config})
    write_rows(tmp_path / "arc" / "ARC-Easy" / "test.jsonl", {"question": "q"})
    with pytest.raises(DataError, match=r"arc_easy is shown examples of; .*ARC-Easy has no train; put train.jsonl"):
        local_task_configs(["arc_easy"], tmp_path)
    write_rows(tmp_path / "arc" / "ARC-Easy" / "train.jsonl", {"question": "p"})
    assert local_task_configs(["arc_easy"], tmp_path)[0]["fewshot_split"] == "train"


def test_training_rows_are_required_only_for_training(data_dir: Path) -> None:
    (data_dir / "arc" / "ARC-Easy" / "train.jsonl").unlink()
    assert local_task_configs(["arc_easy"], data_dir)[0]["training_split"] is None
    with pytest.raises(DataError, match=r"arc_easy is trained on; .*ARC-Easy has no train; put train.jsonl there"):
        local_task_configs(["arc_easy"], data_dir, "--task", needs_train=True)


def test_files_are_read_as_they_are_now_with_all_columns(tmp_path: Path) -> None:
    """There is no cache by time stamp, and columns that the first row does not have are kept."""
    file = write_rows(tmp_path / "test.jsonl", {"a": 1}, {"a": 2, "b": 3})
    assert read_dataset({"test": [str(file)]})["test"].to_list() == [{"a": 1, "b": None}, {"a": 2, "b": 3}]
    stamp = file.stat()
    write_rows(file, {"a": 4}, {"a": 5, "b": 6})
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert read_dataset({"test": [str(file)]})["test"].to_list()[0]["a"] == 4


def test_files_without_rows_and_mixed_types_are_refused(tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"must hold rows in .*train.jsonl; there are none; add rows, or delete it"):
        read_dataset({"train": [str(empty)]})
    mixed = write_rows(tmp_path / "test.jsonl", {"a": 1}, {"a": "one"})
    with pytest.raises(
        DataError, match=r"values of one type in each column of .*test.jsonl; column a: .*; correct the column"
    ):
        read_dataset({"test": [str(mixed)]})
