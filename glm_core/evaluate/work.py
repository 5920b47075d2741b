"""A run as a durable job: its rows, its answers by generation, by likelihood or by a chain of thought, its scores."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import batch
from ..batch import Answering, Prompt
from ..errors import GLMError
from ..jobs import Job, JobStore, Result, StopSignal
from ..tables import ReadOptions, Table, open_table
from ..tables.options import plural
from .questions import Questions
from .task import EvaluationTask, Left, rows_of

if TYPE_CHECKING:
    from ..engine import Engine
    from ..remote.labels import RemoteScorer
    from ..scoring import Scorer, Scores

log = logging.getLogger(__name__)

KIND = "evaluate"
WINDOW_ROWS = 512  # rows sorted by length and scored at a time
CHAIN_ROWS = 16  # chains of thought whose options are scored together
COMMIT_ROWS = 64
COMMIT_S = 0.5
PLACES = 4  # decimals of a log-probability that are kept
LEFT_OUT = {
    "example": "Not asked: {rows} shown as an example.",
    "prompt": "Not asked: {rows} without a prompt.",
    "reference": "Not asked: {rows} without a reference.",
}
OUT_OF_RANGE = "The model's numbers left the range of its precision. Load it in another one."
HALF = "A cell holds half a character. Repair the text of this row."


def start(store: JobStore, task: EvaluationTask, title: str = "", table: Table | None = None) -> Job:
    """Copy the rows into a new run and queue it; GLMError, and a failed job, where the file cannot be asked."""
    return _fill(store, _create(store, task, title), task, table)


def start_in_background(
    store: JobStore, task: EvaluationTask, title: str = "", table: Table | None = None
) -> Job:
    """`start` for a large table: the job is "preparing" while its rows are copied."""
    job = _create(store, task, title)
    return batch.in_background(job, lambda: _fill(store, job, task, table))


def title_of(task: EvaluationTask) -> str:
    """What a run is called where nobody named it: the checkpoint on the file."""
    if task.method == "imported":
        return task.input_name
    from ..remote import shown

    return f"{shown(task.checkpoint)} on {task.input_name}"


def _create(store: JobStore, task: EvaluationTask, title: str) -> Job:
    if task.method != "imported" and not task.checkpoint:
        raise ValueError("a task without a checkpoint")
    return store.create(KIND, title.strip() or title_of(task), task.to_json())


def _fill(store: JobStore, job: Job, task: EvaluationTask, table: Table | None) -> Job:
    with batch.preparing(store, job):
        if table is None:
            table = open_table(
                Path(task.input_path), ReadOptions.from_json(task.read_options), task.input_name
            )
        left = Left()
        if not store.add_rows(job.id, (row.cells for row in rows_of(task, table, left))):
            raise GLMError(
                f"{task.input_name} has no row with a prompt and a reference.",
                "Choose other columns, or another file.",
            )
        for warning in (*table.warnings, *left_out(left)):
            store.warn(job.id, warning)
        return store.mark_ready(job.id)


def left_out(left: Left) -> list[str]:
    """A sentence per reason for which rows are not asked."""
    return [
        LEFT_OUT[reason].replace("{rows}", plural(count, "row")) for reason, count in sorted(left.items())
    ]


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Answer the rows that have no result yet, then score all; GLMError if the checkpoint is another one by now."""
    from .scoring import update

    task = EvaluationTask.from_json(job.task)
    if store.pending(job.id, 1):
        if task.method == "imported":
            raise GLMError("Some rows have no prediction.", "Import the file again.")
        batch.with_engine(job, store, stop, task, lambda engine: _answer(job, store, stop, task, engine))
    if not stop.event.is_set():
        update(store, job.id, lambda done, of: store.update(job.id, f"Scoring {done:,} of {of:,} rows"))
        store.update(job.id, "")


def _answer(job: Job, store: JobStore, stop: StopSignal, task: EvaluationTask, engine: Engine) -> None:
    questions = Questions(engine.tokenizer, task, engine.context)
    if task.method == "likelihood":
        _Likelihood(job, store, stop, task, engine, questions).run()
    elif task.method == "chain":
        _Chain(job, store, stop, task, engine, questions).run()
    else:
        Answering(job, store, stop, task.settings, engine, questions).run()


# ---- answers with their probabilities


def stored(answer: str, values: dict[str, float], reasoning: str = "") -> str:
    """What a row keeps of a scored answer: the answer, the log-probability of each possible one, what led to it."""
    kept: dict[str, Any] = {"answer": answer, "log_probabilities": values}
    if reasoning:
        kept["reasoning"] = reasoning
    return json.dumps(kept, ensure_ascii=False)


def unstored(prediction: str) -> tuple[str, dict[str, float], str]:
    """(answer, log-probabilities, reasoning) of what `stored` gave."""
    try:
        kept = json.loads(prediction)
        return str(kept["answer"]), dict(kept["log_probabilities"]), str(kept.get("reasoning", ""))
    except (ValueError, KeyError, TypeError):
        return prediction, {}, ""


class _Options:
    """Scores the possible answers of rows; which these are may differ by row, where an option is blank."""

    def __init__(self, task: EvaluationTask, engine: Engine, questions: Questions) -> None:
        self.task, self.engine, self.questions = task, engine, questions
        self._scorers: dict[tuple[tuple[str, ...], tuple[int, ...]], Scorer | RemoteScorer] = {}

    def of(self, cells: Sequence[str]) -> tuple[str, ...]:
        """The possible answers to a row."""
        task = self.task
        if task.kind == "label":
            return task.labels
        return tuple(
            letter
            for letter, column in zip(task.letters, task.options, strict=True)
            if cells[task.columns.index(column)].strip()
        )

    def scorer(self, options: tuple[str, ...], head: tuple[int, ...]) -> Scorer | RemoteScorer:
        """What scores these answers behind prompts that begin with these ids."""
        if (options, head) not in self._scorers:
            ids = [self.questions.answer_ids(one) for one in options]
            self._scorers[options, head] = self.engine.scorer(ids, head)
        return self._scorers[options, head]


def _chosen(options: Sequence[str], scores: Scores) -> tuple[str, dict[str, float]]:
    """The likeliest answer (of equal ones the first) and the log-probability of each."""
    values = {one: round(value, PLACES) for one, value in zip(options, scores.values, strict=True)}
    return max(options, key=values.__getitem__), values


class _Likelihood:
    """One stretch of a run whose answers are the likeliest of those possible."""

    def __init__(
        self, job: Job, store: JobStore, stop: StopSignal, task: EvaluationTask, engine: Engine, questions: Questions
    ) -> None:  # fmt: skip
        self.job, self.store, self.stop, self.questions = job, store, stop, questions
        self.options = _Options(task, engine, questions)
        self.finished: list[Result] = []
        self.committed = time.monotonic()

    def run(self) -> None:
        """Until no row is left, or until told to stop; what is finished is committed either way."""
        after = -1
        try:
            while not self.stop.event.is_set():
                rows = self.store.pending(self.job.id, WINDOW_ROWS, after)
                if not rows:
                    break
                after = rows[-1][0]
                self._window(rows)
        finally:
            self._commit(all_of_it=True)

    def _window(self, rows: Sequence[tuple[int, Sequence[str]]]) -> None:
        groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[tuple[int, Prompt]]] = {}
        for idx, cells in rows:
            try:
                prompt = self.questions.build(cells)
            except UnicodeError:
                self.finished.append(Result(idx, "failed", error=HALF))
                continue
            head = prompt.ids[: prompt.prefix_length]
            groups.setdefault((self.options.of(cells), head), []).append((idx, prompt))
        for (options, head), members in groups.items():
            started = time.monotonic()
            scorer = self.options.scorer(options, head)
            for place, scores in scorer.each([prompt.ids for _, prompt in members], self.stop.event):
                idx, prompt = members[place]
                now = time.monotonic()
                self._keep(idx, prompt, options, scores, now - started)
                started = now
                self._commit()

    def _keep(
        self, idx: int, prompt: Prompt, options: tuple[str, ...], scores: Scores, seconds: float
    ) -> None:
        failed = not scores.usable or any(map(math.isinf, scores.values))
        answer, values = ("", {}) if failed else _chosen(options, scores)
        self.finished.append(
            Result(
                idx,
                "failed" if failed else "ok",
                "" if failed else stored(answer, values),
                prompt.truncated,
                round(seconds, 4),
                len(prompt.ids),
                error=(scores.error or OUT_OF_RANGE) if failed else "",
                finished=time.time(),
            )
        )

    def _commit(self, all_of_it: bool = False) -> None:
        due = time.monotonic() - self.committed > COMMIT_S or len(self.finished) >= COMMIT_ROWS
        if self.finished and (due or all_of_it):
            self.store.save_results(self.job.id, self.finished, self.job.owner)
            self.finished, self.committed = [], time.monotonic()


class _Chain(Answering):
    """One stretch of a run whose model thinks first; then the options are scored behind what it said."""

    def __init__(
        self, job: Job, store: JobStore, stop: StopSignal, task: EvaluationTask, engine: Engine, questions: Questions
    ) -> None:  # fmt: skip
        super().__init__(job, store, stop, task.settings, engine, questions)
        self.task, self.questions = task, questions
        self.options = _Options(task, engine, questions)
        self.asked: dict[int, str] = {}

    def _new(self, idx: int, prompt: Prompt) -> Any:
        self.asked[idx] = prompt.text
        return super()._new(idx, prompt)

    def _commit(self, all_of_it: bool = False) -> None:
        """Only rows whose options are scored are stored; told to stop, the others are left for the next stretch."""
        last = self.after is None and not (self.ready or self.running)
        if self.stop.event.is_set():
            self.finished = [one for one in self.finished if one.status == "failed"]
        elif self.finished and (len(self.finished) >= CHAIN_ROWS or all_of_it or last):
            self.finished = self._judged(self.finished)
        else:
            return
        super()._commit(True)

    def _judged(self, results: Sequence[Result]) -> list[Result]:
        ready = {one.idx: one for one in results if one.status == "ok"}
        groups: dict[tuple[str, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for idx, one in ready.items():
            cells = self.store.results_page(self.job.id, idx, 1)[0][1]
            ids = self.questions.follow_up(self.asked.pop(idx), one.prediction, cells)
            groups.setdefault(self.options.of(cells), []).append((idx, ids))
        for options, members in groups.items():
            found = self.options.scorer(options, ()).score([ids for _, ids in members])
            for (idx, _), scores in zip(members, found, strict=True):
                if scores.usable:
                    answer, values = _chosen(options, scores)
                    ready[idx] = replace(ready[idx], prediction=stored(answer, values, ready[idx].prediction))
                else:
                    error = scores.error or OUT_OF_RANGE
                    ready[idx] = replace(ready[idx], status="failed", prediction="", error=error)
        return [ready.get(one.idx, one) for one in results]
