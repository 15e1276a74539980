"""Records in mapped files are the records that were written."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tnl.data import store
from tnl.errors import StorageError

RECORDS = [
    {"id": "a.json:record 1", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"id": "b.json:record 2", "input_ids": [63999], "labels": [-100]},
    {"id": "记录 3", "input_ids": list(range(100)), "labels": list(range(100))},
]


def plain(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": record["id"], **{name: record[name].tolist() for name in ("input_ids", "labels")}} for record in records]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store.write(RECORDS, tmp_path / "train")
    stored = store.Stored(tmp_path / "train")
    assert len(stored) == 3 and plain(stored) == RECORDS and plain([stored[-1]]) == RECORDS[2:] and plain(stored[0:2]) == RECORDS[:2]
    assert stored.lengths == store.lengths_of(RECORDS) == store.lengths_of(stored) == [3, 1, 100]
    with pytest.raises(IndexError):
        stored[3]


def test_no_record_is_a_store_too(tmp_path: Path) -> None:
    store.write([], tmp_path / "eval")
    stored = store.Stored(tmp_path / "eval")
    assert not stored and list(stored) == [] and store.lengths_of(stored) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps files that are mapped")
def test_the_files_are_mapped_and_may_vanish(tmp_path: Path) -> None:
    store.write(RECORDS, tmp_path / "train")
    stored = store.Stored(tmp_path / "train")
    held = Path("/proc/self/maps")
    if held.exists():
        assert str(tmp_path / "train" / store.IDS) in held.read_text(encoding="utf-8")
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    assert plain(stored) == RECORDS


def test_a_room_takes_records_one_by_one_and_reads_them_back() -> None:
    room = store.Room()
    for record in RECORDS:
        room.add(*(numpy.array(record[name], "<i4") for name in ("input_ids", "labels")))
        assert room.ids(1, 3).tolist() == [2, 3]
    assert room.count == 104
    ids, labels = room.mapped()
    assert ids.tolist() == [i for record in RECORDS for i in record["input_ids"]]
    assert labels.tolist() == [i for record in RECORDS for i in record["labels"]]
    assert torch.from_numpy(ids[1:3]).data_ptr() == ids.ctypes.data + 4, "a tensor of it is the same memory"
    assert [x.tolist() for x in store.Room().mapped()] == [[], []]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_disk_that_is_full_is_said() -> None:
    room = Full()
    with pytest.raises(StorageError, match="No space left"):
        room.add(numpy.zeros(3, "<i4"), numpy.zeros(3, "<i4"))


class Full(store.Room):
    """A room on a device without space."""

    def __init__(self) -> None:
        self.files = [Path("/dev/full").open("wb", buffering=0) for _ in range(2)]  # noqa: SIM115
        self.count = 0
