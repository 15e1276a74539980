"""Which records each optimizer step takes: a function of the seed and the epoch alone, so that a resumed run goes on where it was."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tnl.data.packing import pack_lengths
from tnl.recipe.sections import DataSection, TrainSection
from tnl.train.step import seed_of

UNITS = {"batch": "records", "fill": "rows", "none": "records"}
"""What batch sizes count, by data.packing."""
FEW = 50
"""Optimizer steps of a run that teaches little."""


class StepSampler(Sampler[list[int]]):
    """Batches of record indices, one a step. Draws from no global generator.

    units: what is drawn, lists of record indices (`units_of`); None: single records. size: units a step.
    strategy: random, sequential or group_by_length (units of like length together, which spares padding).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        seed: int,
        strategy: str = "random",
        drop_last: bool = False,
        units: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.units = [[i] for i in range(len(lengths))] if units is None else units
        self.lengths = [sum(lengths[i] for i in unit) for unit in self.units]
        self.size, self.seed, self.strategy, self.drop_last = size, seed, strategy, drop_last
        self.epoch = 0

    @property
    def batch_sampler(self) -> "StepSampler":
        """Where Trainer looks for set_epoch, in a loader that skips batches and in one that does not."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """All units in this epoch's order."""
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(seed_of(self.seed, f"order {self.epoch}"))
        if self.strategy == "group_by_length":
            return get_length_grouped_indices(self.lengths, self.size, generator=generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for i in range(0, len(self) * self.size, self.size):
            yield [record for unit in order[i : i + self.size] for record in self.units[unit]]

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.size)
        return full + bool(rest and not self.drop_last)


class Batch:
    """The records of one optimizer step; a class of its own, so that nobody takes it for tensors to move."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.tokens = sum(len(record["input_ids"]) for record in records)

    @property
    def ids(self) -> list[str]:
        """The records' names, in order."""
        return [str(record["id"]) for record in self.records]


def units_of(data: DataSection, lengths: Sequence[int], budget: int, shared: int = 0) -> list[list[int]]:
    """What batch sizes count: records, or with data.packing fill rows of them, of `budget` tokens where the recipe leaves it open.

    shared: tokens that all records begin with and a row has once.
    """
    return pack_lengths(lengths, data.row_tokens or budget, shared) if data.packing == "fill" else [[i] for i in range(len(lengths))]


def steps_an_epoch(section: TrainSection, records: int, size: int) -> int:
    """Optimizer steps of `size` records in an epoch; the last one may have fewer records."""
    full, rest = divmod(records, size)
    return full + bool(rest and not section.dataloader_drop_last)


def epochs(section: TrainSection, records: int, size: int) -> float:
    """Epochs of the run: the recipe's, and as many more as train.min_steps wants."""
    return max(section.num_train_epochs, -(-(section.min_steps or 0) // max(steps_an_epoch(section, records, size), 1)))


def count_steps(section: TrainSection, records: int, size: int) -> int:
    """Optimizer steps of the run."""
    if section.max_steps > 0:
        return section.max_steps
    return math.ceil(steps_an_epoch(section, records, size) * epochs(section, records, size))


def words(section: TrainSection, records: int, size: int, what: str = "records") -> str:
    """How many steps there will be, and what to do where they are few, in one line. what: are counted, records or rows."""
    steps, each, times = count_steps(section, records, size), steps_an_epoch(section, records, size), epochs(section, records, size)
    line = f"{steps:,} optimizer steps of {size} {what} ({each:,} an epoch)"
    if section.max_steps > 0:
        return line
    if times > section.num_train_epochs:
        line += f"; {times:,} epochs instead of {section.num_train_epochs:g}, because train.min_steps is {section.min_steps:,}"
    if steps < FEW:
        line += f"; so few teach little: train.min_steps={2 * FEW} adds epochs, a smaller train.gradient_accumulation_steps adds steps"
    return line
