"""A prompt per row of a table, one answer per row: the batch task, its prompts, its run and its export."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import sys
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import GLMError
from .jobs import Job, JobPaused, JobStore, Result, StopSignal

if TYPE_CHECKING:
    from .engine import Engine, GenerationSettings, Handle
    from .tables import WriteReport
    from .tokenizers.base import Message, Tokenizer

log = logging.getLogger(__name__)

WINDOW_ROWS = 1024  # rows sorted by length at a time
ROWS_AHEAD = 4  # requests in the engine, in multiples of the rows it computes at once
COMMIT_ROWS = 64
COMMIT_S = 0.5
REMEMBERED_ANSWERS = 4096
TRIAL_ROWS = 5
FAILURES = 200  # in a row: the engine is broken, not the table
PACKAGES = ("torch", "transformers", "sentencepiece")
DUPLICATES = "Rows with the same prompt were generated once and share the answer; the copies have 0 seconds."

HALF = re.compile("[\ud800-\udfff]")  # of a pair that makes one character; no tokenizer takes it alone
PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class BatchTask:
    """What to ask of every row and how: the same object behind the screen, the CLI and a resumed job."""

    checkpoint: str = field(metadata={"help": "Folder of the checkpoint"})
    checkpoint_fingerprint: str
    precision: str
    device: str
    template: str = field(
        metadata={"help": "The prompt; {column} is replaced by the cell, {{ and }} are braces"}
    )
    system: str
    settings: GenerationSettings
    output_column: str
    input_name: str
    input_path: str
    input_sha256: str
    columns: tuple[str, ...]
    read_options: dict[str, Any] = field(default_factory=dict)
    limit_rows: int | None = None
    generation: str = ""  # prompt format, where it was chosen by hand
    base: str = ""  # folder of the base, where the checkpoint is an adapter alone
    engine: str = field(default="", metadata={"help": "ray: on a cluster; else on this machine"})
    address: str = field(
        default="", metadata={"help": "host:port of the cluster; empty: one of its own, here"}
    )
    workers: int = field(default=0, metadata={"help": "0: as many as fit"})
    cpus_per_worker: float = field(default=0.0, metadata={"help": "0: an equal share"})
    versions: dict[str, str] = field(default_factory=dict)
    # Where the checkpoint is on a server: its address, model and how it is asked.
    remote: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The task as a job stores it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"settings": self.settings.to_json(), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BatchTask:
        """The task of a stored job; GLMError if it lacks a value."""
        from .engine import GenerationSettings

        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        try:
            known["settings"] = GenerationSettings.from_json(known["settings"])
            return cls(**known | {"columns": tuple(known["columns"])})
        except (KeyError, TypeError) as error:
            raise GLMError(
                f"The stored batch task is incomplete ({error}).", "Start the job again."
            ) from error


class Rows(Protocol):
    """What `start` reads: a table of glm_core.tables, or anything with rows and warnings."""

    def rows(self) -> Iterator[tuple[str, ...]]: ...

    @property
    def warnings(self) -> Sequence[str]: ...


# ---- templates


def _parts(template: str) -> list[tuple[bool, str]]:
    """The template as texts (False) and placeholders (True), read once from left to right."""
    parts, end = [], 0
    for match in PART.finditer(template):
        parts.append((False, template[end : match.start()]))
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts.append((False, match[0][0]))
        elif match[1] is None:
            raise GLMError(
                f"The template has a single {match[0]} at character {match.start() + 1}.",
                "Write {column} for a cell, and {{ or }} for a brace that is text.",
            )
        else:
            parts.append((True, match[1]))
    parts.append((False, template[end:]))
    return [(is_cell, text) for is_cell, text in parts if is_cell or text]


def placeholders(template: str) -> list[str]:
    """The names in braces, in order, each once; GLMError for a brace without its partner."""
    return list(dict.fromkeys(name for is_cell, name in _parts(template) if is_cell))


def reference(column: str, columns: Sequence[str]) -> str:
    """How a template names a column: `{name}`, or `{#3}` for the third where the name has braces itself."""
    if _position("#" if "{" in column or "}" in column else column, columns) == columns.index(column):
        return f"{{{column}}}"
    return f"{{#{columns.index(column) + 1}}}"


def _position(name: str, columns: Sequence[str]) -> int | None:
    """Which column a name in braces means: the exact name, else without outer spaces, else by number."""
    stripped = [column.strip() for column in columns]
    if name in columns:
        return columns.index(name)
    if name.strip() in stripped:
        return stripped.index(name.strip())
    number = re.fullmatch(r"\s*#([1-9]\d{0,5})\s*", name, re.ASCII)
    return int(number[1]) - 1 if number and int(number[1]) <= len(columns) else None


class Template:
    """A prompt template checked against the columns of a table."""

    def __init__(self, template: str, columns: Sequence[str]) -> None:
        """GLMError naming the unknown column, or if no cell is used at all."""
        listed = ", ".join(reference(column, columns) for column in columns) or "no columns"
        self._parts: list[tuple[int | None, str]] = []
        for is_cell, text in _parts(template):
            position = _position(text, columns) if is_cell else None
            if is_cell and position is None:
                raise GLMError(
                    f"The template uses {{{text}}}, but there is no such column. There are: {listed}.",
                    "Use one of these, or write {{ and }} for braces that are text.",
                )
            self._parts.append((position, text))
        self.used = sorted({position for position, _ in self._parts if position is not None})
        if not self.used:
            raise GLMError(
                "The template uses no column, so every row would get the same prompt.",
                f"Put at least one of these into it: {listed}.",
            )

    def render(self, cells: Sequence[str]) -> str:
        """The prompt text of one row; braces in a cell stay what they are."""
        return "".join(
            text if position is None else (cells[position] if position < len(cells) else "")
            for position, text in self._parts
        )


def render(template: str, columns: Sequence[str], cells: Sequence[str]) -> str:
    """The prompt text of one row; GLMError where the template does not fit the columns."""
    return Template(template, columns).render(cells)


# ---- prompts


@dataclass(frozen=True)
class Prompt:
    """One row's ids and text, whether a cell was shortened, and how many leading ids all rows share."""

    ids: tuple[int, ...]
    text: str
    truncated: bool = False
    prefix_length: int = 0


class Prompts:
    """Builds the prompt of every row of a task; what all rows share is found once."""

    PROBES = ("", "a", "The", " x", "1", "\n", "我", "，", "\U0001f600")

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        system: str,
        columns: Sequence[str],
        context: int,
        max_new_tokens: int,
        turns: Sequence[Message] = (),
    ) -> None:
        """GLMError where the template does not fit the columns, the model, or the model's context.

        turns   of the conversation before the row's own question, the same for every row
        """
        self._tokenizer, self._system, self._turns = tokenizer, system, tuple(turns)
        self.template = Template(template, columns)
        self._width, self.limit = len(columns), context - max_new_tokens
        self._head: tuple[int, ...] = ()
        probes = [self._ids(self.template.render([probe] * self._width)) for probe in self.PROBES]
        if len(probes[0]) > self.limit:
            raise GLMError(
                f"The template alone has {len(probes[0])} tokens; the model takes {context}, "
                f"of which {max_new_tokens} are kept for the answer.",
                "Shorten the template or the system text, or allow fewer new tokens.",
            )
        self._head = tuple(os.path.commonprefix(probes))

    def _ids(self, text: str) -> tuple[int, ...]:
        from .tokenizers.base import Message

        # Ids per segment: whatever a cell says, it is encoded as text and never as a control token.
        system = [Message("system", self._system)] if self._system.strip() else []
        return tuple(self._tokenizer.chat_ids([*system, *self._turns, Message("user", text)]))

    @property
    def head(self) -> tuple[int, ...]:
        """The ids that nearly every prompt begins with."""
        return self._head

    def build(self, cells: Sequence[str]) -> Prompt:
        """The prompt of one row, its longest cells cut at their ends until it fits with the answer.

        GLMError for a cell that holds half a character.
        """
        text = self.template.render(cells)
        if HALF.search(text):
            raise GLMError("A cell holds half a character.", "Repair the text of this row.")
        ids = self._ids(text)
        truncated = len(ids) > self.limit
        if truncated:
            text, ids = self._shortened(cells)
        # A cell can merge with the text before it into another token, so the shared head is checked per row.
        shared = len(self._head) if ids[: len(self._head)] == self._head and len(ids) > len(self._head) else 0
        return Prompt(ids, text, truncated, shared)

    def _shortened(self, cells: Sequence[str]) -> tuple[str, tuple[int, ...]]:
        """The longest prompt that fits when every cell is held to one number of tokens."""
        encoded = {i: self._tokenizer.encode(cells[i]) for i in self.template.used if i < len(cells)}
        best = self.template.render([])
        best_ids = self._ids(best)
        low, high = 0, min(self.limit, max(map(len, encoded.values())))
        while low < high:
            cap = (low + high + 1) // 2
            cut = list(cells)
            for i, whole in encoded.items():
                cut[i] = self._cut(cells[i], whole, cap)
            text = self.template.render(cut)
            if len(ids := self._ids(text)) <= self.limit:
                low, best, best_ids = cap, text, ids
            else:
                high = cap - 1
        return best, best_ids

    def _cut(self, cell: str, ids: Sequence[int], tokens: int) -> str:
        """The beginning of a cell, ending with a whole token and a whole character."""
        if len(ids) <= tokens:
            return cell
        decoded = self._tokenizer.decode(ids[:tokens])
        start = os.path.commonprefix([cell, decoded])
        if len(start) >= len(decoded) - 4:  # the end of a cut character may be missing
            return start
        return cell[: len(cell) * tokens // len(ids)]  # decoding does not give this text back


def build_prompt(
    tokenizer: Tokenizer,
    template: str,
    system: str,
    columns: Sequence[str],
    cells: Sequence[str],
    context: int,
    max_new_tokens: int,
) -> Prompt:
    """The prompt of a single row, as for a preview; `Prompts` is faster for many. GLMError as there."""
    return Prompts(tokenizer, template, system, columns, context, max_new_tokens).build(cells)


def prompts_of(engine: Engine, task: BatchTask) -> Prompts:
    """The prompts of a task for a loaded model; GLMError as `Prompts`."""
    new_tokens = task.settings.max_new_tokens
    return Prompts(engine.tokenizer, task.template, task.system, task.columns, engine.context, new_tokens)


# ---- before the run


@dataclass(frozen=True)
class Trial:
    """A few rows answered before the job starts, with their prompts and the time they took together."""

    results: tuple[Result, ...]
    prompts: tuple[Prompt, ...]
    seconds: float

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / max(len(self.results), 1)


def trial(
    engine: Engine, task: BatchTask, rows: Iterable[Sequence[str]], stop: threading.Event | None = None
) -> Trial:
    """Answer the first five rows now, ahead of running jobs; GLMError where the template does not fit."""
    from .engine import Request

    prompts = prompts_of(engine, task)
    built = [prompts.build(cells) for cells in islice(rows, TRIAL_ROWS)]
    started = time.monotonic()
    handles: list[Handle] = []
    try:
        for idx, prompt in enumerate(built):
            settings = _row_settings(task.settings, idx)
            handles.append(engine.submit(Request(prompt.ids, settings, "chat", prompt.prefix_length)))
        for handle in handles:
            while not handle.wait(0.1):
                if stop is not None and stop.is_set():
                    raise GLMError("The trial was stopped.")
    finally:
        for handle in handles:
            if not handle.done:
                handle.cancel("trial")
    seconds = time.monotonic() - started
    results = [_result(i, h, p.truncated) for i, (h, p) in enumerate(zip(handles, built, strict=True))]
    return Trial(tuple(results), tuple(built), seconds)


def estimate(seconds_per_row: float, total: int) -> float:
    """Seconds for `total` rows at a trial's pace; a full batch is usually faster."""
    return seconds_per_row * total


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces; GLMError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GLMError(
            f"{Path(path).name} cannot be read: {error.strerror}.", "Choose the file again."
        ) from error


def start(store: JobStore, task: BatchTask, table: Rows) -> Job:
    """Copy the rows into a new job and queue it; GLMError, and a failed job, if the file cannot be read."""
    return fill(store, _create(store, task), task, table)


def start_in_background(store: JobStore, task: BatchTask, table: Rows) -> Job:
    """`start` for a large table: the job is "preparing" while its rows are copied, and counts them as it goes."""
    return fill_in_background(store, _create(store, task), task, table)


def fill_in_background(store: JobStore, job: Job, task: RowTask, table: Rows) -> Job:
    """`fill` in a thread of its own; returns the job as it is at once."""
    return in_background(job, lambda: fill(store, job, task, table))


def in_background(job: Job, copy: Callable[[], object]) -> Job:
    """Copy a job's rows in a thread of its own; returns the job as it is at once."""

    def work() -> None:
        try:
            copy()
        except GLMError:
            pass  # the job says why
        except Exception:
            log.exception("the rows of job %s were not copied", job.id)

    threading.Thread(target=work, name="glm-copy", daemon=True).start()
    return job


def _create(store: JobStore, task: BatchTask) -> Job:
    Template(task.template, task.columns)
    task.settings.check()
    if not task.output_column.strip():
        raise GLMError("The output column has no name.", "Give it one, for example answer.")
    return store.create("batch", task.input_name, task.to_json())


class RowTask(Protocol):
    """What a job says about the table whose rows it takes."""

    @property
    def input_name(self) -> str: ...
    @property
    def limit_rows(self) -> int | None: ...


def fill(store: JobStore, job: Job, task: RowTask, table: Rows) -> Job:
    """Copy a table's rows into a job that was just created and queue it; a table that cannot be read fails it."""
    with preparing(store, job):
        if not store.add_rows(job.id, islice(table.rows(), task.limit_rows)):
            raise GLMError(f"{task.input_name} has no rows.", "Choose a file with at least one row of data.")
        for warning in table.warnings:
            store.warn(job.id, warning)
        return store.mark_ready(job.id)


@contextmanager
def preparing(store: JobStore, job: Job) -> Iterator[None]:
    """What goes wrong inside, while the rows of a new job are copied, fails the job with its sentence."""
    try:
        yield
    except BaseException as error:  # also when the page's thread is stopped in the middle
        store.mark_unready(
            job.id, str(error) if isinstance(error, GLMError) else "The file was not read to its end."
        )
        raise


# ---- the run


@dataclass
class _Work:
    """A prompt on its way, and the rows that wait for its answer (several when their prompts are equal)."""

    idx: int
    prompt: Prompt
    key: bytes | None
    handle: Handle | None = None
    copies: list[tuple[int, bool]] = field(default_factory=list)  # row, and whether it was shortened


class ModelTask(Protocol):
    """What a job says about the model that is to do its work."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def checkpoint_fingerprint(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def generation(self) -> str: ...
    @property
    def base(self) -> str: ...
    @property
    def versions(self) -> dict[str, str]: ...
    @property
    def remote(self) -> dict[str, Any]: ...


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Answer every row that has no result yet; GLMError if the checkpoint is gone or another one by now."""
    task = BatchTask.from_json(job.task)
    if task.engine == "ray":
        from . import cluster

        return cluster.run(job, store, stop)
    with_engine(
        job, store, stop, task,
        lambda engine: Answering(job, store, stop, task.settings, engine, prompts_of(engine, task)).run(),
    )  # fmt: skip


def with_engine(
    job: Job, store: JobStore, stop: StopSignal, task: ModelTask, work: Callable[[Engine], None]
) -> None:
    """Do `work` with the task's model, held for it; GLMError if the checkpoint is gone or another one by now."""
    from . import checkpoints, engine
    from .remote import is_remote, with_remote

    if is_remote(task.checkpoint):
        return with_remote(job, store, stop, task, work)
    host = engine.host()
    folder, base = Path(task.checkpoint), Path(task.base) if task.base else None
    for needed in filter(None, (folder, base)):
        if not needed.is_dir():
            raise GLMError(f"There is no folder {needed}.", "Check the path of the checkpoint.")
    if checkpoints.fingerprint(folder, base) != task.checkpoint_fingerprint:
        raise GLMError(
            f"The checkpoint {folder.name} is not the one this job was started with; its files have changed.",
            "Put the old files back and resume, or start a new job.",
        )
    if task.versions and (
        changed := [f"{k} {v}" for k, v in versions().items() if task.versions.get(k) != v]
    ):
        store.warn(
            job.id, f"Part of the rows ran with other versions than at the start: {', '.join(changed)}."
        )
    store.update(job.id, f"Loading {folder.name}")
    while not stop.event.is_set():
        model = host.use(folder, task.precision, task.device, task.generation or None, base)
        # The sentence is shown to whoever wants another model: not what somebody else's table is called.
        with host.hold(f"the job {job.id if job.user else job.title}"):
            if host.current is model:  # not replaced between the two lines above
                store.update(job.id, job.message, restart_clock=True)
                return work(model)


class Stretch:
    """One stretch of a job over rows: reads those without a result, keeps the answers, commits them in time."""

    def __init__(self, job: Job, store: JobStore, stop: StopSignal, prompts: Prompts | None) -> None:
        self.job, self.store, self.stop, self.prompts = job, store, stop, prompts
        self.answers: OrderedDict[bytes, Result] = OrderedDict()  # by prompt, for rows that come again
        self.finished: list[Result] = []
        self.after: int | None = -1  # the last row read; None once there are no more
        self.committed = time.monotonic()
        self.noted: set[str] = set()

    def _rows(self) -> list[tuple[int, tuple[str, ...]]]:
        """The next rows without a result."""
        rows = self.store.pending(self.job.id, WINDOW_ROWS, -1 if self.after is None else self.after)
        self.after = rows[-1][0] if len(rows) == WINDOW_ROWS else None
        return rows

    def _window(self) -> Iterator[tuple[int, Prompt]]:
        """The next rows without a result with their prompts; fewer where the job is to stop."""
        assert self.prompts is not None
        for idx, cells in self._rows():
            if self.stop.event.is_set():
                return
            try:
                prompt = self.prompts.build(cells)
            except GLMError as error:
                self.finished.append(Result(idx, "failed", error=str(error)))
                continue
            yield idx, prompt

    def _keep(self, result: Result, copy: bool = False) -> None:
        self.finished.append(replace(result, finished=time.time()))
        if copy:
            self._warn(DUPLICATES)

    def _remember(self, key: bytes, result: Result) -> None:
        self.answers[key] = result
        if len(self.answers) > REMEMBERED_ANSWERS:
            self.answers.popitem(last=False)

    def _warn(self, text: str) -> None:
        """A warning of the job, written once."""
        if text not in self.noted:
            self.noted.add(text)
            self.store.warn(self.job.id, text)

    def _commit(self, all_of_it: bool = False) -> None:
        due = time.monotonic() - self.committed > COMMIT_S or len(self.finished) >= COMMIT_ROWS
        if self.finished and (due or all_of_it):
            self.store.save_results(self.job.id, self.finished, self.job.owner)
            self.finished, self.committed = [], time.monotonic()


def prompt_key(prompt: Prompt) -> bytes:
    """The same for equal prompts only."""
    return hashlib.blake2b(array("q", prompt.ids).tobytes(), digest_size=16).digest()


class Answering(Stretch):
    """Rows from the store, through the engine, back as results."""

    def __init__(
        self,
        job: Job,
        store: JobStore,
        stop: StopSignal,
        settings: GenerationSettings,
        engine: Engine,
        prompts: Prompts,
    ) -> None:
        super().__init__(job, store, stop, prompts)
        self.engine, self.settings = engine, settings
        self.ready: deque[_Work] = deque()
        self.running: list[_Work] = []
        self.by_key: dict[bytes, _Work] = {}
        self.wake = threading.Event()
        self.failures = 0  # rows in a row that the engine could not answer

    def run(self) -> None:
        """Until no row is left, or until told to stop; what is finished is committed either way."""
        try:
            while not self.stop.event.is_set():
                ahead = ROWS_AHEAD * self.engine.status().max_rows
                if len(self.ready) < ahead and self.after is not None:
                    self._read_window()
                self._submit(ahead)
                self._collect()
                self._commit()
                if not (self.ready or self.running) and self.after is None:
                    break
                if self.running and not any(work.handle and work.handle.done for work in self.running):
                    self.wake.wait(0.1)
                    self.wake.clear()
        finally:
            self._cancel()
        self._collect(stopping=True)
        self._commit(all_of_it=True)

    def _read_window(self) -> None:
        """The next rows without a result, longest prompt first: rows of like length then share a batch."""
        window = [work for idx, prompt in self._window() if (work := self._new(idx, prompt)) is not None]
        window.sort(key=lambda work: -len(work.prompt.ids))
        self.ready.extend(window)

    def _new(self, idx: int, prompt: Prompt) -> _Work | None:
        """Work for a row, or None where an equal prompt is on its way or answered (greedy only)."""
        if self.settings.temperature != 0:
            return _Work(idx, prompt, None)
        key = prompt_key(prompt)
        if (same := self.by_key.get(key)) is not None:
            same.copies.append((idx, prompt.truncated))
        elif (answer := self.answers.get(key)) is not None:
            self._keep(replace(answer, idx=idx, truncated=prompt.truncated, seconds=0.0), copy=True)
        else:
            self.by_key[key] = work = _Work(idx, prompt, key)
            return work
        return None

    def _submit(self, ahead: int) -> None:
        from .engine import Request

        while self.ready and len(self.running) < ahead:
            work = self.ready[0]
            settings = _row_settings(self.settings, work.idx)
            request = Request(work.prompt.ids, settings, "batch", work.prompt.prefix_length)
            handles = self.engine.submit_many([request], self.stop.event)
            if not handles:
                return  # told to stop while the queue was full
            work.handle = handles[0]
            self.running.append(self.ready.popleft())
            work.handle.add_done_callback(lambda _: self.wake.set())

    def _collect(self, stopping: bool = False) -> None:
        """Take over what the engine has finished."""
        running, self.running = self.running, []
        for work in running:
            handle = work.handle
            assert handle is not None
            if not handle.done:
                self.running.append(work)
                continue
            if work.key is not None:
                del self.by_key[work.key]
            if isinstance(handle.error, JobPaused):  # not this row's fault: it stays on the work list
                self._commit(all_of_it=True)
                raise handle.error
            if handle.state == "cancelled":
                if stopping or self.stop.event.is_set():
                    continue  # not finished: it stays on the work list
                self._commit(all_of_it=True)
                raise GLMError(
                    "The model was unloaded while the job ran.", "Resume the job to load it again."
                )
            result = _result(work.idx, handle, work.prompt.truncated)
            self._keep(result)
            self.failures = 0 if result.status == "ok" else self.failures + 1
            if self.failures >= FAILURES:
                self._commit(all_of_it=True)
                if getattr(self.engine, "remote", None) is not None:
                    raise JobPaused(
                        f"{self.failures} rows in a row failed, the last one with: {result.error}",
                        "See to the server, then resume the job and retry the failed rows.",
                    )
                raise GLMError(
                    f"{self.failures} rows in a row failed, the last one with: {result.error}",
                    "Load the model again, then resume the job and retry the failed rows.",
                )
            for idx, truncated in work.copies:
                self._keep(replace(result, idx=idx, truncated=truncated, seconds=0.0), copy=True)
            for note in handle.notes:
                self._warn(f"Some rows were {note}.")
            if work.key is not None and result.status == "ok":
                self._remember(work.key, result)

    def _cancel(self) -> None:
        """End what the engine still works on for this job, and wait until it has let go."""
        handles = [work.handle for work in self.running if work.handle is not None]
        for handle in handles:
            if not handle.done:
                handle.cancel("job stopped")
        deadline = time.monotonic() + 5
        for handle in handles:
            handle.wait(max(0.0, deadline - time.monotonic()))


def _row_settings(settings: GenerationSettings, idx: int) -> GenerationSettings:
    """A seed of its own for every row, so that an answer does not depend on the rows around it."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + idx)


def _result(idx: int, handle: Handle, truncated: bool) -> Result:
    waited = (handle.started or handle.submitted) - handle.submitted
    return Result(
        idx=idx,
        status="ok" if handle.state == "done" else "failed",
        prediction=handle.text if handle.state == "done" else "",
        truncated=truncated,
        seconds=round(max(0.0, handle.seconds - waited), 4),
        prompt_tokens=handle.n_prompt,
        new_tokens=handle.n_tokens,
        error=_remark(handle),
    )


def _remark(handle: Handle) -> str:
    if handle.state == "failed":
        return str(handle.error or "The engine gave no reason.")
    if handle.state == "cancelled":
        return "It was cancelled."
    return f"The answer was cut at {handle.n_tokens} tokens." if handle.finish_reason == "length" else ""


# ---- after the run


def export(
    store: JobStore,
    job_id: str,
    path: Path,
    format: Literal["csv", "xlsx", "jsonl", "parquet"],
    guard: bool = True,
) -> WriteReport:
    """The analyst's table with the answers beside it, and <file name>.manifest.json.

    Rows without an answer are there too, with status "not run". GLMError if a file cannot be written.
    """
    task = BatchTask.from_json(store.get(job_id).task)

    def answer(result: Result | None) -> tuple[str | float, ...]:
        if result is None:
            return ("", "not run", "", "", "")
        cut = "yes" if result.truncated else "no"
        return (result.prediction, result.status, cut, result.seconds, result.error)

    return write_results(store, job_id, path, format, export_columns(task), answer, guard)


def write_results(
    store: JobStore,
    job_id: str,
    path: Path,
    format: Literal["csv", "xlsx", "jsonl", "parquet"],
    columns: Sequence[str],
    answer: Callable[[Result | None], tuple[str | float, ...]],
    guard: bool = True,
) -> WriteReport:
    """Write a job's table with its manifest: the cells of each row, then those that `answer` makes of its result.

    columns   the names of all of them. GLMError if a file cannot be written.
    """
    from . import tables

    width = len(store.get(job_id).task["columns"])

    def rows() -> Iterator[tuple[str | float, ...]]:
        for _, cells, result in store.iter_results(job_id):
            yield (*(*cells, *[""] * (width - len(cells)))[:width], *answer(result))

    report = tables.write(Path(path), list(columns), rows(), format, guard=guard)
    text = json.dumps(manifest(store, job_id) | {"export_notes": report.notes}, ensure_ascii=False, indent=2)
    side = Path(path).with_name(f"{Path(path).name}.manifest.json")
    partial = side.with_name(f".{side.name}.part")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, side)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise GLMError(
            f"{side.name} could not be written: {error.strerror}.", "Free some disk space."
        ) from error
    return report


def export_columns(task: BatchTask) -> list[str]:
    """The columns of the exported table; a new name that the analyst's table has already gets a number."""
    return with_names(task.columns, (task.output_column.strip(), "status", "truncated", "seconds", "note"))


def with_names(columns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The columns of a table and new ones behind them; a name that is there already gets a number."""
    columns = list(columns)
    for name in names:
        free, number = name, 2
        while free in columns:
            free, number = f"{name} ({number})", number + 1
        columns.append(free)
    return columns


def manifest(store: JobStore, job_id: str) -> dict[str, Any]:
    """How the answers were made, to be kept with them; without paths and host name."""
    from . import cluster
    from .remote import shown

    job = store.get(job_id)
    task = cluster.described(job.task)
    task.pop("input_path", None)
    task["checkpoint"] = shown(task.get("checkpoint", ""))
    return {
        "job": job.id,
        "state": job.state,
        "task": task,
        "counts": asdict(store.counts(job_id)) | {"total": job.total},
        "started": _time(job.started),
        "finished": _time(job.finished),
        "active_seconds": round(job.active_seconds, 1),
        "attempts": job.attempt,
        "warnings": [cluster.anonymous(text, job.task) for text in job.warnings],
        "versions": versions(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": _threads(),
            "system": platform.system(),
        },
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _threads() -> int | None:
    torch = sys.modules.get("torch")  # where nothing was computed, nothing is to be imported for a number
    return int(torch.get_num_threads()) if torch is not None else None
