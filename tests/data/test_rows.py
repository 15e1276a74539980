import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tnl.data.rows import rows_of
from tnl.errors import DataError


def rows(path: Path, text: str) -> list[Any]:
    path.write_bytes(text.encode("utf-8"))
    return [(row.where.removeprefix(f"{path}:"), row.value) for row in rows_of(path, None)]


def refusal(path: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, text)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_json_array(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.json", ' [ {"a": 1} , {"a": [2]} ] \n') == [("record 1", {"a": 1}), ("record 2", {"a": [2]})]
    assert rows(tmp_path / "a.json", "[]") == []


def test_json_lines(tmp_path: Path) -> None:
    expected = [("line 1", {"a": 1}), ("line 3", {"a": 2})]
    assert rows(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}') == expected
    assert rows(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": 2}\r\n') == expected
    assert rows(tmp_path / "a.json", '{"a": 1}\n\n{"a": 2}\n') == expected


BAD_JSON = {
    '[{"a": "b"},]': ':record 2: line 1, column 13: "]" after a comma. Remove the comma before "]".',
    '[{"a": "b",}]': ':record 1: line 1, column 12: "}" after a comma. Remove the comma before "}".',
    "[{'a': 1}]": ":record 1: line 1, column 3: a text without double quotes (found \"'a': 1}]\")",
    '[{"a": 1}\n {"a": 2}]': ":record 1: line 2, column 2: after it needed a comma or ]",
    '[{"a": 1}, {"a": ': ":record 2: line 1, column 18: the text ends in the middle of a record",
    '[{"a": "x\ny"}]': ":record 1: line 1, column 10: a line break or tab inside a text",
    '[{"a": "x}]': ":record 1: line 1, column 8: a text is not closed",
    '[{"a": NaN}]': ":record 1: NaN is not a JSON value",
    '[{"a": 1, "a": 2}]': ':record 1: a key stands twice in one object ("a")',
    '[{"b": {"a": 1, "a": 2}}]': ':record 1: a key stands twice in one object ("a")',
    '[{"a": 1}, 7]': ":record 2: is a number (needed an object)",
    '[{"a": 1}] x': ": line 1, column 12: text after the list (found 'x')",
    '{"data": [{"a": 1}]}': ': the records are wrapped in an object (under "data"). Keep the list under "data" alone.',
    '{"instruction": "a"}': ": is one object (found instruction; needed a list of records)",
    "hello": ": is not JSON (it begins with 'hello'; needed [)",
    " \n ": ": no records",
    "[" + "[" * 100_000: ":record 1: is nested too deeply",
    '[{"a": ' + "1" * 5000 + "}]": ":record 1: Exceeds the limit",
    '[{"a" 1}]': ":record 1: line 1, column 7: expecting ':' delimiter",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:24])
def test_bad_json_names_record_line_and_column(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path / "a.json", text).startswith(BAD_JSON[text])


BAD_LINES = {
    '{"a": 1}\n{"a": 2}\n{"a": }\n': ":line 3: column 7: expecting value",
    '{"a": 1}\n[1]\n': ":line 2: is a list (needed an object)",
    '[{"a": 1}]\n': ":line 1: is a list (a .jsonl file holds one object a line). Name the file .json.",
    '{"a": 1} {"a": 2}\n': ":line 1: column 9: text after the object",
    '{"a": 1}\n{"a": 1, "a": 1}\n': ":line 2: a key stands twice",
    '{"a": 1}\n{"a": "b\n': ":line 2: column 9: the text ends in the middle of a record",
}


@pytest.mark.parametrize("text", BAD_LINES, ids=lambda text: text[:24])
def test_bad_json_lines_name_line_and_column(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path / "a.jsonl", text).startswith(BAD_LINES[text])


def test_too_many_keys_are_refused(tmp_path: Path) -> None:
    text = json.dumps([{str(i): 0 for i in range(1001)}])
    assert "too many keys (found 1,001; at most 1,000)" in refusal(tmp_path / "a.json", text)


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    text = 'instruction,output\nNA,None\n"a,\n""b""",null\n\n,1\n'
    assert rows(tmp_path / "a.csv", text) == [
        ("line 2", {"instruction": "NA", "output": "None"}),
        ("line 3", {"instruction": 'a,\n"b"', "output": "null"}),
        ("line 6", {"instruction": "", "output": "1"}),
    ]


BAD_CSV = {
    "a,b\n1,2\n1,2,3\n": ":line 3: has 3 cells (the header has 2: a, b)",
    'a,b\n1,"x\ny\nz\n': ":line 2: a quote is not closed",
    "a,a\n1,2\n": ':line 1: a column stands twice ("a")',
    "a;b\n1;2\n": ":line 1: the columns are separated by ;",
    "a\tb\n1\t2\n": ":line 1: the columns are separated by tabs",
    "\n\n": ": no records",
}


@pytest.mark.parametrize("text", BAD_CSV, ids=repr)
def test_bad_csv_names_the_line(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path / "a.csv", text).startswith(BAD_CSV[text])


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": ["x", None], "b": [[{"role": "user"}], []]}), path)
    assert [(row.where, row.value) for row in rows_of(path, None)] == [
        (f"{path}:record 1", {"a": "x", "b": [{"role": "user"}]}),
        (f"{path}:record 2", {"a": None, "b": []}),
    ]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(rows_of(path, None))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8), min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_whatever_json_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[dict], ascii: bool) -> None:
    folder = tmp_path_factory.mktemp("round")
    text = json.dumps(values, ensure_ascii=ascii)
    assert [value for _, value in rows(folder / "a.json", text)] == values
    lines = "\n".join(json.dumps(value, ensure_ascii=ascii) for value in values)
    assert [value for _, value in rows(folder / "a.jsonl", lines)] == values


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl", ".csv"]))
def test_whatever_bytes_come_nothing_but_a_data_error_goes(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(data)
    try:
        assert all(isinstance(row.value, dict) for row in rows_of(path, None))
    except DataError as error:
        assert str(path) in str(error) and str(error).isprintable()


def test_a_file_that_was_cut_off_may_have_to_be_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "问', encoding="utf-8")
    with pytest.raises(DataError, match=r"a text is not closed .* or download the file again if its end is missing"):
        list(rows_of(path, None))
