"""The server as a process: signals, a dead engine, a port that is taken, many clients of one document."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tnl.errors import ModelError, RecipeError
from tnl.serve.gate import Limits
from tnl.serve.run import Serving, is_loopback, listen, prepare, run, served_name

CHAT = "/v1/chat/completions"
ASK = {"model": "tiny-base", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 400, "temperature": 1, "stream": True}


def test_a_port_that_is_taken_names_itself() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(RecipeError, match=f"--port: 127.0.0.1:{port} cannot be used"):
            listen("127.0.0.1", port)


def test_an_address_that_is_none_of_this_machines() -> None:
    with pytest.raises(RecipeError, match="--"):
        listen("203.0.113.7", 0)
    with pytest.raises(RecipeError, match="--host"):
        listen("no such host.invalid", 0)


def test_loopback() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.com")


def test_names(tmp_path: Path) -> None:
    assert served_name("demo") == "demo" and served_name("OpenNLPLab/TransNormerLLM-385M") == "TransNormerLLM-385M"
    assert served_name(str(tmp_path / "甄嬛")) == "甄嬛"
    with pytest.raises(RecipeError, match="rename the folder"):
        served_name(str(tmp_path / "two words"))


def test_what_cannot_be_served(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/none: no such folder"):
        prepare(str(base), Serving(adapters=tmp_path / "none"), {})
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match="--runs"):
        prepare(str(base), Serving(runs=tmp_path / "file"), {})
    with pytest.raises(ModelError):
        prepare(str(tmp_path), Serving(), {})


def test_draining_lets_answers_end_and_takes_no_new_ones(start: Callable[..., Any], base: Path) -> None:
    live = start(base)
    found: list[httpx2.Response] = []

    def talk() -> None:
        with live.client() as client:
            found.append(client.post(CHAT, json=ASK))

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    while live.service.engine.load["running"] < 4:
        time.sleep(0.005)
    with live.client() as idle:
        assert idle.get("/health").status_code == 200
        live.server.drain()
        for thread in threads:
            thread.join(30)
        live.thread.join(10)
        with pytest.raises(httpx2.HTTPError):
            idle.get("/health")
    assert (
        all(reply.text.endswith("data: [DONE]\n\n") and reply.text.count('"finish_reason": "') == 1 for reply in found) and len(found) == 4
    )


def test_draining_has_an_end(start: Callable[..., Any], base: Path) -> None:
    live = start(base, Serving(limits=Limits(drain_seconds=1, max_tokens=10**6)))
    found: list[httpx2.Response] = []

    def talk() -> None:
        with live.client() as client:
            found.append(client.post(CHAT, json={**ASK, "max_tokens": 10**6, "temperature": 0}))

    thread = threading.Thread(target=talk)
    thread.start()
    while not live.service.engine.load["running"]:
        time.sleep(0.005)
    begun = time.monotonic()
    live.server.drain()
    thread.join(10)
    live.thread.join(10)
    assert not live.thread.is_alive() and time.monotonic() - begun < 3
    last = json.loads(found[0].text.strip().rpartition("data: ")[2])
    assert last["error"]["type"] == "server_error" and "stopped" in last["error"]["message"]


def test_a_dead_engine_is_seen(start: Callable[..., Any], base: Path) -> None:
    live = start(base)
    live.service.engine.slots.step = lambda *_: 1 / 0
    with live.client() as client:
        reply = client.post(CHAT, json={**ASK, "stream": False})
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "answer_failed"
        health = client.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "dead"}
        assert client.post(CHAT, json=ASK).status_code == 503
    live.thread.join(20)
    assert not live.thread.is_alive() and isinstance(live.service.engine.error, ZeroDivisionError)


CODE = """
import sys, torch
from tnl.errors import TnlError
from tnl.serve.run import run
torch.set_num_threads(1)
if len(sys.argv) > 3:
    from tnl.generate.slots import Slots
    Slots.step = lambda *_: 1 / 0
try:
    run(sys.argv[1], port=int(sys.argv[2]))
except TnlError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def spawned(base: Path, port: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CODE, str(base), str(port), *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ready(port: int) -> httpx2.Client:
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
    for _ in range(600):
        try:
            if client.get("/health").status_code == 200:
                return client
        except httpx2.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_sigterm_lets_run_return(base: Path) -> None:
    """On this thread, as the command does: what runs ends, and nothing is raised."""
    port, found = free_port(), list[str]()

    def talk() -> None:
        with contextlib.closing(ready(port)) as client, client.stream("POST", CHAT, json=ASK) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            found.extend(line for line in lines if line)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=talk)
    thread.start()
    run(str(base), port=port, slots=8, max_tokens=500)
    thread.join(10)
    assert found[-1] == "data: [DONE]" and sum('"finish_reason": "' in line for line in found) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_sigterm_ends_a_process_well(base: Path) -> None:
    port = free_port()
    with spawned(base, port) as process, contextlib.closing(ready(port)) as client:
        with client.stream("POST", CHAT, json=ASK) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and process.wait(10) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "serves tiny-base" in log and "Traceback" not in log


@pytest.mark.slow
def test_a_process_whose_engine_dies_exits_with_another_code(base: Path) -> None:
    port = free_port()
    with spawned(base, port, "broken") as process, contextlib.closing(ready(port)) as client:
        assert client.post(CHAT, json={**ASK, "stream": False}).status_code == 500
        assert client.get("/health").status_code == 503
        assert process.wait(20) != 0


@pytest.mark.slow
def test_a_second_process_on_the_port_leaves_the_first_alone(base: Path) -> None:
    port = free_port()
    with spawned(base, port), contextlib.closing(ready(port)) as client, spawned(base, port) as second:
        _, told = second.communicate(timeout=60)
        assert second.returncode == 2 and f"--port: 127.0.0.1:{port} cannot be used" in told
        assert client.get("/health").status_code == 200


def test_options_by_their_names() -> None:
    found = Serving.of({"slots": 16, "queue": None, "max_prompt": 100, "api_key": "x", "merge": False, "temperature": 0.5, "max_tokens": 7})
    assert Serving.of({}).limits == Limits() and Serving.of({"max_prompt": 1 << 20}).limits.body == 16 << 20
    assert Serving.of({"state_writes": "deferred"}).state_writes == "deferred"
    with pytest.raises(RecipeError, match=r'--state-writes: "often" is none\. Give one of auto, each-step, deferred'):
        Serving.of({"state_writes": "often"})
    with pytest.raises(RecipeError, match="--api-key: is empty"):
        Serving.of({"api_key": ""})
    assert found == Serving(slots=16, api_key="x", merge=False, limits=Limits(prompt=100, max_tokens=7))
