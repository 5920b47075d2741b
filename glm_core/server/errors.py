"""What a request is refused with: a status, and a body in the form of the OpenAI protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
_PLACE = re.compile(r"[a-z_][a-z0-9_]*")
# What pydantic puts into a place to say which of several types it tried.
_TRIED = {"str", "int", "float", "bool", "list", "dict", "none"}


class Refusal(Exception):
    """A request that gets no answer; `param` names the field, `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
            "status": self.status,
        }

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def of_validation(errors: Sequence[Any]) -> Refusal:
    """The first thing that is wrong with a request, by the name of its field; what was sent is not repeated."""
    # Of a field that may be several things, the complaint about the one that came closest.
    first = max(errors, key=lambda error: len(_field(error.get("loc", ()))))
    if any(error.get("type") == "json_invalid" for error in errors):
        return Refusal(400, "The body is not valid JSON.", "body", "json_invalid")
    field = _field(first.get("loc", ()))
    where = ".".join(field) or "body"
    return Refusal(400, f"{where}: {first.get('msg', 'is not valid')}.", where, str(first.get("type", "")))


def _field(place: Sequence[Any]) -> list[str]:
    parts = [str(part) for part in place[1:] if isinstance(part, int) or _PLACE.fullmatch(str(part))]
    return [part for part in parts if part not in _TRIED]
