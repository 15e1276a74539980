"""Take docs/page-*.png: `tnl page` on a run of the demo (`tnl demo`), in Debian's Chromium with a Chinese font (fonts-noto-cjk).

python scripts/make_screenshots.py output/demo
"""

import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parents[1] / "docs"
PORT = 8599
URL = f"http://127.0.0.1:{PORT}"
CHROMIUM = "/usr/bin/chromium"


def main(run: Path) -> None:
    """Start the page, take the pictures, stop it."""
    command = [sys.executable, "-m", "tnl", "page", str(run), "--runs", str(run.resolve().parent), "--port", str(PORT)]
    process = subprocess.Popen(command)
    try:
        wait()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for name, locale, width, height in (("laptop", "en-US", 1280, 800), ("phone", "zh-CN", 390, 844)):
                context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
                take(context.new_page(), name)
            browser.close()
    finally:
        process.terminate()
        process.wait()


def wait() -> None:
    """Until the page answers."""
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"{URL}/_stcore/health", timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit("the page did not start")


def take(page: Page, name: str) -> None:
    """A question to the adapter, the same to adapter and base, and the run's tab."""
    page.goto(URL)
    ask(page, "你是谁？")
    if name == "laptop":
        page.get_by_test_id("stSidebar").get_by_text("Side by side").click()
        page.get_by_text("The other model").wait_for()
        ask(page, "给我讲个故事吧")
    page.screenshot(path=DOCS / f"page-chat-{name}.png")
    page.set_viewport_size({"width": 1280, "height": 1500} if name == "laptop" else {"width": 390, "height": 844})
    page.get_by_role("tab").nth(1).click()
    page.get_by_test_id("stVegaLiteChart").nth(1).locator("canvas, svg").first.wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / f"page-runs-{name}.png")


def ask(page: Page, question: str) -> None:
    """Send a question and wait for the whole answer."""
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(question)
    box.press("Enter")
    page.locator(".st-key-stop").wait_for()
    page.locator(".st-key-again").wait_for()
    page.wait_for_timeout(500)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
