"""The page as people meet it, in Debian's Chromium: send, stream, stop, switch, side by side, follow a run."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tnl.page.look import COLORS
from tnl.page.run import start_page

pytestmark = pytest.mark.slow
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
Open = Callable[..., Page]
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def address(live: Any) -> Iterator[str]:
    """Where the page is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        start_page(port, {**os.environ, "TNL_SERVER": live.url, "TNL_API_KEY": "the-key"}, stack)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/_stcore/health", timeout=5):
                break
            time.sleep(0.1)
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "scripts/setup-test-machine installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, address: str, live: Any) -> Iterator[Open]:
    """open_page(locale, size, scheme) -> a page of a person of its own. In the end nothing was asked elsewhere, and no slot is lost."""
    asked: list[str] = []
    contexts = []

    def begin(locale: str = "en-US", size: Any = LAPTOP, scheme: Any = "light") -> Page:
        contexts.append(chromium.new_context(locale=locale, viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda found: asked.append(found.url))
        page.goto(address)
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
        return page

    yield begin
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if f"//{address.partition('//')[2]}" not in url and not url.startswith(("data:", "blob:"))]
    assert asked and not elsewhere
    assert live.settled()


def ask(page: Page, question: str) -> Locator:
    """Send a question; returns the message that its answer stands in."""
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled()
    messages = page.get_by_test_id("stChatMessage")
    before = messages.count()
    box.fill(question)
    box.press("Enter")
    expect(messages).to_have_count(before + 2)
    return messages.nth(before + 1)


def said(answer: Locator, at: int = 0) -> str:
    return answer.get_by_test_id("stText").nth(at).inner_text()


def sampling(page: Page, tokens: int) -> None:
    """Short answers."""
    sidebar = page.get_by_test_id("stSidebar")
    sidebar.get_by_text("Sampling").click()
    sidebar.get_by_text("As the model was trained").click()
    field = sidebar.get_by_label("Tokens of an answer at most")
    expect(field).to_be_enabled()
    field.fill(str(tokens))
    field.press("Enter")
    page.wait_for_timeout(500)


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_test_id("stSelectbox").filter(has_text=label).locator("[role=combobox], [data-baseweb=select]").first.click()
    page.get_by_role("option", name=option).click()


def grows(answer: Locator, seconds: float = 20) -> None:
    start, end = len(said(answer)), time.monotonic() + seconds
    while len(said(answer)) <= start:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_answer_streams_and_stops(open_page: Open, live: Any) -> None:
    page = open_page()
    answer = ask(page, "给我讲个故事吧")
    expect(answer.get_by_test_id("stText").first).not_to_be_empty()
    grows(answer)
    grows(answer)
    assert live.service.engine.load["free"] < live.service.engine.load["slots"]
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    assert live.settled(3)
    expect(answer).to_contain_text("stopped")  # the button stands on the page before the answer is drawn for the last time
    kept = said(answer)
    assert len(kept) > 10
    page.wait_for_timeout(700)
    assert said(answer) == kept
    # the conversation goes on, the half answer in it
    again = ask(page, "再说")
    grows(again)
    page.get_by_role("button", name="Stop").click()
    assert said(answer) == kept


def test_moving_a_control_does_not_end_an_answer(open_page: Open) -> None:
    page = open_page()
    answer = ask(page, "给我讲个故事吧")
    grows(answer)
    before = said(answer)
    page.get_by_test_id("stSidebar").get_by_text("中文").click()
    expect(page.get_by_role("button", name="停止")).to_be_visible()
    grows(answer)
    assert said(answer).startswith(before)
    page.get_by_role("button", name="新对话").click()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(0)


def test_another_model_then_both_side_by_side_then_again(open_page: Open) -> None:
    page = open_page()
    sampling(page, 8)
    answer = ask(page, "你是谁？")
    expect(answer.get_by_text("tokens/s")).to_be_visible()
    assert answer.get_by_test_id("stCaptionContainer").first.inner_text() == "teahouse"
    choose(page, "Model", "demo (base)")
    answer = ask(page, "你是谁？")
    expect(answer.get_by_text("tokens/s")).to_be_visible()
    assert answer.get_by_test_id("stCaptionContainer").first.inner_text() == "demo"
    page.get_by_test_id("stSidebar").get_by_text("Side by side").click()
    expect(page.get_by_text("The other model")).to_be_visible()
    answer = ask(page, "给我讲个故事吧")
    expect(answer.get_by_text("tokens/s")).to_have_count(2)
    page.wait_for_timeout(1000)  # it scrolls to the end
    left, right = (column.bounding_box() for column in answer.get_by_test_id("stColumn").all())
    assert left and right and left["y"] == right["y"] and right["x"] >= left["x"] + left["width"]
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(500)
    left, right = (column.bounding_box() for column in answer.get_by_test_id("stColumn").all())
    assert left and right and left["x"] == right["x"] and right["y"] >= left["y"] + left["height"]
    page.set_viewport_size(LAPTOP)
    page.get_by_role("button", name="Answer again").click()
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(6)
    expect(answer.get_by_text("tokens/s")).to_have_count(2)


def test_the_export(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    sampling(page, 4)
    answer = ask(page, "你好")
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "talk.json")
    [record] = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [one["role"] for one in record["messages"]] == ["user", "assistant"]
    assert record["messages"][1]["content"].split() == said(answer).split()


def test_a_run_is_followed(open_page: Open, output: Path) -> None:
    page = open_page("zh-CN")
    page.get_by_role("tab", name="训练").click()
    panel = page.get_by_role("tabpanel", name="训练")
    choose(page, "训练记录", "teahouse")
    step = panel.get_by_test_id("stMetric").filter(has_text="步数")
    expect(step).to_contain_text("50")
    expect(panel.get_by_test_id("stVegaLiteChart")).to_have_count(2)
    expect(panel.get_by_test_id("stVegaLiteChart").first.locator("canvas, svg").first).to_be_visible()
    expect(panel.get_by_text("<b>**粗**</b>", exact=True)).to_be_visible()
    assert panel.get_by_text("![x](http://192.0.2.1/x.png)").count() == 1 and panel.locator("img").count() == 0
    metrics = output / "teahouse" / "metrics.jsonl"
    before = metrics.read_text(encoding="utf-8")
    try:
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 60, "loss": 1.25}) + "\n")
        expect(step).to_contain_text("60", timeout=15_000)
        expect(panel.get_by_test_id("stMetric").filter(has_text="损失").first).to_contain_text("1.25")
    finally:
        metrics.write_text(before, encoding="utf-8")


def test_text_is_never_markup(open_page: Open) -> None:
    page = open_page()
    sampling(page, 4)
    question = '![x](http://192.0.2.1/a.png) <img src="http://192.0.2.1/b.png"> **b** $x$ :smile:'
    ask(page, question)
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    shown = page.get_by_test_id("stChatMessage").first
    assert said(shown) == question and shown.locator("img, strong, .katex").count() == 0


def test_two_people_and_a_reload(open_page: Open, live: Any) -> None:
    """Sessions are apart; a page that is loaded anew in the middle ends its answer, and its alone."""
    one, other = open_page(), open_page()
    mine, theirs = ask(one, "一一一"), ask(other, "二二二")
    grows(mine)
    grows(theirs)
    assert "一一一" not in other.locator("body").inner_text() and "二二二" not in one.locator("body").inner_text()
    one.reload()
    expect(one.get_by_test_id("stChatInputTextArea")).to_be_enabled()
    engine = live.service.engine
    end = time.monotonic() + 10
    while engine.load["free"] < engine.load["slots"] - 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    grows(theirs)
    grows(ask(one, "又来了"))


def test_ten_thousand_lines(open_page: Open, output: Path) -> None:
    folder = output / "long"
    folder.mkdir()
    try:
        (folder / "run.json").write_text('{"status": "finished"}', encoding="utf-8")
        long = "\n".join(f"{i} 行" for i in range(10_000))
        (folder / "samples.jsonl").write_text(json.dumps({"question": "数", "after": long}) + "\n", encoding="utf-8")
        page = open_page()
        page.get_by_role("tab", name="Training").click()
        choose(page, "Run", "long")
        expect(page.get_by_text("9999 行")).to_be_attached()
        page.get_by_role("tab", name="Chat").click()
        sampling(page, 4)
        assert said(ask(page, "你好")) is not None
        expect(page.get_by_role("button", name="Answer again")).to_be_visible()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("locale", "size"), [("zh-CN", PHONE), ("en-US", PHONE), ("zh-CN", LAPTOP)])
def test_it_fits_the_screen(open_page: Open, locale: str, size: dict[str, int]) -> None:
    page = open_page(locale, size)
    answer = ask(page, "a" * 300)
    grows(answer)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("(e => e.scrollHeight <= e.clientHeight + 1)(document.querySelector('[data-testid=stMain]'))")
    for part in (page.get_by_test_id("stChatInputTextArea"), page.locator(".st-key-stop button")):
        box = part.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= size["width"] and box["y"] + box["height"] <= size["height"]
    expect(page.get_by_role("tab", name="对话" if locale == "zh-CN" else "Chat")).to_be_visible()


@pytest.mark.parametrize(("scheme", "low", "high"), [("light", 700, 765), ("dark", 0, 150)])
def test_it_is_as_dark_as_the_browser(open_page: Open, scheme: str, low: int, high: int) -> None:
    page = open_page(scheme=scheme)
    colour = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert low <= sum(map(int, re.findall(r"\d+", colour)[:3])) <= high
    page.get_by_role("tab", name="Training").click()
    choose(page, "Run", "teahouse")
    chart = page.get_by_test_id("stVegaLiteChart").first
    expect(chart.locator(f"svg [stroke='{COLORS[scheme][0]}']").first).to_be_attached()


def test_a_page_from_elsewhere_is_refused(address: str) -> None:
    """Under a foreign name that was made to point here (DNS rebinding), or from a foreign page, nobody gets in."""
    host = address.partition("//")[2]
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    }
    statuses = []
    for name, origin in ((host, address), ("evil.example", "http://evil.example"), (host, "http://evil.example")):
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", "/_stcore/stream", headers={**headers, "Host": name, "Origin": origin})
        statuses.append(connection.getresponse().status)
        connection.close()
    assert statuses == [101, 403, 403]
