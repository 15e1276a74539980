from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnl.data.packing import pack, shared_tokens


def records(lengths: list[int]) -> list[dict]:
    return [{"id": str(i), "input_ids": [7] * length, "labels": [7] * length} for i, length in enumerate(lengths)]


def ids(rows: list) -> list[list[str]]:
    return [[record["id"] for record in row] for row in rows]


def test_what_fits_is_one_row_in_order() -> None:
    assert ids(pack(records([3, 1, 2]), 6)) == [["0", "1", "2"]]
    assert pack([], 6) == []


def test_best_fit_decreasing_leaves_no_needless_row() -> None:
    assert ids(pack(records([5, 6, 4, 5]), 10)) == [["0", "3"], ["1", "2"]]


def test_a_record_longer_than_a_row_stands_alone() -> None:
    assert ids(pack(records([30, 4, 5]), 10)) == [["0"], ["1", "2"]]


def test_what_all_begin_with_counts_once_a_row() -> None:
    assert ids(pack(records([8, 9, 7]), 14, shared=5)) == [["0", "1", "2"]]
    assert ids(pack(records([8, 9, 7]), 10, shared=5)) == [["0", "2"], ["1"]]
    assert ids(pack(records([8, 9]), 4, shared=5)) == [["0"], ["1"]]  # nothing fits: each has a row of its own


PROMPT = [3, 1, 4, 1, 5, 9]


def asked(change: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Three records of one prompt, each going on with its number, which is not learned, and two tokens that are."""
    made = [{"id": str(i), "input_ids": [*PROMPT, i, 7, 8], "labels": [-100] * 7 + [7, 8]} for i in range(3)]
    change(made)
    return made


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda made: None, 6),
        (lambda made: made[1]["input_ids"].__setitem__(4, 99), 4),
        (lambda made: made[1]["labels"].__setitem__(6, 1), 5),  # what predicts it would be shared
        (lambda made: made[2]["labels"].__setitem__(2, 4), 1),
        (lambda made: made[2]["labels"].__setitem__(0, 3), 6),  # nothing predicts a record's first token
        (lambda made: made[1].update(input_ids=PROMPT[:4], labels=[-100] * 4), 3),  # something has to go on
        (lambda made: made.append({"id": "empty", "input_ids": [], "labels": []}), 0),
        (lambda made: made.clear(), 0),
    ],
)
def test_what_records_begin_with(change: Callable[[list[dict[str, Any]]], None], count: int) -> None:
    assert shared_tokens(asked(change)) == count


def test_a_row_holds_something() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack(records([1]), 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64))
def test_every_record_once_and_no_row_over_budget(lengths: list[int], budget: int) -> None:
    rows = pack(records(lengths), budget)
    assert sorted(int(i) for row in ids(rows) for i in row) == list(range(len(lengths)))
    assert rows == pack(records(lengths), budget)
    sizes = [[len(record["input_ids"]) for record in row] for row in rows]
    assert all(sum(row) <= budget or len(row) == 1 for row in sizes)
    # first fit decreasing's bound holds for best fit too: 11/9 of the optimum and 1 row, and the optimum is at least the sum
    if lengths and max(lengths) <= budget // 2:
        assert len(rows) <= 1.5 * sum(lengths) / budget + 1
