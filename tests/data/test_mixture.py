"""nybble.data.mixture: shares, repetition, seeds, and what the option accepts."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.data.mixture import Mixture, require_conversations
from nybble.data.packing import TokenRows
from nybble.errors import DataError, OptionError
from tests.helpers.chat import CONVERSATION


def parts_of(sizes: list[int]) -> list[TokenRows]:
    """Rows whose tokens are all 1000 * source + number."""
    return [
        TokenRows.of((1000 * i + torch.arange(size))[:, None].expand(-1, 4).contiguous())
        for i, size in enumerate(sizes)
    ]


def drawn_numbers(rows: TokenRows) -> list[int]:
    return rows.ids[:, 0].tolist()


sources = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 20)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_every_source_gives_its_share_within_one_row(
    described: list[tuple[int, float]], wanted: int, seed: int
) -> None:
    sizes, shares = [size for size, _ in described], [share for _, share in described]
    mixture = Mixture([f"s{i}" for i in range(len(sizes))], shares)
    drawn = drawn_numbers(mixture.draw(parts_of(sizes), wanted, seed))
    assert len(drawn) == wanted
    for i, (size, share) in enumerate(described):
        own = [number for number in drawn if number // 1000 == i]
        assert abs(len(own) - wanted * share / sum(shares)) <= 1
        repeats = [own.count(number) for number in set(own)]
        assert max(repeats, default=0) - (min(repeats) if len(set(own)) == size else 0) <= 1, (
            "no row is drawn again before all rows of its source are"
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_without_shares_no_row_is_drawn_twice(sizes: list[int], wanted: int, seed: int) -> None:
    drawn = drawn_numbers(Mixture([f"s{i}" for i in range(len(sizes))]).draw(parts_of(sizes), wanted, seed))
    assert len(drawn) == len(set(drawn)) == min(wanted, sum(sizes))


@pytest.mark.parametrize("shares", [None, [3.0, 1.0]])
def test_the_draw_depends_on_the_seed_alone(shares: list[float] | None) -> None:
    mixture, parts = Mixture(["a", "b"], shares), parts_of([100, 100])
    drawn = drawn_numbers(mixture.draw(parts, 40, 0))
    torch.rand(5)
    assert drawn == drawn_numbers(mixture.draw(parts, 40, 0))
    assert drawn != drawn_numbers(mixture.draw(parts, 40, 1))
    assert {number // 1000 for number in drawn[:20]} == {0, 1}, "mixed, not one source after the other"


def test_a_source_with_too_few_rows_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "nybble"):
        drawn = drawn_numbers(Mixture.parse(["many=3", "few=1"]).draw(parts_of([100, 4]), 40, 0))
    assert sorted(drawn.count(1000 + i) for i in range(4)) == [2, 2, 3, 3]
    assert "--data few has 4 sequences and its share asks for 10; some are used more than once" in caplog.text
    assert "many" not in caplog.text


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(0, 100))
def test_evaluation_rows_are_never_used_twice(described: list[tuple[int, float]], count: int) -> None:
    sizes = [size for size, _ in described]
    mixture = Mixture([f"s{i}" for i in range(len(sizes))], [share for _, share in described])
    rows = drawn_numbers(mixture.evaluation_rows(parts_of(sizes), count))
    assert len(rows) == len(set(rows))
    assert len(rows) <= count or count == 0
    assert len(rows) >= min(count or sum(sizes), min(sizes))


def test_evaluation_rows_of_one_source_are_its_first_ones() -> None:
    mixture, parts = Mixture.parse(["a"]), parts_of([10])
    assert drawn_numbers(mixture.evaluation_rows(parts, 3)) == [0, 1, 2]
    assert drawn_numbers(mixture.evaluation_rows(parts, 0)) == list(range(10))


def test_evaluation_rows_of_several_sources_follow_their_shares() -> None:
    parts = parts_of([100, 100])
    rows = drawn_numbers(Mixture.parse(["a=0.9", "b=0.1"]).evaluation_rows(parts, 0))
    assert (len(rows), sum(number >= 1000 for number in rows)) == (111, 11)
    assert len(Mixture.parse(["a", "b"]).evaluation_rows(parts, 0)) == 200


def test_a_source_that_leaves_little_to_measure_on_is_named(caplog: pytest.LogCaptureFixture) -> None:
    mixture = Mixture.parse(["many=0.5", "few=0.5"])
    assert len(mixture.evaluation_rows(parts_of([100, 2]), 50)) == 4
    assert "only 4 of 50 sequences are measured on: few has 2" in caplog.text
    caplog.clear()
    assert len(mixture.evaluation_rows(parts_of([100, 80]), 0)) == 160
    assert not caplog.text


def test_entries_are_names_with_shares_or_without() -> None:
    assert Mixture.parse(["wikitext2=0.7", "chat.jsonl=3"]) == Mixture(["wikitext2", "chat.jsonl"], [0.7, 3.0])
    assert Mixture.parse(["a", "b"]) == Mixture(["a", "b"])


def test_an_existing_file_with_an_equals_sign_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "step=100.txt"
    path.write_text("x")
    assert Mixture.parse([str(path)]) == Mixture([str(path)])
    assert Mixture.parse([f"{path}=2", "b=1"]) == Mixture([str(path), "b"], [2.0, 1.0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a=0.5", "b"], "NAME=SHARE for every source"),
        (["a=x", "b=1"], "NAME=SHARE for every source"),
        (["a=0", "b=1"], "shares above 0"),
        (["a=-1"], "shares above 0"),
        (["a=inf"], "shares above 0"),
        (["a=nan"], "shares above 0"),
        (["a=1", "a=2"], "every source once; got a more than once"),
        ([""], "name every source; got an empty name"),
        ([" "], "name every source"),
        (["=0.5"], "name every source; got =0.5"),
        ([], "name at least one source"),
    ],
)
def test_malformed_entries_are_refused_with_the_option(entries: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=f"--eval_data must .*{message}"):
        Mixture.parse(entries, "--eval_data")


def test_assistant_only_loss_needs_a_source_with_conversations() -> None:
    with pytest.raises(DataError, match="; a and b are plain text; leave out --assistant_only_loss"):
        require_conversations({"a": ["plain text"], "b": ["more"]})
    with pytest.raises(DataError, match="; a is plain text"):
        require_conversations({"a": ["plain text"]})
    require_conversations({"a": ["plain text"], "b": [CONVERSATION]})
