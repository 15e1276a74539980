"""Rows of .json, .jsonl, .csv and .parquet files, each with the place that an error names."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tnl.data.files import MAX_LINE, lines_of, read_whole
from tnl.errors import DataError

MAX_KEYS = 1000
"""Keys an object may have."""
MAX_PARQUET = 8 * 1024**3
"""Bytes a parquet file may have after decompression, by its own account."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record as it stands in its file. `where` is FILE:record N or FILE:line N."""

    where: str
    value: dict[str, Any]


def rows_of(path: Path, encoding: str | None) -> Iterator[Row]:
    """The rows of a file by its ending. Raises DataError at the first that cannot be read."""
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    return readers[path.suffix.lower()](path, encoding)


class Refused(ValueError):
    """What JSON allows and records do not: said by the decoder's hooks, which do not know where they are."""


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, its keys unique: with two, which one counts would be anybody's guess."""
    if len(pairs) > MAX_KEYS:
        raise Refused(f"an object has too many keys (found {len(pairs):,}; at most {MAX_KEYS:,})")
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Refused(f'a key stands twice in one object ("{next(key for key in keys if keys.count(key) > 1)[:60]}")')
    return result


def skip(text: str, at: int) -> int:
    """Where the blanks that JSON allows at `at` end."""
    match = BLANKS.match(text, at)
    return match.end() if match else at


def no_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise Refused(f"{name} is not a JSON value")


BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder(object_pairs_hook=unique_pairs, parse_constant=no_constant)


def parse(text: str, at: int, where: str, in_line: bool = False) -> tuple[Any, int]:
    """A JSON value that begins at `at`, and where it ends. Raises DataError with line (unless in_line) and column."""
    try:
        return DECODER.raw_decode(text, skip(text, at))
    except json.JSONDecodeError as error:
        what, todo = explain(error)
        place = f"column {error.colno}" if in_line else f"line {error.lineno}, column {error.colno}"
        raise DataError(where, f"{place}: {what}", todo) from error
    except Refused as error:
        raise DataError(where, str(error), "Correct the record.") from error
    except RecursionError as error:
        raise DataError(where, "is nested too deeply", "Flatten the record.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(where, str(error).split(";")[0], "Write it as text.") from error


def explain(error: json.JSONDecodeError) -> tuple[str, str]:
    """What the decoder found, in a person's words, and what to do."""
    rest = error.doc[error.pos :]
    before = error.doc[: error.pos].rstrip()
    found = f" (found {rest[:20]!r})" if rest.strip() else ""
    if not rest.strip():
        return "the text ends in the middle of a record", "Complete it, or download the file again."
    if before.endswith(",") and rest[0] in "]}":
        return f'"{rest[0]}" after a comma', f'Remove the comma before "{rest[0]}".'
    if rest[0] in "]}" and "comma" in error.msg:
        return f'"{rest[0]}" after a comma', f'Remove the comma before "{rest[0]}".'
    if "trailing comma" in error.msg:
        return "a comma before the closing bracket", "Remove the comma."
    if "double quotes" in error.msg or rest[0] == "'":
        return f"a text without double quotes{found}", 'JSON writes keys and texts in double quotes: "instruction".'
    if "control character" in error.msg:
        return f"a line break or tab inside a text{found}", "Write it as \\n or \\t."
    if "Unterminated" in error.msg:
        todo = 'Close it with a double quote (within a text write \\"), or download the file again if its end is missing.'
        return f"a text is not closed{found}", todo
    if "delimiter" in error.msg:
        return f"{error.msg[0].lower()}{error.msg[1:]}{found}", "Look for a missing comma or an unescaped double quote before it."
    return f"{error.msg[0].lower()}{error.msg[1:]}{found}", "Correct it there."


def json_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """The objects of a JSON array; a .json file of one object a line is read as such."""
    text = read_whole(path, encoding)
    at = skip(text, 0)
    if at == len(text):
        raise DataError(path, "no records (the file is blank)", "Put records into it.")
    if text[at] == "{":
        yield from object_rows(path, text, at, encoding)
        return
    if text[at] != "[":
        raise DataError(path, f"is not JSON (it begins with {text[at : at + 10]!r}; needed [)", "A .json file holds a list of records.")
    at += 1
    number = 0
    while True:
        at = skip(text, at)
        if number == 0 and text[at : at + 1] == "]":
            break
        number += 1
        where = f"{path}:record {number}"
        value, at = parse(text, at, where)
        yield Row(where, record_object(value, where))
        at = skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line, column = position(text, at)
            found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
            todo = "Look for a missing comma or bracket there."
            raise DataError(where, f"line {line}, column {column}: after it needed a comma or ] (found {found})", todo)
        at += 1
    rest = skip(text, at + 1)
    if rest < len(text):
        line, column = position(text, rest)
        raise DataError(path, f"line {line}, column {column}: text after the list (found {text[rest : rest + 20]!r})", "Remove it.")


def position(text: str, at: int) -> tuple[int, int]:
    """Line and column, from 1."""
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def object_rows(path: Path, text: str, at: int, encoding: str | None) -> Iterator[Row]:
    """A .json file that begins with an object: one object a line is read; an object around the records is refused."""
    value, end = parse(text, at, str(path))
    if text[end:].strip():
        yield from jsonl_rows(path, encoding)
        return
    lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
    if lists and not {"messages", "conversations"} & set(lists):
        raise DataError(path, f'the records are wrapped in an object (under "{lists[0]}")', f'Keep the list under "{lists[0]}" alone.')
    raise DataError(path, f"is one object (found {shown_keys(value)}; needed a list of records)", "Put [ before it and ] after it.")


def jsonl_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """One object a line; blank lines are none."""
    for number, line in enumerate(lines_of(path, encoding), start=1):
        if not line.strip():
            continue
        where = f"{path}:line {number}"
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(where, "is a list (a .jsonl file holds one object a line)", "Name the file .json.")
        value, end = parse(line, 0, where, in_line=True)
        if line[end:].strip():
            raise DataError(where, f"column {end + 1}: text after the object (found {line[end:].strip()[:20]!r})", "One object a line.")
        yield Row(where, record_object(value, where))


def record_object(value: Any, where: str) -> dict[str, Any]:
    """The value, where it is an object."""
    if not isinstance(value, dict):
        raise DataError(where, f"is {type_name(value)} (needed an object)", 'A record is {"instruction": ..., "output": ...}.')
    return value


def csv_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """Rows under a header, cells as text: NA, None and null stay what they are."""
    before = csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines_of(path, encoding), strict=True)
    begins = 1
    try:
        header = next((row for row in reader if row), None)
        check_header(path, header)
        assert header is not None
        begins = reader.line_num + 1
        for row in reader:
            where, begins = f"{path}:line {begins}", reader.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                todo = "A comma within a cell needs double quotes around the cell."
                raise DataError(where, f"has {len(row)} cells (the header has {len(header)}: {', '.join(header)[:80]})", todo)
            yield Row(where, dict(zip(header, row)))
    except csv.Error as error:
        what = "a quote is not closed" if "unexpected end" in str(error) else str(error)
        raise DataError(f"{path}:line {begins}", what, 'A double quote within a cell is written twice: "".') from error
    finally:
        csv.field_size_limit(before)


def check_header(path: Path, header: list[str] | None) -> None:
    """Refuse a header that is missing, has a name twice, or is cut by another delimiter."""
    if header is None:
        raise DataError(path, "no records (the file is blank)", "Put a header and rows into it.")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path}:line 1", f'a column stands twice ("{twice}")', "Rename one of them.")
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
        name = "tabs" if other.group() == "\t" else other.group()
        raise DataError(f"{path}:line 1", f"the columns are separated by {name} (found {header[0][:40]!r})", "Save it with commas.")


def parquet_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """Rows of a parquet file, by number from 1."""
    # heavy, and needed for parquet alone
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if size > MAX_PARQUET:
            raise DataError(path, f"is too large (found {size:,} bytes decompressed; at most {MAX_PARQUET:,})", "Split it.")
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path}:record {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not a readable parquet file ({str(error)[:100]})", "Write it again.") from error


def type_name(value: Any) -> str:
    """What a value is, in a person's words."""
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
    ]
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def shown_keys(value: Mapping[str, Any]) -> str:
    """The keys for a message, cut where there are many."""
    keys = [str(key)[:40] for key in value]
    return (", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")) or "nothing"
