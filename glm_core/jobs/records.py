"""What the job store hands out: jobs, results, counts, progress; and whose process a job belongs to."""

from __future__ import annotations

import os
import platform
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import GLMError

State = Literal["preparing", "queued", "running", "done", "paused", "cancelled", "failed"]
BUSY_S = 30.0  # how long a writer waits for another process before it gives up


class JobPaused(GLMError):
    """Raised by a runner that cannot go on for now through no fault of its rows: the job is paused, not failed."""


class JobLost(GLMError):
    """The job was deleted, or belongs to another process by now: whoever gets this changes nothing more."""


@dataclass(frozen=True)
class Job:
    """One job as it stands in the database; `done` counts the answered rows, without the failed ones."""

    id: str
    kind: str
    title: str
    state: State
    task: dict[str, Any]
    total: int
    done: int
    failed: int
    truncated: int
    created: float
    started: float | None
    finished: float | None
    active_seconds: float
    attempt: int
    owner: str
    stop_request: str
    message: str
    warnings: tuple[str, ...]
    complete: bool  # all input rows are in the database
    run_started: float | None  # when the current (or last) stretch of running began
    user: str = ""  # whose job it is; "" for one made without a login

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


@dataclass(frozen=True)
class Result:
    """What became of one row; `error` says why it failed, or what to know about an answer that did not.

    details   what else a kind of job keeps of an answer, in a form of its own
    """

    idx: int
    status: Literal["ok", "failed"]
    prediction: str = ""
    truncated: bool = False
    seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str = ""
    finished: float = 0.0
    details: str = ""


@dataclass(frozen=True)
class Counts:
    done: int
    failed: int
    truncated: int
    left: int


@dataclass(frozen=True)
class Progress:
    """Where a job stands: rows per second over the last 30 s of running (over all of it once it stopped)."""

    done: int
    failed: int
    total: int
    rate: float
    eta_seconds: float | None
    state: State
    message: str


Cells = tuple[str, ...]
Pending = list[tuple[int, Cells]]
AnswerCounts = list[tuple[str, int]]
Page = list[tuple[int, Cells, Result | None]]
Jobs = list[Job]  # JobStore.list hides the builtin inside the class
Results = list[Result]


def this_process() -> str:
    """Host, process id and start time: a name that no later process gets, even with the same id."""
    import psutil

    return f"{platform.node()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def process_alive(owner: str) -> bool | None:
    """Whether the process of that name still runs; None if it is on another host."""
    import psutil

    host, pid, born = (["", "0", "0"] + owner.rsplit(":", 2))[-3:]
    if host != platform.node():
        return None if host else False
    try:
        process = psutil.Process(int(pid))
        # A few seconds of tolerance: the start time moves with corrections of the clock.
        same = abs(process.create_time() - float(born)) < 5
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def disk_problem(error: BaseException) -> str:
    """A sentence for a database that cannot be written just now; empty for any other error."""
    if not isinstance(error, sqlite3.OperationalError):
        return ""
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF  # the primary code, without the detail
    todo = "Nothing is lost: finished rows are stored, and the job goes on from there once you resume it."
    if code == sqlite3.SQLITE_FULL or "is full" in str(error):
        return f"The disk is full. Free some space. {todo}"
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return f"The disk with the workspace cannot be written ({error}). {todo}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"Another program kept the job database locked for {BUSY_S:.0f} seconds. {todo}"
    return ""
