"""python -m glm_core batch: the job of the Batch page, with a progress bar, resumable."""

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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..settings import Settings
from .arguments import FORMATS
from .model import folder_of, own_model, settings_of
from .output import INTERRUPTED, PROGRAM, SOME_ROWS_FAILED, say

if TYPE_CHECKING:
    from ..batch import BatchTask
    from ..jobs import Job, JobStore, Progress, Runner

# What two tasks may differ in and still be the same work: where the file was, and what is installed.
NOT_THE_TASK = ("versions", "input_name", "input_path")
POLL_S = 0.1
PLAIN_LINES_S = 10.0  # between two lines of progress where there is no terminal


def batch(options: argparse.Namespace) -> int:
    """Answer every row of a table as a durable job and write the result; 3 if rows failed."""
    from .. import batch as work
    from .. import jobs, tables
    from ..tables.options import plural

    out = _writable(options.out, options.file)
    settings = Settings.read()
    settings.make_folders()
    store = jobs.store(settings)
    store.recover()  # a job whose process was killed is nobody's now, and can be taken over
    reading = tables.ReadOptions(
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
        on_bad_rows=options.on_bad_rows,
    )
    table = tables.open_table(options.file, reading)
    task = _task(options, table.info.columns, reading.to_json())
    job = None if options.restart else _earlier(store, task)
    if job is None:
        say(f"Reading {table.info.name} ...")
        job = work.start(store, task, table)
        say(f"Job {job.id}: {job.total:,} rows for {Path(task.checkpoint).name}.")
    elif job.state == "done" and job.failed and options.retry_failed:
        job = store.retry_failed(job.id)
        say(f"Job {job.id}: {job.message}")
    elif job.state == "done":
        say(f"Job {job.id} has answered these rows already; --restart would do it anew.")
    else:
        if job.state in ("paused", "failed", "cancelled"):
            job = store.resume(job.id)
        where = "is run by another process; this is how far it is" if job.state == "running" else "goes on"
        say(f"Job {job.id} {where}: {job.total - job.left:,} of {job.total:,} rows are done.")
    if job.state != "done":
        job, interrupted = _follow(store, job.id)
        if job.state != "done":
            return _not_done(job, interrupted, options.arguments)
    report = work.export(store, job.id, out, FORMATS[out.suffix.lower()], guard=not options.no_guard)
    for note in (*job.warnings, *report.notes):
        say(f"Note: {note}")
    shortened = f", {job.truncated:,} shortened to fit" if job.truncated else ""
    print(f"{out}: {plural(job.done, 'row')} answered, {job.failed:,} failed{shortened}")
    if job.failed:
        say("The columns status and note say which rows failed and why; --retry-failed tries them again.")
        return SOME_ROWS_FAILED
    return 0


def _writable(out: Path, source: Path) -> Path:
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


def _task(options: argparse.Namespace, columns: tuple[str, ...], read_options: dict[str, Any]) -> BatchTask:
    """The task, checked against table and checkpoint before anything is stored; GLMError where it fails."""
    from .. import batch as work
    from .. import checkpoints

    if options.column is not None and options.column not in columns:
        raise GLMError(
            f"{options.file.name} has no column {options.column!r}; it has {', '.join(columns)}.",
            "Choose one of these.",
        )
    template = options.prompt if options.column is None else work.reference(options.column, columns)
    folder = folder_of(options.model)
    info = checkpoints.inspect(folder)
    if info.problems:
        problems = " ".join(info.problems)
        raise GLMError(f"{folder} cannot be loaded. {problems}", "Repair the folder or choose another.")
    under = checkpoints.base_of(info, options.base) if info.needs_base else info
    settings = settings_of(options, {}, under.context)
    tokenizer = checkpoints.load_tokenizer(under.path, under.generation)
    work.Prompts(tokenizer, template, options.system, columns, under.context, settings.max_new_tokens)
    device = checkpoints.best_device() if options.device == "auto" else options.device
    auto = options.precision == "auto"
    return work.BatchTask(
        checkpoint=str(folder),
        checkpoint_fingerprint=checkpoints.fingerprint(folder, under.path if info.needs_base else None),
        precision=checkpoints.best_precision(under, device) if auto else options.precision,
        device=device,
        template=template,
        system=options.system,
        settings=settings,
        output_column=options.output_column,
        input_name=options.file.name,
        input_path=str(options.file.resolve()),
        input_sha256=work.file_sha256(options.file),
        columns=columns,
        read_options=read_options,
        limit_rows=options.limit,
        generation=under.generation,
        base=str(under.path) if info.needs_base else "",
        versions=work.versions(),
    )


def _earlier(store: JobStore, task: BatchTask) -> Job | None:
    """The newest job of the same task on the same rows; one whose file was not read to its end is none."""

    def key(values: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in values.items() if k not in NOT_THE_TASK}, sort_keys=True)

    wanted, jobs = key(task.to_json()), store.list(limit=100_000, kind="batch")
    same = [job for job in jobs if job.complete and key(job.task) == wanted]
    return max(same, key=lambda job: job.created, default=None)  # ids of one second are in no order


def _follow(store: JobStore, job_id: str) -> tuple[Job, bool]:
    from .. import batch as work

    return follow(store, job_id, "batch", work.run)


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
                    thread = threading.Thread(target=worker.run, args=(claimed,), daemon=True)
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


def _not_done(job: Job, interrupted: bool, arguments: Sequence[str]) -> int:
    again = [part for part in arguments if part not in ("--restart", "--retry-failed")]
    kept = f"{job.total - job.left:,} of {job.total:,} rows are done and kept."
    if interrupted:
        say(f"Paused: {kept} To go on: {PROGRAM} {shlex.join(again)}")
        return INTERRUPTED
    what = job.message or f"The job was {job.state} from elsewhere."
    raise GLMError(what, f"{kept} The same command goes on.")


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
