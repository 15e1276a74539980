"""Which records share a row: end to end, no padding, at most so many tokens a row; and which tokens all of them begin with."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from tnl.data.template import IGNORED

LEAST = 16
"""Tokens: to share fewer spares less than the second launch of every layer's attention takes."""


def pack(records: Sequence[Mapping[str, Any]], budget: int, shared: int = 0) -> list[list[Mapping[str, Any]]]:
    """Records in rows, as `pack_lengths` says."""
    return [[records[i] for i in row] for row in pack_lengths([len(record["input_ids"]) for record in records], budget, shared)]


def pack_lengths(lengths: Sequence[int], budget: int, shared: int = 0) -> list[list[int]]:
    """Indices in rows of at most `budget` tokens by best fit decreasing; what is longer has a row of its own.

    shared: the first tokens of every length, which a row has but once. All in one row where they fit. Every index stands in exactly one
    row; rows and the indices in them keep the order given, so the result depends on nothing but the arguments. Raises ValueError for a
    budget below 1.
    """
    if budget < 1:
        raise ValueError("a row holds at least one token")
    lengths, budget = [length - shared for length in lengths], max(budget - shared, 1)
    if sum(lengths) <= budget:
        return [list(range(len(lengths)))] if lengths else []
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            rows.append([i])
            insort(room, (max(budget - lengths[i], 0), len(rows) - 1))
        else:
            free, row = room.pop(at)
            rows[row].append(i)
            insort(room, (free - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def shared_tokens(records: Sequence[Mapping[str, Any]]) -> int:
    """How many tokens all records begin with and none learns, nor the token behind them: that one is predicted from the last of them."""
    if not records:
        return 0
    first = numpy.asarray(records[0]["input_ids"])
    count = len(first)
    for record in records:
        ids, labels = (numpy.asarray(record[name]) for name in ("input_ids", "labels"))
        count = max(min(count, len(ids) - 1), 0)
        ends = numpy.flatnonzero((ids[:count] != first[:count]) | (labels[1 : count + 1] != IGNORED))
        if len(ends):
            count = int(ends[0])
        if not count:
            break
    return count
