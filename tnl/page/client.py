"""The server as the page sees it: JSON over HTTP, and answers that are read on threads of their own until they end or are closed."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import quote, urlsplit

Finish = Literal["stop", "length", "stopped", "error"]
SECONDS = 10.0
"""Until the server must have answered what it knows at once."""
UNSEEN = 5.0
"""Seconds after which an answer that nobody looks at is left: its page has gone."""
LINES = 2000
"""Of a run's metrics, from its end."""


class ServerError(Exception):
    """What the server refused, or that it is not there, in words for the person."""


class Server:
    """One server. Its address is called directly, whatever proxies are set up for other addresses."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._parts = urlsplit(self.url)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def models(self) -> list[dict[str, Any]]:
        """The base and the adapters: id, root (the base's id), system. Raises ServerError."""
        return list(self._get("/v1/models")["data"])

    def runs(self) -> list[dict[str, Any]]:
        """Every run: id, status, changed, last. Raises ServerError."""
        return list(self._get("/v1/runs")["data"])

    def run(self, name: str) -> dict[str, Any]:
        """One run, with metrics and samples. Raises ServerError."""
        return self._get(f"/v1/runs/{quote(name, safe='')}?limit={LINES}")

    def answer(self, body: dict[str, Any]) -> Answer:
        """Begin an answer; it is read while the caller does other things."""
        return Answer(self, body)

    def connect(self, seconds: float | None) -> http.client.HTTPConnection:
        """A new connection. Raises OSError."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=SECONDS)
        connection.connect()
        connection.sock.settimeout(seconds)
        return connection

    def ask(self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """Send a request, a POST where there is a body. Raises OSError, HTTPException, ServerError."""
        sent = None if body is None else json.dumps(body, allow_nan=False).encode("utf-8")
        connection.request("GET" if sent is None else "POST", self._parts.path + path, sent, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(complaint(response.read(1 << 16)) or f"HTTP {response.status}")
        return response

    def _get(self, path: str) -> dict[str, Any]:
        try:
            connection = self.connect(SECONDS)
            try:
                found = json.loads(self.ask(connection, path).read())
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self.url}: {reason(error)}") from None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path}: not what a tnl server says")
        return found


class Answer:
    """One answer as it comes: `text` grows until `finish` is set. It goes on as long as somebody looks at it."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.model: str = body["model"]
        self.text = self.error = ""
        self.finish: Finish | None = None
        self.tokens = 0
        self.seconds = 0.0
        """From the first text to the last."""
        self._closed = False
        self._looked = time.monotonic()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._read, args=(server, body), daemon=True)
        self._thread.start()

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer; the first token counts as reading."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0

    def look(self) -> None:
        """Say that somebody is there."""
        self._looked = time.monotonic()

    def close(self) -> None:
        """Leave: the server stops drawing, what has come stays."""
        self._closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads; close alone would not
        self._thread.join(SECONDS)

    def _read(self, server: Server, body: dict[str, Any]) -> None:
        finish: Finish = "error"
        try:
            connection = server.connect(None)
            self._socket = connection.sock
            try:
                if not self._closed:
                    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
                    finish = self._take(server.ask(connection, "/v1/chat/completions", asked))
            finally:
                connection.close()
        except ServerError as error:
            self.error = str(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = f"{server.url}: {reason(error)}"
        if self._closed:
            finish, self.error = "stopped", ""
        self.finish = finish

    def _take(self, response: http.client.HTTPResponse) -> Finish:
        finish: Finish | None = None
        first = time.perf_counter()
        for chunk in events(response):
            self._closed = self._closed or time.monotonic() - self._looked > UNSEEN
            if self._closed:
                return "stopped"
            if "error" in chunk:
                raise ServerError(complaint(json.dumps(chunk).encode("utf-8")))
            for choice in chunk.get("choices") or ():
                piece = (choice.get("delta") or {}).get("content") or ""
                if piece and not self.text:
                    first = time.perf_counter()
                self.text += piece
                finish = choice.get("finish_reason") or finish
            self.seconds = time.perf_counter() - first
            self.tokens = (chunk.get("usage") or {}).get("completion_tokens") or self.tokens
        if finish is None:
            raise ServerError("the connection ended before the answer did")
        return finish


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, to its end."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def complaint(body: bytes) -> str:
    """The message of an error in OpenAI's shape; empty where it is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def reason(error: Exception) -> str:
    """A fault of the network in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
