"""The one scheduler: queue, continuous batches, prefix cache, streaming and cancel, around one loaded model.

One thread owns the model. It keeps two batches, one of chat rows and one of batch rows, and advances them a token
at a time, so a chat answer starts while thousands of rows are waiting. Rows join and leave a batch between steps.
They are left-padded to a common length; positions and masks count real tokens only, so in fp32 a row gets the same
tokens in any company (`Engine.self_test` shows that on the loaded model).
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import gc
import itertools
import logging
import os
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from . import checkpoints
from .errors import GLMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .checkpoints import LoadedModel
    from .models.lean import LeanDecoder
    from .remote import Remote
    from .remote.labels import RemoteScorer
    from .scoring import Scorer
    from .threads import Choice

log = logging.getLogger(__name__)

T = TypeVar("T")

Priority = Literal["chat", "batch"]
REST_S = 10.0  # how long the end of the program waits for a load
CHAT_QUEUE = 64  # waiting chat requests before a new one is refused
BATCH_QUEUE = 2048
CHAT_ROWS = 16
CHAT_STEPS_PER_BATCH_ROUND = 3  # while somebody chats, batch work gets every fourth round
FORWARD_SECONDS = 0.25  # no forward should keep a chat request waiting longer
FORWARD_TOKENS = 32  # the least that is fed at once, however slow the machine
KEPT_HANDLES = 256
MOST_LIKELIEST = 20  # tokens noted beside a generated one
MAX_SEED = 1 << 62  # torch takes 64 bits; a row's number is added to the seed of a job
AGAIN = "started again in a smaller batch, memory had run out"


class EngineBusy(GLMError):
    """The queue is full; the request was not accepted."""


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is chosen token by token; the defaults are greedy and reproducible."""

    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens"})
    temperature: float = field(
        default=0.0, metadata={"help": "0 takes the likeliest token every time (greedy)"}
    )
    top_p: float = field(default=1.0, metadata={"help": "Sample from the smallest set with this probability"})
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0 is all"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 makes used tokens less likely"})
    seed: int | None = field(default=None, metadata={"help": "Same seed, same sampled answer"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "Texts that end the answer; not part of it"})

    def check(self) -> None:
        """Raise a GLMError naming the first value outside its range."""
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("max_new_tokens", self.max_new_tokens, 1, 1_000_000),
            ("temperature", self.temperature, 0, 10),
            ("top_p", self.top_p, 1e-6, 1),
            ("top_k", self.top_k, 0, 10_000_000),
            ("repetition_penalty", self.repetition_penalty, 0.01, 10),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise GLMError(f"{name} is {value}.", f"Choose a value from {low:g} to {high:g}.")
        if 0 < self.temperature < 1e-3:
            raise GLMError(f"temperature is {self.temperature}.", "Choose 0 (greedy), or 0.001 and more.")
        if self.seed is not None and not 0 <= self.seed < MAX_SEED:
            raise GLMError(f"seed is {self.seed}.", f"Choose a whole number from 0 to {MAX_SEED - 1:,}.")
        if any(not text for text in self.stop):
            raise GLMError("A stop text is empty.", "Remove it.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"stop": list(self.stop)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GenerationSettings:
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        return cls(**(values | {"stop": tuple(values.get("stop", ()))}))


@dataclass(frozen=True)
class Request:
    """A prompt to be continued. `prefix_length` leading ids are shared with other requests and computed once.

    logprobs   how many of the likeliest tokens are noted beside every generated one; None notes nothing
    """

    prompt_ids: tuple[int, ...]
    settings: GenerationSettings = GenerationSettings()
    priority: Priority = "chat"
    prefix_length: int = 0
    logprobs: int | None = None


class TokenScore(NamedTuple):
    """Log-probability of a generated token, in nats, as the model gives it: before temperature, penalty and cuts.

    likeliest   (id, log-probability) of the likeliest tokens at its place, best first
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


State = Literal["queued", "running", "done", "cancelled", "failed"]


class Handle:
    """A request on its way: its text so far, its state, its place in line; `cancel` ends it at the next token."""

    def __init__(self, request: Request, engine: Engine) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.request = request
        self.state: State = "queued"
        self.finish_reason: Literal["", "stop", "length", "cancelled", "error"] = ""
        self.error: GLMError | None = None
        self.notes: tuple[str, ...] = ()
        self.ids: list[int] = []
        self.scores: list[TokenScore] = []  # of the ids, where the request asks for them
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self._engine = engine
        self._cancelled = False
        self._failed: GLMError | None = None
        self._generator: torch.Generator | None = None
        self._text: tuple[int, bool, str] = (-1, False, "")
        self._changed = threading.Event()
        self._callbacks: list[Callable[[Handle], None]] = []
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        return self.state in ("done", "cancelled", "failed")

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        """The answer so far, without a cut character at its end and without a stop text."""
        count, finished = len(self.ids), self.done
        if self._text[:2] != (count, finished):
            text = self._engine.tokenizer.answer_text(self.ids[:count], finished)
            for stop in self.request.settings.stop:
                text = text.split(stop, 1)[0]
            self._text = (count, finished, text)
        return self._text[2]

    @property
    def place(self) -> int:
        """How many requests of this priority are served before this one, plus one; 0 once it runs."""
        return self._engine.place_of(self)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token; None before it."""
        return None if self.first_token is None else self.first_token - self.submitted

    @property
    def seconds(self) -> float:
        """Seconds from submission to the end, or until now."""
        return (self.ended or time.monotonic()) - self.submitted

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token; 0 before the second."""
        if self.first_token is None or len(self.ids) < 2:
            return 0.0
        return (len(self.ids) - 1) / max((self.ended or time.monotonic()) - self.first_token, 1e-6)

    def cancel(self, reason: str = "user") -> None:
        """End the request before its next token; what it has generated is kept."""
        self._cancelled = True
        self._engine.wake()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False if it did not come in time."""
        return self._changed.wait(timeout)

    def add_done_callback(self, function: Callable[[Handle], None]) -> None:
        """Call `function(self)` once at the end, from the engine's thread; it must be quick."""
        with self._lock:
            if not self.done:
                self._callbacks.append(function)
                return
        function(self)

    def _finish(self, state: State, reason: str, error: GLMError | None = None) -> None:
        with self._lock:
            if self.done:
                return
            self.ended = time.monotonic()
            self.error = error
            self.finish_reason = reason  # type: ignore[assignment]
            self.state = state
            callbacks, self._callbacks = self._callbacks, []
        self._generator = None
        for function in callbacks:
            try:
                function(self)
            except Exception:
                log.exception("a done-callback failed")
        self._changed.set()


class KVCache:
    """Keys and values of some rows, all right-aligned: tensors (rows, kv heads, capacity, head dim) per layer.

    Passed to the model as `past_key_values`; with a ready 4-D mask and explicit positions the model only calls
    `update`. Growing in place saves a copy of the whole cache per token.
    """

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor] = [None] * layers  # type: ignore[list-item]
        self.values: list[Tensor] = [None] * layers  # type: ignore[list-item]
        self.length = 0
        self.room = 32

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        if self.keys[layer] is None or self.keys[layer].shape[2] < end:
            for store, new in ((self.keys, keys), (self.values, values)):
                grown = new.new_empty(*new.shape[:2], end + self.room, new.shape[3])
                if self.length:
                    grown[:, :, : self.length] = store[layer][:, :, : self.length]
                store[layer] = grown
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def select(self, rows: Tensor, start: int = 0, end: int | None = None, room: int = 32) -> KVCache:
        """A copy of some rows (repeats allowed) and of the columns from start to end."""
        end = self.length if end is None else end
        cache = KVCache(len(self.keys))
        cache.length = end - start
        for mine, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer, tensor in enumerate(mine):
                grown = tensor.new_empty(len(rows), tensor.shape[1], cache.length + room, tensor.shape[3])
                grown[:, :, : cache.length] = tensor[:, :, start:end].index_select(0, rows.to(tensor.device))
                theirs[layer] = grown
        return cache

    def row(self, index: int, columns: Tensor) -> KVCache:
        """A copy of one row, of the given columns in their order."""
        cache = KVCache(len(self.keys))
        cache.length, cache.room = len(columns), 0
        for mine, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer, tensor in enumerate(mine):
                theirs[layer] = tensor[index : index + 1].index_select(2, columns.to(tensor.device))
        return cache

    @staticmethod
    def stacked(first: KVCache, second: KVCache, room: int = 32) -> KVCache:
        """The rows of both, right-aligned to the longer one; the columns in front are zero and must be masked."""
        cache = KVCache(len(first.keys))
        cache.length = max(first.length, second.length)
        split = first.keys[0].shape[0]
        for name in ("keys", "values"):
            for layer, (a, b) in enumerate(zip(getattr(first, name), getattr(second, name), strict=True)):
                both = a.new_zeros(split + b.shape[0], a.shape[1], cache.length + room, a.shape[3])
                both[:split, :, cache.length - first.length : cache.length] = a[:, :, : first.length]
                both[split:, :, cache.length - second.length : cache.length] = b[:, :, : second.length]
                getattr(cache, name)[layer] = both
        return cache


class PrefixCache:
    """Keys and values of prompt heads seen before, the least recently used dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0  # a number, so that any thread may read it
        self.entries: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    def longest(self, ids: Sequence[int]) -> tuple[int, KVCache | None]:
        """The entry that shares the longest head with the ids, and how many ids it shares."""
        best, found = 0, None
        for key in self.entries:
            shared = _common(key, ids)
            if shared > best:
                best, found = shared, key
        if found is None:
            return 0, None
        self.entries.move_to_end(found)
        return best, self.entries[found]

    def put(self, ids: tuple[int, ...], cache: KVCache) -> None:
        """Keep a head; entries it extends are dropped, and a head larger than the whole store is not kept."""
        if cache.nbytes > self.max_bytes:
            return
        for key in [key for key in self.entries if len(key) <= len(ids) and ids[: len(key)] == key]:
            del self.entries[key]
        self.entries[ids] = cache
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        while self.nbytes > self.max_bytes:
            self.nbytes -= self.entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop every entry."""
        self.entries.clear()
        self.nbytes = 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Rows:
    """The running rows of one priority: their handles, cache, real columns and next positions."""

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.cache: KVCache | None = None
        self.real: Tensor | None = None  # (rows, columns) bool: which cached columns hold a token
        self.positions: Tensor | None = None  # (rows,) position of the next token
        self.tokens: Tensor | None = None  # (rows,) the token to feed next
        self.layout: Tensor | None = None  # (rows, 2) context and anchor of ChatGLM-6B, see models/chatglm.py

    def __len__(self) -> int:
        return len(self.handles)

    def add(self, other: Rows) -> None:
        import torch

        if not other.handles:
            return
        if not self.handles:
            self.__dict__.update(other.__dict__)
            return
        assert self.cache and other.cache and self.real is not None and other.real is not None
        length = max(self.cache.length, other.cache.length)
        self.cache = KVCache.stacked(self.cache, other.cache)
        self.real = torch.cat([_right(self.real, length), _right(other.real, length)])
        self.positions = torch.cat([self.positions, other.positions])  # type: ignore[list-item]
        self.tokens = torch.cat([self.tokens, other.tokens])  # type: ignore[list-item]
        if self.layout is not None and other.layout is not None:
            self.layout = torch.cat([self.layout, other.layout])
        self.handles = self.handles + other.handles

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns in front that no kept row uses; their memory is free at once."""
        import torch

        if not rows:
            self.__init__()  # type: ignore[misc]
            return
        assert self.cache is not None and self.real is not None
        assert self.positions is not None and self.tokens is not None
        index = torch.tensor(rows, device=self.real.device)
        real = self.real.index_select(0, index)
        start = int(real.any(0).int().argmax())
        self.cache = self.cache.select(index, start)
        self.real = real[:, start:].contiguous()
        self.positions, self.tokens = self.positions[index], self.tokens[index]
        self.layout = None if self.layout is None else self.layout[index]
        self.handles = [self.handles[row] for row in rows]


def _right(real: Tensor, length: int) -> Tensor:
    import torch.nn.functional as F

    return F.pad(real, (length - real.shape[1], 0), value=False)


@dataclass(frozen=True)
class SelfTest:
    """Whether rows generated together equal rows generated alone, on the loaded model."""

    passed: bool
    rows: int
    text: str


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing, for a status strip."""

    name: str
    precision: str
    device: str
    queued_chat: int
    queued_batch: int
    running_chat: int
    running_batch: int
    max_rows: int
    weight_bytes: int
    cache_bytes: int
    notes: tuple[str, ...]
    exact: bool | None
    exact_text: str
    threads_text: str = (
        ""  # how many threads were chosen, and what was measured; empty where nothing was chosen
    )


class Engine:
    """Generates and scores with one loaded model; safe to call from any thread."""

    remote: Remote | None = None  # the server that answers, where it is not this process

    def __init__(self, loaded: LoadedModel, max_rows: int | None = None) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        self._lean = self._prepared()
        self.tokenizer = loaded.tokenizer
        self.context = loaded.info.context
        self.device = loaded.device
        config: Any = loaded.model.config
        self.layers = int(config.num_hidden_layers)
        element = self._element_size()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.bytes_per_token = 2 * self.layers * heads * head_dim * element
        # ChatGLM-6B reads its prompt in both directions: no part of it can be computed before the whole is known.
        self.whole_prompts = loaded.info.architecture == "chatglm"
        self.virtual = (
            0 if loaded.prefix is None else loaded.prefix.length
        )  # columns of P-tuning v2 in every cache
        self._virtual_keys_values = self._prefix_columns()
        # At most this many rows at a time; halved when memory runs out.
        self.limits: dict[Priority, int] = {"chat": CHAT_ROWS, "batch": max_rows or self._room_for_rows()}
        self.most_waiting: dict[Priority, int] = {"chat": CHAT_QUEUE, "batch": BATCH_QUEUE}
        self.prefixes = PrefixCache(max(16 << 20, min(loaded.weight_bytes // 10, 1 << 30)))
        self.notes: tuple[str, ...] = loaded.notes
        self.exact: SelfTest | None = None
        self.threads: Choice | None = None  # what `choose_threads` found
        self._queues: dict[Priority, deque[Handle]] = {"chat": deque(), "batch": deque()}
        self._rows: dict[Priority, Rows] = {"chat": Rows(), "batch": Rows()}
        # What others run on this thread: at once, and when it is the turn of the batch rows.
        self._tasks: dict[Priority, deque[Callable[[], None]]] = {"chat": deque(), "batch": deque()}
        self._handles: OrderedDict[str, Handle] = OrderedDict()
        self._condition = threading.Condition()
        self._closing = False
        self._prefill_speed = 2000.0  # tokens/s, replaced by what is measured
        self._chat_steps = 0
        self._thread = threading.Thread(target=self._run, name="glm-engine", daemon=True)
        self._thread.start()

    @property
    def max_rows(self) -> int:
        """Batch rows computed together."""
        return self.limits["batch"]

    # ---- what callers use ------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Queue a request. EngineBusy when the queue is full, GLMError when it cannot fit the context."""
        self.check(request)
        handle = Handle(request, self)
        with self._condition:
            self._refuse_if_closed()
            queue = self._queues[request.priority]
            if len(queue) >= self.most_waiting[request.priority]:
                raise EngineBusy(
                    f"{len(queue)} requests are waiting, which is as many as the queue takes.",
                    "Try again in a moment.",
                )
            queue.append(handle)
            if request.priority == "chat":
                self._handles[handle.id] = handle
                while len(self._handles) > KEPT_HANDLES:
                    self._handles.popitem(last=False)
            self._condition.notify_all()
        return handle

    def submit_many(self, requests: Sequence[Request], stop: threading.Event | None = None) -> list[Handle]:
        """Queue batch requests, waiting for room; ends early, with the handles so far, when `stop` is set."""
        handles: list[Handle] = []
        for request in requests:
            while True:
                try:
                    handles.append(self.submit(request))
                    break
                except EngineBusy:
                    if stop is not None and stop.is_set():
                        return handles
                    time.sleep(0.02)
        return handles

    def score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], prefix_length: int = 0
    ) -> list[list[float]]:
        """Log-probability of every continuation after every prompt: the sum over its tokens, in nats.

        Returns one list per prompt with one number per continuation. Runs between the steps of running requests.
        """
        from .scoring import score

        return [list(one.values) for one in score(self, prompts, continuations, prefix_length)]

    def scorer(self, answers: Sequence[Sequence[int]], head: Sequence[int] = ()) -> Scorer | RemoteScorer:
        """What scores the same answers for any number of prompts; `head` as in `scoring.Scorer`."""
        from .scoring import Scorer

        return Scorer(self, answers, head)

    def choose_threads(self, budget_s: float = 1.0) -> Choice | None:
        """Compute with as many threads as are fastest for a token of one row and of eight and for reading prompts.

        None, and nothing changes, for a model that is not on the processor, where an environment variable has chosen,
        and where there is one processor.
        """
        import psutil
        import torch

        from . import threads

        if self.device.type != "cpu" or self.loaded.device_map:
            return None
        if name := threads.asked():
            if name == "GLM_THREADS":  # torch knows the others
                number = max(1, int(os.environ[name]))
                self.later(lambda: torch.set_num_threads(number)).result()
            return None
        most = threads.usable()
        among = threads.candidates(most, psutil.cpu_count(logical=False) or most)
        if len(among) < 2:
            return None

        def begin() -> threads.Measurement:
            now = min(torch.get_num_threads(), most)
            # A chat, a few answers at once, and prompts or labels of a table.
            steps = [self._token_step(1), self._token_step(8)]
            if not self.whole_prompts:
                steps.append(self._token_step(8, 48))
            return threads.Measurement(steps, among, now, torch.set_num_threads, budget_s)

        measured = self.later(begin).result()
        while not measured.done:  # a request that comes meanwhile waits for one step
            self.later(measured.trial).result()
        self.threads = self.later(measured.choose).result()
        return self.threads

    def _token_step(self, rows: int, tokens: int = 1) -> Callable[[], object]:
        """A call that feeds some tokens to each of some rows, as often as wanted, behind a short prompt."""
        import torch

        from .tokenizers.base import Message

        full = [list(self.tokenizer.chat_ids([Message("user", "1+1=2, 2+2=4")]))] * rows
        cache, layout = self.empty_cache(rows), self.layouts(full)
        ids, real, positions = self.left_padded(full, 0)
        self._forward(cache, ids, positions, real, layout)
        length, fed = cache.length, ids[:, -1:].repeat(1, tokens)
        where = positions[:, -1:] + torch.arange(1, tokens + 1, device=self.device)
        seen = torch.nn.functional.pad(real, (0, tokens), value=True)

        def step() -> None:
            cache.length = length
            self._forward(cache, fed, where, seen, layout)

        return step

    def self_test(self, rows: int = 8, tokens: int = 12) -> SelfTest:
        """Generate rows together, padded and from a shared prefix, and alone without any of it; compare the ids."""
        tokenizer = self.tokenizer
        from .tokenizers.base import Message

        texts = ["你好", "What is this?", "请用一句话介绍你自己。", "Name three fruits, please, and one colour.",
                 "今天天气不错，我们去公园走走吧，你觉得怎么样？", "1+1", "Thanks!", "把“苹果”翻译成英文"]  # fmt: skip
        texts = [text for text, _ in zip(itertools.cycle(texts), range(rows), strict=False)]
        prompts = [tuple(tokenizer.chat_ids([Message("user", text)])) for text in texts]
        settings = GenerationSettings(max_new_tokens=tokens)
        shared = _common(prompts[0], prompts[1])
        handles = self.submit_many([Request(prompt, settings, "batch", shared) for prompt in prompts])
        for handle in handles:
            handle.wait()
        equal = 0
        for handle in handles:
            alone: list[int] = []

            def work(request: Request = handle.request, alone: list[int] = alone) -> None:
                alone += self._alone(request)

            self._call(work)
            equal += alone == handle.ids
        self.exact = SelfTest(
            equal == rows,
            rows,
            f"{equal} of {rows} rows generated together equal the rows generated alone ({self.loaded.precision}).",
        )
        return self.exact

    def handle(self, handle_id: str) -> Handle | None:
        """A chat request of this engine by id, also for some time after its end."""
        return self._handles.get(handle_id)

    def place_of(self, handle: Handle) -> int:
        if handle.state != "queued":
            return 0
        with self._condition:
            try:
                return self._queues[handle.request.priority].index(handle) + 1
            except ValueError:
                return 0

    def status(self) -> EngineStatus:
        """Counts and sizes at this moment."""
        caches = [rows.cache for rows in self._rows.values()]
        return EngineStatus(
            name=self.loaded.info.name,
            precision=self.loaded.precision,
            device=str(self.device),
            queued_chat=len(self._queues["chat"]),
            queued_batch=len(self._queues["batch"]),
            running_chat=len(self._rows["chat"]),
            running_batch=len(self._rows["batch"]),
            max_rows=self.max_rows,
            weight_bytes=self.loaded.weight_bytes,
            cache_bytes=sum(cache.nbytes for cache in caches if cache) + self.prefixes.nbytes,
            notes=self.notes,
            exact=self.exact.passed if self.exact else None,
            exact_text=self.exact.text if self.exact else "",
            threads_text=self.threads.text if self.threads else "",
        )

    def wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def close(self) -> None:
        """End every request as cancelled and stop the thread; the model is not touched."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    # ---- what other modules compute with the model -----------------------------------------------------------

    def later(self, work: Callable[[], T], priority: Priority = "batch") -> Future[T]:
        """Run `work` on the scheduler's thread between two steps: at once ("chat"), or on the batch rows' turn.

        Returns at once. Works of one priority run in the order they came. The result is a GLMError where the model
        is unloaded before its turn.
        """
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closing:
                    raise GLMError("The model was unloaded.", "Load it again.")
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._condition:
            self._refuse_if_closed()
            self._tasks[priority].append(task)
            self._condition.notify_all()
        return future

    def between_steps(self, work: Callable[[], T]) -> T:
        """Run `work` on the scheduler's thread between two steps, at once, and wait for its result."""
        return self.later(work, "chat").result()

    _call = between_steps

    @property
    def chatting(self) -> bool:
        """Whether a chat answer is on its way."""
        return bool(self._queues["chat"]) or len(self._rows["chat"]) > 0

    def forward_tokens(self) -> int:
        """How many tokens may be fed at once without keeping a chat request waiting too long, as measured."""
        return max(FORWARD_TOKENS, int(self._prefill_speed * FORWARD_SECONDS))

    def forward_columns(self, rows: int, width: int) -> int:
        """How many of `width` columns of so many rows may be fed at once: all where prompts are read whole."""
        return width if self.whole_prompts else max(FORWARD_TOKENS, self.forward_tokens() // rows)

    def forward(
        self, cache: KVCache, ids: Tensor, positions: Tensor, real: Tensor, layout: Tensor | None = None
    ) -> Tensor:
        """Feed ids (rows, n) after the cached columns; returns fp32 logits of the last column (rows, vocabulary).

        positions   (rows, n) how many real tokens of its row stand before each
        real        (rows, cached columns + n) bool: which columns hold a token
        layout      what `layouts` says of the whole rows
        Only for work that runs `between_steps` or `later`.
        """
        return self._forward(cache, ids, positions, real, layout)

    def forward_tree(
        self,
        cache: KVCache,
        ids: Tensor,
        positions: Tensor,
        real: Tensor,
        layout: Tensor | None,
        tree: Tensor,
    ) -> Tensor:
        """`forward` with a tree of continuations in the last columns.

        tree   (nodes, nodes) bool: which of these columns each of them sees
        Returns fp32 logits of the column before the tree and of its nodes, (rows, 1 + nodes, vocabulary).
        """
        return self._forward_all(cache, ids, positions, real, 1 + len(tree), layout, tree)

    def without_prefix(self) -> Engine:
        """The same model and thread without the P-tuning v2 prefix, to compute with; it takes no requests."""
        bare = copy.copy(self)
        bare.virtual, bare._virtual_keys_values = 0, []
        return bare

    def check(self, request: Request) -> None:
        request.settings.check()
        if not request.prompt_ids:
            raise GLMError("The prompt is empty.", "Enter a text.")
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LIKELIEST:
            raise GLMError(
                f"logprobs is {request.logprobs}.", f"Choose a whole number from 0 to {MOST_LIKELIEST}."
            )
        if len(request.prompt_ids) >= self.context:
            raise GLMError(
                f"The prompt has {len(request.prompt_ids)} tokens, the model takes {self.context} with the answer.",
                "Shorten the text or the history.",
            )
        if self.whole_prompts:
            from .models.chatglm import layout

            layout(request.prompt_ids, self.model.config)  # refused here, it costs no other row its answer

    def empty_cache(self, rows: int) -> KVCache:
        """A cache for so many rows that holds nothing but the prefix, if there is one."""
        cache = KVCache(self.layers)
        if self.virtual:
            cache.keys = [keys.expand(rows, -1, -1, -1) for keys, _ in self._virtual_keys_values]
            cache.values = [values.expand(rows, -1, -1, -1) for _, values in self._virtual_keys_values]
            cache.length = self.virtual
        return cache

    def layouts(self, full: Sequence[Sequence[int]]) -> Tensor | None:
        """Context and anchor of every row for ChatGLM-6B, (rows, 2); None for models that read left to right."""
        if not self.whole_prompts:
            return None
        import torch

        from .models.chatglm import layout

        found = [layout(ids, self.model.config) for ids in full]
        return torch.tensor([[one.context, one.anchor] for one in found], device=self.device)

    def left_padded(self, rows: list[list[int]], shared: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ids behind a shared head, padded on the left: ids and positions (rows, width), real (rows, all columns)."""
        import torch

        width = max(map(len, rows)) - shared
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        known = self.virtual + shared
        real = torch.zeros(len(rows), known + width, dtype=torch.bool)
        real[:, :known] = True
        for row, whole in enumerate(rows):
            tail = whole[shared:]
            ids[row, width - len(tail) :] = torch.tensor(tail)
            real[row, known + width - len(tail) :] = True
        positions = (real.cumsum(1) - 1 - self.virtual).clamp_min(0)[:, known:]
        return ids.to(self.device), real.to(self.device), positions.to(self.device)

    # ---- the scheduler's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        import torch

        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    try:
                        if self._tasks["chat"]:
                            self._tasks["chat"].popleft()()
                        self._round()
                        if not self._busy():
                            trim()
                    except (
                        Exception
                    ) as error:  # the thread must outlive a mistake, or every caller waits for ever
                        for priority in self._rows:
                            self._recover(priority, [], error)
        finally:
            with self._condition:
                self._closing = True
                left = [*self._all_rows(), *self._queues["chat"], *self._queues["batch"]]
                tasks = [task for waiting in self._tasks.values() for task in waiting]
                for queue in self._queues.values():
                    queue.clear()
                for waiting in self._tasks.values():
                    waiting.clear()
            self._rows = {"chat": Rows(), "batch": Rows()}
            self.prefixes.clear()
            for handle in left:
                handle._finish("cancelled", "cancelled")
            for task in tasks:
                task()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is closed."""
        with self._condition:
            while not self._closing:
                if self._busy():
                    return True
                self._condition.wait(timeout=1.0)
        return False

    def _busy(self) -> bool:
        waiting = any(self._tasks.values()) or any(self._queues.values())
        return waiting or any(map(len, self._rows.values()))

    def _all_rows(self) -> list[Handle]:
        return [*self._rows["chat"].handles, *self._rows["batch"].handles]

    def _round(self) -> None:
        """One token for every chat row, and, when nobody chats or it is its turn, one for every batch row."""
        self._drop_cancelled()
        self._advance("chat")
        chatting = len(self._rows["chat"]) > 0
        self._chat_steps = self._chat_steps + 1 if chatting else 0
        if not chatting or self._chat_steps % (CHAT_STEPS_PER_BATCH_ROUND + 1) == 0:
            self._advance("batch")
            if self._tasks["batch"]:
                self._tasks["batch"].popleft()()

    def _advance(self, priority: Priority) -> None:
        joining: list[Handle] = []
        try:
            while joining := self._next_group(priority):
                self._rows[priority].add(self._prefill(joining))
                self._settle(priority)
                joining = []
                if priority == "batch" and (self._queues["chat"] or len(self._rows["chat"])):
                    break  # nobody who chats waits for more than one prefill
            if len(self._rows[priority]):
                self._step(priority)
                self._settle(priority)
        except Exception as error:
            self._recover(priority, joining, error)

    def _next_group(self, priority: Priority) -> list[Handle]:
        """The queued requests to start together: one prefix, similar lengths, as many as there is room for."""
        queue, running = self._queues[priority], self._rows[priority]
        limit = self.limits[priority]
        free = limit - len(running)
        if not queue or free <= 0 or (len(running) and priority == "batch" and free < limit // 4):
            return []  # joining one by one would make every prefill small
        with self._condition:
            first = queue[0]
            prefix = self._head_of(first)
            longest, budget = 0, self.forward_tokens()
            group: list[Handle] = []
            for handle in itertools.islice(queue, min(free, len(queue))):
                length = handle.n_prompt + len(handle.ids) - len(prefix)
                longest = max(longest, length)
                if self._head_of(handle) != prefix:
                    break
                if group and longest * (len(group) + 1) > budget:
                    break
                group.append(handle)
            for _ in group:
                queue.popleft()
        now = time.monotonic()
        for handle in group:
            handle.state, handle.started = "running", handle.started or now
        return group

    def _head_of(self, handle: Handle) -> tuple[int, ...]:
        """The ids that are computed once for all requests that begin with them; none where prompts are read whole."""
        return () if self.whole_prompts else handle.request.prompt_ids[: handle.request.prefix_length]

    def _prefill(self, handles: list[Handle]) -> Rows:
        """Compute the prompts of some requests with one shared head, and choose their first tokens."""

        full = [[*handle.request.prompt_ids, *handle.ids] for handle in handles]
        cache, shared = self._shared_head(handles, full)
        ids, real, positions = self.left_padded(full, shared)
        layout = self.layouts(full)
        width = ids.shape[1]
        started, chunk = time.monotonic(), self.forward_columns(len(handles), width)
        for begin in range(0, width, chunk):
            end = min(width, begin + chunk)
            columns = self.virtual + shared + end
            logits = self._forward(
                cache, ids[:, begin:end], positions[:, begin:end], real[:, :columns], layout
            )
            if (
                all(handle._cancelled for handle in handles) or self._closing
            ):  # a long prompt nobody waits for
                for handle in handles:
                    handle._finish("cancelled", "cancelled")
                return Rows()
            if end < width and handles[0].request.priority == "batch":
                self._drop_cancelled()
                self._advance("chat")
        tokens = len(handles) * width
        if tokens >= 64:
            speed = tokens / max(time.monotonic() - started, 1e-6)
            self._prefill_speed = 0.7 * self._prefill_speed + 0.3 * min(max(speed, 50.0), 200_000.0)
        rows = Rows()
        rows.handles, rows.cache, rows.real, rows.layout = handles, cache, real, layout
        rows.positions = real.sum(1) - self.virtual
        rows.tokens = self._choose(handles, logits, full)
        return rows

    def _shared_head(self, handles: list[Handle], full: list[list[int]]) -> tuple[KVCache, int]:
        """A cache for these rows that already holds the longest head known to be shared, and its length."""
        import torch

        if self.whole_prompts:
            return self.empty_cache(len(full)), 0
        shortest = min(map(len, full)) - 1  # at least one token must be fed to get logits
        wanted = min(handles[0].request.prefix_length, shortest)
        if wanted > 0:
            head = tuple(full[0][:wanted])
            known, entry = self.prefixes.longest(head)
            if known < wanted:
                entry = self.empty_cache(1)
                entry.room = 0
                ids = torch.tensor([head], device=self.device)
                positions = torch.arange(wanted, device=self.device)[None]
                real = torch.ones(1, self.virtual + wanted, dtype=torch.bool, device=self.device)
                chunk = self.forward_tokens()
                for begin in range(0, wanted, chunk):
                    end = min(wanted, begin + chunk)
                    columns = self.virtual + end
                    self._forward(entry, ids[:, begin:end], positions[:, begin:end], real[:, :columns])
                self.prefixes.put(head, entry)
            shared = wanted
        elif len(handles) == 1:
            shared, entry = self.prefixes.longest(full[0])
            shared = min(shared, shortest)
        else:
            shared, entry = 0, None
        if entry is None or shared < 8:
            return self.empty_cache(len(full)), 0
        room = max(map(len, full)) - shared + 32
        return entry.select(
            torch.zeros(len(handles), dtype=torch.long, device=self.device), 0, self.virtual + shared, room
        ), shared

    def _forward(
        self, cache: KVCache, ids: Tensor, positions: Tensor, real: Tensor, layout: Tensor | None = None
    ) -> Tensor:
        """Feed ids (rows, n) after the cached columns; returns fp32 logits of the last column (rows, vocabulary)."""
        logits: Tensor = self._forward_all(cache, ids, positions, real, 1, layout)
        return logits[:, -1]

    def _forward_all(
        self,
        cache: KVCache,
        ids: Tensor,
        positions: Tensor,
        real: Tensor,
        keep: int,
        layout: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits of the last `keep` columns fed, (rows, keep, vocabulary); see `forward_tree` for `tree`."""
        import torch

        n = ids.shape[1]
        mask, where = self._seen(positions, real, n, layout)
        if tree is not None and len(tree):
            mask[..., -len(tree) :, -len(tree) :] &= tree
        if self._lean is not None:
            lean: Tensor = self._lean(ids, mask, cache, positions, keep)
            cache.length += n
            return lean.float()
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            # Numbers of columns give whole rows of memory; on a slice of several columns the head is multiplied row by
            # row, with a copy of its weight for each in bf16 (a quarter of the time of scoring labels).
            logits_to_keep=1 if n == 1 else torch.arange(n - keep, n, device=ids.device),
            **where,
        )
        cache.length += n
        logits: Tensor = output.logits.float()
        return logits

    def _seen(
        self, positions: Tensor, real: Tensor, n: int, layout: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Which columns the last n see, (rows, 1, n, columns) bool, and their positions as the model takes them."""
        import torch

        if layout is not None:
            from .models import chatglm

            context, anchor = layout.unbind(1)
            mask = chatglm.visible(real, context + self.virtual, n)
            return mask, {"glm_position_ids": chatglm.positions(positions, context, anchor)}
        total = real.shape[1]
        columns = torch.arange(total, device=real.device)
        own = columns[total - n :, None]
        # A padding column sees itself: a row of a softmax over nothing is NaN, and would spread.
        mask = (real[:, None, :] & (columns <= own)) | (columns == own)
        return mask[:, None], {"position_ids": positions}

    def _step(self, priority: Priority) -> None:
        """One more token for every row of a priority."""
        import torch.nn.functional as F

        rows = self._rows[priority]
        assert rows.cache is not None and rows.real is not None
        assert rows.positions is not None and rows.tokens is not None
        real = F.pad(rows.real, (0, 1), value=True)
        logits = self._forward(rows.cache, rows.tokens[:, None], rows.positions[:, None], real, rows.layout)
        rows.real, rows.positions = real, rows.positions + 1
        rows.tokens = self._choose(rows.handles, logits)

    def _choose(self, handles: list[Handle], logits: Tensor, full: list[list[int]] | None = None) -> Tensor:
        """The next token of every row; appended to its handle."""
        largest, tokens = logits.max(-1)  # NaN is the largest of all
        usable = largest.isfinite().tolist()
        for row, handle in enumerate(handles):
            settings = handle.request.settings
            if not usable[row]:
                handle._failed = GLMError(
                    f"The model's numbers left the range of {self.loaded.precision} after {len(handle.ids)} tokens.",
                    "Load the model in bf16 or fp32, or shorten the text.",
                )
                continue
            if settings.temperature > 0 or settings.repetition_penalty != 1.0:
                if handle._generator is None and settings.temperature > 0:
                    handle._generator = _generator(settings.seed)
                seen = [*handle.request.prompt_ids, *handle.ids]
                try:
                    tokens[row] = choose(logits[row], settings, seen, handle._generator)
                except (
                    RuntimeError
                ) as error:  # numbers that cannot be sampled from end this row, not its neighbours
                    handle._failed = _failure(error)
        if any(handle.request.logprobs is not None for handle in handles):
            self._note_scores(handles, logits, tokens)
        now = time.monotonic()
        for handle, token in zip(handles, tokens.tolist(), strict=True):
            if handle._failed is not None:
                continue
            handle.ids.append(token)
            if handle.first_token is None:
                handle.first_token = now
        return tokens

    @staticmethod
    def _note_scores(handles: list[Handle], logits: Tensor, tokens: Tensor) -> None:
        """Note the log-probability of the token of every row that asks for it; before the token itself."""
        asked = [
            row
            for row, handle in enumerate(handles)
            if handle.request.logprobs is not None and handle._failed is None
        ]
        if not asked:
            return
        values = logits[asked].log_softmax(-1)
        most = max(handles[row].request.logprobs or 0 for row in asked)
        likeliest, ids = (part.tolist() for part in values.topk(min(most, values.shape[-1])))
        chosen = values.gather(1, tokens[asked][:, None])[:, 0].tolist()
        for place, row in enumerate(asked):
            pairs = zip(ids[place], likeliest[place], strict=True)
            kept = tuple(itertools.islice(pairs, handles[row].request.logprobs))
            handles[row].scores.append(TokenScore(chosen[place], kept))

    def _settle(self, priority: Priority) -> None:
        """Finish the rows that reached an end, and free their part of the cache."""
        rows, kept = self._rows[priority], []
        ended: list[tuple[Handle, str]] = []
        for index, handle in enumerate(rows.handles):
            reason = self._end_reason(handle)
            if reason:
                ended.append((handle, reason))
            else:
                kept.append(index)
        if not ended:
            return
        if priority == "chat":
            self._remember(rows, [i for i in range(len(rows)) if i not in kept])
        rows.keep(kept)
        for handle, reason in ended:
            if handle._failed is not None:
                handle._finish("failed", "error", handle._failed)
            else:
                handle._finish("done", reason)

    def _end_reason(self, handle: Handle) -> str:
        settings = handle.request.settings
        if handle._failed is not None:
            return "error"
        if handle.ids and handle.ids[-1] in self.tokenizer.stop_ids:
            return "stop"
        if settings.stop:
            text = self.tokenizer.answer_text(handle.ids, False)
            if any(stop in text for stop in settings.stop):
                return "stop"
        if len(handle.ids) >= settings.max_new_tokens or handle.n_prompt + len(handle.ids) >= self.context:
            return "length"
        return ""

    def _remember(self, rows: Rows, ended: list[int]) -> None:
        """Keep the cache of a finished chat turn: the next turn of that conversation starts with it."""
        assert rows.cache is not None and rows.real is not None
        if self.whole_prompts:
            return
        for index in ended:
            handle = rows.handles[index]
            ids = (*handle.request.prompt_ids, *handle.ids)[:-1]  # the last token was never fed
            if len(ids) * self.bytes_per_token > self.prefixes.max_bytes // 2:
                continue
            # A row that began with a shared head has its padding between that head and its own text.
            columns = rows.real[index].nonzero()[:, 0]
            if len(columns) == self.virtual + len(ids):
                self.prefixes.put(ids, rows.cache.row(index, columns))

    def _drop_cancelled(self) -> None:
        gone: list[Handle] = []
        with self._condition:  # callers append to the queues at any time
            for queue in self._queues.values():
                dropped = [handle for handle in queue if handle._cancelled]
                for handle in dropped:
                    queue.remove(handle)
                gone += dropped
        for rows in self._rows.values():
            gone += [handle for handle in rows.handles if handle._cancelled]
        for handle in gone:
            handle._finish("cancelled", "cancelled")
        for rows in self._rows.values():
            if any(handle._cancelled for handle in rows.handles):
                rows.keep([i for i, handle in enumerate(rows.handles) if not handle._cancelled])

    def _recover(self, priority: Priority, joining: list[Handle], error: Exception) -> None:
        """After an exception: out of memory starts the rows again in smaller company, anything else fails them."""
        self._rows[priority], rows = Rows(), self._rows[priority]
        handles = [*rows.handles, *(handle for handle in joining if handle not in rows.handles)]
        del rows
        if not out_of_memory(error):
            log.error("generation failed", exc_info=error)
            for handle in handles:
                handle._finish("failed", "error", _failure(error))
            return
        del error
        self.prefixes.clear()
        _free_memory()
        for handle in handles:  # it may have happened after the last token of a row was chosen
            if handle.ids and (reason := self._end_reason(handle)):
                handle._finish("done", reason)
        handles = [handle for handle in handles if not handle.done]
        if len(handles) > 1:
            limit = self.limits[priority] = max(1, min(self.limits[priority], len(handles)) // 2)
            self.notes = (*self.notes[-4:], f"Memory ran out: now {limit} rows at a time.")
            for handle in handles:
                handle.state = "queued"
                if AGAIN not in handle.notes:
                    handle.notes = (*handle.notes, AGAIN)
            with self._condition:
                self._queues[priority].extendleft(reversed(handles))
            return
        for handle in handles:
            handle._finish(
                "failed",
                "error",
                GLMError(
                    f"Memory ran out on a prompt of {handle.n_prompt} tokens.",
                    "Shorten the text or the history, close other programs, or load the model in a lower precision.",
                ),
            )

    # ---- scoring and the reference path ----------------------------------------------------------------------

    def _prepared(self) -> LeanDecoder | None:
        """The model's lean forward, where it has one, with the weights laid out for this processor."""
        from .models.lean import laid_out, lean

        if self.loaded.device_map:
            return None
        self.model.eval()
        if self.loaded.device.type != "cpu":
            return lean(self.model)
        found = laid_out(self.model, self.loaded.precision == checkpoints.DYNAMIC)
        trim()
        return found

    def _element_size(self) -> int:
        """Bytes of a number in the cache: that of the embedding, whatever the linear layers are stored in."""
        return int(self.model.get_input_embeddings().weight.element_size())

    def _prefix_columns(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, per layer (1, kv heads, P, head dim), that a P-tuning v2 prefix puts before every row."""
        if self.loaded.prefix is None:
            return []
        import torch

        with torch.inference_mode():
            return list(self.loaded.prefix.keys_values(1, self.model.dtype))

    def _alone(self, request: Request) -> list[int]:
        """Greedy tokens of one request by the plain definition: the whole sequence again for every token."""
        import torch

        ids, new = list(request.prompt_ids), []
        for _ in range(request.settings.max_new_tokens):
            fed = torch.tensor([ids], device=self.device)
            if self.virtual:
                fed, real, positions = self.left_padded([ids], 0)
                logits = self._forward(self.empty_cache(1), fed, positions, real, self.layouts([ids]))[0]
            else:
                logits = self.model(input_ids=fed, use_cache=False, logits_to_keep=1).logits[0, -1]
            token = int(logits.float().argmax())
            new.append(token)
            ids.append(token)
            if token in self.tokenizer.stop_ids:
                break
        return new

    def _refuse_if_closed(self) -> None:
        if self._closing:
            raise GLMError("The model was unloaded.", "Load it again on the Models page.")

    def _room_for_rows(self) -> int:
        """Rows whose cache of 1,024 tokens fits an eighth of the free memory, from 4 to 128."""
        import psutil
        import torch

        free = (
            torch.cuda.mem_get_info(self.device)[0]
            if self.device.type == "cuda"
            else psutil.virtual_memory().available
        )
        return int(min(128, max(4, free // 8 // (self.bytes_per_token * 1024))))


def choose(
    logits: Tensor, settings: GenerationSettings, seen: Sequence[int], generator: torch.Generator | None
) -> int:
    """One token from fp32 logits (vocabulary,): repetition penalty, temperature, top-k, top-p, then a draw.

    The order and the arithmetic are those of transformers' logits processors; temperature 0 takes the maximum.
    """
    import torch

    logits = logits.cpu().clone()
    if settings.repetition_penalty != 1.0:
        used = torch.tensor(sorted(set(seen)))
        values = logits[used]
        logits[used] = torch.where(
            values < 0, values * settings.repetition_penalty, values / settings.repetition_penalty
        )
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = warp(logits, settings).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def warp(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """Logits after temperature, top-k and top-p; what is cut becomes -inf. Shape (vocabulary,)."""
    import torch

    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = logits.sort(descending=False)
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        cut[-1] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), -torch.inf)
    return logits


def _generator(seed: int | None) -> torch.Generator:
    import torch

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that device or main memory ran out."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _failure(error: Exception) -> GLMError:
    return GLMError(
        f"Generation failed: {type(error).__name__}: {str(error)[:300]}.", "Try again; see the log."
    )


def trim() -> None:
    """Give freed memory back to the system; glibc keeps the gaps between caches that came and went.

    Ten people chatting for fifty rounds made the process grow by 4 % without it.
    """
    with contextlib.suppress(OSError, AttributeError):  # there is no glibc on macOS and Windows
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _in_thread_of_its_own(work: Callable[[], T], name: str) -> T:
    """Call a function that does not raise, in a thread that ends with it, and wait for it.

    OpenMP keeps threads for every thread that has computed with several. With more of them than processors they sleep
    after every step instead of waiting for the next: the embedded model said half as many tokens per second in a
    program whose main thread had loaded it.
    """
    done: list[T] = []
    thread = threading.Thread(target=lambda: done.append(work()), name=name, daemon=True)
    thread.start()
    thread.join()
    return done.pop()


def leave_imports_alone() -> None:
    """Import what a model needs and take all that is there out of the garbage collector's sight, before a load.

    For programs that answer people: what libraries make at import is never garbage, and to look through it took
    0.2 s each time, in which nobody was answered. A model loaded later is collected as always.
    """
    import pandas  # noqa: F401
    import torch  # noqa: F401

    from .models import chatglm, chatglm2  # noqa: F401

    gc.collect()
    gc.freeze()


def _free_memory() -> None:
    import torch

    gc.collect()
    trim()
    with contextlib.suppress(Exception):  # after a device error even this fails
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class MemoryReport:
    """Bytes in use by this process, by the machine and on the device, and around the last load."""

    process_bytes: int
    system_used_bytes: int
    system_total_bytes: int
    device_used_bytes: int | None
    device_total_bytes: int | None
    before_load_bytes: int | None
    after_load_bytes: int | None


class EngineHost:
    """The one place that decides which model is loaded: at most one, the old one out before the new one in."""

    def __init__(self) -> None:
        self.current: Engine | None = None
        self.state: Literal["empty", "loading", "ready", "failed"] = "empty"
        self.error: GLMError | None = None
        self.loading_name = ""
        self.loading_share = 0.0  # of the bytes to read, 0 to 1
        self.loading_bytes = 0  # of all files
        self.on_progress: checkpoints.Progress | None = None  # told as well: bytes read, bytes of all files
        self._before: int | None = None
        self._after: int | None = None
        self._lock = threading.RLock()
        self._resting = False
        self._settling: threading.Thread | None = None
        self._holds: list[str] = []

    def use(
        self,
        path: str | Path,
        precision: str = "auto",
        device: str = "auto",
        generation: str | None = None,
        base: str | Path | None = None,
    ) -> Engine:
        """The engine of a checkpoint, loaded if it is not yet; callers that come together load once.

        The parameters are those of `checkpoints.load`. GLMError while a job holds another model, or when the checkpoint does not load.
        """
        from .remote import is_remote

        if is_remote(path):
            return self._use_remote(str(path))
        folder = Path(path).expanduser().resolve()
        with self._lock:
            if self._resting:
                raise self._ending()
            if self.current is not None and self._serves(folder, precision, device, generation, base):
                return self.current
            self._refuse_if_held()
            self._unload()
            self.state, self.loading_name, self.error = "loading", folder.name, None
            self.loading_bytes, self.loading_share = 0, 0.0
            self._before = _process_bytes()
            engine = _in_thread_of_its_own(
                lambda: self._engine(folder, precision, device, generation, base), "glm-load"
            )
            if isinstance(engine, GLMError):
                self.state, self.error = "failed", engine
                _free_memory()
                raise engine
            self._after = _process_bytes()
            self.current, self.state = engine, "ready"
            if not self._resting:
                self._settling = threading.Thread(
                    target=self._settle, args=(engine,), name="glm-self-test", daemon=True
                )
                self._settling.start()
        return engine

    def _engine(
        self, folder: Path, precision: str, device: str, generation: str | None, base: str | Path | None
    ) -> Engine | GLMError:
        """A loaded model's engine, or why there is none: raised here, the error would keep the weights in memory."""
        try:
            loaded = checkpoints.load(folder, precision, device, generation, base, self._progress)
            self._progress(self.loading_bytes, self.loading_bytes)
            return Engine(loaded)
        except GLMError as error:
            return GLMError(error.message, error.todo)
        except Exception as error:
            log.exception("loading failed")
            return GLMError(
                f"{folder.name} did not load: {type(error).__name__}: {str(error)[:200]}.",
                "See the log; `python -m glm_core doctor` says whether something is missing.",
            )

    def _use_remote(self, spec: str) -> Engine:
        """The engine of a server, in the place of a loaded model. GLMError where the server does not answer."""
        from . import remote

        wanted = remote.find(spec)
        with self._lock:
            if self.current is not None and self.current.remote == wanted:
                return self.current
            self._refuse_if_held()
            engine = remote.connect(wanted)  # a server that is not there leaves the model where it is
            self._unload()
            self._before = self._after = None
            self.error = None
            self.current, self.state = engine, "ready"
        return engine

    def unload(self) -> None:
        """Free the model's memory; GLMError while a job holds it."""
        with self._lock:
            self._refuse_if_held()
            self._unload()
            self.state, self.error = "empty", None

    @contextlib.contextmanager
    def hold(self, reason: str) -> Iterator[None]:
        """While held, the model is neither unloaded nor replaced; `reason` is named to whoever tries."""
        with self._lock:
            self._holds.append(reason)
        try:
            yield
        finally:
            with self._lock:
                self._holds.remove(reason)

    def handle(self, handle_id: str) -> Handle | None:
        """A chat request of the loaded model by id."""
        engine = self.current
        return engine.handle(handle_id) if engine else None

    def memory(self) -> MemoryReport:
        """Memory at this moment, and before and after the last load."""
        import psutil

        machine = psutil.virtual_memory()
        used = total = None
        engine = self.current
        if engine is not None and engine.device.type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(engine.device)
            used = total - free
        return MemoryReport(
            _process_bytes(),
            machine.total - machine.available,
            machine.total,
            used,
            total,
            self._before,
            self._after,
        )

    def _progress(self, done: int, total: int) -> None:
        self.loading_bytes, self.loading_share = total, done / max(1, total)
        if self._resting:  # a large model is not read to its end first
            raise self._ending()
        if self.on_progress is not None:
            self.on_progress(done, total)

    @staticmethod
    def _ending() -> GLMError:
        return GLMError("The program is ending.", "Start it again.")

    def _serves(
        self, folder: Path, precision: str, device: str, generation: str | None, base: str | Path | None
    ) -> bool:
        loaded = self.current.loaded if self.current else None
        if loaded is not None and loaded.info.bits and precision.startswith("int"):
            precision = "bf16"  # what `checkpoints.load` makes of it where the weights are stored as codes
        return (
            loaded is not None
            and loaded.info.path == folder
            and precision in ("auto", loaded.precision)
            and device in ("auto", str(loaded.device), loaded.device.type, loaded.devices)
            and generation in (None, loaded.tokenizer.generation)
            and (
                base is None
                or (loaded.base is not None and loaded.base.path == Path(base).expanduser().resolve())
            )
        )

    def _refuse_if_held(self) -> None:
        if self._holds:
            raise GLMError(
                f"The loaded model is in use by {self._holds[0]}.", "Pause it on the Jobs page first."
            )

    def _unload(self) -> None:
        engine, self.current = self.current, None
        if engine is not None:
            engine.close()
            if engine.remote is None:
                checkpoints.release(engine.loaded)
            _free_memory()

    def rest(self) -> None:
        """Load nothing more and let the threads of this module end, at Python's end.

        One that is inside of a C++ library then ends the whole program with "terminate called".
        """
        self._resting = True
        if self._lock.acquire(timeout=REST_S):  # held while a model is loaded
            try:
                if self.current is not None:
                    self.current.close()
                if self._settling is not None:  # the engine is closed: its next question is refused
                    self._settling.join(REST_S)
            finally:
                self._lock.release()

    @staticmethod
    def _settle(engine: Engine) -> None:
        with contextlib.suppress(GLMError):  # unloaded meanwhile
            engine.choose_threads()
            if (
                engine.loaded.weight_bytes < 500 << 20
            ):  # a second at most; larger models are tested on request
                engine.self_test()


def _process_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


_host: EngineHost | None = None
_host_lock = threading.Lock()


def host() -> EngineHost:
    """The engine host of this process."""
    global _host
    with _host_lock:
        if _host is None:
            _host = EngineHost()
            atexit.register(_host.rest)
        return _host
