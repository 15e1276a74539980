import numpy
import pytest
import torch

from tnl.data.collate import collate_long, collate_padded, collate_rows, record_keys

RECORDS = [
    {"id": "a", "input_ids": [5, 6, 0, 2], "labels": [-100, -100, 0, 2]},
    {"id": "b", "input_ids": [7, 8], "labels": [7, 8]},
]


def test_a_row_restarts_positions_and_never_learns_a_records_first_token() -> None:
    row = collate_rows(RECORDS)
    assert row["input_ids"].tolist() == [[5, 6, 0, 2, 7, 8]]
    assert row["labels"].tolist() == [[-100, -100, 0, 2, -100, 8]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in row.values())


def test_a_row_filled_up_to_a_multiple_ends_in_a_segment_of_its_own() -> None:
    row = collate_rows(RECORDS, multiple=4, pad_id=9)
    assert row["input_ids"].tolist()[0][6:] == [9, 9]
    assert row["labels"].tolist()[0][6:] == [-100, -100]
    assert row["position_ids"].tolist()[0][6:] == [0, 1]


def test_a_row_has_what_its_records_share_once() -> None:
    records = [{"id": str(i), "input_ids": [5, 6, i, i], "labels": [-100, -100, -100, i]} for i in (7, 8, 9)]
    row = collate_rows(records, shared=2, multiple=3, pad_id=1)
    assert row["input_ids"].tolist() == [[5, 6, 7, 7, 8, 8, 9, 9, 1]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 2, 3, 0]]
    assert row["labels"].tolist() == [[-100, -100, -100, 7, -100, 8, -100, 9, -100]]


def test_tokens_that_are_shared_are_dropped_alike() -> None:
    """In a row that has them once, in rows that do not, and in segments."""
    records = [{**record, "draw": i, "shared_draw": (2, 77)} for i, record in enumerate([*RECORDS, RECORDS[0]])]
    keys = collate_rows(records)["dropout_keys"][0]
    assert torch.equal(keys[:2], keys[4:6]) and torch.equal(keys[:2], keys[6:8]) and keys[2] != keys[8]
    assert torch.equal(collate_padded(records, 0)["dropout_keys"][0], keys[:4])
    assert torch.equal(record_keys(collate_long(records[2]), torch.arange(1, 4)), keys[7:])
    assert torch.equal(collate_rows(records[::2], shared=2)["dropout_keys"][0], torch.cat([keys[:4], keys[8:]]))


@pytest.mark.parametrize("multiple", [1, 8])
def test_padding_masks_by_length_not_by_id(multiple: int) -> None:
    batch = collate_padded(RECORDS, 0, multiple=multiple)
    assert batch["input_ids"].shape == (2, 4 if multiple == 1 else 8)
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["labels"][0, :4].tolist() == [-100, -100, 0, 2] and batch["labels"][1, :4].tolist() == [-100, 8, -100, -100]


def test_packed_and_padded_supervise_the_same_tokens() -> None:
    packed, padded = collate_rows(RECORDS)["labels"], collate_padded(RECORDS, 0)["labels"]
    assert packed[packed != -100].tolist() == padded[padded != -100].tolist()


def test_arrays_make_the_same_rows_as_lists() -> None:
    arrays = [{**r, **{name: numpy.array(r[name], "<i4") for name in ("input_ids", "labels")}} for r in RECORDS]
    for collate in (collate_rows, lambda records: collate_padded(records, 9)):
        for name, tensor in collate(RECORDS).items():
            assert torch.equal(collate(arrays)[name], tensor) and collate(arrays)[name].dtype == torch.int64


def test_a_long_record_is_not_copied() -> None:
    record = {"id": "a", "input_ids": numpy.arange(5, dtype="<i4"), "labels": numpy.arange(5, dtype="<i4"), "draw": 7}
    row = collate_long(record)
    assert row["input_ids"].data_ptr() == record["input_ids"].ctypes.data and row["labels"].shape == (1, 5)
    assert int(row["draw"]) == 7 and set(collate_long(RECORDS[0])) == {"input_ids", "labels"}
