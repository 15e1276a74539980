"""Records into tensors: end to end in one row, or padded side by side (the form to compare with)."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy
import torch
from torch import Tensor

from tnl.data.template import IGNORED
from tnl.kernels.lora import token_keys


def collate_rows(row: Sequence[Mapping[str, Any]], *, multiple: int = 1, pad_id: int = 0) -> dict[str, Tensor]:
    """One row of records end to end: input_ids, labels, position_ids, each [1, T] int64.

    Positions restart at 0 with every record, which is how transformers marks packed rows. The first label of a record is -100:
    after the shift by one it would be learned from the record before. `multiple` fills up with pad_id as a segment of its own, not learned.
    Records that carry a number "draw" give dropout_keys, [1, T] int32: their tokens' masks are the same in any row (kernels/lora.py).
    """
    sizes = [len(record["input_ids"]) for record in row]
    fill = -sum(sizes) % multiple
    ids = torch.full((1, sum(sizes) + fill), pad_id)
    labels = torch.full_like(ids, IGNORED)
    for record, size, stop in zip(row, sizes, accumulate(sizes)):
        start = stop - size
        ids[0, start:stop] = as_tensor(record["input_ids"])
        labels[0, start + 1 : stop] = as_tensor(record["labels"])[1:size]
    positions = torch.cat([torch.arange(size) for size in (*sizes, fill)])[None]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if "draw" in row[0]:
        keys = [token_keys(record["draw"], torch.arange(len(record["input_ids"]))) for record in row]
        batch["dropout_keys"] = torch.cat([*keys, torch.zeros(fill, dtype=torch.int32)])[None]
    return batch


def collate_long(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """A record alone in its row, nothing made or copied: input_ids and labels [1, T] as the record holds them (its first label is never
    learned), and its number "draw", where it has one. For long_sequence.py, which takes a segment at a time.
    """
    batch = {name: as_tensor(record[name])[None] for name in ("input_ids", "labels")}
    return batch | ({"draw": torch.tensor(record["draw"])} if "draw" in record else {})


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
        batch["dropout_keys"] = torch.stack([token_keys(record["draw"], torch.arange(longest)) for record in records])
    return batch
