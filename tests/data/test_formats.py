import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tnl.data.formats import FORMATS, read, read_records, speakers
from tnl.data.messages import Message, Record, Role
from tnl.errors import DataError

U, A, S = Role.USER, Role.ASSISTANT, Role.SYSTEM


def write(path: Path, value: Any) -> Path:
    if path.suffix == ".jsonl" and not isinstance(value, str):
        value = "\n".join(json.dumps(row, ensure_ascii=False) for row in value)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def one(tmp_path: Path, row: dict, **options: Any) -> tuple[Message, ...]:
    (record,) = read_records(write(tmp_path / "a.json", [row]), **options)
    return record.messages


def refusal(tmp_path: Path, *rows: Any, name: str = "a.json", **options: Any) -> str:
    path = write(tmp_path / name, list(rows))
    with pytest.raises(DataError) as caught:
        read_records(path, **options)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def test_alpaca(tmp_path: Path) -> None:
    assert one(tmp_path, {"instruction": "I", "input": "X", "output": "O"}) == (Message(U, "I", input="X"), Message(A, "O"))
    assert one(tmp_path, {"instruction": "I", "input": None, "output": "O"}) == (Message(U, "I"), Message(A, "O"))
    assert one(tmp_path, {"instruction": "", "input": "X", "output": "O"}) == (Message(U, "X"), Message(A, "O"))
    full = {"instruction": "I", "output": "O", "system": "S", "history": [["q", "a"]]}
    assert one(tmp_path, full) == (Message(S, "S"), Message(U, "q"), Message(A, "a"), Message(U, "I"), Message(A, "O"))


def test_openai_messages(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "d", "weight": 0},
    ]
    assert one(tmp_path, {"messages": turns}) == (
        Message(S, "S"),
        Message(U, "ab"),
        Message(A, '[{"name": "f", "arguments": "{}"}]'),
        Message(U, "7"),
        Message(A, "d", train=False),
    )


def test_sharegpt_with_tools(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]
    turns += [{"from": "observation", "value": "7"}, {"from": "gpt", "value": "b"}]
    expected = (Message(U, "a"), Message(A, "{}"), Message(U, "7"), Message(A, "b"))
    assert one(tmp_path, {"conversations": turns, "tools": "[]"}) == expected
    assert one(tmp_path, {"conversations": turns, "tools": '[{"name": "f"}]'}) == (Message(S, 'Tools: [{"name": "f"}]'), *expected)
    assert one(tmp_path, {"conversations": turns, "system": "S", "tools": "T"}) == (Message(S, "S\n\nTools: T"), *expected)


def test_columns_are_mapped(tmp_path: Path) -> None:
    columns = {"instruction": "prompt", "output": "response"}
    assert one(tmp_path, {"prompt": "I", "response": "O"}, columns=columns) == (Message(U, "I"), Message(A, "O"))
    row = {"dialog": [{"speaker": "user", "says": "a"}, {"speaker": "assistant", "says": "b"}]}
    columns = {"messages": "dialog", "role": "speaker", "content": "says"}
    assert one(tmp_path, row, columns=columns) == (Message(U, "a"), Message(A, "b"))
    said = refusal(tmp_path, {"prompt": "I"}, columns={"instruction": "prompt", "output": "response"})
    assert said.startswith(':record 1: "response" (data.columns: output) is missing (found prompt).')


def test_text_and_txt(tmp_path: Path) -> None:
    assert read_records(write(tmp_path / "a.jsonl", [{"text": "x"}])) == [Record(f"{tmp_path}/a.jsonl:line 1", text="x")]
    assert read_records(write(tmp_path / "a.txt", "x\ny")) == [Record(f"{tmp_path}/a.txt:record 1", text="x\ny")]


def test_csv_and_parquet(tmp_path: Path) -> None:
    row = {"instruction": "NA", "input": "", "output": "None"}
    expected = (Message(U, "NA"), Message(A, "None"))
    (record,) = read_records(write(tmp_path / "a.csv", "instruction,input,output\nNA,,None\n"))
    assert (record.id, record.messages) == (f"{tmp_path}/a.csv:line 2", expected)
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet")[0].messages == expected
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text('messages\n"' + json.dumps(turns).replace('"', '""') + '"\n', encoding="utf-8")
    for name in ("b.parquet", "c.csv"):
        assert read_records(tmp_path / name)[0].messages == (Message(U, "a"), Message(A, "b"))


def test_files_of_several_formats_are_read_each_by_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [{"instruction": "I", "output": "O", "id": 7}])
    write(tmp_path / "b.jsonl", [{"text": "x\ufffd"}, {"text": "I am {{name}}."}])
    write(tmp_path / "notes.md", "x")
    reading = read(tmp_path)
    assert (reading.formats, reading.rows, len(reading.records)) == (["alpaca", "text"], 3, 3)
    assert [len(source.sha256) for source in reading.sources] == [64, 64]
    said = " / ".join(reading.notices)
    assert "passed over notes.md" in said and "not used: id" in said and "1 records hold U+FFFD" in said
    assert "1 records hold placeholders such as {{name}}" in said


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BAD: list[tuple[dict, str]] = [
    (
        {"instruction": "a", "input": ""},
        ':record 2: "output" is missing (found instruction, input). Every record needs instruction and output',
    ),
    ({"instruction": "a", "output": None}, ':record 2: "output" is null'),
    ({"instruction": "a", "output": 7}, ':record 2: "output" is a number (found 7; needed text)'),
    ({"instruction": "a", "output": ["b"]}, ':record 2: "output" is a list'),
    ({"instruction": "a", "output": {"b": 1}}, ':record 2: "output" is an object'),
    ({"instruction": "a", "input": True, "output": "b"}, ':record 2: "input" is true or false'),
    ({"instruction": "a", "output": " "}, ':record 2: "output" is empty'),
    ({"instruction": "", "input": "", "output": "b"}, ':record 2: "instruction" and "input" are both empty'),
    ({"instruction": "a", "output": "b\ud800"}, ':record 2: "output" holds half of a surrogate pair'),
    ({"instruction": "a", "output": "b", "history": "x"}, ':record 2: "history" is text, but not a JSON list'),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, ':record 2: "history" entry 1 is no pair'),
    ({"instruction": "a", "output": "b", "history": [["q", ""]]}, ':record 2: "history" entry 1 has an empty answer'),
    ({"instruction": "a", "output": "b", "history": [["q", 1]]}, ':record 2: "history" entry 1 is a number'),
]
BAD_TURNS: list[tuple[Any, str]] = [
    (None, ':record 2: "messages" is null (found messages)'),
    (7, ':record 2: "messages" is a number (needed a list)'),
    ([], ":record 2: has no messages"),
    ([7], ":record 2: message 1 is a number"),
    ([{"role": "user\n<|im_start|>", "content": "a"}], ":record 2: message 1 has no known role (found 'user\\n<|im_start|>')"),
    ([{"role": ["user"], "content": "a"}], ":record 2: message 1 has no known role"),
    ([{"role": "user", "content": None}], ':record 2: message 1: "content" is null'),
    ([{"role": "user", "text": "a"}], ':record 2: message 1: "content" is missing (found role, text)'),
    ([{"role": "user", "content": [{"type": "image_url"}]}], ":record 2: message 1 holds something other than text"),
    (TURNS[1:], ":record 2: turn 1 is the assistant's (needed the user's"),
    ([*TURNS, *TURNS[1:]], ":record 2: turn 3 is the assistant's"),
    ([*TURNS, TURNS[0]], ":record 2: ends with a question that has no answer"),
    ([TURNS[0], {"role": "assistant", "content": ""}], ":record 2: turn 2, the assistant's, is empty"),
    ([*TURNS, {"role": "system", "content": "s"}], ":record 2: turn 3 is the system's"),
]


@pytest.mark.parametrize(("row", "said"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_instruction_record_is_named(tmp_path: Path, row: dict, said: str) -> None:
    rows = json.dumps([{"instruction": "a", "output": "b"}, row])
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).removeprefix(str(path)).startswith(said)


@pytest.mark.parametrize(("turns", "said"), BAD_TURNS, ids=lambda value: str(value)[:30])
def test_a_bad_conversation_is_named(tmp_path: Path, turns: Any, said: str) -> None:
    assert refusal(tmp_path, {"messages": TURNS}, {"messages": turns}).startswith(said)


def test_two_system_texts_and_preference_pairs_are_refused(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, *TURNS]
    assert "two system texts" in refusal(tmp_path, {"messages": turns, "system": "t"})
    pairs = {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}}
    assert "preference pairs" in refusal(tmp_path, pairs)


def test_wrong_columns_say_what_was_found_needed_and_how_to_map(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"prompt": "a", "response": "b"})
    assert said.startswith(":record 1: no usable columns (found prompt, response; needed instruction and output, or messages")
    assert said.endswith("Set data.columns: {instruction: prompt, output: response}.")
    assert refusal(tmp_path, {"prompt": "a", "output": "b"}).endswith("Set data.columns: {instruction: prompt}.")
    assert "{instruction: THEIR_NAME" in refusal(tmp_path, {"foo": "a"})
    assert "{text: content}" in refusal(tmp_path, {"content": "a"})


def test_options_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"data\.format: unknown format 'sharegtp'"):
        read_records(path, format="sharegtp")
    with pytest.raises(DataError, match=r"data\.columns: no column is called 'prompt'"):
        read_records(path, columns={"prompt": "instruction"})
    with pytest.raises(DataError, match=r"data\.persona is for transcripts"):
        read_records(path, persona="a")
    with pytest.raises(DataError, match="holds no alpaca records"):
        read_records(write(tmp_path / "a.txt", "x"), format="alpaca")
    assert FORMATS == ("auto", "alpaca", "messages", "sharegpt", "transcript", "text")


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[]"), ("a.json", "\n\n"), ("a.jsonl", "\n\n"), ("a.csv", "text\n"), ("a.txt", "\n")]
)
def test_no_records_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match="no records"):
        read_records(write(tmp_path / name, text))


def test_a_late_record_is_refused_by_its_number(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 9_000 + [{"instruction": "a"}]
    assert refusal(tmp_path, *rows, name="a.jsonl").startswith(':line 9001: "output" is missing')


def test_transcripts_of_text_and_rows(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "A: 1\nB: 2\n\nA: 3\n")
    reading = read(text, persona="B")
    assert (reading.rows, len(reading.records), reading.passed) == (2, 1, {"scenes without the persona": 1})
    assert speakers(text) == {"A": 2, "B": 1}
    table = write(tmp_path / "b.csv", "who,said\nA,1\nB,2\n")
    columns = {"name": "who", "line": "said"}
    (record,) = read_records(table, format="transcript", columns=columns, persona="B")
    assert speakers(table, columns=columns) == {"A": 1, "B": 1}
    assert (record.id, record.messages) == (f"{tmp_path}/b.csv:line 2", (Message(U, "1"), Message(A, "2")))
    with pytest.raises(DataError, match=r"needs data\.persona \(speakers: A 2, B 1\)"):
        read(text, format="transcript")
    assert "looks like a transcript (A, B)" in read(text).notices[0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_of_megabytes_is_read_whole(name: str, tmp_path: Path) -> None:
    said = {"from": "gpt", "value": "发票已成功生成，总金额为$3.5。\n🙂" * 10}
    rows = [{"conversations": [{"from": "human", "value": f"我需要发票{i}。"}, said], "tools": "[]"} for i in range(4000)]
    path = write(tmp_path / name, rows)
    assert path.stat().st_size > 2**21
    records = read_records(path)
    assert [record.messages[0].content for record in records] == [row["conversations"][0]["value"] for row in rows]
    assert {record.messages[1].content for record in records} == {said["value"]}


def test_what_a_row_of_a_transcript_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Every row of a transcript needs name and line"):
        read_records(write(tmp_path / "a.json", [{"instruction": "a", "output": "b"}]), format="transcript", persona="a")
