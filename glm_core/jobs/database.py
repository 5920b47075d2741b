"""Jobs, their rows and their results in SQLite: written by one process, read by any number."""

from __future__ import annotations

import copy
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..access.people import DEMO_JOBS, DEMO_ROWS, OPERATOR, Person, Right
from ..errors import GLMError
from .records import (
    BUSY_S,
    AnswerCounts,
    Cells,
    Counts,
    Job,
    JobLost,
    Jobs,
    Page,
    Pending,
    Progress,
    Result,
    Results,
    process_alive,
    this_process,
)

RATE_WINDOW_S = 30.0
OPEN = ("preparing", "queued", "running", "paused")
FOREIGN_OWNER_S = 600.0  # silence after which a job of another host (an old container) counts as orphaned
CRASHES = 3  # a job that took the process down this often without one finished row is not tried again

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS job(
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, state TEXT NOT NULL, task TEXT NOT NULL,
        total INT NOT NULL DEFAULT 0, done INT NOT NULL DEFAULT 0, failed INT NOT NULL DEFAULT 0,
        truncated INT NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL,
        active_seconds REAL NOT NULL DEFAULT 0, attempt INT NOT NULL DEFAULT 0, owner TEXT NOT NULL,
        stop_request TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
        warnings TEXT NOT NULL DEFAULT '[]', complete INT NOT NULL DEFAULT 0, run_started REAL,
        marked REAL, crashes INT NOT NULL DEFAULT 0, user TEXT NOT NULL DEFAULT '',
        place INT NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS job_state ON job(state, id)",
    """CREATE TABLE IF NOT EXISTS row(
        job_id TEXT, idx INT, cells TEXT NOT NULL, PRIMARY KEY(job_id, idx)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS result(
        job_id TEXT, idx INT, status TEXT NOT NULL, prediction TEXT NOT NULL, truncated INT NOT NULL,
        seconds REAL NOT NULL, prompt_tokens INT NOT NULL, new_tokens INT NOT NULL, error TEXT NOT NULL,
        finished REAL NOT NULL, details TEXT NOT NULL DEFAULT '', PRIMARY KEY(job_id, idx)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS result_finished ON result(job_id, finished)",
    "CREATE INDEX IF NOT EXISTS result_failed ON result(job_id, idx) WHERE status = 'failed'",
    "CREATE INDEX IF NOT EXISTS result_truncated ON result(job_id, idx) WHERE truncated = 1",
    "CREATE TABLE IF NOT EXISTS setting(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
# Columns that databases of earlier versions have not, in the order they came.
ADDED = (("job", "user", "TEXT NOT NULL DEFAULT ''"), ("job", "place", "INT NOT NULL DEFAULT 0"))
IN_TURN = "place, id"  # the order in which queued jobs are run; `place` is 0 until somebody moves a job
# Kinds of jobs that not everybody may start.
NEEDS: dict[str, Right] = {"finetune": "finetune", "memory": "load"}
# Time spent running, kept at every commit so that a kill loses none; over a minute is a machine asleep.
TICK = "active_seconds = active_seconds + MIN(60, MAX(0, :now - COALESCE(marked, :now))), marked = :now"


JOB_COLUMNS = ", ".join(field.name for field in fields(Job))
RESULT_COLUMNS = ", ".join(field.name for field in fields(Result))


class JobStore:
    """The job, row, result and setting tables of one database; any thread and any process may use it."""

    def __init__(self, path: Path) -> None:
        """Open or create the database; GLMError where the file cannot be used."""
        self.path = Path(path)
        self.person = OPERATOR
        self._local = threading.local()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.writing() as db:
                for statement in SCHEMA:
                    db.execute(statement)
                for table, column, kind in ADDED:
                    if column not in {row["name"] for row in db.execute(f"PRAGMA table_info({table})")}:
                        db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
                if "details" not in {row["name"] for row in db.execute("PRAGMA table_info(result)")}:
                    db.execute("ALTER TABLE result ADD COLUMN details TEXT NOT NULL DEFAULT ''")
                    # What a classification knows of a row stood in the column of errors before.
                    db.execute(
                        "UPDATE result SET details = error, error = '' WHERE status = 'ok' AND error LIKE '{%' "
                        "AND job_id IN (SELECT id FROM job WHERE kind = 'classify')"
                    )
        except (OSError, sqlite3.DatabaseError) as error:
            raise GLMError(
                f"The job database {self.path} cannot be used: {error}.",
                "Free some disk space, or set GLM_WORKSPACE to another folder.",
            ) from error

    def seen_by(self, person: Person) -> JobStore:
        """The same store as a person sees it: jobs of others are not there, new ones are this person's."""
        if person == self.person:
            return self
        view = copy.copy(self)
        view.person = person
        return view

    def require(self, job_id: str) -> None:
        """GLMError where this person may not see a job, in the words for one that does not exist."""
        if not self.person.sees_all:
            self.get(job_id)

    def connection(self) -> sqlite3.Connection:
        """This thread's own connection, opened on first use; sqlite3 errors pass through."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            db.row_factory = sqlite3.Row
            deadline = time.monotonic() + BUSY_S
            while True:
                try:
                    db.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:
                    # SQLite does not honour the timeout when two processes create the same database.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            db.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut, not only a kill
            db.execute("PRAGMA fullfsync = ON")
            self._local.db = db
        return db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at its end, taken back where an error passes through."""
        db = self.connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite may have rolled back by itself, as on a full disk
                db.execute("ROLLBACK")
            raise

    # ---- making a job

    def create(self, kind: str, title: str, task: Mapping[str, Any]) -> Job:
        """A new job in state "preparing", owned by this process until `mark_ready`.

        GLMError where this person may not start one of this kind, or as a visitor has enough open jobs.
        """
        now = time.time()
        if kind in NEEDS:
            self.person.require(NEEDS[kind])
        if self.person.is_visitor and len(self.list(DEMO_JOBS, states=OPEN)) >= DEMO_JOBS:
            raise GLMError(
                f"{DEMO_JOBS} jobs at a time are what this demonstration allows.",
                "Wait for one, or cancel it.",
            )
        job_id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        with self.writing() as db:
            db.execute(
                "INSERT INTO job(id, kind, title, state, task, created, owner, marked, user) "
                "VALUES (?,?,?,?,?,?,?,?,?)",
                (
                    job_id,
                    kind,
                    title,
                    "preparing",
                    json.dumps(dict(task)),
                    now,
                    this_process(),
                    now,
                    self.person.name,
                ),
            )
        return self.get(job_id)

    def add_rows(self, job_id: str, rows: Iterable[Sequence[str]], batch: int = 5000) -> int:
        """Append input rows while the job is prepared; how many. JobLost once it is cancelled or deleted."""
        source, index, first = iter(rows), self.get(job_id).total, self.get(job_id).total
        if self.person.is_visitor:
            source = islice(source, max(0, DEMO_ROWS - index))
        while chunk := list(islice(source, batch)):
            try:
                self._insert_rows(job_id, index, chunk, ascii_only=False)
            except UnicodeEncodeError:  # half a surrogate pair, as broken exports have it, is not UTF-8
                self._insert_rows(job_id, index, chunk, ascii_only=True)
            index += len(chunk)
        return index - first

    def _insert_rows(self, job_id: str, index: int, chunk: Sequence[Sequence[str]], ascii_only: bool) -> None:
        dumps = json.JSONEncoder(ensure_ascii=ascii_only, separators=(",", ":")).encode
        with self.writing() as db:
            db.executemany(
                "INSERT INTO row VALUES (?,?,?)",
                ((job_id, i, dumps(list(cells))) for i, cells in enumerate(chunk, index)),
            )
            changed = db.execute(
                "UPDATE job SET total = total + ?, marked = ? "
                "WHERE id = ? AND state = 'preparing' AND total = ?",
                (len(chunk), time.time(), job_id, index),
            )
            if not changed.rowcount:
                raise JobLost("The job was cancelled while its rows were read.", "Start it again.")

    def mark_ready(self, job_id: str, total: int | None = None) -> Job:
        """All rows are in: queue the job. `total` only for kinds that count something else than rows."""
        changed = self._change(
            "UPDATE job SET state = 'queued', complete = 1, owner = '', total = COALESCE(?, total) "
            "WHERE id = ? AND state = 'preparing'",
            (total, job_id),
        )
        if not changed:
            raise JobLost("The job was cancelled while its rows were read.", "Start it again.")
        return self.get(job_id)

    def mark_unready(self, job_id: str, message: str) -> None:
        """Reading the input failed: the job fails with this sentence and cannot be resumed."""
        self._change(
            "UPDATE job SET state = 'failed', message = ?, finished = ?, owner = '' "
            "WHERE id = ? AND state = 'preparing'",
            (message, time.time(), job_id),
        )

    # ---- looking at jobs

    def get(self, job_id: str) -> Job:
        """One job; GLMError if there is none of that id."""
        query = f"SELECT {JOB_COLUMNS} FROM job WHERE id = ? AND state != 'deleting'"
        row = self.connection().execute(query, (job_id,)).fetchone()
        if row is None or not (self.person.sees_all or row["user"] == self.person.name):
            raise GLMError(
                f"There is no job {job_id!r}.", "It may have been deleted; look at the list of jobs."
            )
        return _job(row)

    def list(
        self,
        limit: int = 100,
        kind: str | None = None,
        states: Sequence[str] | None = None,
        everybody: bool = False,
    ) -> Jobs:
        """The newest jobs first.

        everybody   those of all people, where this person may see them
        """
        query, values = f"SELECT {JOB_COLUMNS} FROM job WHERE state != 'deleting'", []
        mine = self.person.lists
        if mine is not None and not (everybody and self.person.sees_all):
            query, values = query + f" AND user IN ({_marks(mine)})", [*mine]
        if kind is not None:
            query, values = query + " AND kind = ?", [*values, kind]
        if states is not None:
            query, values = query + f" AND state IN ({_marks(states)})", [*values, *states]
        rows = self.connection().execute(
            query + " ORDER BY created DESC, id DESC LIMIT ?", [*values, str(limit)]
        )
        return [_job(row) for row in rows]

    def in_turn(self) -> Jobs:
        """The queued jobs of this person, or of everybody for an administrator, in the order they will run."""
        query = f"SELECT {JOB_COLUMNS} FROM job WHERE state = 'queued' ORDER BY {IN_TURN}"
        found = [_job(row) for row in self.connection().execute(query)]
        return [job for job in found if self.person.sees_all or job.user == self.person.name]

    def ahead(self, job_id: str) -> int:
        """How many jobs, of anybody, run or wait before a queued one; 0 for a job that does not wait."""
        self.require(job_id)
        query = (
            "SELECT COUNT(*) FROM job, (SELECT place AS p, id AS i FROM job WHERE id = ? AND state = 'queued') "
            "WHERE state = 'running' OR (state = 'queued' AND (place, id) < (p, i))"
        )
        return int(self.connection().execute(query, (job_id,)).fetchone()[0])

    def running(self) -> int:
        """How many jobs, of anybody, run now."""
        return int(
            self.connection().execute("SELECT COUNT(*) FROM job WHERE state = 'running'").fetchone()[0]
        )

    def counts(self, job_id: str) -> Counts:
        """Rows answered, failed, answered after shortening, and left; no table is scanned."""
        job = self.get(job_id)
        return Counts(job.done, job.failed, job.truncated, job.left)

    def progress(self, job_id: str) -> Progress:
        """Counts with the measured rate and, while it runs, the time left."""
        job, now, rate = self.get(job_id), time.time(), 0.0
        finished = job.done + job.failed
        if job.state == "running":
            since = max(now - RATE_WINDOW_S, job.run_started or now)
            query = "SELECT COUNT(*) FROM result WHERE job_id = ? AND finished > ?"
            recent = int(self.connection().execute(query, (job_id, since)).fetchone()[0])
            rate = recent / max(now - since, 0.001)
        elif finished and job.active_seconds:
            rate = finished / job.active_seconds
        eta = job.left / rate if rate and job.state == "running" else None
        return Progress(job.done, job.failed, job.total, rate, eta, job.state, job.message)

    # ---- rows and results

    def pending(self, job_id: str, limit: int, after_idx: int = -1) -> Pending:
        """The next rows without a result, in order: the work list, which is never stored anywhere else."""
        self.require(job_id)
        query = (
            "SELECT idx, cells FROM row WHERE job_id = ?1 AND idx > ?2 AND NOT EXISTS "
            "(SELECT 1 FROM result WHERE job_id = ?1 AND result.idx = row.idx) ORDER BY idx LIMIT ?3"
        )
        rows = self.connection().execute(query, (job_id, after_idx, limit))
        return [(row["idx"], tuple(json.loads(row["cells"]))) for row in rows]

    def save_results(self, job_id: str, results: Iterable[Result], owner: str | None = None) -> int:
        """Commit results at once; how many were new: the first stays. JobLost if `owner` lost it."""
        now = time.time()
        new = {"ok": 0, "failed": 0, "truncated": 0}
        names = [field.name for field in fields(Result)]
        insert = (
            f"INSERT INTO result(job_id, {RESULT_COLUMNS}) VALUES ({_marks([job_id, *names])}) "
            "ON CONFLICT(job_id, idx) DO NOTHING"
        )
        with self.writing() as db:
            for result in results:
                given = result if result.finished else replace(result, finished=now)
                inserted = db.execute(insert, (job_id, *(getattr(given, name) for name in names)))
                if inserted.rowcount:
                    new[result.status] += 1
                    new["truncated"] += result.truncated
            changed = db.execute(
                "UPDATE job SET done = done + :ok, failed = failed + :failed, "
                f"truncated = truncated + :truncated, crashes = 0, {TICK} "
                "WHERE id = :id AND state != 'deleting' AND (:owner IS NULL OR owner = :owner)",
                {**new, "id": job_id, "owner": owner, "now": now},
            )
            if not changed.rowcount:
                raise JobLost("The job was deleted or is run by another process.")
        return new["ok"] + new["failed"]

    def results_page(
        self, job_id: str, offset: int, limit: int, status: Literal["failed", "truncated"] | None = None
    ) -> Page:
        """Rows with their results in input order: all of them, or only the failed or the shortened ones."""
        self.require(job_id)
        if status is None:  # row numbers have no gaps, so an offset is a row number
            wanted = "SELECT idx FROM row WHERE job_id = ?1 AND idx >= ?2 AND idx < ?2 + ?3"
        else:  # as the partial indexes have it
            which = {"failed": "status = 'failed'", "truncated": "truncated = 1"}[status]
            wanted = f"SELECT idx FROM result WHERE job_id = ?1 AND {which} ORDER BY idx LIMIT ?3 OFFSET ?2"
        query = (
            f"SELECT cells, {RESULT_COLUMNS} FROM row LEFT JOIN result USING (job_id, idx) "
            f"WHERE job_id = ?1 AND idx IN ({wanted}) ORDER BY idx"
        )
        rows = self.connection().execute(query, (job_id, offset, limit))
        return [(row["idx"], tuple(json.loads(row["cells"])), _result(row)) for row in rows]

    def iter_results(self, job_id: str, batch: int = 2000) -> Iterator[tuple[int, Cells, Result | None]]:
        """Every row with its result, for an export; in pages, so a slow reader never holds the database."""
        offset = 0
        while page := self.results_page(job_id, offset, batch):
            yield from page
            offset += batch

    def answer_counts(self, job_id: str, most: int) -> AnswerCounts:
        """How often each answer came, the most frequent first; none where there are more than `most` kinds."""
        self.require(job_id)
        answers = "FROM result WHERE job_id = ?1 AND status = 'ok'"
        first = f"SELECT COUNT(DISTINCT prediction) FROM (SELECT prediction {answers} LIMIT 2000)"
        if int(self.connection().execute(first, (job_id,)).fetchone()[0]) > most:
            return []  # free text: counting a million different answers would take seconds
        query = f"SELECT prediction, COUNT(*) AS n {answers} GROUP BY prediction ORDER BY n DESC LIMIT ?2"
        rows = self.connection().execute(query, (job_id, most + 1)).fetchall()
        return [] if len(rows) > most else [(row["prediction"], row["n"]) for row in rows]

    def last_results(self, job_id: str, n: int) -> Results:
        """The n results that were finished last, newest first."""
        self.require(job_id)
        query = f"SELECT {RESULT_COLUMNS} FROM result WHERE job_id = ? ORDER BY finished DESC LIMIT ?"
        found = (_result(row) for row in self.connection().execute(query, (job_id, n)))
        return [result for result in found if result is not None]

    # ---- what a person asks for

    def request_pause(self, job_id: str) -> Job:
        """Pause a queued job at once, a running one within a second; GLMError where none runs or waits."""
        self.require(job_id)
        with self.writing() as db:
            db.execute("UPDATE job SET stop_request = 'pause' WHERE id = ? AND state = 'running'", (job_id,))
            db.execute("UPDATE job SET state = 'paused' WHERE id = ? AND state = 'queued'", (job_id,))
        job = self.get(job_id)
        if job.state not in ("running", "paused"):
            raise GLMError(f"The job is {job.state}; there is nothing to pause.")
        return job

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a job; finished rows stay. GLMError if it is over already."""
        self.require(job_id)
        with self.writing() as db:
            db.execute("UPDATE job SET stop_request = 'cancel' WHERE id = ? AND state = 'running'", (job_id,))
            db.execute(
                "UPDATE job SET state = 'cancelled', finished = ?, owner = '' "
                "WHERE id = ? AND state IN ('preparing', 'queued', 'paused')",
                (time.time(), job_id),
            )
        job = self.get(job_id)
        if job.state not in ("running", "cancelled"):
            raise GLMError(f"The job is {job.state} already.")
        return job

    def resume(self, job_id: str) -> Job:
        """Queue a stopped job again for the rows it has left; GLMError where it cannot go on."""
        job = self.get(job_id)
        if not job.complete and job.state in ("failed", "cancelled"):
            raise GLMError("The file was not read to its end.", "Start the job again from the file.")
        changed = self._change(
            "UPDATE job SET state = CASE state WHEN 'running' THEN 'running' ELSE 'queued' END, "
            "finished = NULL, stop_request = '', message = '', crashes = 0 WHERE id = ? AND "
            "(state IN ('paused', 'failed', 'cancelled') OR (state = 'running' AND stop_request = 'pause'))",
            (job_id,),
        )
        if not changed:
            raise GLMError(f"The job is {self.get(job_id).state}; there is nothing to resume.")
        return self.get(job_id)

    def retry_failed(self, job_id: str) -> Job:
        """Forget the failed results and queue the job again; GLMError while it runs or if no row failed."""
        self.require(job_id)
        with self.writing() as db:
            state = "SELECT state, complete FROM job WHERE id = ?"
            row = db.execute(state, (job_id,)).fetchone()
            if (
                row is None
                or row["state"] in ("preparing", "queued", "running", "deleting")
                or not row["complete"]
            ):
                raise GLMError(
                    "The failed rows can be tried again once the job has stopped.", "Pause it first."
                )
            cut = "SELECT COUNT(*) FROM result WHERE job_id = ? AND status = 'failed' AND truncated = 1"
            shortened = int(db.execute(cut, (job_id,)).fetchone()[0])
            failed = db.execute(
                "DELETE FROM result WHERE job_id = ? AND status = 'failed'", (job_id,)
            ).rowcount
            if not failed:
                raise GLMError("No row of this job failed.")
            db.execute(
                "UPDATE job SET failed = 0, truncated = truncated - ?, state = 'queued', finished = NULL, "
                "crashes = 0, stop_request = '', message = ? WHERE id = ?",
                (shortened, f"{failed:,} failed rows are tried again.", job_id),
            )
        return self.get(job_id)

    def move(self, job_id: str, to: int) -> None:
        """Give a queued job another turn among those that wait, 0 for the next; only administrators may."""
        if not self.person.sees_all:
            raise GLMError("Only an administrator may change the order of jobs.", "Ask an administrator.")
        with self.writing() as db:
            waiting = [
                row["id"]
                for row in db.execute(f"SELECT id FROM job WHERE state = 'queued' ORDER BY {IN_TURN}")
            ]
            if job_id not in waiting:
                raise GLMError("The job does not wait in the queue any more.", "Look at the list again.")
            waiting.remove(job_id)
            waiting.insert(max(0, to), job_id)
            # All below 0: jobs that are queued later come after them.
            db.executemany(
                "UPDATE job SET place = ? WHERE id = ?",
                [(number - len(waiting), one) for number, one in enumerate(waiting)],
            )

    def delete(self, job_id: str) -> None:
        """Delete a job with its rows and results; GLMError while it is read in or running."""
        self.require(job_id)
        changed = self._change(
            "UPDATE job SET state = 'deleting', owner = ? "
            "WHERE id = ? AND state NOT IN ('preparing', 'running')",
            (this_process(), job_id),
        )
        if not changed:
            raise GLMError(f"The job is {self.get(job_id).state}.", "Cancel it first, then delete it.")
        self._purge(job_id)

    def _purge(self, job_id: str) -> None:
        # In pieces: one transaction over a million rows would keep a running job from committing.
        for table in ("result", "row"):
            query = (
                f"DELETE FROM {table} WHERE job_id = ?1 AND idx IN "
                f"(SELECT idx FROM {table} WHERE job_id = ?1 ORDER BY idx LIMIT 20000)"
            )
            while self._change(query, (job_id,)):
                pass
        self._change("DELETE FROM job WHERE id = ? AND state = 'deleting'", (job_id,))

    # ---- what the process that runs a job does

    def claim(self, kinds: Sequence[str], owner: str, job_id: str | None = None) -> Job | None:
        """Take the oldest queued job of these kinds (or this one) for `owner`; None if there is none."""
        where = f"state = 'queued' AND kind IN ({_marks(kinds)}) AND ? IN (id, '') ORDER BY {IN_TURN} LIMIT 1"
        found = (
            self.connection().execute(f"SELECT id FROM job WHERE {where}", (*kinds, job_id or "")).fetchone()
        )
        if found is None:  # an idle supervisor only reads
            return None
        now = time.time()
        changed = self._change(
            "UPDATE job SET state = 'running', owner = ?1, attempt = attempt + 1, finished = NULL, place = 0, "
            "started = COALESCE(started, ?2), run_started = ?2, marked = ?2, stop_request = '' "
            "WHERE id = ?3 AND state = 'queued'",
            (owner, now, found["id"]),
        )
        return self.get(found["id"]) if changed else None

    def beat(self, job_id: str, owner: str) -> None:
        """Count the time a job ran, and show other hosts that its owner lives."""
        self._change(f"UPDATE job SET {TICK} WHERE id = :id AND owner = :owner AND state = 'running'",
                     {"id": job_id, "owner": owner, "now": time.time()})  # fmt: skip

    def release(self, job_id: str, owner: str, state: str, message: str = "", asked: str = "") -> bool:
        """End `owner`'s run of a job in this state; False if the job is no longer its own.

        asked   the request the run ended for; one that came while it ended counts more: a cancel ends the job,
                a resume queues it again
        """
        now = time.time()
        values = {
            "id": job_id,
            "owner": owner,
            "state": state,
            "message": message,
            "now": now,
            "asked": asked,
        }
        final = (
            "CASE WHEN :state IN ('paused', 'queued') AND stop_request = 'cancel' THEN 'cancelled' "
            "WHEN :state = 'paused' AND :asked = 'pause' AND stop_request = '' THEN 'queued' ELSE :state END"
        )
        return bool(
            self._change(
                f"UPDATE job SET {TICK}, state = {final}, message = :message, stop_request = '', owner = '', "
                f"finished = CASE WHEN {final} IN ('done', 'failed', 'cancelled') THEN :now END "
                "WHERE id = :id AND owner = :owner AND state = 'running'",
                values,
            )
        )

    def update(self, job_id: str, message: str, restart_clock: bool = False) -> None:
        """Say what a running job does now; `restart_clock` keeps what it did so far out of the rate."""
        now = time.time() if restart_clock else None
        query = "UPDATE job SET message = ?, run_started = COALESCE(?, run_started) WHERE id = ?"
        self._change(query, (message, now, job_id))

    def amend(self, job_id: str, values: Mapping[str, Any]) -> None:
        """Add to what a job's task says, or change in it what does not change its answers: where it runs."""
        with self.writing() as db:
            row = db.execute("SELECT task FROM job WHERE id = ?", (job_id,)).fetchone()
            if row is not None:
                task = json.dumps(json.loads(row["task"]) | dict(values))
                db.execute("UPDATE job SET task = ? WHERE id = ?", (task, job_id))

    def warn(self, job_id: str, text: str) -> None:
        """Add a sentence to the job's warnings, once, and not more than fifty."""
        with self.writing() as db:
            row = db.execute("SELECT warnings FROM job WHERE id = ?", (job_id,)).fetchone()
            warnings = json.loads(row["warnings"]) if row else []
            if text not in warnings and len(warnings) < 50:
                value = json.dumps([*warnings, text])
                db.execute("UPDATE job SET warnings = ? WHERE id = ?", (value, job_id))

    def recover(self, owner_alive: Callable[[str], bool | None] | None = None) -> Jobs:
        """Take over from processes that died: queue what they ran, fail what they were reading in.

        owner_alive   True, False, or None for an owner on another host; its silence then decides
        """
        alive, found = owner_alive or process_alive, []
        query = "SELECT * FROM job WHERE state IN ('preparing', 'running', 'deleting')"
        for row in self.connection().execute(query).fetchall():
            answer = alive(row["owner"])
            silent = time.time() - (row["marked"] or row["created"]) > FOREIGN_OWNER_S
            if answer or (answer is None and not silent):
                continue
            if row["state"] == "deleting":
                self._purge(row["id"])
                continue
            state, message = {"pause": "paused", "cancel": "cancelled"}.get(row["stop_request"], "queued"), ""
            if row["state"] == "preparing":
                state, message = "failed", "The file was not read to its end; start it again."
            elif state == "queued" and row["crashes"] + 1 >= CRASHES:
                state = "paused"
                message = (
                    f"The program ended {CRASHES} times while this job ran, without finishing a row. "
                    "Choose a smaller model, a lower precision or a shorter context, or resume to try again."
                )
            finished = time.time() if state in ("failed", "cancelled") else None
            changed = self._change(
                "UPDATE job SET state = ?, message = ?, finished = ?, owner = '', stop_request = '', "
                "crashes = crashes + 1 WHERE id = ? AND state = ? AND owner = ?",
                (state, message, finished, row["id"], row["state"], row["owner"]),
            )
            if changed:
                found.append(self.get(row["id"]))
        return found

    # ---- settings

    def setting(self, key: str, default: str = "") -> str:
        """A stored setting of the installation."""
        row = self.connection().execute("SELECT value FROM setting WHERE key = ?", (key,)).fetchone()
        return default if row is None else str(row["value"])

    def set_setting(self, key: str, value: str) -> None:
        """Store a setting of the installation."""
        self._change(
            "INSERT INTO setting VALUES (?1, ?2) ON CONFLICT(key) DO UPDATE SET value = ?2", (key, value)
        )

    def _change(self, query: str, values: Sequence[Any] | Mapping[str, Any]) -> int:
        with self.writing() as db:
            return db.execute(query, values).rowcount


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118
    values["task"], values["complete"] = json.loads(values["task"]), bool(values["complete"])
    return Job(**values | {"warnings": tuple(json.loads(values["warnings"]))})


def _result(row: sqlite3.Row) -> Result | None:
    if row["status"] is None:
        return None
    return Result(
        **{field.name: row[field.name] for field in fields(Result)} | {"truncated": bool(row["truncated"])}
    )
