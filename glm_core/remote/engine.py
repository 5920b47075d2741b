"""A server as an engine: conversations go out as messages, answers come back as text, nothing is computed here.

Pages and jobs hand a prompt on as ids. Those of a remote engine are the characters of its messages behind a mark for
each role, so the way from a template to the server loses nothing, and everything that builds, compares or counts
prompts works as it does for a checkpoint. How many tokens a prompt has only the server knows; it says so afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from ..engine import (
    BATCH_QUEUE,
    CHAT_QUEUE,
    CHAT_ROWS,
    KEPT_HANDLES,
    Engine,
    EngineBusy,
    EngineStatus,
    GenerationSettings,
    Handle,
    PrefixCache,
    Priority,
    Request,
)
from ..errors import GLMError
from ..tokenizers.base import Message, Role, Tokenizer
from .client import CHECK_ADDRESS, Client, KeyRefused, Refused
from .remotes import Remote

if TYPE_CHECKING:
    from ..checkpoints import CheckpointInfo
    from .labels import RemoteScorer
    from .probe import Report

log = logging.getLogger(__name__)

T = TypeVar("T")

GENERATION = "remote"
UNLIMITED = 1 << 30  # characters; what is too long the server refuses
FIRST_MARK = 0x110000  # behind the last character there is
MARKS: dict[Role, int] = {
    "system": FIRST_MARK, "user": FIRST_MARK + 1, "assistant": FIRST_MARK + 2, "observation": FIRST_MARK + 3,
}  # fmt: skip
END = FIRST_MARK + 4
ROLES = {mark: role for role, mark in MARKS.items()}
SENT_AS: dict[Role, str] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "observation": "user",
}
# Where a server does not say how it answers; those of the models' own demonstrations.
DEFAULTS = {"max_new_tokens": 512, "temperature": 0.8, "top_p": 0.8}
NOT_A_CHAT = "The server's answer is none of a chat."
AGAIN = "sent again, the server was busy or had failed"
CLOSE_S = 10.0
Kind = Literal["workbench", "vllm", "sglang", "llamacpp", "other"]
OWNERS: dict[str, Kind] = {
    "glm-workbench": "workbench",
    "vllm": "vllm",
    "sglang": "sglang",
    "llamacpp": "llamacpp",
}


class Characters(Tokenizer):
    """A conversation as ids and back: one per character, and one for each role."""

    generation = GENERATION
    n_pieces = END + 1
    eos_id = pad_id = END
    stop_ids = frozenset((END,))

    def __init__(self) -> None:
        self.special = {**{f"[{role}]": mark for role, mark in MARKS.items()}, "[end]": END}

    @property
    def vocab_size(self) -> int:
        return END + 1

    def encode(self, text: str) -> list[int]:
        text.encode()  # UnicodeError for half a character, as other tokenizers
        return list(map(ord, text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        names = {} if skip_special else {mark: f"\n[{role}]\n" for mark, role in ROLES.items()}
        return "".join(names.get(one, "") if one >= FIRST_MARK else chr(one) for one in ids).lstrip("\n")

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [MARKS[message.role], *self.encode(message.content)]
        return ids

    def answer_ids(self, text: str) -> list[int]:
        return [*self.encode(text), END]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        text = self.decode(ids)
        return text.strip() if finished else text.lstrip()


def messages_of(ids: Sequence[int]) -> list[Message]:
    """The conversation that `Characters.chat_ids` made these ids of."""
    found: list[Message] = []
    places = [place for place, one in enumerate(ids) if one in ROLES]
    for begin, end in zip(places, [*places[1:], len(ids)], strict=True):
        found.append(Message(ROLES[ids[begin]], "".join(map(chr, ids[begin + 1 : end]))))
    return found


@dataclass(frozen=True)
class Place:
    """Where a remote model computes, in place of a device."""

    name: str
    type: str = "remote"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Served:
    """What the server says of its model.

    context   tokens of prompt and answer; 0 where it does not say
    reported  the server's own name for the model
    takes_examples   whether its /v1/classify does
    """

    kind: Kind = "other"
    reported: str = ""
    context: int = 0
    listed: tuple[str, ...] = ()
    takes_examples: bool = False


class RemoteModel:
    """A server's model in the place of a loaded one."""

    def __init__(self, remote: Remote, served: Served) -> None:
        from ..checkpoints.loading import LoadReport

        self.info = replace(info_of(remote), context=served.context or UNLIMITED)
        self.model = self.prefix = self.base = None
        self.tokenizer = Characters()
        self.precision = GENERATION
        self.device = Place(remote.host)
        self.devices = remote.host
        self.load_seconds = 0.0
        self.weight_bytes = 0
        self.defaults: dict[str, Any] = dict(DEFAULTS)
        self.report = LoadReport()
        self.device_map: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()


def info_of(remote: Remote) -> CheckpointInfo:
    """A server in a list of checkpoints."""
    from ..checkpoints import CheckpointInfo

    return CheckpointInfo(
        Path(remote.spec), remote.label, GENERATION, GENERATION, 0, 0, "", 0, 0, UNLIMITED, architecture=GENERATION
    )  # fmt: skip


class RemoteHandle(Handle):
    """A request to a server on its way; tokens are those the server counts."""

    def __init__(self, request: Request, engine: RemoteEngine) -> None:
        super().__init__(request, engine)
        self.parts: list[str] = []
        self.used_prompt = 0
        self.used_answer = 0  # while it streams, the pieces so far
        self.sent_again = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def n_prompt(self) -> int:
        return self.used_prompt

    @property
    def n_tokens(self) -> int:
        return self.used_answer

    @property
    def text(self) -> str:
        text = "".join(self.parts)
        for stop in self.request.settings.stop:
            text = text.split(stop, 1)[0]
        return text.strip() if self.done else text.lstrip()

    @property
    def tokens_per_second(self) -> float:
        if self.first_token is None or self.used_answer < 2:
            return 0.0
        return (self.used_answer - 1) / max((self.ended or time.monotonic()) - self.first_token, 1e-6)

    def cancel(self, reason: str = "user") -> None:
        """End the request and close its connection; what has come is kept."""
        self._cancelled = True
        task = self.task
        if task is not None:
            self._engine.wake_task(task)  # type: ignore[attr-defined]

    def end(
        self,
        state: Literal["done", "cancelled", "failed"],
        reason: str,
        error: GLMError | None = None,
    ) -> None:
        """Take the answer as it is now for the last."""
        if self.sent_again:
            self.notes = (*self.notes, AGAIN)
        self._finish(state, reason, error)


class RemoteEngine(Engine):
    """Answers of a server, through the calls of `Engine`; what needs weights raises a GLMError."""

    remote: Remote

    def __init__(
        self, remote: Remote, served: Served | None = None, told: Callable[[str], None] | None = None
    ) -> None:
        """Nothing is asked of the server yet, see `connect`. GLMError where its key is not there."""
        self.remote = remote
        self.served = served or Served()
        model: Any = RemoteModel(remote, self.served)
        self.loaded = model
        self.model = None
        self.tokenizer = model.tokenizer
        self.context = UNLIMITED
        self.device = model.device
        self.layers = self.virtual = self.bytes_per_token = 0
        self.whole_prompts = False
        self.limits: dict[Priority, int] = {"chat": CHAT_ROWS, "batch": remote.concurrency}
        self.most_waiting: dict[Priority, int] = {"chat": CHAT_QUEUE, "batch": BATCH_QUEUE}
        self.prefixes = PrefixCache(0)
        self.notes: tuple[str, ...] = ()
        self.exact = None
        self.connected = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.label_way = ""  # of the job this is for; see labels.way_for
        self._abilities: Report | None = None
        self._plain_tokens = True  # max_tokens; else max_completion_tokens
        self._with_usage = True
        self._count: dict[Priority, int] = {"chat": 0, "batch": 0}
        self._running: dict[Priority, int] = {"chat": 0, "batch": 0}
        self._handles: OrderedDict[str, Handle] = OrderedDict()
        self._open: set[RemoteHandle] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self.client = Client(remote, told)
        self._thread = threading.Thread(target=self._loop.run_forever, name="glm-remote", daemon=True)
        self._thread.start()

    # ---- what callers use

    def submit(self, request: Request) -> Handle:
        """Send a request soon. EngineBusy when too many wait, GLMError for settings that cannot be."""
        self.check(request)
        handle = RemoteHandle(request, self)
        with self._lock:
            self._refuse_if_closed()
            waiting = self._count[request.priority]
            if waiting >= self.most_waiting[request.priority]:
                raise EngineBusy(
                    f"{waiting} requests are waiting, which is as many as the queue takes.",
                    "Try again in a moment.",
                )
            self._count[request.priority] += 1
            self._open.add(handle)
            if request.priority == "chat":
                self._handles[handle.id] = handle
                while len(self._handles) > KEPT_HANDLES:
                    self._handles.popitem(last=False)
        self._loop.call_soon_threadsafe(self._begin, handle)
        return handle

    def check(self, request: Request) -> None:
        request.settings.check()
        if not request.prompt_ids:
            raise GLMError("The prompt is empty.", "Enter a text.")

    def status(self) -> EngineStatus:
        """Counts at this moment; there is nothing in memory."""
        return EngineStatus(
            name=self.loaded.info.name,
            precision=self.loaded.precision,
            device=str(self.device),
            queued_chat=max(0, self._count["chat"] - self._running["chat"]),
            queued_batch=max(0, self._count["batch"] - self._running["batch"]),
            running_chat=self._running["chat"],
            running_batch=self._running["batch"],
            max_rows=self.max_rows,
            weight_bytes=0,
            cache_bytes=0,
            notes=self.notes,
            exact=None,
            exact_text="",
        )

    @property
    def chatting(self) -> bool:
        return self._count["chat"] > 0

    def place_of(self, handle: Handle) -> int:
        return 0

    def wake(self) -> None:
        """Nothing waits here."""

    def wake_task(self, task: asyncio.Task[None]) -> None:
        """End a request from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        """End every request as cancelled, close the connections and stop the thread."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if threading.current_thread() is self._thread:
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _shut(self) -> None:
        tasks = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()
        for handle in list(self._open):
            handle.end("cancelled", "cancelled")

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Do something on the thread that asks the server; GLMError where the engine is closed."""
        with self._lock:
            if self._closing:
                work.close()
            self._refuse_if_closed()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def abilities(self) -> Report:
        """What the server can do, found out once."""
        from .probe import tested

        if self._abilities is None:
            self._abilities = tested(self)
        return self._abilities

    def scorer(self, answers: Sequence[Sequence[int]], head: Sequence[int] = ()) -> RemoteScorer:
        """What scores these answers behind conversations; `head` says nothing here."""
        from .labels import RemoteScorer

        return RemoteScorer(self, answers)

    def record(self) -> dict[str, Any]:
        """What a job keeps of the server beside its address in `Remote.spec`: never the key."""
        remote = self.remote
        return {
            "name": remote.name,
            "url": remote.url,
            "model": remote.model,
            "reported_model": self.served.reported,
            "server": self.served.kind,
            "context": self.served.context,
            "asked_at": self.connected,
            "key_env": remote.key_env,
            "concurrency": remote.concurrency,
            "tries": remote.tries,
            "timeout_s": remote.timeout_s,
        }

    # ---- what needs weights

    def _without_weights(self, *_: Any, **__: Any) -> NoReturn:
        raise GLMError(
            f"{self.remote.label} is on a server: its weights and numbers are not here.",
            "Load a checkpoint of this computer on the Models page.",
        )

    later = between_steps = _call = _without_weights
    forward = forward_tree = without_prefix = empty_cache = layouts = left_padded = _without_weights
    self_test = _without_weights

    def forward_tokens(self) -> int:
        self._without_weights()

    def forward_columns(self, rows: int, width: int) -> int:
        self._without_weights()

    # ---- on the thread of the connections

    def _begin(self, handle: RemoteHandle) -> None:
        handle.task = self._loop.create_task(self._answer(handle))
        if handle._cancelled:
            handle.task.cancel()

    async def _answer(self, handle: RemoteHandle) -> None:
        priority = handle.request.priority
        try:
            if priority == "chat":
                await self._streamed(handle)
            else:
                await self._whole(handle)
        except asyncio.CancelledError:
            handle.end("cancelled", "cancelled")
        except GLMError as error:
            handle.end("failed", "error", error)
        except Exception as error:
            log.exception("a request to %s failed", self.remote.host)
            handle.end(
                "failed", "error", GLMError(f"The request failed: {type(error).__name__}.", "See the log.")
            )
        finally:
            with self._lock:
                self._count[priority] -= 1
                self._running[priority] -= handle.started is not None
                self._open.discard(handle)

    def _started(self, handle: RemoteHandle) -> None:
        if handle.started is None:
            handle.started = time.monotonic()
            handle.state = "running"
            with self._lock:
                self._running[handle.request.priority] += 1

    async def _whole(self, handle: RemoteHandle) -> None:
        """A row: one request, one answer, sent again where that may help."""

        def again() -> None:
            handle.sent_again += 1

        def begun() -> None:
            self._started(handle)

        found: dict[str, Any] | None = None
        while found is None:
            body = self.body(handle.request)
            try:
                found = await self.client.ask("/chat/completions", body, begun, again)
            except Refused as error:
                if not self._adapt(error):
                    raise
        choice = _first_choice(found)
        self._take(handle, (choice.get("message") or {}).get("content"), found)
        self._end(handle, choice.get("finish_reason"))

    async def _streamed(self, handle: RemoteHandle) -> None:
        """A chat answer, as it comes."""
        self._started(handle)
        while True:
            body = self.body(handle.request) | {"stream": True}
            if self._with_usage:
                body["stream_options"] = {"include_usage": True}
            reason, counted = None, 0
            try:
                async with self.client.stream("/chat/completions", body) as events:
                    async for event in events:
                        self._take_usage(handle, event)
                        if not (event.get("choices") or ()):
                            continue
                        choice = _first_choice(event)
                        if text := (choice.get("delta") or {}).get("content"):
                            handle.first_token = handle.first_token or time.monotonic()
                            handle.parts.append(str(text))
                            counted += 1
                            handle.used_answer = max(counted, handle.used_answer)
                        reason = choice.get("finish_reason") or reason
                break
            except Refused as error:
                if handle.parts or not self._adapt(error):
                    raise
        if reason is None:
            raise Refused("The connection ended within the answer: nothing says that it is whole.")
        self._end(handle, reason)

    def body(self, request: Request) -> dict[str, Any]:
        """A request in the words of the protocol."""
        settings = request.settings
        body: dict[str, Any] = {
            "model": self.remote.model,
            "messages": as_sent(messages_of(request.prompt_ids)),
            "temperature": settings.temperature,
            "max_tokens" if self._plain_tokens else "max_completion_tokens": settings.max_new_tokens,
        }
        if settings.temperature > 0:
            body["top_p"] = settings.top_p
            if settings.seed is not None:
                body["seed"] = settings.seed
        if settings.stop:
            body["stop"] = list(settings.stop)
        return body | self._beyond(settings)

    def _beyond(self, settings: GenerationSettings) -> dict[str, Any]:
        """What the protocol does not have, in the server's own words.

        Servers that fill in a model's defaults are told even that a setting is not to be used.
        """
        top_k, penalty = settings.top_k, settings.repetition_penalty
        kind = self.served.kind
        if kind == "workbench":
            return {"top_k": top_k, "repetition_penalty": penalty}
        if kind in ("vllm", "sglang"):
            return {"top_k": top_k or -1, "repetition_penalty": penalty}
        if kind == "llamacpp":
            return {"top_k": top_k, "repeat_penalty": penalty}
        found: dict[str, Any] = {}
        if top_k and settings.temperature > 0:
            found["top_k"] = top_k
        if penalty != 1.0:
            found["repetition_penalty"] = penalty
        return found

    def _adapt(self, error: Refused) -> bool:
        """Whether the request can be put in another way that this server takes."""
        said = f"{error.param} {error.message}"
        if "max_completion_tokens" in said and self._plain_tokens:
            self._plain_tokens = False
            return True
        if "stream_options" in said and self._with_usage:
            self._with_usage = False
            return True
        return False

    def _take(self, handle: RemoteHandle, text: Any, found: dict[str, Any]) -> None:
        if text is not None and not isinstance(text, str):
            raise Refused("The server's answer holds no text.", CHECK_ADDRESS)
        handle.parts = [text or ""]
        self._take_usage(handle, found)

    @staticmethod
    def _take_usage(handle: RemoteHandle, found: dict[str, Any]) -> None:
        usage = found.get("usage")
        if isinstance(usage, dict):
            handle.used_prompt = int(usage.get("prompt_tokens") or 0)
            handle.used_answer = int(usage.get("completion_tokens") or handle.used_answer)

    @staticmethod
    def _end(handle: RemoteHandle, reason: Any) -> None:
        handle.end("done", "length" if reason == "length" else "stop")


def as_sent(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages in the words of the protocol."""
    return [{"role": SENT_AS[one.role], "content": one.content} for one in messages]


def _first_choice(found: dict[str, Any]) -> dict[str, Any]:
    choices = found.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    raise Refused(NOT_A_CHAT, CHECK_ADDRESS)


# ---- finding out who is there


def served_of(remote: Remote, listed: Sequence[dict[str, Any]]) -> Served:
    """What a server's list of models says of the one that is asked. GLMError where it is not among them."""
    names = tuple(str(one.get("id", "")) for one in listed)
    found = next((one for one in listed if one.get("id") == remote.model), None)
    if found is None:
        if listed and all(str(one.get("owned_by", "")).lower() in OWNERS for one in listed):
            raise GLMError(
                f"{remote.host} has no model {remote.model!r}; it has {', '.join(names)}.",
                "Choose one of these.",
            )
        return Served(listed=names)
    kind = OWNERS.get(str(found.get("owned_by", "")).lower(), "other")
    meta = found.get("meta")
    context = found.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else 0) or 0
    features = found.get("classify")
    examples = isinstance(features, list) and "shots" in features
    return Served(kind, str(found.get("root") or remote.model), int(context), names, examples)


def connect(remote: Remote, told: Callable[[str], None] | None = None) -> RemoteEngine:
    """An engine for a server that answers; GLMError where it does not, or has no such model.

    A remote without a model takes the only one the server has.
    """
    engine = RemoteEngine(remote, told=told)
    try:
        listed: list[dict[str, Any]] = []
        try:
            listed = engine.run(engine.client.models()).result()
        except KeyRefused as error:
            if (
                error.status != 404 or not remote.model
            ):  # a server without such a list may be asked nevertheless
                raise
        if not remote.model:
            if len(listed) != 1:
                names = ", ".join(str(one.get("id", "")) for one in listed) or "none"
                raise GLMError(
                    f"{remote.host} has these models: {names}.", "Name one: http://host:8000/v1#model."
                )
            remote = replace(remote, model=str(listed[0].get("id", "")))
        served = served_of(remote, listed)
    finally:
        engine.close()
    return RemoteEngine(remote, served, told)
