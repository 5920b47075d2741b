"""What each person of a shared workbench has in it: how much, and taking all of it away."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .access.people import VISITOR
from .chat import ConversationStore
from .errors import GLMError
from .jobs import JobStore
from .review import Reviews
from .settings import Settings
from .votes import Trials

STOP_S = 10.0  # how long to wait for a job to notice that it was cancelled
VISIT_S = 86400.0  # after which the things of a visitor of another process are cleared away


@dataclass(frozen=True)
class Belongings:
    """What one person has; `rows` are input rows of jobs, `file_bytes` uploads and exports."""

    name: str
    jobs: int = 0
    rows: int = 0
    conversations: int = 0
    trials: int = 0
    file_bytes: int = 0


def folder_name(name: str) -> str:
    """The name of a person's own folder of uploads; "" for what belongs to nobody."""
    from .access import Person

    return Person(name, "user").folder if name else ""


def uploads_of(settings: Settings, folder: str) -> Path:
    """Where the uploads of a person are, by `Person.folder`; the common folder where there is no login."""
    return settings.uploads / folder if folder else settings.uploads


def everything(settings: Settings, store: JobStore, names: Iterable[str] = ()) -> list[Belongings]:
    """What everybody has, who has the most files first; `names` are listed even with nothing."""
    found = {name: Belongings(name) for name in names}
    db = store.connection()
    Trials(store)  # the table of trials exists
    ConversationStore(store.path).close()

    def add(name: str, **more: int) -> None:
        now = found.setdefault(name, Belongings(name))
        found[name] = replace(now, **{key: getattr(now, key) + value for key, value in more.items()})

    owner: dict[str, str] = {}
    for row in db.execute("SELECT id, user, total FROM job WHERE state != 'deleting'"):
        owner[row["id"]] = row["user"]
        add(row["user"], jobs=1, rows=row["total"])
    for row in db.execute("SELECT user, COUNT(*) AS n FROM conversation GROUP BY user"):
        add(row["user"], conversations=row["n"])
    for row in db.execute("SELECT id, user FROM trial"):
        owner[f"votes-{row['id']}"] = row["user"]
        add(row["user"], trials=1)
    for file in _files(settings.exports):
        stem = file.name.rpartition(".")[0]
        add(next((name for key, name in owner.items() if stem.startswith(key)), ""), file_bytes=_size(file))
    folders = {folder_name(name): name for name in found if name}
    for file in _files(settings.uploads):
        inside = file.relative_to(settings.uploads).parts
        add(folders.get(inside[0], "") if len(inside) > 1 else "", file_bytes=_size(file))
    return sorted(found.values(), key=lambda one: (-one.file_bytes, -one.rows, one.name))


def forget(settings: Settings, store: JobStore, name: str) -> None:
    """Delete everything a person has, running jobs included; GLMError where a job does not end."""
    if not name:
        raise GLMError("What belongs to nobody is not deleted as a whole.", "Delete its jobs one by one.")
    conversations = ConversationStore(store.path)
    trials, reviews = Trials(store), Reviews(store)
    db = store.connection()
    for row in db.execute("SELECT id FROM conversation WHERE user = ?", (name,)).fetchall():
        conversations.delete(row["id"])
    conversations.close()
    for row in db.execute("SELECT id FROM trial WHERE user = ?", (name,)).fetchall():
        trials.delete(row["id"])
        _remove(settings.exports.glob(f"votes-{row['id']}*"))
    for row in db.execute("SELECT id FROM job WHERE user = ?", (name,)).fetchall():
        _end(store, row["id"])
        store.delete(row["id"])
        reviews.forget(row["id"])
        _remove(settings.exports.glob(f"{row['id']}-*"))
    folder = folder_name(name)
    shutil.rmtree(uploads_of(settings, folder), ignore_errors=True)
    (settings.workspace / f"preferences-{folder}.json").unlink(missing_ok=True)


def forget_visitors(settings: Settings, store: JobStore, older_than_s: float = VISIT_S) -> int:
    """Delete what visitors of the demonstration left behind, as after a crash; how many visitors."""
    ConversationStore(store.path).close()
    query = (
        "SELECT user, MAX(created) AS last FROM (SELECT user, created FROM job UNION ALL "
        "SELECT user, updated FROM conversation) WHERE user LIKE ? GROUP BY user HAVING last < ?"
    )
    before = time.time() - older_than_s
    gone = [row["user"] for row in store.connection().execute(query, (f"{VISITOR}%", before))]
    for name in gone:
        forget(settings, store, name)
    return len(gone)


def _end(store: JobStore, job_id: str) -> None:
    end = time.monotonic() + STOP_S
    try:
        store.request_cancel(job_id)
    except GLMError:  # it is over
        return
    while store.get(job_id).state == "running" and time.monotonic() < end:
        time.sleep(0.1)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # deleted meanwhile
        return 0


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
