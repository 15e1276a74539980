"""Encoded records in files that are mapped into memory: tokenised once, held once, whoever reads them, and however long they are."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy

from tnl.storage import storage

Record = dict[str, Any]
Ids = numpy.ndarray
"""[T] int32: a record's ids, or its labels."""
IDS, LABELS, ENDS, NAMES = "ids.i32", "labels.i32", "ends.i64", "names.json"


class Room:
    """Ids and labels, put end to end into two files that vanish with the process; mapped once all are there."""

    def __init__(self) -> None:
        with storage(Path(tempfile.gettempdir())):
            self.files = [tempfile.TemporaryFile(prefix="tnl-data-") for _ in (IDS, LABELS)]  # noqa: SIM115  closed with the last record
        self.count = 0
        """Tokens so far."""

    def add(self, ids: Ids, labels: Ids) -> None:
        """Put as many ids and labels behind those that are there. Raises StorageError."""
        with storage(Path(tempfile.gettempdir()), ids.nbytes + labels.nbytes):
            for file, values in zip(self.files, (ids, labels)):
                file.write(values.astype("<i4", copy=False).data)
        self.count += len(ids)

    def ids(self, start: int, stop: int) -> Ids:
        """Ids start ... stop - 1, read back."""
        file = self.files[0]
        file.seek(4 * start)
        data = file.read(4 * (stop - start))
        file.seek(0, 2)
        return numpy.frombuffer(data, dtype="<i4")

    def mapped(self) -> tuple[Ids, Ids]:
        """All ids and all labels; slices of them lie in the files too."""
        for file in self.files:
            file.flush()
        ids, labels = (mapped(file, self.count) for file in self.files)
        return ids, labels


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
        tokens = self.ends[-1] if self.ends else 0
        self.ids, self.labels = (mapped(folder / file, tokens) for file in (IDS, LABELS))

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
        return {"id": self.names[index], "input_ids": self.ids[start:stop], "labels": self.labels[start:stop]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return numpy.diff(self.ends, prepend=0).tolist() if self.ends else []


def lengths_of(records: Sequence[Record]) -> list[int]:
    """Tokens of each record, without reading those that lie in files."""
    return records.lengths if isinstance(records, Stored) else [len(record["input_ids"]) for record in records]


def mapped(file: Any, count: int) -> Ids:
    """So many int32 of a file (a path, or open), none of them read before it is looked at; what is written there stays in memory."""
    return numpy.asarray(numpy.memmap(file, dtype="<i4", mode="c", shape=(count,))) if count else numpy.empty(0, dtype="<i4")
