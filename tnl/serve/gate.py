"""What stands before every route: who may ask, how large and how slow a request may be, one line in the log for each."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
import uuid
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tnl.serve.errors import ApiError, shown
from tnl.serve.metrics import Metrics

DRAINED = 16 << 20
"""Bytes beyond the bound that are read and forgotten before a body is refused."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    body: int = 1 << 20
    """Bytes of a body."""
    prompt: int = 32_768
    """Tokens of a prompt."""
    max_tokens: int = 4096
    """Tokens of an answer."""
    answers: int = 8
    """Answers to one request: n times its prompts."""
    read_seconds: float = 10
    """Until a request's headers, and then its body, must be there."""
    write_seconds: float = 30
    """Until a client must have taken what is written."""
    connections: int = 1000
    drain_seconds: float = 30
    """Until running answers must have ended, once the server is told to stop."""


class Gone(Exception):
    """The client has left."""


class Gate:
    """ASGI middleware. The key is compared in constant time, before anything of a request but its headers is looked at."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, *, api_key: str | None = None, local: bool = False) -> None:
        self.app, self.limits, self.metrics, self.local = app, limits, metrics, local
        self._key = None if api_key is None else hashlib.sha256(api_key.encode("utf-8")).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, own = time.perf_counter(), 499, uuid.uuid4().hex[:16]
        scope.setdefault("state", {})["request_id"] = own

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", own.encode())]}
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, await self.body(scope, receive), answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Gone:
            pass
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            user = scope["state"].get("user")
            by = f" user={shown(user)}" if user else ""
            seconds = time.perf_counter() - begun
            log.info("%s %s %s %d %.3fs%s", own, shown(scope["method"]), shown(scope["path"]), status, seconds, by)

    def check(self, scope: Scope) -> None:
        """Refuse who may not ask. Raises ApiError."""
        headers = scope["headers"]
        if self.local and not all(is_local(value) for name, value in headers if name in (b"host", b"origin")):
            # a page from elsewhere in this machine's browser, perhaps under a name that was made to point here (DNS rebinding)
            raise ApiError(403, "this server answers to localhost alone", code="foreign_host")
        if self._key is None or scope["path"] == "/health":
            return
        given = [value for name, value in headers if name == b"authorization"]
        token = given[0][7:] if len(given) == 1 and given[0][:7].lower() == b"bearer " else b""
        if not hmac.compare_digest(hashlib.sha256(token).digest(), self._key):
            message = "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its bounds; returns what hands it on. Raises ApiError 400, 408, 413, or Gone."""
        most = self.limits.body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = int(length[:20]) > most
        parts: list[bytes] = []
        size, more = 0, int(length[:20]) <= most + DRAINED
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    size, more = size + len(message.get("body", b"")), message.get("more_body", False)
                    too_large = too_large or size > most
                    if too_large:
                        # read on and forget, since a client that is cut off while it writes does not see the reply
                        parts, more = [], more and size < most + DRAINED
                    else:
                        parts.append(message.get("body", b""))
        except TimeoutError:
            message_ = f"the body was not there after {self.limits.read_seconds:g} s"
            raise ApiError(408, message_, headers={"Connection": "close"}) from None
        if too_large:
            raise ApiError(413, f"the body has more than {most:,} bytes", headers={"Connection": "close"})
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def hand_on() -> Message:
            return whole.pop() if whole else await receive()

        return hand_on


def is_local(host: bytes) -> bool:
    """Whether a Host or Origin header names this machine by a loopback name or address."""
    name = host.decode("latin-1").strip().lower().rpartition("://")[2]
    name = name[1 : name.find("]")] if name.startswith("[") else name.rpartition(":")[0] or name
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
