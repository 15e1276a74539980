import os
from pathlib import Path

import pytest

from tnl.data.files import TextFile, check_encoding, find_files, lines_of, read_whole, source_of, text_of
from tnl.errors import DataError

RECORD = '[{"instruction": "你是谁", "output": "甄嬛"}]'


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_a_folder_is_its_files_by_name_and_says_what_it_passes_over(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "README.md", ".hidden.json"):
        write(tmp_path / name, RECORD)
    files, notices = find_files(tmp_path)
    assert [path.name for path in files] == ["a.json", "b.jsonl"]
    assert len(notices) == 1 and "README.md" in notices[0] and ".hidden.json" in notices[0]


def test_a_list_mixes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    one, two = write(tmp_path / "x.csv", "text\na\n"), write(tmp_path / "d" / "y.txt", "a")
    assert find_files([one, tmp_path / "d", str(one)])[0] == [one, two, one]
    assert "more than once" in find_files([one, one])[1][0]


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "ok.json", RECORD)
    with pytest.raises(DataError, match=r"^[^:]*: no such file\. Did you mean .*ok\.json"):
        find_files(tmp_path / "okk.json")


@pytest.mark.parametrize("name", ["x.md", "x.tsv", "x"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="has an ending that is not read"):
        find_files(write(tmp_path / name, RECORD))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, said in (("pipe", "no regular file"), ("zero", "no regular file"), ("link", "leads nowhere"), ("loop", "leads nowhere")):
        with pytest.raises(DataError, match=said):
            find_files(tmp_path / f"{name}.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of records"):
        find_files(tmp_path / "empty")
    with pytest.raises(DataError, match="names no file"):
        find_files([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", RECORD)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        source_of(path)


def test_new_content_of_the_same_size_is_another_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "aaaa")
    before, stat = source_of(path), path.stat()
    write(path, "bbbb")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_of(path).size == before.size and source_of(path).sha256 != before.sha256


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        source_of(write(tmp_path / "a.json", ""))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_or_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    assert read_whole(write(tmp_path / "a.txt", RECORD + "\r\n", encoding), None) == RECORD + "\n"


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_named_and_never_assumed(tmp_path: Path, encoding: str) -> None:
    text = "caf\u00e9, na\u00efve" if encoding == "latin-1" else RECORD
    path = write(tmp_path / "a.json", text, encoding)
    with pytest.raises(DataError) as caught:
        check_encoding(path, None)
    message = str(caught.value)
    assert message.startswith(f"{path}: is not UTF-8 (") and "\n" not in message
    said = {"gb18030": '"你是谁"', "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-32": "UTF-32", "latin-1": "byte 0xE9 at offset 3"}
    assert said[encoding] in message
    assert ("data.encoding: gb18030" in message) == (encoding == "gb18030")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_an_encoding_that_is_given_is_used(tmp_path: Path, encoding: str) -> None:
    text = "你是誰" if encoding == "big5" else RECORD
    assert read_whole(write(tmp_path / "a.txt", text, encoding), encoding) == text


def test_an_encoding_that_is_given_wrongly_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", RECORD)
    with pytest.raises(DataError, match=r"valid UTF-8, though data\.encoding says gb18030"):
        check_encoding(path, "gb18030")
    with pytest.raises(DataError, match="unknown encoding"):
        check_encoding(path, "utf-88")
    with pytest.raises(DataError, match="is not utf-16"):
        check_encoding(write(tmp_path / "c.txt", "odd", "utf-8"), "utf-16")
    check_encoding(write(tmp_path / "b.txt", "plain"), "gb18030")


def test_the_offset_and_line_of_a_bad_byte_are_exact_over_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    # the chunk border (1 MiB) falls within a character
    path.write_bytes(b"x" * ((1 << 20) - 1) + "你\n".encode() + b"\xff")
    with pytest.raises(DataError, match=r"byte 0xFF at offset 1,048,579, line 2"):
        check_encoding(path, None)
    path.write_bytes(b"abc\xe4\xbd")
    with pytest.raises(DataError, match="offset 3"):
        check_encoding(path, None)


def test_a_line_over_the_cap_is_refused_without_reading_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnl.data.files.MAX_LINE", 100)
    path = write(tmp_path / "a.jsonl", "a\n" + "b" * 200)
    with pytest.raises(DataError, match=r"a\.jsonl:line 2: is too long"):
        list(lines_of(path, None))
    monkeypatch.setattr("tnl.data.files.MAX_WHOLE", 100)
    with pytest.raises(DataError, match="too large to be read at once"):
        read_whole(path, None)


@pytest.mark.parametrize("encoding", [None, "gb18030", "utf-16"])
def test_a_long_text_stays_in_its_file_and_reads_the_same(encoding: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("却说曹操\r\nauto\r自迎天子。\n" * 50).encode(encoding or "utf-8-sig"))
    short = text_of(path, encoding)
    assert isinstance(short, str) and "\r" not in short
    monkeypatch.setattr("tnl.data.files.LONG", 100)
    monkeypatch.setattr("tnl.data.files.PIECE", 7)
    long = text_of(path, encoding)
    assert isinstance(long, TextFile) and "".join(long.blocks()) == short and max(map(len, long.blocks())) == 7
    path.write_bytes(path.read_bytes()[:200] + b"\xff\xff\xff")
    with pytest.raises(DataError, match="is not"):
        text_of(path, encoding)
