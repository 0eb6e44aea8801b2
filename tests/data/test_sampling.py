"""nybble.data.sampling: the order of sequences, and duplicates among them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.data.sampling import distinct_rows, draw_order


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_every_sequence_is_drawn_once_per_pass(available: int, wanted: int, seed: int) -> None:
    order = draw_order(available, wanted, seed).tolist()
    assert len(order) == wanted
    for start in range(0, wanted, available):
        drawn = order[start : start + available]
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(available))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 100))
def test_the_first_draws_do_not_depend_on_how_many_follow(available: int, one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert torch.equal(draw_order(available, more, 3)[:fewer], draw_order(available, fewer, 3))


def test_the_order_depends_on_the_seed_alone_and_changes_from_pass_to_pass() -> None:
    order = draw_order(10, 25, 3)
    torch.rand(5)
    assert torch.equal(order, draw_order(10, 25, 3))
    assert not torch.equal(order, draw_order(10, 25, 4))
    assert order[:10].tolist() != order[10:20].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=20))
def test_distinct_rows_give_the_rows_back(rows: list[list[int]]) -> None:
    ids_ST = torch.tensor(rows)
    first_U, index_S = distinct_rows(ids_ST)
    assert torch.equal(ids_ST[first_U][index_S], ids_ST)
    assert first_U.tolist() == [i for i, row in enumerate(rows) if row not in rows[:i]]


def test_no_rows_have_no_distinct_rows() -> None:
    first_U, index_S = distinct_rows(torch.empty(0, 4, dtype=torch.int64))
    assert (first_U.tolist(), index_S.tolist()) == ([], [])
    assert first_U.dtype == index_S.dtype == torch.int64
