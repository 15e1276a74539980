"""What a client did wrong, or the server cannot do now, in the shape of OpenAI's API. Nothing of a request's content is ever said back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SHOWN = 60
"""Characters of a name from a request that a message may show."""


class ApiError(Exception):
    """A refusal: its HTTP status, what is wrong, and the field that is to blame."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that clients know."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.body, self.status, self.headers)


def shown(name: object) -> str:
    """A name from a request, short and on one line, control characters made visible."""
    text = str(name)
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in short)


def unknown_model(name: object) -> ApiError:
    """One text for all that is not served, whether it exists elsewhere or not."""
    message = f'no model is called "{shown(name)}" here (GET /v1/models lists them)'
    return ApiError(404, message, param="model", code="model_not_found")
