"""Keys, hosts, sizes and times: what stands before the routes, on raw sockets where a client would not do such a thing."""

import json
import logging
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tnl.serve.gate import Limits, is_local
from tnl.serve.run import Serving

KEY = "canary-5f1e-schlüssel"
CHAT = "/v1/chat/completions"
ASK = {"model": "tiny-base", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
QUICK = Limits(read_seconds=1, write_seconds=1, body=10_000, connections=20, max_tokens=100_000)


@pytest.fixture(scope="module")
def guarded(start: Callable[..., Any], base: Path) -> Any:
    return start(base, Serving(api_key=KEY))


@pytest.fixture(scope="module")
def quick(start: Callable[..., Any], base: Path) -> Any:
    return start(base, Serving(limits=QUICK))


def connect(live: Any, data: bytes = b"") -> socket.socket:
    found = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    found.sendall(data)
    return found


def raw(body: bytes | dict[str, Any], length: int | None = None, path: str = CHAT, more: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return (head + more + f"content-length: {len(data) if length is None else length}\r\n\r\n").encode() + data


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def read_reply(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"}"):
        found += connection.recv(1)
    return found


def test_no_route_but_health_answers_without_the_key(guarded: Any) -> None:
    paths = [
        "/v1/models",
        "/v1/models/one",
        "/metrics",
        "/openapi.json",
        "/v1/runs",
        "/v1/runs/x",
        "/nope",
        "/docs",
        "//health",
        "/health/",
    ]
    with guarded.client() as client:
        assert client.get("/health").status_code == 200
        replies = [client.get(path) for path in paths] + [client.post(path, json=ASK) for path in (CHAT, "/v1/completions", "/")]
        replies.append(client.post(CHAT, content=b"not even json"))
    for reply in replies:
        assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", reply.url
        assert reply.json()["error"] == {
            "message": "an API key is needed: Authorization: Bearer KEY",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": KEY.encode()},
        {"authorization": b"Bearer " + KEY.encode()[:-1]},
        {"authorization": b"Bearer " + KEY.encode() + b"x"},
        {"authorization": b"Bearer"},
        {"authorization": b"Basic " + KEY.encode()},
        {"x-api-key": KEY.encode()},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_wrong_keys(guarded: Any, headers: dict[str, bytes]) -> None:
    with guarded.client() as client:
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.get("/v1/models", params={"api_key": KEY}).status_code == 401


def test_the_key_opens_and_is_never_written(guarded: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    with guarded.client(headers={"authorization": b"bearer " + KEY.encode()}) as client:
        replies = [
            client.get("/v1/models"),
            client.post(CHAT, json=ASK),
            client.get("/openapi.json"),
            client.get("/metrics"),
            client.get("/x"),
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 404]
    log = "".join(record.getMessage() for record in caplog.records if record.name.startswith(("tnl", "uvicorn")))
    written = log + "".join(capfd.readouterr()) + "".join(reply.text for reply in replies)
    assert "canary" not in written and "POST /v1/chat/completions 200" in log


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("127.0.0.1:8000", None, 200),
        ("[::1]:8000", None, 200),
        ("LOCALHOST:1", "http://localhost:8501", 200),
        ("evil.example", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("localhost", "https://evil.example", 403),
        ("localhost", "null", 403),
        ("192.168.1.5", None, 403),
    ],
)
def test_only_this_machines_names_and_pages(live: Any, host: str, origin: str | None, status: int) -> None:
    headers = {"host": host} | ({"origin": origin} if origin else {})
    with live.client() as client:
        reply = client.get("/v1/models", headers=headers)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["code"] == "foreign_host"


def test_what_is_local() -> None:
    assert all(map(is_local, (b"localhost", b"127.0.0.1", b"127.9.9.9:80", b"[::1]", b"[::1]:80", b"http://localhost:80")))
    assert not any(map(is_local, (b"", b"0.0.0.0", b"localhost.evil", b"[", b"[::2]", b"\xff", b"null", b"https://a.b")))


def test_a_body_that_is_too_large(quick: Any) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for body, more, length in (
        (b"x" * 200_000, "", None),
        (b"x" * 100, "", 10**12),
        (b"2710\r\n" + b"x" * 10_000 + b"\r\n5\r\nxxxxx\r\n0\r\n\r\n", "transfer-encoding: chunked\r\n", None),
    ):
        data = raw(body, length, more=more)
        if more:
            data = data.replace(f"content-length: {len(body)}\r\n".encode(), b"")
        with connect(quick, data) as connection:
            reply = read_all(connection)
        assert reply.startswith(b"HTTP/1.1 413 ") and b"the body has more than 10,000 bytes" in reply
    with quick.client() as client:
        assert client.post(CHAT, json=ASK).status_code == 200
    time.sleep(0.2)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_body_that_does_not_come(quick: Any) -> None:
    begun = time.monotonic()
    with connect(quick, raw(b'{"model": ', 5000)) as connection:
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 408 ") and b"the body was not there after 1 s" in reply and time.monotonic() - begun < 3


@pytest.mark.parametrize("data", [b"", b"GET /health HTTP/1.1\r\nhost: local"])
def test_headers_that_do_not_come(quick: Any, data: bytes) -> None:
    begun = time.monotonic()
    with connect(quick, data) as connection:
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 408 ") and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - begun < 3


def test_headers_that_do_not_come_a_second_time(quick: Any) -> None:
    with connect(quick, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
        assert b'{"status":"ok"}' in read_reply(connection)
        time.sleep(1.5)  # longer than headers may take: the connection was only waiting
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea")
        assert b'{"status":"ok"}' in read_reply(connection)
        assert b" 408 " in read_all(connection)


def test_no_http(quick: Any) -> None:
    with connect(quick, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n") as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_too_many_connections(quick: Any) -> None:
    held = [connect(quick) for _ in range(20)]
    time.sleep(0.2)
    try:
        with connect(quick) as one_more:
            assert read_all(one_more).startswith(b"HTTP/1.1 503 ")
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.2)
    with quick.client() as client:
        assert client.get("/health").status_code == 200


def test_a_reader_that_does_not_read_is_cut_off(quick: Any) -> None:
    ask = raw({**ASK, "max_tokens": 50_000, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20, "temperature": 1})
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", quick.port))
    with slow:
        slow.sendall(ask)
        engine = quick.service.engine
        end = time.monotonic() + 20
        while engine.load["running"] < 8:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert quick.settled(20)
    assert engine.counts.finished["cancelled"] >= 1 and engine.counts.finished["error"] == 0


PHASES = ["headers", "body", "queue", "prefill", "whole", "stream", "reset"]


def leave(live: Any, phase: str, wait: float) -> None:
    """A client that leaves in the middle."""
    ask: dict[str, Any] = {**ASK, "max_tokens": 50_000, "temperature": 1}
    if phase == "prefill":
        ask["messages"] = [{"role": "user", "content": "hello " * 1500}]
    if phase in ("stream", "reset"):
        ask["stream"] = True
    if phase == "queue":
        ask["n"] = 8
    data = raw(ask)
    with connect(live, data[:40] if phase == "headers" else data[:-5] if phase == "body" else data) as connection:
        if phase in ("stream", "reset"):
            connection.recv(1000)
        time.sleep(wait)
        if phase == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_its_slot(quick: Any, phase: str) -> None:
    for wait in (0.0, 0.1):
        leave(quick, phase, wait)
    assert quick.settled(1)
    with quick.client() as client:
        assert client.post(CHAT, json=ASK).status_code == 200


@pytest.mark.slow
def test_a_thousand_clients_that_leave(start: Callable[..., Any], base: Path) -> None:
    live = start(base, Serving(limits=Limits(max_tokens=100_000)))
    for i in range(50):
        leave(live, PHASES[i % 7], 0.02)
    files = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(1000):
        leave(live, PHASES[i % 7], (i % 13) / 200)
        if i % 50 == 0:
            assert live.settled(1)
    assert live.settled(1)
    time.sleep(1)
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 5
    live.stop()
