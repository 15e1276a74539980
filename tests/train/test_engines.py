"""How the records of a step are shared out."""

import torch

from tnl.train.crew import Crew
from tnl.train.engines import Engine


def shares(lengths: list[int], size: int) -> list[list[int]]:
    records = [{"id": index, "input_ids": [0] * length, "labels": []} for index, length in enumerate(lengths)]
    return [[record["id"] for record in Engine(Crew(rank, size), torch.device("cpu")).share(records)] for rank in range(size)]


def test_every_record_is_one_process_s() -> None:
    lengths = [7, 1, 30, 4, 4, 9, 12, 3, 3, 3]
    for size in (1, 2, 3, 8, 16):
        parts = shares(lengths, size)
        assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
        assert all(part == sorted(part) for part in parts)
        sums = [sum(lengths[index] for index in part) for part in parts]
        assert max(sums) <= max(max(lengths), 4 / 3 * sum(lengths) / size)  # Graham's bound for the longest first


def test_one_process_keeps_the_order() -> None:
    assert shares([3, 9, 1], 1) == [[0, 1, 2]]
