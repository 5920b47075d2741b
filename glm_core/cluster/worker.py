"""What runs on a node: the engine and the runner of a job, its rows coming from the scheduler instead of a database."""

from __future__ import annotations

import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from .. import batch, classify
from ..errors import GLMError
from ..jobs import Job, JobStore, Result, StopSignal

if TYPE_CHECKING:
    from ..engine import Engine
    from .scheduling import Rows

REPORT_S = 0.5  # after which a worker reports, also where it has finished nothing
NAP_S = 0.05


class Feed:
    """What a runner takes for the job store: rows that were sent come out, results wait to be fetched."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.rows: deque[tuple[int, tuple[str, ...]]] = deque()
        self.results: list[Result] = []
        self.warnings: list[str] = []
        self.ended: GLMError | None = None  # why nothing more will come
        self.idle = False  # whether the runner waits for rows

    def add(self, rows: Rows) -> None:
        """Rows to be answered."""
        with self.changed:
            self.rows.extend(rows)
            self.changed.notify_all()

    def pending(self, job_id: str, limit: int, after_idx: int = -1, wait_s: float = NAP_S) -> Rows:
        """Rows that have come since; waits a moment where there are none."""
        with self.changed:
            if not self.rows and wait_s:
                self.idle = True
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.rows, wait_s)
                self.idle = False
            return [self.rows.popleft() for _ in range(min(limit, len(self.rows)))]

    def save_results(self, job_id: str, results: Iterable[Result], owner: str | None = None) -> int:
        """Keep results until they are fetched."""
        with self.changed:
            self.results += results
            self.changed.notify_all()
        return len(self.results)

    def warn(self, job_id: str, text: str) -> None:
        """A warning for the job."""
        with self.changed:
            self.warnings.append(text)

    def update(self, job_id: str, message: str, restart_clock: bool = False) -> None:
        """What a worker does at the moment is not shown."""

    def end(self, error: GLMError) -> None:
        """Nothing more comes, for this reason."""
        with self.changed:
            self.ended = error
            self.changed.notify_all()

    def fetch(self, wait_s: float) -> tuple[list[Result], list[str], str]:
        """(results and warnings since the last time, why nothing more will come); waits for some of these."""
        with self.changed:
            # Many small reports would take the time of those who compute.
            self.changed.wait_for(lambda: (self.results and self.idle) or self.ended, wait_s)
            ended = str(self.ended) if self.ended is not None and not self.results else ""
            found = self.results, self.warnings, ended
            self.results, self.warnings = [], []
            return found


class _Fed(batch.Stretch):
    """A stretch whose rows come when they come."""

    def _rows(self) -> Rows:
        idle = not (getattr(self, "ready", ()) or getattr(self, "running", ()))
        self._commit(all_of_it=idle)  # who waits for rows gets none while its answers are kept back
        return cast(Feed, self.store).pending(self.job.id, batch.WINDOW_ROWS, wait_s=NAP_S if idle else 0)


class _Answering(_Fed, batch.Answering):
    """Answers to prompts."""


class _Labelling(_Fed, classify.Labelling):
    """Labels with probabilities."""


@dataclass(frozen=True)
class Answer:
    """What an open worker is: where, how many rows at once, with what; or why it cannot be."""

    node: str
    at_once: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    todo: str = ""


class Worker:
    """One engine and the thread that feeds it; `open`, then `exchange` again and again."""

    def __init__(self, job: Job, device: str, threads: int, node: str = "") -> None:
        """
        device    as torch names it in this process
        threads   that compute, where that is a processor
        """
        self.job, self.device, self.threads = job, device, threads
        self.node = node or platform.node()
        self.feed = Feed()
        self.stop = StopSignal(cast(JobStore, self.feed), job)  # not entered: nobody asks a worker to pause
        self.opened = threading.Event()
        self.at_once = 0
        self._thread = threading.Thread(target=self._work, name="glm-cluster-work", daemon=True)

    def open(self) -> Answer:
        """Load the model."""
        self._thread.start()
        while not self.opened.wait(NAP_S):
            if (error := self.feed.ended) is not None:
                return Answer(self.node, message=f"On the node {self.node}: {error.message}", todo=error.todo)
        facts = {"device": self.device, "versions": versions()}
        return Answer(self.node, self.at_once, facts | ({"threads": self.threads} if self.threads else {}))

    def exchange(self, rows: Rows, wait_s: float = REPORT_S) -> tuple[Sequence[Result], Sequence[str], str]:
        """Take rows; return the results and warnings there are, and why the work has ended where it has."""
        self.feed.add(rows)
        return self.feed.fetch(wait_s)

    def close(self) -> None:
        """End the work; what is on its way is given up."""
        self.stop.stop("exit")
        self._thread.join()

    def _work(self) -> None:
        try:
            from ..engine import leave_imports_alone

            leave_imports_alone()
            if self.threads:
                import torch

                torch.set_num_threads(self.threads)
            RUNNERS[self.job.kind](self)
            error = GLMError("The work of this worker ended.")
        except GLMError as problem:
            error = problem
        except Exception as problem:  # of its message only the beginning: it may quote a row
            error = GLMError(f"internal error: {type(problem).__name__}: {str(problem)[:120]}")
        self.feed.end(error)

    def with_engine(self, task: Any, work: Callable[[Engine], None]) -> None:
        """Do `work` with the model of a task on this worker's device."""

        def begin(engine: Engine) -> None:
            self.at_once = engine.max_rows
            self.opened.set()
            work(engine)

        # The scheduler compares the versions of the nodes itself.
        here = replace(task, device=self.device, versions={})
        batch.with_engine(self.job, cast(JobStore, self.feed), self.stop, here, begin)


def _batch(worker: Worker) -> None:
    task = batch.BatchTask.from_json(worker.job.task)
    worker.with_engine(
        task,
        lambda engine: _Answering(
            worker.job, cast(JobStore, worker.feed), worker.stop, task.settings, engine, batch.prompts_of(engine, task)
        ).run(),
    )  # fmt: skip


def _classify(worker: Worker) -> None:
    task = classify.LabelTask.from_json(worker.job.task)
    worker.with_engine(
        task,
        lambda engine: _Labelling(
            worker.job, cast(JobStore, worker.feed), worker.stop, classify.Classifier(engine, task)
        ).run(),
    )


RUNNERS: dict[str, Callable[[Worker], None]] = {"batch": _batch, "classify": _classify}


def versions() -> dict[str, str]:
    """The versions that results depend on, and those that have to go together."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    try:
        ray = version("ray")
    except PackageNotFoundError:
        ray = "not installed"
    return {"glm_core": __version__, **batch.versions(), "ray": ray}
