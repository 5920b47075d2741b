"""The engine as a server needs it: admission, answers that are watched without a thread each, labels."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GLMError
from .errors import Refusal
from .keys import Keys
from .meters import Meters

if TYPE_CHECKING:
    from starlette.types import Receive

    from ..engine import Engine, Handle, Request

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_SECONDS = 0.01  # between two looks at the running answers; one look serves all of them
TICK_PER_ANSWER = (
    0.0008  # more, so that many streams send fewer, larger pieces instead of taking the engine's time
)
QUIET_SECONDS = 10.0  # after which a stream without news says that it is still there
TRIM_SECONDS = 15.0  # between giving freed memory back; the engine does so only when nobody asks for anything
LONG_TEXT = 2000  # characters; longer ones are encoded beside the event loop
MOST_WAIT = 60  # seconds; longer nobody is told to wait


@dataclass(frozen=True)
class Options:
    """How a server serves."""

    concurrency: int = field(default=32, metadata={"help": "Answers computed together"})
    queue: int = field(default=64, metadata={"help": "Requests that may wait; more are refused with 429"})
    max_request_bytes: int = field(default=4 << 20, metadata={"help": "Largest request"})
    cors: tuple[str, ...] = field(default=(), metadata={"help": "Origins whose pages may ask"})
    api_keys: Path | None = field(
        default=None, metadata={"help": "File of hashed keys; None: nobody needs one"}
    )

    def check(self) -> None:
        """Raise a GLMError naming the first value outside its range."""
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("queue", self.queue, 0),
            ("max_request_bytes", self.max_request_bytes, 1024),
        ):
            if value < least:
                raise GLMError(f"{name} is {value}.", f"Choose {least} or more.")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise GLMError(
                    f"{origin!r} is not an origin.",
                    "Write it as a browser does, such as http://localhost:3000.",
                )


class Service:
    """What the routes use: one engine, found anew for every request since it may still be loading."""

    def __init__(
        self,
        options: Options,
        find: Callable[[], Engine | None],
        share: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """GLMError for options that cannot be, or an unusable key file. `share` says how far loading is, 0 to 1."""
        options.check()
        self.keys = Keys(options.api_keys) if options.api_keys else None
        self.options, self._find, self.share = options, find, share
        self.meters = Meters()
        self.started = time.time()
        self._prepared: Engine | None = None
        self._watched: set[Answers] = set()
        self._busy = asyncio.Event()
        self._labelling = 0
        self._closing = False
        self._durations: deque[float] = deque([1.0], maxlen=64)  # seconds of the last answers
        self._encoders = ThreadPoolExecutor(2, "glm-encode")
        self._labellers = ThreadPoolExecutor(4, "glm-label")

    @property
    def loaded(self) -> Engine | None:
        """The engine, or None while it is loading."""
        engine = self._find()
        if engine is not None and engine is not self._prepared:
            engine.limits["chat"] = self.options.concurrency
            # Admission is ours: whoever was admitted is never refused by the engine.
            engine.most_waiting["chat"] = self.options.concurrency + self.options.queue
            self._prepared = engine
        return engine

    @property
    def engine(self) -> Engine:
        """The engine; a Refusal with 503 while it is loading."""
        engine = self.loaded
        if self._closing:
            raise stopping()
        if engine is None:
            raise Refusal(503, "The model is loading.", code="loading", retry_after=5)
        return engine

    # ---- admission

    @property
    def in_flight(self) -> int:
        """Requests that run or wait; an answer that nobody wants any more counts until the engine drops it."""
        return sum(not handle.done for one in self._watched for handle in one.handles) + self._labelling

    def admit(self, count: int = 1) -> None:
        """Raise a Refusal with 429 where there is no room for so many more."""
        room = self.options.concurrency + self.options.queue
        busy = self.in_flight
        if count > room:
            raise Refusal(
                400, f"{count} answers were asked for; this server computes and queues {room} at most.", "n"
            )
        if busy + count > room:
            # An average answer takes so long; so many are computed together.
            turns = (busy + count - room) / self.options.concurrency + 1
            wait = math.ceil(turns * sum(self._durations) / len(self._durations))
            raise Refusal(
                429,
                f"{busy} requests are being answered or waiting, which is as many as this server takes.",
                code="queue_full",
                retry_after=min(MOST_WAIT, max(1, wait)),
            )

    # ---- answers

    async def encode(self, work: Callable[[], T], characters: int) -> T:
        """What `work` makes of so many characters; where they are many, beside the event loop."""
        if characters <= LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Queue requests, all or none. A Refusal where there is no room, or one does not fit."""
        from ..engine import EngineBusy

        engine = self.engine
        self.admit(len(requests))
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(engine.submit(request))
        except BaseException as error:
            for handle in handles:
                handle.cancel("not all were accepted")
            if isinstance(error, EngineBusy):
                raise Refusal(429, error.message, code="queue_full", retry_after=1) from error
            if isinstance(error, GLMError):
                raise Refusal(400, str(error)) from error
            raise
        answers = Answers(self, handles)
        self._watched.add(answers)
        self._busy.set()
        return answers

    async def watch(self) -> None:
        """Tell answers of their news, as long as the server runs."""
        from ..engine import trim

        trimmed = time.monotonic()
        while True:
            await self._busy.wait()
            if time.monotonic() - trimmed > TRIM_SECONDS:
                trimmed = time.monotonic()
                asyncio.get_running_loop().run_in_executor(self._encoders, trim)
            await asyncio.sleep(TICK_SECONDS + TICK_PER_ANSWER * len(self._watched))
            for answers in tuple(self._watched):
                answers.look()
            if not self._watched:
                self._busy.clear()

    def ended(self, answers: Answers) -> None:
        """Count what an answer took, and watch it no longer."""
        if answers not in self._watched:
            return
        self._watched.discard(answers)
        for handle in answers.handles:
            self.meters.tokens.add(handle.n_tokens)
            if handle.time_to_first_token is not None:
                self.meters.first_token.add(handle.time_to_first_token)
            if handle.state == "done" and handle.started is not None and handle.ended is not None:
                self._durations.append(handle.ended - handle.started)
            if handle.state == "cancelled":
                self.meters.cancelled.add()
        self.meters.prompt_tokens.add(answers.handles[0].n_prompt)

    # ---- labels

    async def label(self, work: Callable[[threading.Event], T], receive: Receive) -> T | None:
        """What `work` finds, in a thread; its argument is set, and None returned, once the client is gone."""
        self.admit()
        stop = threading.Event()
        self._labelling += 1
        running = asyncio.get_running_loop().run_in_executor(self._labellers, work, stop)
        running.add_done_callback(self._labelled)
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
            return await running if running.done() else None
        finally:
            stop.set()
            gone.cancel()

    def _labelled(self, running: asyncio.Future[Any]) -> None:
        self._labelling -= 1
        if not running.cancelled():
            running.exception()  # taken note of, also where nobody waits for it any more

    def close(self) -> None:
        """End what runs, and refuse what comes."""
        self._closing = True
        for answers in tuple(self._watched):
            answers.cancel()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._labellers.shutdown(wait=False, cancel_futures=True)


class Answers:
    """The answers to one HTTP request, on their way."""

    def __init__(self, service: Service, handles: list[Handle]) -> None:
        self.handles = handles
        self._service = service
        self._changed = asyncio.Event()
        self._seen: list[tuple[int, bool]] = []
        self._told = time.monotonic()
        self._quiet = False

    @property
    def done(self) -> bool:
        return all(handle.done for handle in self.handles)

    def look(self) -> None:
        """Note whether there is news since the last look."""
        now = [(len(handle.ids), handle.done) for handle in self.handles]
        if now != self._seen:
            self._seen, self._told, self._quiet = now, time.monotonic(), False
            self._changed.set()
        elif not self._changed.is_set() and time.monotonic() - self._told > QUIET_SECONDS:
            self._told, self._quiet = time.monotonic(), True
            self._changed.set()
        if all(done for _, done in now):
            self._service.ended(self)

    def cancel(self) -> None:
        """End what still runs; the engine drops it before its next token."""
        for handle in self.handles:
            if not handle.done:
                handle.cancel("client gone")

    async def news(self) -> AsyncIterator[bool]:
        """True whenever there may be more to read, the last time when all is there; False in between, when it is quiet."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._quiet:
                self._quiet = False
                yield False
                continue
            done = self.done
            yield True
            if done:
                return

    async def finished(self, receive: Receive) -> bool:
        """Wait for the end; False, with everything cancelled, where the client went away before."""
        gone = asyncio.create_task(disconnected(receive))
        waiting = asyncio.create_task(self._wait())
        try:
            await asyncio.wait((gone, waiting), return_when=asyncio.FIRST_COMPLETED)
            return waiting.done()
        finally:
            gone.cancel()
            waiting.cancel()
            self.cancel()

    async def _wait(self) -> None:
        async for _ in self.news():
            pass


def stopping() -> Refusal:
    """What is answered while the server ends."""
    return Refusal(503, "The server is stopping.", code="stopping", retry_after=5)


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone; only after the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
