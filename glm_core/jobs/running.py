"""The one thread of a process that runs queued jobs, and the signal that ends a run."""

from __future__ import annotations

import atexit
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

from ..errors import GLMError
from .database import JobStore
from .records import Job, JobLost, JobPaused, disk_problem, this_process

Reason = Literal["", "pause", "cancel", "exit"]


class StopSignal:
    """Tells a runner to end: `event` for what waits, `reason()` for why; watches the job while entered."""

    def __init__(self, store: JobStore, job: Job, poll_s: float = 0.2) -> None:
        self.event = threading.Event()
        self._store, self._job, self._poll_s = store, job, poll_s
        self._reason: Reason = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="glm-job-watch", daemon=True)

    def reason(self) -> Reason:
        """Why to stop: "pause" or "cancel" as asked for, "exit" when the process ends; empty to go on."""
        return self._reason

    def stop(self, reason: Reason) -> None:
        """Ask the runner to end; the first reason counts."""
        if not self.event.is_set():
            self._reason = reason
            self.event.set()

    def __enter__(self) -> StopSignal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        beat = 0.0
        while not self._over.wait(self._poll_s):
            try:
                job = self._store.get(self._job.id)
                if job.owner != self._job.owner:
                    self.stop("exit")
                elif job.stop_request in ("pause", "cancel"):
                    self.stop("pause" if job.stop_request == "pause" else "cancel")
                if time.monotonic() - beat > 5:
                    beat = time.monotonic()
                    self._store.beat(self._job.id, self._job.owner)
            except GLMError:  # deleted
                self.stop("cancel")
            except sqlite3.Error:  # the runner meets the same disk, and reports it
                pass


Runner = Callable[[Job, JobStore, StopSignal], None]


class Supervisor:
    """One thread that runs queued jobs one after the other, and takes over those of dead processes."""

    def __init__(self, store: JobStore, runners: Mapping[str, Runner], poll_s: float = 0.5) -> None:
        self.store, self.runners, self.poll_s = store, dict(runners), poll_s
        self.owner = this_process()
        self.current: Job | None = None
        self.problem = ""  # why no job can run or be finished just now, for the status strip
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._signal: StopSignal | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Supervisor:
        """Start the thread if it does not run yet."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._stopping.clear()
                self._thread = threading.Thread(target=self._loop, name="glm-jobs", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
        return self

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; the job it runs is queued again and goes on at the next start."""
        self._stopping.set()
        with self._lock:
            signal, thread = self._signal, self._thread
        if signal is not None:
            signal.stop("exit")
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _loop(self) -> None:
        recovered = float("-inf")
        while not self._stopping.is_set():
            try:
                if time.monotonic() - recovered > 5:
                    self.store.recover()
                    recovered = time.monotonic()
                job = self.store.claim(tuple(self.runners), self.owner)
                self.problem = ""
                if job is not None:
                    self.run(job)
                    continue
            except Exception as error:  # this thread must live: without it no job would ever run again
                self.problem = disk_problem(error) or self._log("supervisor", error)
            self._stopping.wait(self.poll_s)

    def run(self, job: Job) -> None:
        """Run one claimed job to its end in this thread; nothing it does raises."""
        state, message = "done", ""
        with StopSignal(self.store, job) as signal:
            with self._lock:
                self.current, self._signal = job, signal
            if self._stopping.is_set():
                signal.stop("exit")
            try:
                self.runners[job.kind](job, self.store, signal)
                left = self.store.counts(job.id).left if self.store.pending(job.id, 1) else 0
                if signal.reason() and (left or not job.total):
                    state = {"pause": "paused", "cancel": "cancelled"}.get(signal.reason(), "queued")
                elif left:
                    state, message = "failed", f"internal error: the runner ended with {left:,} rows left."
            except JobLost:
                state = ""
            except JobPaused as error:
                state, message = "paused", str(error)
            except GLMError as error:
                state, message = "failed", str(error)
            except Exception as error:
                message = disk_problem(error)
                state = "paused" if message else "failed"
                message = message or self._log(job.id, error)
        if state:
            self._release(job, state, message, signal.reason())
        with self._lock:
            self.current = self._signal = None

    def _release(self, job: Job, state: str, message: str, asked: str) -> None:
        while True:
            try:
                self.store.release(job.id, job.owner, state, message, asked)
                self.problem = ""
                return
            except sqlite3.Error as error:
                # A full disk cannot store this message either. Until it can, the status strip says it; should
                # the process end first, the next start finds a dead owner and goes on with the rows left.
                self.problem = message or disk_problem(error) or str(error)
                if self._stopping.wait(2.0):
                    return

    def _log(self, name: str, error: BaseException) -> str:
        folder = self.store.path.parent / "logs"
        with suppress(OSError):
            folder.mkdir(exist_ok=True, mode=0o700)
            with (folder / f"{name}.log").open("a", encoding="utf-8") as file:
                file.write(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n"
                )
        return (
            f"internal error: {type(error).__name__}: {error} (details in logs/{name}.log of the workspace)"
        )
