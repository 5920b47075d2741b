"""What every request passes first: origin, key, size; and the line about it in the log, which holds no word of it."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from typing import TYPE_CHECKING

from .errors import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .service import Service

log = logging.getLogger(__name__)

OPEN_PATHS = {"/health", "/openapi.json", "/docs"}  # they tell nothing worth a key
QUIET_PATHS = {"/health", "/metrics"}  # machines ask for them all the time
BODY_SECONDS = 60.0  # in which a body must have come


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
                self._check_origin(headers)
                self._check_key(scope, headers)
                body = await self._body(headers, receive)
            except Refusal as refusal:
                await refusal.response()(scope, receive, sending)
                return
            await self._app(_as_json(scope), _replayed(body, receive), sending)
        except Exception as error:
            _log_mistake(error)
            if not status:
                await internal_error().response()(scope, receive, sending)
        finally:
            self._note(scope, status or 499, time.monotonic() - started)

    def _check_origin(self, headers: dict[bytes, str]) -> None:
        """Refuse what a page has a browser send; programs send no Origin.

        That its origin is our own address proves nothing: a name may lead to this machine only since a minute.
        """
        origin, allowed = headers.get(b"origin"), self._service.options.cors
        if origin is not None and origin not in allowed and "*" not in allowed:
            raise Refusal(
                403, "Pages of this origin may not ask; the server was not started with it in --cors."
            )

    def _check_key(self, scope: Scope, headers: dict[bytes, str]) -> None:
        keys = self._service.keys
        if keys is None or scope["path"] in OPEN_PATHS:
            return
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if kind.lower() != "bearer" or not keys.admits(key.strip()):
            raise Refusal(
                401, "A valid API key is needed, as Authorization: Bearer KEY.", code="invalid_api_key"
            )

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes | None:
        """The whole body, None where the client went away before its end; a Refusal if it is too large or too slow."""
        most = self._service.options.max_request_bytes
        too_large = Refusal(413, f"The request is longer than the {most:,} bytes this server takes.")
        told = headers.get(b"content-length", "")
        if told.isdecimal() and int(told) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"The request did not arrive in {BODY_SECONDS:g} seconds.") from None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's pattern, never the path itself: somebody may have written a key or a text into it.
        path = getattr(scope.get("route"), "path", "other")
        self._service.meters.requests.add(method=_method(scope), path=path, status=str(status))
        self._service.meters.seconds.add(seconds, path=path)
        client = (scope.get("client") or ("?",))[0]
        level = logging.DEBUG if path in QUIET_PATHS and status < 500 else logging.INFO
        log.log(level, "%s %s %d %.3f s from %s", _method(scope), path, status, seconds, client)


def internal_error() -> Refusal:
    """What is answered where the program itself is wrong."""
    return Refusal(500, "The server made a mistake; its log says where.")


def _as_json(scope: Scope) -> Scope:
    """The request as one of JSON, whatever type it names: the originals did not look, and curl names another."""
    if scope["method"] == "POST":
        others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]
    return scope


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
    return scope["method"] if scope["method"] in known else "other"


def _replayed(body: bytes | None, receive: Receive) -> Receive:
    """What the application receives: the body in one piece, then whatever the client does."""
    left = body

    async def again() -> Message:
        nonlocal left
        if left is None:
            return await receive() if body is not None else {"type": "http.disconnect"}
        whole, left = left, None
        return {"type": "http.request", "body": whole, "more_body": False}

    return again


def _log_mistake(error: Exception) -> None:
    """Where an exception came from; not its message, which may quote what was sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s while answering:\n%s", type(error).__name__, frames)
