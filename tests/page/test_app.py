"""The page without a browser: Streamlit runs the script, the server is real."""

import json
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tnl.page import app
from tnl.page.texts import CHINESE, ENGLISH


@pytest.fixture
def page(live: Any, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setenv("TNL_SERVER", live.url)
    monkeypatch.setenv("TNL_API_KEY", "the-key")
    page = AppTest.from_file(app.__file__, default_timeout=60).run()
    # short answers, always the same: the adapter of these tests would talk for ever
    page.toggle(key="taught").set_value(False).run()
    page.slider(key="temperature").set_value(0.0)
    page.number_input(key="max_tokens").set_value(6)
    page.run()
    assert not page.exception and live.settled()
    return page


def ask(page: AppTest, question: str) -> AppTest:
    page.chat_input(key="question").set_value(question).run()
    assert not page.exception
    return page


def answers(page: AppTest) -> list[tuple[str, ...]]:
    """Of each turn, the models that answered."""
    return [tuple(answer.model for answer in turn.answers) for turn in page.session_state.turns]


def test_it_opens_on_the_adapter_in_english(page: AppTest) -> None:
    assert [tab.label for tab in page.tabs] == [ENGLISH["talk"], ENGLISH["runs"]]
    assert page.selectbox(key="model").value == "teahouse"
    assert page.selectbox(key="model").options == ["demo (base)", "teahouse (tuned)"]
    assert page.text_area(key="system").placeholder == "你是茶馆里的说书人。"
    assert not page.session_state.turns and page.chat_input(key="question").placeholder == ENGLISH["ask"]


def test_an_answer_and_the_same_one_again(page: AppTest) -> None:
    ask(page, "  你是谁？ ")
    [turn] = page.session_state.turns
    said = turn.answers[0]
    assert turn.question == "你是谁？" and said.finish in ("length", "stop") and said.text
    shown = [text.value for message in page.chat_message for text in message.get("text")]
    assert shown == ["你是谁？", said.text]
    assert any("tokens/s" in caption.value for caption in page.caption)
    page.button(key="again").click().run()
    [turn] = page.session_state.turns
    assert turn.answers[0] is not said and turn.answers[0].text == said.text and not page.session_state.drawing


def test_another_model_and_both(page: AppTest) -> None:
    ask(page, "一")
    page.selectbox(key="model").set_value("demo").run()
    ask(page, "二")
    page.toggle(key="both").set_value(True).run()
    assert page.selectbox(key="other").options == ["teahouse (tuned)"]
    ask(page, "三")
    assert answers(page) == [("teahouse",), ("demo",), ("demo", "teahouse")]
    assert all(answer.text for turn in page.session_state.turns for answer in turn.answers)
    forget = page.sidebar.button[0]
    assert forget.label == ENGLISH["forget"]
    forget.click().run()
    assert not page.session_state.turns


def test_the_settings_reach_the_server(page: AppTest, live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    begin = app.Server.answer

    def listen(self: Any, body: dict[str, Any]) -> Any:
        asked.append(json.loads(json.dumps(body)))
        return begin(self, body)

    monkeypatch.setattr(app.Server, "answer", listen)
    page.text_area(key="system").set_value(" 你是甄嬛 ")
    page.number_input(key="seed").set_value(3)
    ask(page, "一")
    assert asked[0]["messages"] == [{"role": "system", "content": "你是甄嬛"}, {"role": "user", "content": "一"}]
    expected = {"temperature": 0.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.0, "max_tokens": 6, "seed": 3}
    assert {name: asked[0][name] for name in expected} == expected
    page.toggle(key="taught").set_value(True).run()
    page.selectbox(key="model").set_value("demo").run()
    ask(page, "二")
    assert set(asked[1]) == {"model", "messages"} and len(asked[1]["messages"]) == 4


def test_chinese(page: AppTest) -> None:
    page.segmented_control(key="language").set_value("zh").run() if hasattr(page, "segmented_control") else page.button_group(
        key="language"
    ).set_value(["zh"]).run()
    assert [tab.label for tab in page.tabs] == [CHINESE["talk"], CHINESE["runs"]]
    assert page.selectbox(key="model").label == CHINESE["model"]


def test_runs(page: AppTest) -> None:
    assert [option.split(" · ")[0] for option in page.selectbox(key="run").options] == ["new_run", "teahouse"]
    assert [info.value for info in page.info] == [ENGLISH["no_metrics"]]
    page.selectbox(key="run").set_value("teahouse").run()
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown == {"Status": "finished", "Step": "50", "Loss": r"1\.5", "Held-out loss": r"2\.25", "Tokens/s": "3,000"}
    charts = page.get("vega_lite_chart") or page.get("arrow_vega_lite_chart")
    assert len(charts) == 2
    # a model's answer is text: neither Markdown nor HTML
    assert "<b>**粗**</b>" in [text.value for text in page.get("text")]


def test_a_server_that_is_gone(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.session_state.turns
    monkeypatch.setenv("TNL_SERVER", "http://127.0.0.1:9")
    page.run()
    assert [error.value for error in page.error] == [ENGLISH["no_server"]] and not page.exception
    assert page.button[0].label == ENGLISH["retry"] and page.session_state.turns == before


def test_an_answer_that_is_refused(page: AppTest) -> None:
    page.number_input(key="max_tokens").set_value(100_000)
    ask(page, "一")
    assert page.session_state.turns[0].answers[0].finish == "error"
    assert [error.value for error in page.error] == [ENGLISH["failed"]]
    assert any("max_tokens: at most" in text.value for text in page.get("text"))
    page.number_input(key="max_tokens").set_value(4)
    ask(page, "二")
    assert page.session_state.turns[1].answers[0].text and not page.session_state.drawing


def test_a_key_that_is_wrong(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TNL_SERVER", live.url)
    monkeypatch.setenv("TNL_API_KEY", "another")
    page = AppTest.from_file(app.__file__, default_timeout=60).run()
    assert not page.exception and "API key" in page.get("text")[0].value
