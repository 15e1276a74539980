import re
from pathlib import Path

import pytest

from tnl.page import texts
from tnl.page.look import plain


def test_both_languages_say_the_same_things() -> None:
    assert list(texts.CHINESE) == list(texts.ENGLISH) and set(texts.TEXTS) == set(texts.LANGUAGES)
    for name, chinese in texts.CHINESE.items():
        assert re.findall(r"\{\w+\}", chinese) == re.findall(r"\{\w+\}", texts.ENGLISH[name]), name
        assert not re.search("[\u4e00-\u9fff]", texts.ENGLISH[name]), name


def test_every_text_is_shown_somewhere() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(texts.__file__).parent.glob("*.py") if path.name != "texts.py")
    # a finish, a run's status, a column: looked up by the server's own word
    dynamic = {"stopped", "length", "base", "adapter", "new", "unfinished", "interrupted", "finished"}
    for name in texts.ENGLISH:
        assert name in dynamic or f'"{name}"' in sources, name


@pytest.mark.parametrize(
    ("locale", "language"), [("zh-CN", "zh"), ("zh", "zh"), ("ZH-tw", "zh"), ("en-US", "en"), ("de", "en"), (None, "en")]
)
def test_language(locale: str | None, language: str) -> None:
    assert texts.language_of(locale) == language


def test_a_name_is_no_markdown() -> None:
    assert plain("my_run-2.1 **b**") == r"my\_run\-2\.1 \*\*b\*\*"
    assert plain("甄嬛") == "甄嬛"
