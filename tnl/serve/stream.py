"""From the engine's thread to the event loop: the pieces of one HTTP request's answers, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tnl.generate.engine import Engine
from tnl.generate.request import Answer, Closed, Piece, QueueFull, Request, Ticket
from tnl.serve.errors import ApiError
from tnl.serve.gate import Gone
from tnl.serve.metrics import Metrics

Chunk = dict[str, Any]
RETRY_AFTER = "2"
"""Seconds after which a client that met a full queue may ask again."""


class Asked:
    """The tickets of one HTTP request. Answer i of prompt p has the index p * n + i."""

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: Metrics) -> None:
        """Hand the requests to the engine, all or none. Raises ApiError 429, 503; KeyError where their adapter is gone."""
        self.metrics, self.begun = metrics, time.perf_counter()
        self.tickets: list[Ticket] = []
        self._loop = asyncio.get_running_loop()
        self._pieces: list[tuple[int, Piece]] = []
        self._there = asyncio.Event()
        self._lock = threading.Lock()
        self._open = sum(request.n for request in requests)
        self._first = True
        try:
            offset = 0
            for request in requests:
                self.tickets.append(engine.submit(request, self._listener(offset)))
                offset += request.n
        except QueueFull as error:
            self.cancel()
            message = f"the server is busy: {error}"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": RETRY_AFTER}) from None
        except Closed:
            self.cancel()
            raise ApiError(503, "the server is stopping", code="stopping") from None

    def _listener(self, offset: int) -> Callable[[Piece], None]:
        def listen(piece: Piece) -> None:
            # on the engine's thread; one wake-up of the loop for all that has come since it looked
            with self._lock:
                waking = not self._pieces
                self._pieces.append((offset + piece.index, piece))
            if waking:
                self._loop.call_soon_threadsafe(self._there.set)

        return listen

    def cancel(self) -> None:
        """Free the slots."""
        for ticket in self.tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(index, piece) as they come, until every answer has ended. Leaving early cancels what is left."""
        try:
            while self._open:
                await self._there.wait()
                self._there.clear()
                with self._lock:
                    come, self._pieces = self._pieces, []
                if self._first and come:
                    self._first = False
                    self.metrics.first_token.observe(time.perf_counter() - self.begun)
                self._open -= sum(piece.finish is not None for _, piece in come)
                yield come
        finally:
            if self._open:
                self.cancel()
            self.metrics.seconds.observe(time.perf_counter() - self.begun)

    async def answers(self, receive: Receive) -> list[Answer]:
        """All answers, once they are whole. Raises Gone as soon as the client leaves, ApiError where one failed."""

        async def work() -> None:
            async for _ in self.pieces():
                pass

        await first_of(work(), gone(receive))
        found = [answer for ticket in self.tickets for answer in ticket.answers]
        for answer in found:
            if answer.finish not in ("stop", "length"):
                raise failure(answer)
        return found

    def usage(self) -> dict[str, Any]:
        """What it took, in OpenAI's words."""
        read = sum(len(ticket.request.ids) for ticket in self.tickets)
        drawn = sum(answer.tokens for ticket in self.tickets for answer in ticket.answers)
        cached = sum(ticket.cached_tokens for ticket in self.tickets)
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def failure(answer: Answer | Piece) -> ApiError:
    """What a client is told of an answer that did not end well."""
    return ApiError(500, answer.error or "the answer was cancelled", code="answer_failed")


async def gone(receive: Receive) -> None:
    """Wait until the client has left. Raises Gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise Gone


async def first_of(*works: Any) -> None:
    """Wait for the first to end, cancel the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events that end when the client leaves: nothing is drawn for nobody."""

    media_type = "text/event-stream"

    def __init__(self, asked: Asked, events: Callable[[int, Piece], Iterable[Chunk]], last: Callable[[], Iterable[Chunk]]) -> None:
        """events: what is sent for a piece; last: what is sent once all have ended well."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.asked, self.events, self.last = asked, events, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first_of(self._send(send), gone(receive))
        finally:
            self.asked.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        failed: Piece | None = None
        async for come in self.asked.pieces():
            sent: list[Chunk] = []
            for index, piece in come:
                if piece.finish in ("error", "cancelled"):
                    failed = piece
                else:
                    sent += self.events(index, piece)
            if sent:
                await send({"type": "http.response.body", "body": b"".join(map(event, sent)), "more_body": True})
        ending = [event(failure(failed).body)] if failed else [*map(event, self.last()), b"data: [DONE]\n\n"]
        await send({"type": "http.response.body", "body": b"".join(ending), "more_body": False})


def event(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
