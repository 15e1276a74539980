from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnl.data.messages import Message, Record, Role
from tnl.data.transcript import Line, Scenes, parse_transcript, persona_records, plain_name, scenes_of_rows, windows
from tnl.errors import DataError

SCRIPT = """第一场 养心殿
皇上：你来了。
（甄嬛行礼）
甄嬛（低头）：臣妾来了。
路上有雪。
甄嬛: 还冷。
皇上：坐。

苏培盛：皇上驾到！
华妃：臣妾恭迎。
甄嬛：皇上万福。
见 http://example.org/a 处
***
旁白没有名字
温实初: 12:30 再来。
"""

WHATSAPP = """[2024/1/2, 12:33:44] Messages and calls are end-to-end encrypted.
\u200e[2024/1/2, 12:33:50] Li Lei: hello
are you there?
[2024/1/2, 12:34:01] 小明: yes
[2024/1/2, 12:34:05] 小明: <Media omitted>
[2024/1/2, 20:00:00] Li Lei: again
[2024/1/2, 20:01:00] 小明: yes: again
"""

ANDROID = """1/2/24, 9:05 PM - Li Lei: hello
1/2/24, 9:06 PM - Han Meimei: hi
1/2/24, 9:07 PM - Li Lei left
1/3/24, 9:08 AM - Li Lei: morning
"""

QQ = """消息记录（此消息记录为文本格式，不支持重新导入）

================================================================
消息分组:我的好友
================================================================
消息对象:小红

2024-01-02 12:33:44 小明(12345678)
你好
[图片]
在吗？

2024-01-02 12:34:00 小红<a@b.cn>
在

2024-01-03 08:00:00 小明(12345678)
早
"""

WECHAT = """小明 2024年1月2日 下午3:05
你好

小红 2024年1月2日 下午3:06
你也好
"""


def shown(scenes: Scenes) -> list[list[tuple[str, str]]]:
    return [[(line.name, line.text) for line in scene] for scene in scenes.scenes]


def test_a_script() -> None:
    found = parse_transcript(SCRIPT)
    assert shown(found) == [
        [("皇上", "你来了。"), ("甄嬛", "臣妾来了。\n路上有雪。"), ("甄嬛", "还冷。"), ("皇上", "坐。")],
        [("苏培盛", "皇上驾到！"), ("华妃", "臣妾恭迎。"), ("甄嬛", "皇上万福。\n见 http://example.org/a 处")],
        [("温实初", "12:30 再来。")],
    ]
    assert found.speakers == {"皇上": 2, "甄嬛": 3, "苏培盛": 1, "华妃": 1, "温实初": 1}
    assert found.passed == {"headings and rules": 2, "stage directions": 1, "lines without a speaker": 1}


def test_a_double_spaced_script_breaks_at_two_blank_lines() -> None:
    found = parse_transcript("A: 1\n\nB: 2\n\nA: 3\n\n\nB: 4\n\nA: 5\n")
    assert shown(found) == [[("A", "1"), ("B", "2"), ("A", "3")], [("B", "4"), ("A", "5")]]
    assert "two blank lines" in found.notices[0]


def test_whatsapp_on_ios() -> None:
    found = parse_transcript(WHATSAPP)
    assert shown(found) == [
        [("Li Lei", "hello\nare you there?"), ("小明", "yes")],
        [("Li Lei", "again"), ("小明", "yes: again")],
    ]
    assert found.passed == {"notices of the chat program": 1, "lines without words": 1}


def test_whatsapp_on_android() -> None:
    found = parse_transcript(ANDROID)
    assert shown(found) == [[("Li Lei", "hello"), ("Han Meimei", "hi")], [("Li Lei", "morning")]]
    assert found.passed == {"notices of the chat program": 1}


def test_qq_and_wechat() -> None:
    found = parse_transcript(QQ)
    assert shown(found) == [[("小明", "你好\n\n在吗？"), ("小红", "在")], [("小明", "早")]]
    assert found.passed == {"lines before the first message": 3, "headings and rules": 2}
    assert shown(parse_transcript(WECHAT)) == [[("小明", "你好"), ("小红", "你也好")]]


def test_a_chat_with_a_line_for_each_day() -> None:
    text = "记录\n——  2023-05-01  ——\n\n小明  08:01\n早\n小红  08:02\n早！\n----\n#公园\n\n——  2023-05-02  ——\n\n小红  08:03\n又早\n"
    found = parse_transcript(text)
    assert shown(found) == [[("小明", "早"), ("小红", "早！\n#公园")], [("小红", "又早")]]
    assert found.passed == {"headings and rules": 3, "lines before the first message": 1}


def test_a_word_for_place_or_time_is_no_speaker() -> None:
    found = parse_transcript("场景：夜\n时间: 晚\nA [aside]: x\nScene: a hall\nB: y\n")
    assert found.speakers == {"A": 1, "B": 1} and found.passed == {"headings and rules": 3}


def test_time_before_a_name_and_its_line() -> None:
    found = parse_transcript("2024-01-02 12:33:44 小明: 一\n[12:40] 小红： 二\n12:41 小明: 三\n")
    assert shown(found) == [[("小明", "一"), ("小红", "二"), ("小明", "三")]]


@pytest.mark.parametrize(
    ("written", "name"),
    [("甄嬛（冷笑）", "甄嬛"), ("**Bob**", "Bob"), ("小明(12345)", "小明"), ("Ｌｉ", "Li"), (" 小红<a@b.cn> ", "小红"), ("(off)", "")],
)
def test_names_are_plain(written: str, name: str) -> None:
    assert plain_name(written) == name


def records(text: str, persona: str | None) -> tuple[list[Record], Counter]:
    found = parse_transcript(text)
    return persona_records([(Path("a.txt"), found)], persona, found.speakers)


def test_the_persona_is_the_assistant_and_two_others_are_named() -> None:
    made, passed = records(SCRIPT, "甄嬛")
    assert [record.id for record in made] == ["a.txt:line 2", "a.txt:line 9"]
    assert made[0].messages == (Message(Role.USER, "你来了。"), Message(Role.ASSISTANT, "臣妾来了。\n路上有雪。\n还冷。"))
    assert made[1].messages[0] == Message(Role.USER, "苏培盛：皇上驾到！\n华妃：臣妾恭迎。")
    assert passed["lines after the persona's last"] == 1 and passed["scenes without the persona"] == 1


def test_a_persona_may_open_a_scene() -> None:
    made, _ = records("A: 1\nB: 2\nA: 3\n", "a")
    assert [message.role for message in made[0].messages] == [Role.ASSISTANT, Role.USER, Role.ASSISTANT]


def test_an_unknown_or_missing_persona_is_answered_with_the_speakers() -> None:
    with pytest.raises(DataError, match=r"a\.txt: data\.persona: '皇后' never speaks \(speakers: 甄嬛 3, 皇上 2"):
        records(SCRIPT, "皇后")
    with pytest.raises(DataError, match=r"needs data\.persona \(speakers: 甄嬛 3"):
        records(SCRIPT, None)


def test_a_persona_that_is_nearly_named_is_meant() -> None:
    with pytest.raises(DataError, match=r"never speaks .*Did you mean Bob 🐻\?$"):
        records("Ann: 1\nBob 🐻: 2\n", "bob")
    with pytest.raises(DataError, match=r"a\.txt: nobody speaks .*Write `name: line`"):
        records("<ann> hi\n<bob> lo\n", "bob")


def test_a_name_in_capitals_is_the_same_speaker() -> None:
    found = parse_transcript("MARA: a\nTom: b\nMara: c\n\nTOM: d\nMara: e\n")
    assert found.speakers == {"Mara": 3, "Tom": 2}
    made, _ = persona_records([(Path("a.txt"), found)], "mara", found.speakers)
    assert made[1].messages[0] == Message(Role.USER, "d")


def test_what_a_chat_program_says_of_messages_that_are_gone_is_not_learned() -> None:
    heads = [f"2024-01-01 20:0{i}:00 {name}" for i, name in enumerate(("小鱼", "阿泽", "小鱼"))]
    chat = f'{heads[0]}\n在吗\n{heads[1]}\n"小鱼" 撤回了一条消息\n早点睡\n{heads[2]}\n你撤回了一条消息\n'
    found = parse_transcript(chat)
    assert shown(found) == [[("小鱼", "在吗"), ("阿泽", "早点睡")]] and found.passed == {"lines without words": 1}
    english = "[1/2/24, 9:10 PM] Ann: This message was deleted\n[1/2/24, 9:11 PM] Bob: ok <This message was edited>\n"
    assert shown(parse_transcript(english)) == [[("Bob", "ok")]]


def test_rows_become_scenes() -> None:
    lines = [
        Line("f:line 2", "A", "1", "x"),
        Line("f:line 3", "B (off)", "2", "x"),
        Line("f:line 4", "A", " ", "y"),
        Line("f:line 5", "A", "3", "y"),
    ]
    assert shown(scenes_of_rows(lines)) == [[("A", "1"), ("B", "2")], [("A", "3")]]


def dialogue(turns: int, size: int = 10) -> Record:
    pairs = [(Message(Role.USER, f"{i:0{size}d}"), Message(Role.ASSISTANT, f"{i:0{size}d}!")) for i in range(turns)]
    return Record("s", tuple(message for pair in pairs for message in pair), scene=True)


def count(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)


@pytest.mark.parametrize("turns", [1, 2, 7, 40])
@pytest.mark.parametrize("limit", [21, 42, 100, 10_000])
def test_windows_learn_every_answer_once_and_fit(turns: int, limit: int) -> None:
    made, lost = windows(dialogue(turns), count, limit)
    learned = [m.content for record in made for m in record.messages if m.role is Role.ASSISTANT and m.train]
    assert learned == [f"{i:010d}!" for i in range(turns)] and lost == 0
    assert all(count(record.messages) <= limit for record in made)
    assert len({record.id for record in made}) == len(made)
    assert all(record.scene for record in made)


def test_a_later_window_opens_with_context_that_is_not_learned() -> None:
    made, _ = windows(dialogue(12), count, 100)
    assert [m.train for m in made[1].messages if m.role is Role.ASSISTANT] == [False, True, True, True]
    assert made[1].messages[1].content == "0000000003!"


def test_a_long_question_loses_its_first_lines_and_they_are_counted() -> None:
    question = "\n".join(f"line {i}" for i in range(40))
    record = Record(
        "s", (Message(Role.USER, question), Message(Role.ASSISTANT, "yes"), Message(Role.USER, "a"), Message(Role.ASSISTANT, "b"))
    )
    made, lost = windows(record, count, 60)
    assert made[0].messages[0].content.endswith("line 39") and 0 < lost < 40
    assert made[0].messages[0].content.count("\n") + 1 + lost == 40
    assert windows(record, count, None) == ([record], 0)


PARTS = [
    "A: one",
    "B：two",
    "more",
    "",
    "",
    "（stage）",
    "***",
    "第一场",
    "A:",
    "2024-01-02 12:33:44 A",
    "== 2024-01-03 ==",
    "[2024/1/2, 12:33:44] B: x",
    "12:40 A",
    "http://a/b",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12))
def test_every_line_is_in_a_scene_or_counted(lines: list[str]) -> None:
    found = parse_transcript("\n".join(lines))
    kept = " ".join(line.text for scene in found.scenes for line in scene)
    heads = sum(1 for line in lines if line.startswith(("2024", "12:40", "A:")) and "one" not in line)
    # a head or a bare name is no line of words itself; all others are kept or passed over
    words = [line for line in lines if line]
    assert len(words) <= kept.count("\n") + sum(map(len, found.scenes)) + found.passed.total() + heads
    assert found.speakers.total() == sum(map(len, found.scenes))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "line", ["," + " " * 200_000 + ",", "T" * 200_000, "a" + " ," * 100_000 + "x", "(" * 200_000, "a: " + "[" * 200_000, "1:1" * 60_000]
)
def test_no_line_takes_long(line: str) -> None:
    parse_transcript(f"A: 1\n{line}\n12:30 B: 2\n{line}\n12:31 A: 2")
    plain_name(line)
