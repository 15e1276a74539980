"""Records into tensors: end to end in one row, or padded side by side (the form to compare with)."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy
import torch
from torch import Tensor

from tnl.data.template import IGNORED
from tnl.kernels.lora import token_keys


def collate_rows(row: Sequence[Mapping[str, Any]], *, shared: int = 0, multiple: int = 1, pad_id: int = 0) -> dict[str, Tensor]:
    """One row of records end to end: input_ids, labels, position_ids, each [1, T] int64.

    Positions restart at 0 with every record, which is how transformers marks packed rows. The first label of a record is -100:
    after the shift by one it would be learned from the record before. Of the first `shared` tokens, where all records begin with them,
    the row has those of its first record alone; the others go on behind them, at position `shared`, and the row says so ("shared", a
    number). `multiple` fills up with pad_id as a segment of its own, not learned.
    Records that carry a number "draw" give dropout_keys, [1, T] int32: their tokens' masks are the same in any row (kernels/lora.py).
    """
    begins = [shared * (i > 0) for i in range(len(row))]
    sizes = [len(record["input_ids"]) - begin for record, begin in zip(row, begins)]
    fill = -sum(sizes) % multiple
    ids = torch.full((1, sum(sizes) + fill), pad_id)
    labels = torch.full_like(ids, IGNORED)
    for record, begin, size, stop in zip(row, begins, sizes, accumulate(sizes)):
        start = stop - size
        ids[0, start:stop] = as_tensor(record["input_ids"])[begin:]
        labels[0, start + 1 : stop] = as_tensor(record["labels"])[begin + 1 :]
    places = [torch.arange(begin, begin + size) for begin, size in zip(begins, sizes)]
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.cat([*places, torch.arange(fill)])[None]}
    if shared:
        batch["shared"] = torch.tensor(shared)
    if "draw" in row[0]:
        keys = [record_keys(record, where) for record, where in zip(row, places)]
        batch["dropout_keys"] = torch.cat([*keys, torch.zeros(fill, dtype=torch.int32)])[None]
    return batch


def collate_long(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """A record alone in its row, nothing made or copied: input_ids and labels [1, T] as the record holds them (its first label is never
    learned), and where its dropout comes from, if it says so. For long_sequence.py, which takes a segment at a time.
    """
    batch = {name: as_tensor(record[name])[None] for name in ("input_ids", "labels")}
    return batch | {name: torch.tensor(record[name]) for name in ("draw", "shared_draw") if name in record}


def record_keys(record: Mapping[str, Any], positions: Tensor) -> Tensor:
    """[T] int32: what the dropout masks of a record's tokens at these positions [T] come from: its number "draw", or where it has a
    "shared_draw" (tokens, number) that number for the first tokens, so that these are dropped alike in every record.
    """
    keys = token_keys(int(record["draw"]), positions)
    if "shared_draw" not in record:
        return keys
    tokens, draw = (int(x) for x in record["shared_draw"])
    return torch.where(positions < tokens, token_keys(draw, positions), keys)


def as_tensor(ids: Any) -> Tensor:
    """Ids as a tensor: of an array, mapped or not, the same memory."""
    return torch.from_numpy(numpy.asarray(ids))


def collate_padded(records: Sequence[Mapping[str, Any]], pad_id: int, *, multiple: int = 1) -> dict[str, Tensor]:
    """One record a row, padded on the right to the longest: input_ids, labels, attention_mask, each [B, T] int64.

    The mask comes from lengths: pad_id is `<unk>`, which may stand in a record too. dropout_keys as collate_rows.
    """
    longest = max(len(record["input_ids"]) for record in records)
    longest += -longest % multiple
    ids = torch.full((len(records), longest), pad_id)
    labels = torch.full((len(records), longest), IGNORED)
    mask = torch.zeros(len(records), longest, dtype=torch.int64)
    for i, record in enumerate(records):
        size = len(record["input_ids"])
        ids[i, :size] = as_tensor(record["input_ids"])
        labels[i, 1:size] = as_tensor(record["labels"])[1:]
        mask[i, :size] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if "draw" in records[0]:
        batch["dropout_keys"] = torch.stack([record_keys(record, torch.arange(longest)) for record in records])
    return batch
