"""Encoded records in files that several processes map into memory: tokenised once, held once, whoever reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy

Record = dict[str, Any]
IDS, LABELS, ENDS, NAMES = "ids.i32", "labels.i32", "ends.i64", "names.json"


def write(records: Sequence[Record], folder: Path) -> None:
    """Write records {"id", "input_ids", "labels"} into a folder, which is made. Raises OSError."""
    folder.mkdir(parents=True)
    ends = numpy.cumsum([len(record["input_ids"]) for record in records], dtype="<i8")
    ends.tofile(folder / ENDS)
    for file, key in ((IDS, "input_ids"), (LABELS, "labels")):
        with (folder / file).open("wb") as stream:
            for record in records:
                numpy.asarray(record[key], dtype="<i4").tofile(stream)
    (folder / NAMES).write_text(json.dumps([record["id"] for record in records], ensure_ascii=False), encoding="utf-8")


class Stored(Sequence[Record]):
    """The records of a folder: each is read from the mapped files when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        self.ends = numpy.fromfile(folder / ENDS, dtype="<i8").tolist()
        self.ids, self.labels = (mapped(folder / file) for file in (IDS, LABELS))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, stop = self.ends[index - 1] if index else 0, self.ends[index]
        return {"id": self.names[index], "input_ids": self.ids[start:stop].tolist(), "labels": self.labels[start:stop].tolist()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return numpy.diff(self.ends, prepend=0).tolist() if self.ends else []


def lengths_of(records: Sequence[Record]) -> list[int]:
    """Tokens of each record, without reading those that lie in files."""
    return records.lengths if isinstance(records, Stored) else [len(record["input_ids"]) for record in records]


def mapped(path: Path) -> Any:
    """A file of int32 as an array that is not read before it is looked at."""
    return numpy.memmap(path, dtype="<i4", mode="r") if path.stat().st_size else numpy.empty(0, dtype="<i4")
