"""Which files a recipe means, and their text: strict encodings, caps on size, and nothing that could hang."""

import codecs
import hashlib
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tnl.data.pieces import PIECE
from tnl.errors import DataError
from tnl.paths import missing

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
MAX_LINE = 32 * 1024 * 1024
"""Characters a line of text may have."""
MAX_WHOLE = 512 * 1024 * 1024
"""Bytes of a file that is read at once (.json, a transcript)."""

LONG = 4 * 1024 * 1024
"""Bytes of a plain text that is not held in memory."""

BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
HAN = re.compile("[\u4e00-\u9fff]{2,}")


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read. sha256 is of its bytes: a file of the same size and time with other content is another."""

    path: Path
    sha256: str
    size: int


def find_files(paths: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The files of a path, a folder or a list of these, in order, and notices on what was passed over.

    Raises DataError for what is missing, is no regular file, or has another ending.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files: list[Path] = []
    notices: list[str] = []
    for path in map(Path, given):
        found, passed = folder_files(path) if kind_of(path) == "folder" else ([path], [])
        files += found
        if passed:
            more = " ..." if len(passed) > 5 else ""
            notices.append(f"{path}: passed over {', '.join(passed[:5])}{more} ({', '.join(SUFFIXES)} are read)")
    if not files:
        raise DataError("data.train", "names no file", "Give a file, a folder, or a list of these.")
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            todo = f"Use one of {', '.join(SUFFIXES)}."
            raise DataError(path, f"has an ending that is not read (found {path.suffix or 'none'})", todo)
    twice = [str(path) for path, times in Counter(path.resolve() for path in files).items() if times > 1]
    if twice:
        notices.append(f"named more than once, read as often: {', '.join(twice[:3])}")
    return files, notices


def kind_of(path: Path) -> str:
    """folder or file. Raises DataError for all else, without opening it: a FIFO would hang, /dev/zero would never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise DataError(path, f"is a link that leads nowhere (to {path.readlink()})", "Name the file itself.") from error
        if isinstance(error, PermissionError):
            raise DataError(path, "cannot be read (permission denied)", "Mend its permissions.") from error
        what, todo = missing(path)
        raise DataError(path, what, todo) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        raise DataError(path, "is no regular file (a pipe, a socket or a device)", "Write the records into a file first.")
    return "file"


def folder_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The readable files of a folder by name, and the names of the others; hidden ones and folders in it are others."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(folder, f"cannot be listed ({error.strerror})", "Mend its permissions.") from error
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")]
    files = [entry for entry in files if kind_of(entry) == "file"]
    if not files:
        raise DataError(folder, f"has no file of records ({len(entries)} entries)", f"Put {', '.join(SUFFIXES)} files into it.")
    return files, [entry.name for entry in entries if entry not in files]


def source_of(path: Path) -> Source:
    """Size and SHA-256. Raises DataError for an empty or unreadable file."""
    kind_of(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "Mend its permissions.") from error
    if size == 0:
        raise DataError(path, "no records (the file is empty)", "Put records into it.")
    return Source(path, digest, size)


def open_text(path: Path, encoding: str | None) -> TextIO:
    """The file as text, decoded strictly as UTF-8 (with or without a byte-order mark) or as the encoding given.

    Raises DataError where the bytes do not agree with it: what they look like is named, never assumed.
    """
    check_encoding(path, encoding)
    return path.open(encoding=encoding or "utf-8-sig", errors="strict", newline="")


def read_whole(path: Path, encoding: str | None) -> str:
    """The whole text, line ends as \\n."""
    size = path.stat().st_size
    if size > MAX_WHOLE:
        todo = "Write one record a line into a .jsonl file, or split it."
        raise DataError(path, f"is too large to be read at once (found {size:,} bytes; at most {MAX_WHOLE:,})", todo)
    with open_text(path, encoding) as file:
        return file.read().replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text that stays in its file: its encoding is right, its line ends are read as \\n."""

    path: Path
    encoding: str | None

    def blocks(self) -> Iterator[str]:
        """The text in blocks of PIECE characters."""
        with self.path.open(encoding=self.encoding or "utf-8-sig", errors="strict") as file:
            while block := file.read(PIECE):
                yield block


def text_of(path: Path, encoding: str | None) -> str | TextFile:
    """The text of a file of any size: where it is long, it is read when its turn comes."""
    if path.stat().st_size <= LONG:
        return read_whole(path, encoding)
    check_encoding(path, encoding)
    return TextFile(path, encoding)


def lines_of(path: Path, encoding: str | None) -> Iterator[str]:
    """The lines with their ends, memory flat. Raises DataError at a line over the cap."""
    with open_text(path, encoding) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                todo = "Split the record; a .txt file holds a text of any length."
                raise DataError(f"{path}:line {number}", f"is too long (more than {MAX_LINE:,} characters)", todo)
            yield line


def check_encoding(path: Path, encoding: str | None) -> None:
    """Refuse bytes that are not in the encoding, or are in another one beyond doubt."""
    try:
        codec = codecs.lookup(encoding or "utf-8-sig").name
    except LookupError as error:
        raise DataError("data.encoding", f"unknown encoding {encoding!r}", "Use a name such as utf-8, gb18030 or utf-16.") from error
    with path.open("rb") as file:
        head = file.read(4096)
    bom = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    wide = codec.startswith(("utf-16", "utf-32"))
    if not wide and (bom or b"\0" in head):
        looks = f"starts with the byte-order mark of {bom}" if bom else "looks like UTF-16 or a binary file: byte 0 occurs"
        name = (bom or "UTF-16").lower()
        raise DataError(path, f"is not UTF-8 ({looks})", f"Set data.encoding: {name}, or convert it: iconv -f {name} -t utf-8 {path.name}.")
    if not wide and not codec.startswith("utf-8") and not is_ascii(path) and first_bad_byte(path, "utf-8") is None:
        raise DataError(path, f"is valid UTF-8, though data.encoding says {encoding}", "Remove data.encoding, or convert the other files.")
    bad = first_bad_byte(path, codec)
    if bad is not None:
        raise DataError(path, *not_in(path, encoding, bad))


def first_bad_byte(path: Path, codec: str) -> tuple[int, int, int] | None:
    """Offset, value and line of the first byte that cannot be decoded; None where all can."""
    decoder = codecs.getincrementaldecoder(codec)("strict")
    offset, line = 0, 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            held = decoder.getstate()[0]
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:  # UTF-16 without its byte-order mark gives no place
                data = held + chunk
                at = min(getattr(error, "start", 0), max(len(data) - 1, 0))
                return offset - len(held) + at, data[at] if data else 0, line + data[:at].count(b"\n")
            if not chunk:
                return None
            offset += len(chunk)
            line += text.count("\n")


def not_in(path: Path, encoding: str | None, bad: tuple[int, int, int]) -> tuple[str, str]:
    """What is wrong with a file's encoding, and what to do."""
    offset, value, line = bad
    found = f"byte 0x{value:02X} at offset {offset:,}, line {line}"
    if encoding:
        return f"is not {encoding} ({found})", "Set data.encoding to the file's own."
    with path.open("rb") as file:
        file.seek(max(offset - 64, 0))
        near = file.read(4096)
    if first_bad_byte(path, "gb18030") is None and (han := HAN.search(near.decode("gb18030", "ignore"))):
        todo = f"Set data.encoding: gb18030, or convert it: iconv -f gb18030 -t utf-8 {path.name}."
        return f'is not UTF-8 ({found}; it looks like GB18030: "{han.group()[:12]}")', todo
    return f"is not UTF-8 ({found})", f"Name its encoding in data.encoding, or convert it: iconv -f ENCODING -t utf-8 {path.name}."


def is_ascii(path: Path) -> bool:
    """Whether every byte is below 128."""
    with path.open("rb") as file:
        return all(chunk.isascii() for chunk in iter(lambda: file.read(1 << 20), b""))
