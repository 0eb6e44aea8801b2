"""nybble.data.splits: what is held out, and which split a file name means."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.data.splits import SPLITS, hold_out, split_of_row, splits_in_name
from nybble.errors import DataError


@settings(max_examples=50, deadline=None)
@given(st.integers(10, 400))
def test_ten_documents_or_more_give_a_tenth_to_each_split_and_lose_nothing(count: int) -> None:
    documents = [str(i) for i in range(count)]
    splits = hold_out(documents)
    assert sorted((*splits.train, *splits.validation, *splits.test), key=int) == documents
    assert abs(len(splits.validation) - count / 10) <= 1
    assert abs(len(splits.test) - count / 10) <= 1


def test_equal_documents_are_all_kept() -> None:
    splits = hold_out(["same"] * 20)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 2)


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (9, (7, 1, 1))])
def test_few_conversations_are_not_cut(count: int, sizes: tuple[int, int, int]) -> None:
    conversations = [[{"role": "user", "content": str(i)}] for i in range(count)]
    splits = hold_out(conversations)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert [*splits.train, *splits.validation, *splits.test] == conversations


def test_one_text_is_cut_into_blocks_of_lines_in_order() -> None:
    lines = [f"line {i}\n" for i in range(1050)]
    splits = hold_out(["".join(lines)])
    assert [len(splits[split]) for split in SPLITS] == [9, 1, 1]
    assert all(block.count("\n") == 100 for split in ("validation", "test") for block in splits[split])  # type: ignore[union-attr]
    assert sorted("".join(map(str, (*splits.train, *splits.validation, *splits.test)))) == sorted("".join(lines))
    assert "".join(map(str, hold_out(["".join(lines[:200])]).train)) == "".join(lines[:200]), "2 blocks are too few"


def test_lines_of_few_texts_are_not_joined() -> None:
    texts = ["\n".join(f"{name} {i}" for i in range(150)) for name in ("a", "b")]
    lines = [line for split in SPLITS for block in hold_out(texts)[split] for line in str(block).splitlines()]
    assert sorted(lines) == sorted(line for text in texts for line in text.splitlines())


def test_only_missing_splits_are_taken() -> None:
    splits = hold_out([str(i) for i in range(100)], ("validation",))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 0)


def test_held_out_positions_move_from_ten_to_ten() -> None:
    """Rows that alternate between two kinds give both kinds to every split."""
    for split in ("validation", "test"):
        rows = [i for i in range(100) if split_of_row(i) == split]
        assert len(rows) == 10
        assert {i % 2 for i in rows} == {0, 1}
        assert {i % 10 for i in rows} == set(range(10))


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train-00000-of-00001.txt", ["train"]),
        ("my_valid.txt", ["validation"]),
        ("DEV.jsonl", ["validation"]),
        ("testing.csv", ["test"]),
        ("constraints.txt", []),
        ("latest.txt", []),
        ("devices.txt", []),
    ],
)
def test_whole_words_of_a_file_name_choose_the_split(name: str, splits: list[str]) -> None:
    assert splits_in_name(Path("train") / name) == splits


def test_a_file_name_with_two_splits_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"the name of .*test_of_training.txt must contain one split; it contains train"
    ):
        splits_in_name(Path("test_of_training.txt"))
