"""The rows of a job on a Ray cluster: one engine per GPU or share of processors, the results in the same job store.

scheduling.py deals out the rows and knows nothing of Ray, pool.py is Ray, worker.py is what runs on a node.
Ray ends a process that loses its cluster, so child.py, a process of its own, speaks to it: a server or a notebook
outlives any cluster.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from ..errors import GLMError
from ..jobs import Job, JobLost, JobStore, StopSignal
from ..settings import REPOSITORY

RAY = "ray"  # the engine of a task that runs on a cluster
WHERE = ("engine", "address", "workers", "cpus_per_worker")  # of a task: where it runs, not what it computes
NODES = "nodes"  # of a stored task: the nodes it ran on
PATIENCE_S = 20.0  # for the process to take its workers down


def problem() -> GLMError | None:
    """Why nothing can run on a cluster from here; None where it can. Imports nothing."""
    if importlib.util.find_spec("ray") is not None:
        return None
    return GLMError("Ray is not installed.", "pip install -r requirements-ray.txt")


def check(checkpoint: str, address: str, workers: int, cpus_per_worker: float) -> None:
    """GLMError where Ray is missing, the model is on a server, or for the first value that cannot be."""
    from ..remote import is_remote

    if (missing := problem()) is not None:
        raise missing
    if is_remote(checkpoint):
        raise GLMError(
            "A model on a server needs no cluster.", "Run the job on this machine; it only waits for answers."
        )
    _, _, port = address.rpartition(":")
    if address and address != "auto" and not (":" in address and port.isdigit() and 0 < int(port) < 65536):
        raise GLMError(
            f"{address!r} is no address of a Ray cluster.",
            "Write host:port of its head, such as 10.0.0.5:6379, or leave it empty for this machine.",
        )
    if workers < 0:
        raise GLMError(f"There cannot be {workers} workers.", "Choose 1 or more, or 0 for as many as fit.")
    if not 0 <= cpus_per_worker < 10_000:
        raise GLMError(
            f"A worker cannot have {cpus_per_worker:g} CPUs.", "Choose 1 or more, or 0 for an equal share."
        )


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Do every row of a job that has no result yet on the cluster its task names; GLMError where that fails."""
    if (missing := problem()) is not None:
        raise missing
    if not store.pending(job.id, 1):
        return
    logs = store.path.parent / "logs"
    try:
        logs.mkdir(exist_ok=True, mode=0o700)
        with (logs / f"{job.id}-ray.log").open("ab") as log:
            process = _process(job, store, log)
    except OSError as error:
        raise GLMError(
            f"The process that speaks to the cluster did not start: {error.strerror or error}.",
            "Free some disk space or memory, then resume.",
        ) from error
    assert process.stdout is not None and process.stdin is not None
    threading.Thread(target=_stopper, args=(process, stop), name="glm-cluster-stop", daemon=True).start()
    try:
        said = process.stdout.read()  # until it ends
    finally:
        _end(process)
    _take_over(said, process.returncode, f"{job.id}-ray.log")
    with suppress(OSError):
        (logs / f"{job.id}-ray.log").unlink()  # nobody needs it after all went well


def described(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task for a manifest: without the address of the cluster and the names of its nodes."""
    kept = {key: value for key, value in task.items() if key != "address"}
    if kept.get(NODES):
        kept[NODES] = [{k: v for k, v in one.items() if k != "node"} for one in kept[NODES]]
    return kept


def anonymous(text: str, task: Mapping[str, Any]) -> str:
    """A text of a job without the names of its nodes."""
    for number, one in enumerate(task.get(NODES) or (), 1):
        text = text.replace(str(one.get("node")), f"node {number}")
    return text


def _process(job: Job, store: JobStore, log: IO[bytes]) -> subprocess.Popen[bytes]:
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "glm_core.cluster.child", str(store.path), job.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)},
        # Ctrl-C in the terminal is for the command, which then pauses the job.
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _stopper(process: subprocess.Popen[bytes], stop: StopSignal) -> None:
    """Tell the process once the job is to stop."""
    while process.poll() is None:
        if stop.event.wait(0.2):
            _ask(process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
                return
            process.kill()
            return


def _ask(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):  # it has ended
        process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """No process is left when a run ends, for whatever reason it does."""
    _ask(process)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _take_over(said: bytes, code: int, log: str) -> None:
    """Raise here what the process could not do."""
    try:
        found = json.loads(said)
    except ValueError:
        found = {}
    kind = found.get("state")
    if kind == "done":
        return
    if kind == "lost":
        raise JobLost(str(found["message"]))
    if kind == "disk":
        error = sqlite3.OperationalError(str(found["message"]))
        error.sqlite_errorcode = int(found["code"])
        raise error
    if kind == "failed":
        raise GLMError(str(found["message"]), str(found["todo"]))
    ended = f"code {code}"
    if code < 0:
        with suppress(ValueError):
            ended = signal.Signals(-code).name
    raise GLMError(
        f"The process that speaks to the cluster ended with {ended}; logs/{log} of the workspace says more.",
        "Resume the job: the finished rows are kept.",
    )
