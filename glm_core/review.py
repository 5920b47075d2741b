"""What people say of a classification: a log of their labels beside the model's answers, which it never changes.

Every label, skip and withdrawal is an entry of its own in the job database, written before the next row is shown.
What counts is the last entry of a person for a row that was not withdrawn.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from . import statistics
from .errors import GLMError

if TYPE_CHECKING:
    from .jobs import Job, JobStore
    from .tables import WriteReport

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Order = Literal["uncertain", "disagree"]
Action = Literal["label", "skip", "undo"]

LONGEST_NAME = 60
LONGEST_NOTE = 2000
FORMATS: tuple[Literal["csv", "jsonl", "xlsx", "parquet"], ...] = ("csv", "jsonl", "xlsx", "parquet")
ROWS_AT_ONCE = 500  # asked of the database in one statement
COLUMNS = (
    "content", "label", "source", "label_name", "row", "model_answer", "model_probability", "agrees", "reviewers",
    "note", "reviewed", "job", "file", "checkpoint",
)  # fmt: skip

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS review(
        seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, idx INT NOT NULL, reviewer TEXT NOT NULL,
        action TEXT NOT NULL, label TEXT NOT NULL, note TEXT NOT NULL, time REAL NOT NULL, undoes INT)""",
    "CREATE INDEX IF NOT EXISTS review_job ON review(job_id, reviewer, seq)",
    "CREATE UNIQUE INDEX IF NOT EXISTS review_undone ON review(undoes) WHERE undoes IS NOT NULL",
    "CREATE TABLE IF NOT EXISTS review_truth(job_id TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
# The entries of a job that nobody withdrew, and of those the last of each person for each row.
STANDING = (
    "SELECT * FROM review WHERE job_id = :job AND action != 'undo' "
    "AND seq NOT IN (SELECT undoes FROM review WHERE job_id = :job AND undoes IS NOT NULL)"
)
LATEST = f"SELECT *, MAX(seq) FROM ({STANDING}) GROUP BY reviewer, idx"

_lock = threading.Lock()
_made: set[Path] = set()  # databases that have the tables


@dataclass(frozen=True)
class Entry:
    """One label or skip of one person for one row."""

    seq: int
    idx: int
    reviewer: str
    action: Action
    label: str
    note: str
    time: float


@dataclass(frozen=True)
class Truth:
    """Which column of a job's table holds correct labels, and which label each of its values means.

    mapping   value as it stands in the file -> name of a label; None leaves the rows with this value out
    """

    column: str
    mapping: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """The model's answers to the rows of a job that it could read, in the order of the table.

    idx          (rows) which rows
    scores       (rows, labels), log-probabilities of writing each label, in nats, without any calibration
    probability  (rows, labels), among the labels, as the task calibrates them
    outside      (rows) probability that the model would say something else
    answer       (rows) number of the label it gave
    """

    labels: tuple[str, ...]
    idx: Ints
    scores: Floats
    probability: Floats
    outside: Floats
    answer: Ints
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def confidence(self) -> Floats:
        """Probability of the label given, (rows); with a threshold it need not be the likeliest."""
        return confidence(self.probability, self.answer)

    @property
    def margin(self) -> Floats:
        """Probability of the likeliest label less that of the next, (rows)."""
        if not len(self) or self.probability.shape[1] < 2:
            return np.ones(len(self))
        best = np.partition(self.probability, -2, axis=1)
        return np.asarray(best[:, -1] - best[:, -2])

    @property
    def entropy(self) -> Floats:
        """Entropy of the probabilities in nats, (rows)."""
        p = self.probability
        return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1))


def confidence(probability: Floats, answer: Ints) -> Floats:
    """Per row the probability of its answer, of the likeliest label where it has none."""
    if not len(answer):
        return np.zeros(0)
    given = probability[np.arange(len(answer)), np.maximum(answer, 0)]
    return np.asarray(np.where(answer < 0, probability.max(axis=1), given))


@dataclass(frozen=True)
class Correction:
    """What people say of a row: the label most of them gave, of equally many the one given last."""

    idx: int
    label: str
    labels: tuple[tuple[str, str], ...]  # (reviewer, label), in the order they were given
    note: str
    time: float


@dataclass(frozen=True)
class AgreementReport:
    """How far people agree on the rows that at least two of them labelled.

    n          those rows
    percent    share of them on which the two agree, with Wilson's interval; of the first two where there are more
    """

    reviewers: tuple[str, ...]
    n: int
    percent: statistics.Interval
    kappa: statistics.Agreement
    ac1: statistics.Agreement
    alpha: statistics.Agreement
    differing: tuple[int, ...]


def answers(store: JobStore, job_id: str) -> Answers:
    """The answers of a classify job as arrays, from one read of its results."""
    from .classify import read_answers

    labels, rows = read_answers(store, job_id)
    width = len(labels)
    idx: list[int] = []
    scores: list[Sequence[float]] = []
    probability: list[Sequence[float]] = []
    outside: list[float] = []
    answer: list[int] = []
    reasons: list[str] = []
    known: dict[str, str] = {}  # each reason once in memory
    nothing = (float("nan"),) * width  # of a server that gives labels alone
    for one in rows:
        idx.append(one.idx)
        scores.append(one.scores or nothing)
        probability.append(one.probabilities or nothing)
        outside.append(one.outside)
        answer.append(one.answer)
        reasons.append(known.setdefault(one.reason, one.reason))
    return Answers(
        labels=tuple(labels),
        idx=np.array(idx, dtype=np.int64),
        scores=np.array(scores, dtype=np.float64).reshape(len(idx), width),
        probability=np.array(probability, dtype=np.float64).reshape(len(idx), width),
        outside=np.array(outside, dtype=np.float64),
        answer=np.array(answer, dtype=np.int64),
        reasons=tuple(reasons),
    )


def rank(given: Answers, order: Order, truth: Ints | None = None) -> Ints:
    """The rows in the order to look at them.

    order   "uncertain": the smallest margin first, of equal ones the larger entropy; "disagree": rows whose correct
            label is another one, the surest answer first
    truth   for "disagree", (rows): number of the correct label, -1 where it is not known
    """
    if order == "uncertain":
        # Rounded, so that margins equal but for the last bits are equal.
        return np.asarray(given.idx[np.lexsort((given.idx, -given.entropy, given.margin.round(9)))])
    if truth is None or truth.shape != given.answer.shape:
        raise ValueError("one correct label per row")
    wrong = np.flatnonzero((truth >= 0) & (truth != given.answer))
    return np.asarray(given.idx[wrong[np.lexsort((given.idx[wrong], -given.confidence[wrong]))]])


class Reviews:
    """The reviews in the database of the jobs; any thread and any process may use it."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        with _lock:
            if store.path not in _made:
                with self.store.writing() as db:
                    for statement in SCHEMA:
                        db.execute(statement)
                self.forget_deleted()
                _made.add(store.path)

    # ---- what a person does

    def label(self, job_id: str, idx: int, reviewer: str, label: str, note: str = "") -> Entry:
        """Give a row a label; the same again changes nothing. GLMError for another label, row or name."""
        names = label_names(self.store.get(job_id))
        if label not in names:
            raise GLMError(f"{label!r} is not one of the labels.", f"Choose one of: {', '.join(names)}.")
        return self._add(job_id, idx, reviewer, "label", label, note)

    def skip(self, job_id: str, idx: int, reviewer: str, note: str = "") -> Entry:
        """Leave a row for later or for somebody else."""
        return self._add(job_id, idx, reviewer, "skip", "", note)

    def undo(self, job_id: str, reviewer: str) -> Entry | None:
        """Withdraw the last standing entry of a person and return it; None where there is none."""
        self.store.require(job_id)
        query = f"SELECT * FROM ({STANDING}) WHERE reviewer = :reviewer ORDER BY seq DESC LIMIT 1"
        reviewer = reviewer_name(reviewer)
        with self.store.writing() as db:
            row = db.execute(query, {"job": job_id, "reviewer": reviewer}).fetchone()
            if row is None:
                return None
            db.execute(
                "INSERT INTO review(job_id, idx, reviewer, action, label, note, time, undoes) "
                "VALUES (?,?,?,'undo','','',?,?)",
                (job_id, row["idx"], reviewer, time.time(), row["seq"]),
            )
        return _entry(row)

    def _add(self, job_id: str, idx: int, reviewer: str, action: Action, label: str, note: str) -> Entry:
        reviewer, note = reviewer_name(reviewer), note.strip()[:LONGEST_NOTE]
        job = self.store.get(job_id)
        if not 0 <= idx < job.total:
            raise GLMError(f"The job has no row {idx + 1:,}; it has {job.total:,}.", "Choose another row.")
        wanted = {"job": job_id, "reviewer": reviewer, "idx": idx}
        query = (
            f"SELECT * FROM ({STANDING}) WHERE reviewer = :reviewer AND idx = :idx ORDER BY seq DESC LIMIT 1"
        )
        with self.store.writing() as db:
            last = db.execute(query, wanted).fetchone()
            if last is not None and (last["action"], last["label"], last["note"]) == (action, label, note):
                return _entry(last)  # a key that was pressed twice
            added = db.execute(
                "INSERT INTO review(job_id, idx, reviewer, action, label, note, time) VALUES (?,?,?,?,?,?,?)",
                (job_id, idx, reviewer, action, label, note, now := time.time()),
            )
        return Entry(int(added.lastrowid or 0), idx, reviewer, action, label, note, now)

    # ---- what there is

    def latest(self, job_id: str, reviewer: str | None = None) -> list[Entry]:
        """What counts: per person and row the last entry that stands, oldest first."""
        self.store.require(job_id)
        query, values = f"SELECT * FROM ({LATEST})", {"job": job_id}
        if reviewer is not None:
            query, values = f"{query} WHERE reviewer = :reviewer", values | {"reviewer": reviewer}
        rows = self.store.connection().execute(f"{query} ORDER BY seq", values)
        return [_entry(row) for row in rows]

    def log(self, job_id: str) -> list[dict[str, Any]]:
        """Every entry ever made, withdrawn ones and withdrawals among them, oldest first."""
        self.store.require(job_id)
        rows = self.store.connection().execute(
            "SELECT * FROM review WHERE job_id = ? ORDER BY seq", (job_id,)
        )
        return [dict(row) for row in rows]

    def reviewers(self, job_id: str) -> dict[str, int]:
        """Who labelled how many rows; the most first."""
        query = (
            f"SELECT reviewer, COUNT(*) AS n FROM ({LATEST}) WHERE action = 'label' "
            "GROUP BY reviewer ORDER BY n DESC, reviewer"
        )
        rows = self.store.connection().execute(query, {"job": job_id})
        return {row["reviewer"]: row["n"] for row in rows}

    def count(self, job_id: str) -> int:
        """Rows that somebody labelled."""
        query = f"SELECT COUNT(DISTINCT idx) FROM ({LATEST}) WHERE action = 'label'"
        return int(self.store.connection().execute(query, {"job": job_id}).fetchone()[0])

    def queue(
        self, job_id: str, ranked: Sequence[int] | Ints, reviewer: str, limit: int = 1, skipped: bool = False
    ) -> list[int]:
        """The next rows for a person, in the order of `rank`, without those this person has labelled or skipped.

        skipped   the rows this person skipped instead
        """
        mine = {one.idx: one.action for one in self.latest(job_id, reviewer_name(reviewer))}
        found = []
        for idx in ranked:
            if (mine.get(int(idx)) == "skip") if skipped else (int(idx) not in mine):
                found.append(int(idx))
                if len(found) == limit:
                    break
        return found

    def corrections(self, job_id: str) -> list[Correction]:
        """The rows that people labelled, in the order of the table; the model's answers stay what they are."""
        by_row: dict[int, list[Entry]] = {}
        for entry in self.latest(job_id):
            if entry.action == "label":
                by_row.setdefault(entry.idx, []).append(entry)
        found = []
        for idx, entries in sorted(by_row.items()):
            counts = Counter(entry.label for entry in entries)
            most = max(counts.values())
            chosen = next(entry.label for entry in reversed(entries) if counts[entry.label] == most)
            note = "; ".join(dict.fromkeys(entry.note for entry in entries if entry.note))
            given = tuple((entry.reviewer, entry.label) for entry in entries)
            found.append(Correction(idx, chosen, given, note, entries[-1].time))
        return found

    def agreement(self, job_id: str, reviewers: Sequence[str] = ()) -> AgreementReport | None:
        """How far people agree; None unless two of them labelled rows.

        reviewers   whom to compare; all where none is named. Percent and kappa are of the first two.
        """
        people = tuple(reviewers) or tuple(self.reviewers(job_id))
        if len(people) < 2:
            return None
        table: dict[int, dict[str, str]] = {}
        for entry in self.latest(job_id):
            if entry.action == "label":
                table.setdefault(entry.idx, {})[entry.reviewer] = entry.label
        labels = len(label_names(self.store.get(job_id)))
        ratings = [[row.get(person) for person in people] for row in table.values()]
        pairs = [(row[0], row[1]) for row in ratings if row[0] is not None and row[1] is not None]
        differing = [
            idx for idx, row in sorted(table.items()) if len({row[p] for p in people if p in row}) > 1
        ]
        return AgreementReport(
            reviewers=people,
            n=sum(1 for row in ratings if sum(one is not None for one in row) > 1),
            percent=statistics.wilson(sum(a == b for a, b in pairs), len(pairs)),
            kappa=statistics.cohen_kappa([row[0] for row in ratings], [row[1] for row in ratings]),
            ac1=statistics.gwet_ac1(ratings, labels=labels),
            alpha=statistics.krippendorff_alpha(ratings),
            differing=tuple(differing),
        )

    # ---- which column holds correct labels

    def truth(self, job_id: str) -> Truth | None:
        """The column of correct labels that was chosen for a job, or None."""
        self.store.require(job_id)
        query = "SELECT value FROM review_truth WHERE job_id = ?"
        row = self.store.connection().execute(query, (job_id,)).fetchone()
        return None if row is None else Truth(**json.loads(row["value"]))

    def set_truth(self, job_id: str, truth: Truth | None) -> None:
        """Choose the column of correct labels; None takes it back. GLMError for an unknown column or label."""
        job = self.store.get(job_id)
        with self.store.writing() as db:
            if truth is None:
                db.execute("DELETE FROM review_truth WHERE job_id = ?", (job_id,))
                return
            if truth.column not in job.task["columns"]:
                raise GLMError(f"The table has no column {truth.column!r}.", "Choose one of its columns.")
            names = label_names(job)
            for label in truth.mapping.values():
                if label is not None and label not in names:
                    raise GLMError(
                        f"{label!r} is not one of the labels.", f"Choose one of: {', '.join(names)}."
                    )
            value = json.dumps({"column": truth.column, "mapping": dict(truth.mapping)}, ensure_ascii=False)
            db.execute(
                "INSERT INTO review_truth VALUES (?1, ?2) ON CONFLICT(job_id) DO UPDATE SET value = ?2",
                (job_id, value),
            )

    # ---- leaving

    def export(self, job_id: str, path: Path) -> WriteReport:
        """Write the rows that people labelled as training data: content, label, and where both come from.

        The label is what the model is to say. The format is that of the file's ending, csv, jsonl, xlsx or parquet.
        GLMError where nobody labelled a row yet.
        """
        from . import tables

        path = Path(path)
        format = next((one for one in FORMATS if path.suffix.lower() == f".{one}"), None)
        if format is None:
            raise GLMError(
                f"Training data is not written as {path.suffix or 'a file without an ending'}.",
                f"Choose one of: {', '.join(FORMATS)}.",
            )
        found = self.corrections(job_id)
        if not found:
            raise GLMError(
                "Nobody has labelled a row of this job yet.", "Label some rows in the review queue."
            )
        # A program reads it: every text is written exactly as it is.
        return tables.write(
            path, COLUMNS, self._training_rows(self.store.get(job_id), found), format, guard=False
        )

    def _training_rows(self, job: Job, found: Sequence[Correction]) -> Iterator[tuple[str | float, ...]]:
        said = {str(one["name"]): str(one.get("verbaliser") or one["name"]) for one in job.task["labels"]}
        given = answers(self.store, job.id)
        place = {int(idx): i for i, idx in enumerate(given.idx)}
        content = Content(job)
        checkpoint = Path(str(job.task.get("checkpoint", ""))).name
        for begin in range(0, len(found), ROWS_AT_ONCE):
            some = found[begin : begin + ROWS_AT_ONCE]
            cells = self.cells(job.id, [one.idx for one in some])
            for one in some:
                at = place.get(one.idx)
                answer = given.labels[given.answer[at]] if at is not None and given.answer[at] >= 0 else ""
                yield (
                    content.of(cells[one.idx]),
                    said.get(one.label, one.label),
                    "human",
                    one.label,
                    one.idx + 1,
                    answer,
                    round(float(given.confidence[at]), 6) if at is not None else "",
                    "yes" if answer == one.label else "no",
                    "; ".join(f"{who}: {label}" for who, label in one.labels),
                    one.note,
                    time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(one.time)),
                    job.id,
                    str(job.task.get("input_name", "")),
                    checkpoint,
                )

    def cells(self, job_id: str, rows: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """The cells of some rows of a job's table."""
        self.store.require(job_id)
        found = {}
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = [int(idx) for idx in rows[begin : begin + ROWS_AT_ONCE]]
            query = f"SELECT idx, cells FROM row WHERE job_id = ? AND idx IN ({','.join('?' * len(some))})"
            for row in self.store.connection().execute(query, (job_id, *some)):
                found[int(row["idx"])] = tuple(json.loads(row["cells"]))
        return found

    def forget(self, job_id: str) -> int:
        """Delete all reviews of a job for good; how many entries. Ask the person first."""
        with self.store.writing() as db:
            db.execute("DELETE FROM review_truth WHERE job_id = ?", (job_id,))
            return db.execute("DELETE FROM review WHERE job_id = ?", (job_id,)).rowcount

    def forget_deleted(self) -> int:
        """Delete the reviews of jobs that are no longer there; how many entries."""
        gone = "job_id NOT IN (SELECT id FROM job)"
        with self.store.writing() as db:
            db.execute(f"DELETE FROM review_truth WHERE {gone}")
            return db.execute(f"DELETE FROM review WHERE {gone}").rowcount


class Content:
    """The text of a row that a classification was about: the cell, or the filled-in template where it has several."""

    def __init__(self, job: Job) -> None:
        from .batch import Template

        self.template = Template(str(job.task["template"]), job.task["columns"])

    def of(self, cells: Sequence[str]) -> str:
        """The text, without the instruction."""
        if len(self.template.used) == 1:
            at = self.template.used[0]
            return cells[at] if at < len(cells) else ""
        return self.template.render(cells)


def label_names(job: Job) -> tuple[str, ...]:
    """The labels of a classify job, in their order; GLMError for a job of another kind."""
    if job.kind != "classify":
        raise GLMError(f"The job {job.title} is no classification.", "Choose a classification.")
    return tuple(str(one["name"]) for one in job.task["labels"])


def reviewer_name(name: str) -> str:
    """A person's name as it is stored; GLMError where there is none."""
    found = " ".join(unicodedata.normalize("NFC", name).split())
    if not found:
        raise GLMError("The reviewer has no name.", "Enter a name or initials.")
    if len(found) > LONGEST_NAME:
        raise GLMError(f"The reviewer's name has {len(found)} characters.", f"Use at most {LONGEST_NAME}.")
    return found


def truth_numbers(values: Sequence[str], truth: Truth, labels: Sequence[str]) -> Ints:
    """The number of the correct label of each row, -1 where its value is left out or not mapped."""
    index = {label: i for i, label in enumerate(labels)}
    known = {value: index.get(label, -1) for value, label in truth.mapping.items() if label is not None}
    return np.array([known.get(value, -1) for value in values], dtype=np.int64)


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(*(row[name] for name in ("seq", "idx", "reviewer", "action", "label", "note", "time")))
