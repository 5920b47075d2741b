"""Asking a server over HTTP: what its refusals mean, when a request is sent again, and when the server is gone."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..jobs import JobPaused
from .remotes import Remote, key_of

if TYPE_CHECKING:
    import httpx2

CONNECT_S = 10.0
PROBE_S = 15.0  # longest wait for the list of models, by which a server shows that it is there
FIRST_PAUSE_S = 0.5  # before a request is sent again; doubles every time
LONGEST_PAUSE_S = 30.0
MOST_RETRY_AFTER_S = 600.0
OUTAGES = 3  # that one request waits for, before it fails alone
CHAT_TRIES = 3
EXCERPT = 300  # characters of what a server says
AGAIN = frozenset((408, 409, 425, 429))  # beside 500 and more
BUSY = frozenset((429, 503, 529))
_LENGTH = re.compile(
    r"context.{0,20}(length|size|window)|maximum.{0,20}(length|context|tokens)|too (long|many tokens)|max_model_len"
    r"|exceeds? the (available |model'?s? )?context|takes [\d,]+ tokens",
    re.I,
)


class Refused(GLMError):
    """The server said no to one request, or failed at it as often as it was asked; others may fare better.

    status   of the HTTP answer; 0 where there was none
    param    the field the server names, if it does
    """

    def __init__(self, message: str, todo: str = "", status: int = 0, param: str = "") -> None:
        super().__init__(message, todo)
        self.status, self.param = status, param


class Unavailable(JobPaused):
    """The server has been gone for longer than anyone was ready to wait."""


class KeyRefused(JobPaused):
    """The server refuses the key, or knows no such model or address: no request will do better."""

    def __init__(self, message: str, todo: str = "", status: int = 0) -> None:
        super().__init__(message, todo)
        self.status = status


class _Again(Exception):
    """A request that may succeed when it is sent again.

    after   seconds the server asks to wait
    late    whether no answer came in time
    """

    def __init__(self, reason: str, after: float | None = None, status: int = 0, late: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.after, self.status, self.late = reason, after, status, late


class Room:
    """How many requests may be on their way: less where the server cannot keep up, and slowly more again.

    Without it, requests that ran out of time and were sent again would be what keeps a server from keeping up.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.running = 0
        self._freed = asyncio.Event()
        self._lowered = 0.0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place among those on their way."""
        while self.running >= int(self.limit):
            self._freed.clear()
            await self._freed.wait()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._freed.set()

    def answered(self) -> None:
        """One more as soon as as many as may be on their way were answered."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)
        self._freed.set()

    def overwhelmed(self) -> None:
        """A third less, at most once a second."""
        now = time.monotonic()
        if now - self._lowered > 1:
            self._lowered = now
            self.limit = max(1.0, self.limit * 2 / 3)


class Client:
    """Requests to one server; for one event loop. `told` hears of trouble, and of its end by an empty text."""

    def __init__(self, remote: Remote, told: Callable[[str], None] | None = None) -> None:
        """GLMError where the key is not there."""
        import httpx2

        self.remote = remote
        self._key = key_of(remote)
        self._told = told or (lambda _: None)
        headers = {"User-Agent": "glm-workbench", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        many = remote.concurrency + 32
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(remote.timeout_s, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=many, max_keepalive_connections=many),
        )
        self.room = Room(remote.concurrency)
        self._not_before = 0.0  # the server asked for patience
        self._back: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._back is not None:
            self._back.cancel()
        await self._http.aclose()

    # ---- one request

    async def models(self) -> list[dict[str, Any]]:
        """What GET /models lists; GLMError where the server does not answer or refuses."""
        try:
            response = await self._http.get(f"{self.remote.url}/models", timeout=PROBE_S)
            found = self._read(response)
        except _Again as again:
            raise Refused(self._no_use(again.reason), TRY_LATER, again.status) from None
        except _errors() as error:
            raise Refused(self._no_use(self._words(error)), CHECK_ADDRESS) from None
        listed = found.get("data")
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    async def once(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        """One request to any address of the server, not sent again. GLMError where it fails."""
        try:
            return self._read(await self._http.request(method, url, json=body))
        except _Again as again:
            raise Refused(self._no_use(again.reason), TRY_LATER, again.status) from None
        except _errors() as error:
            raise Refused(self._no_use(self._words(error)), CHECK_ADDRESS) from None

    async def ask(
        self,
        path: str,
        body: dict[str, Any],
        begun: Callable[[], None] = lambda: None,
        again: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """The JSON answer to a request, sent as often as the remote's `tries` says and with pauses that grow.

        path    behind the base address, or a whole address
        begun   called when the request is first sent; `again` whenever it is sent once more
        Refused for a request that cannot be answered; Unavailable and KeyRefused where no request can.
        """
        tries = outages = 0
        url = path if path.startswith("http") else f"{self.remote.url}{path}"
        while True:
            await self._gate()
            async with self.room.place():
                begun()
                try:
                    found = self._read(await self._http.post(url, content=_json(body), headers=JSON))
                    self.room.answered()
                    return found
                except _Again as error:
                    failed = error
                except _errors() as error:
                    failed = _Again(self._words(error), late=_is_late(error))
            if failed.late or failed.status in BUSY:
                self.room.overwhelmed()
            tries += 1
            again()
            if tries < self.remote.tries:
                await self._pause(failed, tries)
                continue
            outages += 1
            if outages > OUTAGES or await self._alive():
                raise Refused(
                    f"It was sent {tries} times without success, the last time: {failed.reason}",
                    "Retry the row later.",
                    failed.status,
                )
            await self._wait_until_back(failed)
            tries = 0

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of a streamed answer; the connection is closed where the caller leaves, so the server stops.

        Sent again only while nothing has come.
        """
        tries = 0
        while True:
            await self._gate()
            try:
                sent = self._http.build_request(
                    "POST", f"{self.remote.url}{path}", content=_json(body), headers=JSON
                )
                response = await self._http.send(sent, stream=True)
                if response.status_code != 200:
                    await response.aread()
                    self._read(response)
                break
            except _Again as error:
                failed = error
            except _errors() as error:
                failed = _Again(self._words(error))
            tries += 1
            if tries >= min(CHAT_TRIES, self.remote.tries):
                raise Refused(self._no_use(failed.reason), TRY_LATER, failed.status)
            await self._pause(failed, tries)
        try:
            yield self._events(response)
        finally:
            await response.aclose()

    async def _events(self, response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
        held = b""
        try:
            async for piece in response.aiter_bytes():
                held += piece
                *lines, held = held.split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    try:
                        event = json.loads(data)
                    except ValueError:
                        raise Refused("A piece of the answer cannot be read.", TRY_LATER) from None
                    if isinstance(event, dict) and event.get("error"):
                        raise Refused(f"The server ended the answer: {self._reason(event)}", TRY_LATER)
                    if isinstance(event, dict):
                        yield event
        except _errors() as error:
            raise Refused(
                f"The connection ended within the answer: {self._words(error)}", TRY_LATER
            ) from None

    # ---- what an answer means

    def _read(self, response: httpx2.Response) -> dict[str, Any]:
        """The JSON of an answer; _Again, Refused or KeyRefused for what is none."""
        status = response.status_code
        try:
            found = json.loads(response.content)
        except ValueError:
            found = None
        if status == 200:
            if not isinstance(found, dict):
                raise _Again("The answer was no JSON, or was cut off.")
            if found.get("error") and "choices" not in found:
                raise _Again(self._reason(found))
            return found
        reason = self._reason(found) if isinstance(found, dict) else ""
        reason = reason or self._clean(response.text) or response.reason_phrase or "no reason was given"
        detail = found.get("error") if isinstance(found, dict) else None
        code = str(detail.get("code") or "") if isinstance(detail, dict) else ""
        if status in (401, 403):
            raise KeyRefused(
                f"{self.remote.label} refuses the key ({status}): {reason}",
                f"Set {self.remote.key_env} to a key of this server, then go on.",
                status,
            )
        if status in (402,) or code == "insufficient_quota":
            raise KeyRefused(
                f"{self.remote.label} has no credit left ({status}): {reason}",
                "See to it, then go on.",
                status,
            )
        if status == 404:
            raise KeyRefused(
                f"{self.remote.label} does not know {self.remote.model} at this address ({status}): {reason}",
                "Check address and model of the remote engine.",
                status,
            )
        if status in AGAIN or status >= 500:
            raise _Again(f"{status}, {reason}", _seconds(response.headers.get("Retry-After")), status)
        if 300 <= status < 400:
            raise KeyRefused(
                f"{self.remote.label} sends requests elsewhere ({status}).",
                "Give the address it sends them to.",
                status,
            )
        if code == "context_length_exceeded" or (status in (400, 413, 422) and _LENGTH.search(reason)):
            raise Refused(
                f"The text is too long for the model of the server: {reason}",
                "Shorten the text, or allow fewer new tokens.",
                status,
            )
        param = str(detail.get("param") or "") if isinstance(detail, dict) else ""
        raise Refused(
            f"The server refused the request ({status}): {reason}",
            "Change it, or the settings.",
            status,
            param,
        )

    def _reason(self, found: dict[str, Any]) -> str:
        """What the server says, in whichever of the usual forms."""
        told: Any = found.get("error") or found.get("message") or found.get("detail") or ""
        if isinstance(told, dict):
            told = told.get("message") or told.get("code") or ""
        return self._clean(told if isinstance(told, str) else json.dumps(told, ensure_ascii=False))

    def _clean(self, text: str) -> str:
        """A server's words in a line, short, and without the key should they hold it."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"

    def _words(self, error: Exception) -> str:
        """What went wrong on the way."""
        import httpx2

        if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
            return "no connection"
        if isinstance(error, httpx2.TimeoutException):
            return f"no answer within {self.remote.timeout_s:g} seconds"
        return "the connection was dropped"

    def _no_use(self, reason: str) -> str:
        return f"{self.remote.label} at {self.remote.url} does not answer as it should: {reason}"

    # ---- patience

    async def _gate(self) -> None:
        """Wait as long as the server asked everybody to wait."""
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, min(1.0, 0.2 * left)))

    async def _pause(self, failed: _Again, tries: int) -> None:
        """Wait before a request is sent again: as long as the server says, else longer every time, never in step."""
        if failed.after is not None:
            after = min(failed.after, MOST_RETRY_AFTER_S)
            self._not_before = max(self._not_before, time.monotonic() + after)
            return
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1))
        await asyncio.sleep(random.uniform(0.5, 1.0) * longest)

    async def _alive(self) -> bool:
        """Whether the server lists its models just now; KeyRefused passes."""
        try:
            await self.models()
            return True
        except Refused as error:
            return 0 < error.status < 500
        except KeyRefused as error:
            if error.status == 404:  # a server without such a list
                return True
            raise

    async def _wait_until_back(self, failed: _Again) -> None:
        """Wait for a server that is gone, with all others who do; Unavailable when that takes too long."""
        if self._back is None or self._back.done():
            self._back = asyncio.ensure_future(self._watch(failed))
        await asyncio.shield(self._back)

    async def _watch(self, failed: _Again) -> None:
        end = time.monotonic() + self.remote.patience_s
        pause = 1.0
        self._told(f"{self.remote.label} does not answer ({failed.reason}); waiting for it")
        while time.monotonic() < end:
            await asyncio.sleep(min(pause, max(0.05, end - time.monotonic())))
            if await self._alive():
                self._told("")
                return
            pause = min(15.0, 1.5 * pause)
        raise Unavailable(
            f"{self.remote.label} at {self.remote.url} has been gone for {self.remote.patience_s:.0f} seconds"
            f" ({failed.reason}).",
            "Nothing is lost: start the server again, then resume.",
        )


CHECK_ADDRESS = "Check that the server runs and that the address is right."
TRY_LATER = "Try again in a moment."
JSON = {"Content-Type": "application/json"}


def _errors() -> tuple[type[Exception], ...]:
    import httpx2

    return (httpx2.TransportError, httpx2.DecodingError, httpx2.InvalidURL)


def _is_late(error: Exception) -> bool:
    import httpx2

    return isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout)


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds, given as such or as a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
