"""The page's client against a server that is written here, and against the real one."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tnl.page import client
from tnl.page.client import Answer, Server, ServerError

ASK = {"model": "teahouse", "messages": [{"role": "user", "content": "你好"}]}


class Scripted:
    """A server that says to every request what it was told to, byte by byte, then closes."""

    def __init__(self, reply: bytes, wait: float = 0) -> None:
        self.reply, self.wait = reply, wait
        self.left = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self.socket, self.socket.accept()[0] as client:
            got = b""
            while b"\r\n\r\n" not in got or (got.startswith(b"POST") and not got.endswith(b"}}")):
                got += client.recv(1 << 16)
            for i in range(0, len(self.reply), 7):
                client.sendall(self.reply[i : i + 7])
            client.settimeout(self.wait or 0.01)
            try:
                if not client.recv(1):
                    self.left.set()
            except OSError:
                pass


def stream(*events: Any) -> bytes:
    body = b"".join(
        b"data: " + (one if isinstance(one, bytes) else json.dumps(one, ensure_ascii=False).encode()) + b"\n\n" for one in events
    )
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text} if text else {}, "finish_reason": finish}]}


def ended(answer: Answer) -> Answer:
    answer._thread.join(10)
    assert answer.finish is not None
    return answer


def test_pieces_become_a_text() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    server = Server(Scripted(stream(piece("你"), piece("好😀"), piece("", "length"), usage, b"[DONE]")).url)
    answer = ended(server.answer(ASK))
    assert (answer.text, answer.finish, answer.tokens, answer.error) == ("你好😀", "length", 3, "")
    assert answer.tokens_per_second > 0


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (stream(piece("你"), {"error": {"message": "the answer was cancelled"}}), "the answer was cancelled"),
        (stream(piece("你")), "ended before the answer did"),
        (stream(b"{"), "Expecting"),
        (b"HTTP/1.1 429 Busy\r\n\r\n" + b'{"error": {"message": "the server is busy"}}', "the server is busy"),
        (b"HTTP/1.1 502 Bad\r\n\r\n<html>", "HTTP 502"),
        (b"nonsense", "nonsense"),
        (b"", "closed"),
    ],
)
def test_what_goes_wrong_is_told(reply: bytes, told: str) -> None:
    answer = ended(Server(Scripted(reply).url).answer(ASK))
    assert answer.finish == "error" and told in answer.error
    assert answer.text in ("", "你")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\n\r\n[1]", b"HTTP/1.1 200 OK\r\n\r\n<html>", b"x", b"HTTP/1.1 401 No\r\n\r\n{}"])
def test_a_server_of_another_kind(reply: bytes) -> None:
    with pytest.raises(ServerError):
        Server(Scripted(reply).url).models()


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerError, match="refused"):
        Server(url).models()
    assert "refused" in ended(Server(url).answer(ASK)).error


def test_closing_wakes_the_reader_and_the_server_sees_it() -> None:
    scripted = Scripted(stream(piece("你")), wait=10)
    answer = Server(scripted.url).answer(ASK)
    while not answer.text:
        time.sleep(0.005)
    begun = time.monotonic()
    answer.close()
    assert (answer.text, answer.finish) == ("你", "stopped")
    assert scripted.left.wait(5) and time.monotonic() - begun < 2
    answer.close()


def test_closing_before_anything_came() -> None:
    answer = Server(Scripted(b"", wait=10).url).answer(ASK)
    answer.close()
    assert answer.finish == "stopped" and not answer.text and not answer.error


@pytest.fixture
def server(live: Any) -> Iterator[Server]:
    yield Server(live.url, "the-key")
    assert live.settled()


def test_the_real_server(server: Server, live: Any) -> None:
    assert [(model["id"], model["root"]) for model in server.models()] == [("demo", "demo"), ("teahouse", "demo")]
    assert {run["id"]: run["status"] for run in server.runs()} == {"new_run": "unfinished", "teahouse": "finished"}
    assert server.run("teahouse")["metrics"][-1]["eval_loss"] == 2.25
    with pytest.raises(ServerError, match="no run is called"):
        server.run("none")
    with pytest.raises(ServerError, match="API key"):
        Server(live.url).models()
    answer = ended(server.answer({**ASK, "model": "demo", "max_tokens": 8, "temperature": 0}))
    assert answer.finish in ("stop", "length") and answer.text and 0 < answer.tokens <= 8
    assert "max_tokens" in ended(server.answer({**ASK, "max_tokens": 0})).error


def test_leaving_frees_the_slot(server: Server, live: Any) -> None:
    answers = [server.answer({**ASK, "seed": seed}) for seed in range(3)]
    while not all(answer.text for answer in answers):
        assert not any(answer.error for answer in answers)
        time.sleep(0.01)
    for answer in answers:
        answer.close()
    assert live.settled(2)
    assert {answer.finish for answer in answers} == {"stopped"} and all(answer.text for answer in answers)


def test_an_answer_that_nobody_looks_at_is_left(server: Server, live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNSEEN", 0.5)
    seen, unseen = server.answer(ASK), server.answer(ASK)
    while unseen.finish is None:
        seen.look()
        time.sleep(0.02)
    assert (unseen.finish, unseen.error, seen.finish) == ("stopped", "", None)
    seen.close()
