"""Near duplicates by word trigrams."""

from nybble.tasks.near_duplicates import NearDuplicateIndex, word_trigrams

TROPHY = "The trophy does not fit into the suitcase because _ is too large."


def test_row_with_one_changed_word_is_a_near_duplicate() -> None:
    index = NearDuplicateIndex([{"sentence": TROPHY, "choices": {"text": ["a b c d"]}}])
    assert index.contains({"sentence": TROPHY.replace("large", "small"), "other": 3})
    assert not index.contains({"sentence": "The suitcase is too small for the trophy and its large box of gold."})


def test_trigrams_must_be_shared_with_a_single_row() -> None:
    parts = ["one two three", "four five six", "seven eight nine"]
    whole = "one two three, four five six, seven eight nine"
    assert len(word_trigrams(whole)) == 7
    assert not NearDuplicateIndex(parts).contains(whole)  # each row has 1 of 7
    assert NearDuplicateIndex([*parts, "one two three four five"]).contains(whole)  # one row has 3 of 7


def test_empty_index_contains_nothing() -> None:
    assert not NearDuplicateIndex([]).contains({"sentence": "anything at all"})
    assert not NearDuplicateIndex(["a b c"]).contains("two words")


def test_trigrams_of_nested_values() -> None:
    row = {"a": "One, two three", "b": [{"c": "four five six seven"}, 8], "d": None}
    assert word_trigrams(row) == {("one", "two", "three"), ("four", "five", "six"), ("five", "six", "seven")}
