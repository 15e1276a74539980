import io
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tnl.data.template import TEMPLATES
from tnl.errors import ModelError, RecipeError
from tnl.generate.chat import Chat, run
from tnl.generate.resolve import Talker
from tnl.generate.sampling import Settings
from tnl.generate.terminal import Screen, visible

STATUS = re.compile(r"state 0\.0 MB · (\d+) tokens seen · [\d.e+]+ tokens/s · cut at 5 tokens\n")


@pytest.fixture
def talk(model: Any, tokenizer: Any) -> Callable[..., str]:
    def talk(*lines: str | BaseException, encoding: str = "utf-8") -> str:
        left = list(lines)

        def read() -> str:
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        settings = Settings(do_sample=False, max_new_tokens=5)
        Chat(Talker(model, tokenizer, TEMPLATES["chatml"], "你好", settings, "tiny", notices=["a notice"]), Screen(out), read).loop()
        return raw.getvalue().decode(encoding)

    return talk


def test_answers_and_what_they_took(talk: Callable[..., str]) -> None:
    said = talk("你是谁", "", "   ", "再说")
    assert said.startswith("a notice\ntiny · template chatml · /help\nsystem: 你好\n")
    first, second = (int(n) for n in STATUS.findall(said))
    assert second > first + 5
    assert "\x1b" not in said


def test_reset_begins_anew(talk: Callable[..., str]) -> None:
    once = talk("一").splitlines()[3]
    lines = talk("一", "二", "/reset", "一").splitlines()
    assert "forgotten" in lines and lines[lines.index("forgotten") + 1] == once


def test_system(talk: Callable[..., str]) -> None:
    said = talk("/system", "/system 你是说书人", "/system", "/quit", "never read")
    assert said.splitlines()[3:] == ["system: 你好", "system: 你是说书人", "system: 你是说书人"]


def test_save_and_load(talk: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "talk.json"
    said = talk("/save", "一", f"/save {file}", "二", "/save", "/save $NO_SUCH_NAME/x")
    assert said.count(f"saved: {file}") == 2 and "name a file" in said and "$NO_SUCH_NAME is not set" in said
    said = talk(f"/save {file}", f"/load {file}", "/load nowhere.json", "三")
    assert f"{file} exists. Name another file." in said and "loaded: 4 messages" in said and "error: " in said
    assert len(STATUS.findall(said)) == 1


def test_a_state_is_saved_and_goes_on(talk: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    said = talk(f"/save {file}", "一", f"/save {file}", "/save", "/reset", "/save")
    assert "error: " in said and "nothing has been said yet" in said
    assert said.count(f"saved: {file}") == 2 and said.endswith("name a file, for example /save talk.json\n")
    said = talk(f"/load {file}", "二", "/save", "/load nowhere.safetensors")
    assert re.search(r"loaded: 2 messages · \d+ tokens, none read anew", said) and f"saved: {file}" in said
    assert "nowhere.safetensors" in said and len(STATUS.findall(said)) == 1


def test_resume(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.safetensors"

    def session(model: Path, *lines: str, resume: Path | None = None, **options: Any) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        run(str(model), resume, device="cpu", max_new_tokens=4, **options)
        return capsys.readouterr().out.splitlines()

    whole = session(adapter, "一", f"/save {file}", "二")
    later = session(adapter, "二", resume=file)
    assert later[0].startswith("loaded: 2 messages · ")
    start = later.index("system: 说书人") + 1
    assert later[start : start + 2] == [whole[whole.index("> 一")], whole[whole.index("> 一") + 1]]
    assert later[later.index("> 二") + 1] == whole[whole.index("> 二") + 1]
    with pytest.raises(ModelError, match="another model or adapter"):
        session(base, "二", resume=file, template="alpaca")
    with pytest.raises(RecipeError, match=r"--system: talk\.safetensors has a system prompt"):
        session(adapter, resume=file, system="甄嬛")
    with pytest.raises(ModelError, match="no such file"):
        session(adapter, resume=tmp_path / "none.safetensors")


def test_commands_that_are_none(talk: Callable[..., str]) -> None:
    said = talk("/rest", "/xyzzy", "/help", "//rest")
    assert "no command is called /rest. Did you mean /reset?" in said and "/xyzzy. /help lists them." in said
    assert "Ctrl-D" in said and len(STATUS.findall(said)) == 1


def test_ctrl_c_stops_an_answer_not_the_program(talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    written = Screen.write

    def interrupting(self: Screen, text: str) -> None:
        written(self, text)
        if not text.endswith("\n") and not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)

    done: list[bool] = []
    monkeypatch.setattr(Screen, "write", interrupting)
    said = talk("一", "二")
    assert said.count(" · stopped\n") == 1 and said.count("tokens seen") == 2


def test_ctrl_c_at_the_prompt(talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(KeyboardInterrupt())
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert "/quit ends" in talk(KeyboardInterrupt(), "/quit")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gb18030"])
def test_a_terminal_that_cannot_show_chinese(talk: Callable[..., str], encoding: str) -> None:
    said = talk("你是谁", encoding=encoding)
    assert "state 0.0 MB" in said and "tokens seen" in said


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\x1b[2Jb\x07\r\n\t\u202e好👩‍👩‍👧") == "a\\x1b[2Jb\\x07\\r\n\t\\u202e好👩‍👩‍👧"


def test_from_a_pipe(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\r\n\n/system\n再见"))
    run(str(adapter), device="cpu", max_new_tokens=4)
    said = capsys.readouterr().out
    assert said.count("tokens seen") == 2 and "system: 说书人" in said and "template alpaca" in said
    assert [line for line in said.splitlines() if line.startswith(">")] == ["> 你好", "> ", "> /system", "> 再见"]
