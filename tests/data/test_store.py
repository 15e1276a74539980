"""Records in mapped files are the records that were written."""

import os
from pathlib import Path

import pytest

from tnl.data import store

RECORDS = [
    {"id": "a.json:record 1", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"id": "b.json:record 2", "input_ids": [63999], "labels": [-100]},
    {"id": "记录 3", "input_ids": list(range(100)), "labels": list(range(100))},
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store.write(RECORDS, tmp_path / "train")
    stored = store.Stored(tmp_path / "train")
    assert len(stored) == 3 and list(stored) == RECORDS and stored[-1] == RECORDS[2] and stored[0:2] == RECORDS[:2]
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
    assert list(stored) == RECORDS
