import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tnl.data.formats import read_records
from tnl.page.talk import Turn, export, messages, request


def answer(model: str, text: str) -> Any:
    return SimpleNamespace(model=model, text=text)


TURNS = [
    Turn("一", [answer("a", "甲"), answer("b", "乙")]),
    Turn("二", [answer("b", "丙")]),
    Turn("失败", [answer("a", "")]),
    Turn("三", [answer("a", "丁")]),
]


def said(model: str, system: str = "") -> list[str]:
    return [f"{one['role'][0]}{one['content']}" for one in messages(TURNS, model, system)]


def test_a_model_remembers_its_own_answers_and_else_those_that_were_given() -> None:
    assert said("a") == ["u一", "a甲", "u二", "a丙", "u三"]
    assert said("b") == ["u一", "a乙", "u二", "a丙", "u三"]
    assert said("c", "系统") == ["s系统", "u一", "a甲", "u二", "a丙", "u三"]


def test_request() -> None:
    found = request(TURNS[:1], "a", "", {"temperature": 0.5})
    assert found == {"model": "a", "messages": [{"role": "user", "content": "一"}], "temperature": 0.5}


def test_the_export_can_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(export(TURNS, "系统"), encoding="utf-8")
    one, other = read_records(tmp_path / "talk.json")
    assert [message.content for message in one.messages] == ["系统", "一", "甲", "二", "丙", "三", "丁"]
    assert [message.content for message in other.messages] == ["系统", "一", "乙", "二", "丙", "三", "丁"]


def test_a_last_question_without_an_answer_is_no_part_of_the_export() -> None:
    [record] = json.loads(export([TURNS[0], Turn("二", [answer("a", "")])], ""))[:1]
    assert [one["content"] for one in record["messages"]] == ["一", "甲"]
