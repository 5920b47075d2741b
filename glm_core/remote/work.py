"""A job whose rows a server answers: its own connection, so that the model in memory stays as it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import GLMError
from ..jobs import Job, JobPaused, JobStore, StopSignal
from .client import Refused
from .engine import RemoteEngine, connect
from .remotes import Remote, find

if TYPE_CHECKING:
    from ..engine import Engine


class RemoteTask(Protocol):
    """What a job says about the server that is to do its work."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def checkpoint_fingerprint(self) -> str: ...
    @property
    def remote(self) -> Mapping[str, Any]: ...


def refuse_where_changed(task: RemoteTask) -> Remote:
    """The server of a task; GLMError where the name means another address or model by now, or none."""
    kept = task.remote
    remote = find(task.checkpoint, str(kept.get("key_env") or "") if not kept.get("name") else "")
    if remote.fingerprint != task.checkpoint_fingerprint:
        raise GLMError(
            f"The remote engine {remote.label} is not the one this job was started with: it was"
            f" {kept.get('model', '')} at {kept.get('url', '')}, now it is {remote.model} at {remote.url}.",
            "Put the old address and model back and resume, or start a new job.",
        )
    return remote


def with_remote(
    job: Job, store: JobStore, stop: StopSignal, task: RemoteTask, work: Callable[[Engine], None]
) -> None:
    """Do `work` with a connection to the task's server; JobPaused where the server is gone.

    GLMError where the name means another server by now.
    """
    remote = refuse_where_changed(task)

    def told(text: str) -> None:
        with suppress(GLMError, sqlite3.Error):  # trouble with the server is said, whatever the disk does
            store.update(job.id, text)

    store.update(job.id, f"Asking {remote.label}")
    try:
        engine: RemoteEngine = connect(remote, told)
    except Refused as error:
        raise JobPaused(error.message, "Nothing is lost: start the server again, then resume.") from error
    try:
        kept = str(task.remote.get("reported_model") or "")
        if kept and engine.served.reported != kept:
            store.warn(
                job.id,
                f"Part of the rows ran on another model under the same name: {engine.served.reported or 'unknown'}"
                f" instead of {kept}.",
            )
        engine.label_way = str(task.remote.get("labels") or "")
        store.update(job.id, "", restart_clock=True)
        work(engine)
    finally:
        engine.close()
