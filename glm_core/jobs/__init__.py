"""Jobs that outlive a click: durable rows and results, and the one thread that runs them.

records.py has what is handed out, database.py the tables, running.py the thread.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

from ..settings import Settings
from .database import JobStore
from .records import (
    Counts,
    Job,
    JobLost,
    JobPaused,
    Progress,
    Result,
    State,
    process_alive,
    this_process,
)
from .running import Runner, StopSignal, Supervisor

__all__ = [
    "Counts",
    "Job",
    "JobLost",
    "JobPaused",
    "JobStore",
    "Progress",
    "Result",
    "Runner",
    "State",
    "StopSignal",
    "Supervisor",
    "process_alive",
    "store",
    "supervisor",
    "this_process",
]

KINDS = (
    "batch",
    "classify",
    "finetune",
    "evaluate",
    "memory",
)  # every job kind is a module of this package with run(job, store, stop)
_lock = threading.Lock()
_stores: dict[Path, JobStore] = {}
_supervisors: dict[Path, Supervisor] = {}


def store(settings: Settings) -> JobStore:
    """The job store of this installation, one per process; GLMError where the database cannot be used."""
    with _lock:
        if settings.database not in _stores:
            _stores[settings.database] = JobStore(settings.database)
        return _stores[settings.database]


def supervisor(settings: Settings) -> Supervisor:
    """The supervisor of this process, running; the first call starts it."""
    jobs = store(settings)
    with _lock:
        if settings.database not in _supervisors:
            _supervisors[settings.database] = Supervisor(jobs, {kind: _runner(kind) for kind in KINDS})
    return _supervisors[settings.database].start()


def _runner(kind: str) -> Runner:
    def run(job: Job, jobs: JobStore, stop: StopSignal) -> None:
        # By name: a job kind is the module of the same word, which itself imports this one.
        importlib.import_module(f"..{kind}", __package__).run(job, jobs, stop)

    return run
