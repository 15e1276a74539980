"""`tnl page`: what it refuses, and the whole command as processes."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tnl.errors import RecipeError
from tnl.page.run import STREAMLIT, check, check_port, run, stopped_by_signals


def test_without_streamlit_the_pip_line_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "streamlit" else find(name))
    with pytest.raises(RecipeError, match=r"streamlit, which is not installed\. .*pip install -c constraints.txt -e \"\.\[page\]\"\."):
        run("demo", None, 8501)


@pytest.mark.parametrize(
    ("model", "server", "given", "told"),
    [
        (None, None, {}, "nobody to talk to"),
        ("demo", "http://127.0.0.1:8000", {}, "both MODEL_OR_RUN and --server"),
        (None, "127.0.0.1:8000", {}, "no address of a server"),
        (None, "ftp://x", {}, "no address of a server"),
        (None, "http://x", {"device": "auto", "max_new_tokens": 5}, "--max-new-tokens: the server that runs has options of its own"),
        (None, "http://x", {"device": "cuda"}, "--device"),
    ],
)
def test_options_that_do_not_go_together(model: str | None, server: str | None, given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check(model, server, given)


def test_options_that_do() -> None:
    check("demo", None, {"device": "cpu", "slots": 2})
    check(None, "https://example.com/tnl", {"device": "auto", "dtype": "auto"})


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"--port: 127.0.0.1:{port} cannot be used"):
            run("demo", None, port)
    check_port(port)


def test_every_setting_is_one_of_streamlits() -> None:
    from streamlit import config

    known = config.get_config_options()
    for setting in STREAMLIT:
        assert setting.removeprefix("--").partition("=")[0] in known, setting
    assert {"--server.address=127.0.0.1", "--browser.gatherUsageStats=false"} < set(STREAMLIT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_well(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals():
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        time.sleep(10)
        raise AssertionError("no signal came")
    assert signal.getsignal(signal.SIGTERM) is before


@contextlib.contextmanager
def spawned(*arguments: str, prefix: Sequence[str] = (), **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [*prefix, sys.executable, "-m", "tnl", "page", *arguments]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=settings)
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ready(port: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the page did not start")


@pytest.mark.slow
def test_the_command(output: Path, tmp_path: Path) -> None:
    """Loopback alone, both ways; the key in no command line, exit 0 on SIGTERM, and nothing left behind."""
    port, log = free_port(), tmp_path / "connects"
    arguments = (str(output / "teahouse"), "--port", str(port), "--runs", str(output))
    strace = ("strace", "-f", "-qq", "-e", "trace=connect", "-o", str(log))
    with spawned(*arguments, prefix=strace, TNL_API_KEY="secret-key") as process:
        ready(port)
        [page] = psutil.Process(process.pid).children()
        family = [page, *page.children(recursive=True)]
        assert len(family) == 3
        addresses = {one.laddr.ip for member in family for one in member.net_connections("inet") if one.status == psutil.CONN_LISTEN}
        assert addresses == {"127.0.0.1"}
        assert not any("secret-key" in word for member in family for word in member.cmdline())
        page.send_signal(signal.SIGTERM)
        said, told = process.communicate(timeout=60)
        assert process.returncode == 0 and said.splitlines()[0] == f"http://127.0.0.1:{port}"
        assert "serves demo, teahouse" in told and "Traceback" not in told and "GET /" not in told
        assert not any(member.is_running() for member in family)
    connects = [line for line in log.read_text(encoding="utf-8").splitlines() if "AF_INET" in line]
    assert connects and all('inet_addr("127.0.0.1")' in line for line in connects)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_killing_it_leaves_nothing_behind(output: Path, early: bool) -> None:
    """Also where the server has just been started and loads."""
    port = free_port()
    with spawned(str(output / "teahouse"), "--port", str(port)) as process:
        if not early:
            ready(port)
        page, family = psutil.Process(process.pid), []
        while len(family) < (1 if early else 2):
            family = page.children(recursive=True)
            time.sleep(0.05)
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while alive := [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() < end, alive
            time.sleep(0.05)


@pytest.mark.slow
def test_what_the_server_refuses_is_told(tmp_path: Path) -> None:
    with spawned(str(tmp_path / "none"), "--port", str(free_port())) as process:
        said, told = process.communicate(timeout=120)
    assert process.returncode == 4 and not said
    assert told.startswith("error: ") and "none" in told and told.count("\n") == 1
