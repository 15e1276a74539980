import json
from pathlib import Path

import pytest
import torch

from tnl.errors import DataError, NumbersError, RecipeError
from tnl.generate.resolve import resolve
from tnl.generate.run import SLOTS, answers, run


def test_one_prompt(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(adapter), "你好", device="cpu")
    first = capsys.readouterr()
    run(str(adapter), "你好", device="cpu")
    assert first.out == capsys.readouterr().out and first.out.strip() and first.out.endswith("\n") and not first.err


def test_a_file_of_prompts(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "questions.txt").write_text("\ufeff你\u2028好\r\n\n 再见 \n你\u2028好\n", encoding="utf-8")
    options = {"device": "cpu", "temperature": 1.5, "seed": 9, "max_new_tokens": 4}
    run(str(adapter), None, tmp_path / "questions.txt", **options)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [line["prompt"] for line in lines] == ["你\u2028好", "再见", "你\u2028好"]
    assert lines[0] == lines[2] and set(lines[0]) == {"prompt", "answer", "finish", "prompt_tokens", "tokens"}
    run(str(adapter), "你\u2028好", **options)  # type: ignore[arg-type]
    assert capsys.readouterr().out == lines[0]["answer"] + "\n"


def test_a_file_of_many_prompts_is_answered_as_one_by_one(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [f"第 {i} 问" + "啊" * (i % 7) for i in range(2 * SLOTS + 5)]
    (tmp_path / "questions.txt").write_text("\n".join(questions), encoding="utf-8")
    run(str(adapter), None, tmp_path / "questions.txt", device="cpu")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == questions
    talker = resolve(str(adapter), {"device": "cpu"})
    for line in lines:
        conversation = talker.conversation()
        assert line["answer"] == "".join(conversation.say(line["prompt"])) and conversation.last is not None
        last = conversation.last
        assert (line["finish"], line["prompt_tokens"], line["tokens"]) == (last.finish, last.read, last.tokens)


def test_numbers_that_are_not_finite_end_it(adapter: Path) -> None:
    talker = resolve(str(adapter), {"device": "cpu"})
    talker.merged().lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NumbersError, match=r"^answer to .你好.: the model's numbers are not finite"):
        list(answers(talker, ["你好"]))


def test_a_notice_is_not_part_of_the_answer(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(str(base), "你好", device="cpu", max_new_tokens=3)
    said = capsys.readouterr()
    assert "chatml is used" in said.err and "chatml" not in said.out


def test_no_question_or_two(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no question"):
        run(str(adapter))
    with pytest.raises(RecipeError, match="both PROMPT and --file"):
        run(str(adapter), "a", tmp_path / "b")


def test_files_that_cannot_be_used(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "gbk.txt").write_bytes("你好".encode("gb18030"))
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    for name, match in (
        ("gbk.txt", r"not UTF-8 \(byte 1\)"),
        ("empty.txt", "no question"),
        ("gbk.tx", r"Did you mean .*gbk\.txt"),
        ("run", "is no file"),
    ):
        with pytest.raises(DataError, match=match):
            run(str(adapter), None, tmp_path / name)
