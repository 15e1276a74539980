"""Records into tensors: end to end in one row, or padded side by side (the form to compare with)."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for record in row:
        size = len(record["input_ids"])
        ids += record["input_ids"]
        labels += [IGNORED, *record["labels"][1:]][:size]
        positions += range(size)
    fill = -len(ids) % multiple
    ids += [pad_id] * fill
    labels += [IGNORED] * fill
    positions += range(fill)
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "position_ids": torch.tensor([positions])}
    if "draw" in row[0]:
        keys = [token_keys(record["draw"], torch.arange(len(record["input_ids"]))) for record in row]
        batch["dropout_keys"] = torch.cat([*keys, torch.zeros(fill, dtype=torch.int32)])[None]
    return batch


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
        ids[i, :size] = torch.tensor(record["input_ids"])
        labels[i, 1:size] = torch.tensor(record["labels"][1:], dtype=torch.int64)
        mask[i, :size] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if "draw" in records[0]:
        batch["dropout_keys"] = torch.stack([token_keys(record["draw"], torch.arange(longest)) for record in records])
    return batch
