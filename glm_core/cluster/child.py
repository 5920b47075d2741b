"""The process that speaks to a Ray cluster for one job, started by `cluster.run`, which holds the other end of its stdin.

The end of stdin, which is also how the death of that process shows, stops it. What became of the job is one line of
JSON on stdout; everything that Ray says goes to stderr.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from ..errors import GLMError
from ..jobs import JobLost, JobStore, StopSignal
from ..jobs.records import disk_problem


def main(database: str, job_id: str) -> None:
    """Do the open rows of a job, and say how it went."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    said = _work(Path(database), job_id)
    with answer:
        json.dump(said, answer)


def _work(database: Path, job_id: str) -> dict[str, Any]:
    from .pool import work

    try:
        store = JobStore(database)
        job = store.get(job_id)
        stop = StopSignal(store, job)  # not entered: who started this process watches the job
        threading.Thread(target=_watch, args=(stop,), name="glm-cluster-end", daemon=True).start()
        work(job, store, stop)
    except JobLost as error:
        return {"state": "lost", "message": error.message}
    except GLMError as error:
        return {"state": "failed", "message": error.message, "todo": error.todo}
    except Exception as error:
        if isinstance(error, sqlite3.OperationalError) and disk_problem(error):
            code = getattr(error, "sqlite_errorcode", 0) or 0
            return {"state": "disk", "message": str(error), "code": code}
        traceback.print_exc()
        reason = f"internal error: {type(error).__name__}: {error}"
        return {"state": "failed", "message": reason, "todo": ""}
    return {"state": "done"}


def _watch(stop: StopSignal) -> None:
    os.read(0, 1)
    stop.stop("exit")


if __name__ == "__main__":
    main(*sys.argv[1:3])
