"""uvicorn's HTTP protocol with bounds on what it leaves open: headers that do not come, readers that do not read, too many connections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from tnl.serve.errors import ApiError
from tnl.serve.gate import Limits


class BoundedProtocol(H11Protocol):
    """One connection. `bounded` makes a class of it with a server's limits."""

    limits = Limits()
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections")
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self._late is None and (cycle is None or cycle.response_complete):
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not cycle and self._late is not None:
            self._late.cancel()
            self._late = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._late is None and self.conn.trailing_data[0] and self.cycle.response_complete:
            self._expect_headers()  # the next request has begun to come already

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP request")

    def _expect_headers(self) -> None:
        self._late = self.loop.call_later(self.limits.read_seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request's headers were not there after {self.limits.read_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(ApiError(status, message).body).encode()
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded(limits: Limits) -> type[Any]:
    """The protocol class for a server with these limits."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits})
