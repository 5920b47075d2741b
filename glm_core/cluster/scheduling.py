"""Which worker gets which rows: small portions so that none holds the end, rows of a dead worker again, each row once.

Of a worker that dies all rows that it had are suspects. They are tried again in small groups, then one by one, each
with a worker to itself; a row whose worker has died three times fails alone.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .. import batch
from ..errors import GLMError
from ..jobs import Job, JobStore, Result, StopSignal
from . import NODES

DEATHS = 3  # of its worker, after which a row is not tried again
GROUP = 16  # rows that are tried together after their worker died once; after that one by one
AHEAD_S = 4.0  # of work that a worker has at hand
FEW, MOST = 16, 2048  # rows that a worker has at hand
LATE_S = 2.0  # of work left to another worker, from which on an idle one does part of it, too
WAIT_S = 0.2
RATE_S = 15.0  # over which the speed of a worker is taken
WINDOWS = 8  # of rows that are read at once; a table of equal rows has many
LOADS = 3  # workers in a row, for each one wanted, that may end while they load

Rows = list[tuple[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Opened:
    """A worker has loaded the model.

    node      where it is
    at_once   rows that it computes together
    facts     device, threads, and versions by package
    """

    worker: int
    node: str
    at_once: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A worker cannot do this job on its node: why, and the way out."""

    worker: int
    message: str
    todo: str = ""


@dataclass(frozen=True)
class Report:
    """What a worker has finished since the last report, and what it noticed."""

    worker: int
    results: Sequence[Result]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Died:
    """A worker is gone; `blameless` where its whole machine is, which no row of it did."""

    worker: int
    reason: str
    blameless: bool = False


Event = Opened | Refused | Report | Died


class Pool(Protocol):
    """Workers somewhere. All calls return at once but `wait`."""

    def start(self, worker: int) -> None:
        """Make a worker of this number; `wait` tells once it is Opened, Refused or Died."""

    def send(self, worker: int, rows: Rows) -> None:
        """Give a worker rows and ask for a report, which comes once it has finished some of all it was given."""

    def wait(self, seconds: float) -> list[Event]:
        """What has happened; an empty list where nothing did in time."""

    def drop(self, worker: int) -> None:
        """Forget a worker, and end it if it lives."""


@dataclass(eq=False)
class _Row:
    """A row that waits for its answer, and the rows that are the same question."""

    idx: int
    cells: tuple[str, ...]
    key: bytes | None
    length: int
    copies: list[int] = field(default_factory=list)
    deaths: int = 0
    holders: set[int] = field(default_factory=set)
    done: bool = False


@dataclass(eq=False)
class _Member:
    """A worker as the scheduler knows it."""

    number: int
    node: str = ""
    ready: bool = False
    asked: bool = False  # a report is on its way
    at_once: int = FEW
    rate: float = 0.0  # rows per second, of the last RATE_S or so
    since: float = 0.0  # when it was asked
    held: dict[int, _Row] = field(default_factory=dict)
    answered: float = 0.0
    worked_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Seconds of work that it has at hand; where its speed is unknown, those it has had already."""
        left = sum(not row.done for row in self.held.values())
        return left / self.rate if self.rate else (time.monotonic() - self.since if left else 0.0)

    def measure(self, rows: int) -> None:
        """Count what a report brought."""
        seconds = max(time.monotonic() - self.since, 1e-3)
        kept = math.exp(-seconds / RATE_S)
        self.answered, self.worked_s = self.answered * kept + rows, self.worked_s * kept + seconds
        self.rate = self.answered / self.worked_s


class Scheduler(batch.Stretch):
    """One stretch of a job on a pool of workers."""

    def __init__(
        self,
        job: Job,
        store: JobStore,
        stop: StopSignal,
        pool: Pool,
        workers: int,
        used: Sequence[int],
        once: bool,
        versions: dict[str, str] | None = None,
    ) -> None:
        """
        used       which columns of a row the question takes; the others stay here
        once       whether the same question always has the same answer
        versions   of this machine's packages, to compare those of the nodes with
        """
        super().__init__(job, store, stop, None)
        self.pool, self.wanted, self.used, self.once = pool, workers, frozenset(used), once
        self.versions = versions or {}
        self.queue: deque[_Row] = deque()
        self.suspects: tuple[deque[_Row], deque[_Row]] = (deque(), deque())  # in groups, and one by one
        self.by_key: dict[bytes, _Row] = {}
        self.members: dict[int, _Member] = {}
        self.open = 0  # rows read and not finished
        self.numbers = 0
        self.deaths = 0  # in a row, without a finished row between
        self.unopened = 0  # in a row
        self.started = False

    def run(self) -> None:
        """Until no row is left, or until told to stop; what is finished is committed either way."""
        try:
            for _ in range(self.wanted):
                self._start()
            while not self.stop.event.is_set():
                self._read()
                if not self.open and self.after is None:
                    break
                self._deal()
                for event in self.pool.wait(WAIT_S):
                    self._take(event)
                self._commit()
        finally:
            for number in list(self.members):
                self.pool.drop(number)
        self._commit(all_of_it=True)

    # ---- rows

    def _read(self) -> None:
        """Rows without a result, as many as the workers will soon need, the longest of a window first."""
        need = sum(self._target(one) for one in self.members.values() if one.ready)
        for _ in range(WINDOWS):
            if self.after is None or len(self.queue) >= max(need, FEW) or self.stop.event.is_set():
                return
            window = [row for idx, cells in self._rows() if (row := self._new(idx, cells)) is not None]
            window.sort(key=lambda row: -row.length)  # rows of like length then share a batch
            self.queue.extend(window)

    def _new(self, idx: int, cells: Sequence[str]) -> _Row | None:
        """A row to be answered, or None where the same question is on its way or answered."""
        taken = tuple(cell if place in self.used else "" for place, cell in enumerate(cells))
        length = sum(map(len, taken))
        if not self.once:
            self.open += 1
            return _Row(idx, taken, None, length)
        key = hashlib.blake2b(repr(taken).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if (same := self.by_key.get(key)) is not None:
            same.copies.append(idx)
            return None
        if (answer := self.answers.get(key)) is not None:
            self._keep(replace(answer, idx=idx, seconds=0.0), copy=True)
            return None
        self.open += 1
        self.by_key[key] = row = _Row(idx, taken, key, length)
        return row

    def _finish(self, row: _Row, result: Result) -> None:
        """Keep the answer to a row, and to those that are the same question."""
        row.done = True
        self.open -= 1
        if row.key is not None:
            del self.by_key[row.key]
        self._keep(result)
        for idx in row.copies:
            self._keep(replace(result, idx=idx, seconds=0.0), copy=True)
        if row.key is not None and result.status == "ok":
            self._remember(row.key, result)

    # ---- dealing

    def _deal(self) -> None:
        """Give every worker that has reported what it needs, and ask for its next report."""
        for member in self.members.values():
            if not member.ready or member.asked:
                continue
            rows = self._portion(member)
            for row in rows:
                row.holders.add(member.number)
                member.held[row.idx] = row
            if member.held:
                member.asked, member.since = True, time.monotonic()
                self.pool.send(member.number, [(row.idx, row.cells) for row in rows])

    def _portion(self, member: _Member) -> list[_Row]:
        """The rows to give to a worker now."""
        if not member.held:
            for waiting, size in zip(self.suspects, (GROUP, 1), strict=True):
                if waiting:
                    return [waiting.popleft() for _ in range(min(size, len(waiting)))]
        elif any(row.deaths for row in member.held.values()):
            return []  # it has suspects, and these are tried by themselves
        room = self._target(member) - len(member.held)
        if self.after is None:  # the rest is shared
            ready = sum(one.ready for one in self.members.values())
            room = min(room, -(-len(self.queue) // ready))
        if self.queue:
            return [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        return [] if member.held or self.after is not None else self._late(member)

    def _target(self, member: _Member) -> int:
        """How many rows a worker should have at hand: some seconds of work, and enough to compute together."""
        return min(MOST, max(member.at_once * 3 // 2, int(member.rate * AHEAD_S)))

    def _late(self, member: _Member) -> list[_Row]:
        """Rows of the worker that would be the last to end, for one that has nothing left: the first answer counts."""
        last = max((one for one in self.members.values() if one.ready), key=lambda one: one.left_s)
        if last is member or last.left_s < LATE_S:
            return []
        alone = [
            row for row in last.held.values() if not row.done and not row.deaths and len(row.holders) == 1
        ]
        return alone[-max(1, len(alone) // 2) :][-self._target(member) :] if alone else []

    # ---- what happens

    def _take(self, event: Event) -> None:
        member = self.members.get(event.worker)
        if member is None:  # it was dropped a moment ago
            return
        if isinstance(event, Opened):
            self._opened(member, event)
        elif isinstance(event, Report):
            self._reported(member, event)
        elif isinstance(event, Refused):
            self._remove(member)
            if not self.members:
                raise GLMError(event.message, event.todo)
            self._warn(f"There is a worker less than asked for. {event.message}")
        else:
            self._died(member, event)

    def _start(self) -> None:
        self.numbers += 1
        self.members[self.numbers] = _Member(self.numbers)
        self.pool.start(self.numbers)

    def _remove(self, member: _Member) -> None:
        del self.members[member.number]
        self.pool.drop(member.number)

    def _opened(self, member: _Member, event: Opened) -> None:
        member.ready, member.node, self.unopened = True, event.node, 0
        member.at_once = max(1, event.at_once)
        self._note(event)
        self._say()

    def _say(self) -> None:
        ready = sum(one.ready for one in self.members.values())
        if ready:
            text = f"Workers at work: {ready} of {self.wanted}"
            self.store.update(self.job.id, text, restart_clock=not self.started)
            self.started = True

    def _note(self, event: Opened) -> None:
        """Write down which node works, with what; a warning where its versions are others than here."""
        nodes = list(self.store.get(self.job.id).task.get(NODES) or ())
        new = {"node": event.node, **event.facts}
        if new not in nodes:
            self.store.amend(self.job.id, {NODES: [*nodes, new]})
        found = event.facts.get("versions", {})
        other = [
            f"{name} {found.get(name, '–')} ({version} here)"
            for name, version in self.versions.items()
            if found.get(name) != version
        ]
        if other:
            self._warn(f"The node {event.node} has other versions than this machine: {', '.join(other)}.")

    def _reported(self, member: _Member, event: Report) -> None:
        member.measure(len(event.results))
        member.asked = False
        for result in event.results:
            row = member.held.pop(result.idx, None)
            if row is None:
                continue
            row.holders.discard(member.number)
            if not row.done:  # else another worker was faster
                self._finish(row, result)
                self.deaths = 0
        for text in event.warnings:
            self._warn(text)

    def _died(self, member: _Member, event: Died) -> None:
        self._remove(member)
        held = [row for row in member.held.values() if not row.done]
        for row in held:
            row.holders.discard(member.number)
            row.deaths += not event.blameless
        for row in (one for one in held if not one.holders):
            if row.deaths >= DEATHS:
                reason = (
                    f"Its worker ended {DEATHS} times while it had this row, the last time so: {event.reason}"
                )
                self._finish(row, Result(row.idx, "failed", error=reason))
                self.deaths = 0
            elif row.deaths:
                self.suspects[row.deaths - 1].append(row)
            else:
                self.queue.appendleft(row)
        if not member.ready:
            self.unopened += 1
            if self.unopened < LOADS * self.wanted:
                self._start()
            elif not self.members:
                raise GLMError(
                    f"No worker could load the model. The last one ended so: {event.reason}",
                    "Give each worker more memory, choose a smaller model or a lower precision, then resume.",
                )
            return
        self._warn(
            f"A worker on {member.node} ended and was replaced; its rows were done again. {event.reason}"
        )
        self.deaths += 1
        if self.deaths > 20 + DEATHS * self.wanted:
            raise GLMError(
                f"{self.deaths} workers ended one after another without finishing a row. The last one ended so: "
                f"{event.reason}",
                "Give each worker more memory, or look into the logs of Ray on its node, then resume.",
            )
        self._start()
        self._say()
