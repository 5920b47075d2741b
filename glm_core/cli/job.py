"""A durable job from the shell: begun, taken up again or watched, with a line of progress, to its end."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..settings import Settings
from .arguments import FORMATS
from .model import own_model
from .output import PROGRAM, say

if TYPE_CHECKING:
    from ..jobs import Job, JobStore, Progress, Runner
    from ..tables import ReadOptions

# What two tasks may differ in and still be the same work: where the file was, and what is installed.
# A server's record has the time it was asked; its address and model are in the fingerprint.
WHERE = ("engine", "address", "workers", "cpus_per_worker")  # rows are done: here, or on which cluster
NOT_THE_TASK = ("versions", "input_name", "input_path", "remote", *WHERE, "nodes")
POLL_S = 0.1
PLAIN_LINES_S = 10.0  # between two lines of progress where there is no terminal


def opened_store(owner: str = "") -> JobStore:
    """The jobs of this workspace; one whose process was killed is nobody's now, and can be taken over.

    owner   whose new jobs are, where several people share the workspace
    """
    from .. import access, jobs

    settings = Settings.read()
    settings.make_folders()
    store = jobs.store(settings)
    store.recover()
    if not owner:
        return store
    users = access.users_of(settings).all()
    if users and owner not in users and "@" not in owner:
        raise GLMError(f"There is no user {owner!r}.", f"There are: {', '.join(users)}.")
    return store.seen_by(access.Person(owner, "admin"))


def reading(options: argparse.Namespace) -> ReadOptions:
    """How the table is to be read."""
    from ..tables import ReadOptions

    return ReadOptions(
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
        on_bad_rows=options.on_bad_rows,
    )


def writable(out: Path, source: Path) -> Path:
    """Where the result goes; GLMError now rather than after hours, where it cannot be written there."""
    out = out.expanduser()
    if out.suffix.lower() not in FORMATS:
        raise GLMError(f"{out.name} is no format to write.", f"End the name with {', '.join(FORMATS)}.")
    if not out.parent.is_dir():
        raise GLMError(f"There is no folder {out.parent}.", "Create it, or choose another for --out.")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise GLMError(f"{out} cannot be written.", "Choose another place for --out.")
    if out.exists() and source.exists() and out.samefile(source):
        raise GLMError(f"{out.name} is the table itself.", "Choose another name for --out.")
    return out


def carried_out(
    options: argparse.Namespace,
    store: JobStore,
    kind: str,
    task: Mapping[str, Any],
    begin: Callable[[], Job],
    run: Runner,
    done: str,
    apart: Collection[str] = NOT_THE_TASK,
) -> Job | None:
    """The job of a task, done: a new one, or the newest of the same task gone on with; None where Ctrl-C paused it.

    task    as JSON types, for comparing with those of earlier jobs, all but what `apart` names
    begin   makes the job
    done    what a finished job has done with the rows: "answered"
    GLMError where the job failed.
    """
    job = None if options.restart else _earlier(store, kind, task, apart)
    if job is None:
        job = begin()
    elif job.state == "done" and job.failed and getattr(options, "retry_failed", False):
        job = store.retry_failed(job.id)
        say(f"Job {job.id}: {job.message}")
    elif job.state == "done":
        say(f"Job {job.id} has {done} these rows already; --restart would do it anew.")
    else:
        if job.state != "running":
            store.amend(job.id, {name: task[name] for name in WHERE if name in task})
        if job.state in ("paused", "failed", "cancelled"):
            job = store.resume(job.id)
        where = "is run by another process; this is how far it is" if job.state == "running" else "goes on"
        say(f"Job {job.id} {where}: {job.total - job.left:,} of {job.total:,} rows are done.")
    if job.state == "done":
        return job
    job, interrupted = follow(store, job.id, kind, run)
    if job.state == "done":
        return job
    again = [part for part in options.arguments if part not in ("--restart", "--retry-failed")]
    kept = f"{job.total - job.left:,} of {job.total:,} rows are done and kept."
    if interrupted:
        say(f"Paused: {kept} To go on: {PROGRAM} {shlex.join(again)}")
        return None
    what = job.message or f"The job was {job.state} from elsewhere."
    raise GLMError(what, f"{kept} The same command goes on.")


def _earlier(store: JobStore, kind: str, task: Mapping[str, Any], apart: Collection[str]) -> Job | None:
    """The newest job of the same task on the same rows; one whose file was not read to its end is none."""

    def key(values: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in values.items() if k not in apart}, sort_keys=True)

    wanted = key(task)
    same = [
        job
        for job in store.list(100_000, kind)
        if job.complete and job.user == store.person.name and key(job.task) == wanted
    ]
    return max(same, key=lambda job: job.created, default=None)  # ids of one second are in no order


def follow(store: JobStore, job_id: str, kind: str, run: Runner) -> tuple[Job, bool]:
    """Run a job here, or watch the process that does, until it stops; and whether Ctrl-C stopped it."""
    from .. import jobs

    worker = jobs.Supervisor(store, {kind: run})  # not started: it runs this one job and no other
    thread: threading.Thread | None = None
    meter, pausing = _Meter(), False
    with own_model():
        while True:
            try:
                alive = thread is not None and thread.is_alive()
                job = store.get(job_id)
                if not alive and (pausing or job.state not in ("queued", "running")):
                    meter.show(store.progress(job_id), last=True)
                    return job, pausing
                if not alive and (claimed := store.claim((kind,), worker.owner, job_id)):
                    thread = threading.Thread(
                        target=worker.run, args=(claimed,), name="glm-job-run", daemon=True
                    )
                    thread.start()
                if worker.problem:  # such as a full disk, which cannot even store that the job has stopped
                    worker.stop()
                    raise GLMError(worker.problem, "Run the same command again to go on.")
                meter.show(store.progress(job_id))
                if thread is None:  # watching: should that process die, the job is ours
                    store.recover()
                time.sleep(POLL_S if thread else 10 * POLL_S)
            except KeyboardInterrupt:
                meter.end()
                if pausing or thread is None:  # a second time; or somebody else's job, which goes on
                    raise
                pausing = True
                say("Pausing: the rows being answered are given up, the finished ones are kept.")
                with suppress(GLMError):  # it was done a moment ago
                    store.request_pause(job_id)


class _Meter:
    """Progress of a job: one line that changes on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.shown = -math.inf
        self.width = 0

    def show(self, progress: Progress, last: bool = False) -> None:
        """Print where the job stands if it is time to."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else PLAIN_LINES_S) and not last:
            return
        self.shown = now
        line = _progress_line(progress)
        if self.terminal:
            room = max(20, shutil.get_terminal_size().columns - 1)
            sys.stderr.write(f"\r{line[:room].ljust(min(self.width, room))}")
            sys.stderr.flush()
            self.width = len(line)
        else:
            say(line)
        if last:
            self.end()

    def end(self) -> None:
        """Leave the line that changes."""
        if self.terminal and self.width:
            print(file=sys.stderr)
        self.width = 0


def _progress_line(progress: Progress) -> str:
    ended = progress.done + progress.failed
    share = ended / max(progress.total, 1)
    parts = [f"[{'#' * int(share * 20):.<20}] {ended:,} of {progress.total:,} rows ({share:.0%})"]
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.rate:
        parts.append(f"{progress.rate:.1f} rows/s")
        if progress.eta_seconds is not None:
            parts.append(f"about {_duration(progress.eta_seconds)} left")
    elif progress.state == "running" and progress.message:
        parts.append(progress.message)
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Time as a person says it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
