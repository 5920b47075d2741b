"""A classify job's answers as arrays for the screen: read once, kept by job and number of finished rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from glm_core import batch, review
from glm_core.errors import GLMError
from glm_core.review import Answers, Reviews, Truth
from pages.shared import classify_measures, classify_task, remote_words, state
from pages.shared.classify_measures import Ints, Judged
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.jobs import Job

MOST_KINDS = 1000
CUT = 400  # characters of a cell that a list shows


@dataclass(frozen=True)
class Found:
    """What a job has brought so far.

    positive   number of the positive label, None where there is none
    rows       the answered rows with a correct label; None without a column of correct labels
    """

    job: Job
    stamp: str
    answers: Answers
    labels: tuple[dict[str, Any], ...]
    positive: int | None
    truth: Truth | None
    rows: Judged | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.answers.labels

    @property
    def bare(self) -> bool:
        """Whether there are labels alone, from a server that gives no probabilities."""
        return remote_words.no_probabilities(self.job.task)

    def shown(self, number: int) -> str:
        """A label by its number, as it is called on screen; a dash for none."""
        return classify_task.shown(self.labels, self.names[number]) if number >= 0 else "–"

    def place(self, rows: Ints | Sequence[int]) -> Ints:
        """Where rows of the table stand among the answers."""
        return np.searchsorted(self.answers.idx, np.asarray(rows, dtype=np.int64))


def stamp(job: Job) -> str:
    """Changes whenever the results of a job do."""
    return f"{job.attempt}-{job.done}-{job.failed}"


@st.cache_data(max_entries=4, show_spinner="Reading the results …")
def answers(job_id: str, stamp: str) -> Answers:
    """The answers of a job."""
    return review.answers(state.job_store(), job_id)


@st.cache_data(max_entries=12, show_spinner="Reading the table …")
def column(job_id: str, total: int, number: int) -> list[str]:
    """The cells of one column of a job's table, for all rows."""
    query = "SELECT cells FROM row WHERE job_id = ? ORDER BY idx"
    found = []
    for (cells,) in state.job_store().connection().execute(query, (job_id,)):
        row = json.loads(cells)
        found.append(row[number] if number < len(row) else "")
    return found


@st.cache_data(max_entries=8, show_spinner=False)
def groups(job_id: str, total: int, numbers: tuple[int, ...]) -> Ints:
    """A number per row of a job's table, the same for rows with the same text."""
    columns = [column(job_id, total, number) for number in numbers]
    return classify_measures.text_groups(["\x1f".join(cells) for cells in zip(*columns, strict=True)])


def text_columns(job: Job) -> tuple[int, ...]:
    """The columns that the question reads."""
    return tuple(batch.Template(str(job.task["template"]), job.task["columns"]).used)


def texts(job: Job) -> list[str]:
    """What was classified, for all rows."""
    columns = [column(job.id, job.total, number) for number in text_columns(job)]
    return columns[0] if len(columns) == 1 else [" · ".join(cells) for cells in zip(*columns, strict=True)]


def value_counts(job: Job, number: int) -> Counter[str]:
    """How often each value occurs in a column of the job's table."""
    return Counter(column(job.id, job.total, number))


def found(job: Job) -> Found:
    """Everything there is of a job. GLMError where its stored answers cannot be read."""
    known = stamp(job)
    given = answers(job.id, known)
    labels = tuple(dict(one) for one in job.task["labels"])
    positive = str(job.task.get("positive") or "")
    truth = Reviews(state.job_store()).truth(job.id)
    rows = None
    if truth is not None:
        columns = list(job.task["columns"])
        if truth.column not in columns:
            raise GLMError(f"The table has no column {truth.column!r}.", "Choose one of its columns.")
        rows = _judged(
            job.id, known, job.total, columns.index(truth.column), json.dumps(dict(truth.mapping), sort_keys=True),
            truth.column, text_columns(job),
        )  # fmt: skip
    return Found(
        job,
        known,
        given,
        labels,
        given.labels.index(positive) if positive in given.labels else None,
        truth,
        rows,
    )


@st.cache_data(max_entries=4, show_spinner="Comparing with the correct labels …")
def _judged(
    job_id: str, stamp: str, total: int, number: int, mapping: str, name: str, used: tuple[int, ...]
) -> Judged:
    given = answers(job_id, stamp)
    values = column(job_id, total, number)
    every = review.truth_numbers(values, Truth(name, json.loads(mapping)), given.labels)
    return classify_measures.judged(given, every[given.idx], groups(job_id, total, used)[given.idx])


def shortened(text: str, most: int = CUT) -> str:
    """A cell as a list shows it."""
    return text if len(text) <= most else text[: most - 1] + "…"


def frame(
    this: Found, rows: Sequence[int], own: Sequence[int] | None = None, truth: bool = True
) -> tuple[Any, dict[str, Any]]:
    """(data frame, column settings) of some answered rows: their cells, label, probabilities and what is odd.

    own   which of the table's columns; all where it is None
    """
    import pandas as pd

    columns = list(this.job.task["columns"])
    chosen = list(range(len(columns))) if own is None else list(own)
    cells = Reviews(state.job_store()).cells(this.job.id, rows)
    at = this.place(rows)
    given = this.answers
    data: dict[str, list[Any]] = {}
    settings: dict[str, Any] = {}
    for number in chosen:
        name = _free(columns[number], data)
        data[name] = [
            shortened(cells[int(idx)][number] if number < len(cells[int(idx)]) else "") for idx in rows
        ]
        settings[name] = st.column_config.TextColumn(width=_width(name, data[name]))
    label = _free(t("answer", "答案"), data)
    data[label] = [this.shown(int(given.answer[i])) for i in at]
    settings[label] = st.column_config.TextColumn(width=_width(label, data[label]))
    if truth and this.rows is not None:
        known = dict(zip(this.rows.idx.tolist(), this.rows.truth.tolist(), strict=True))
        name = _free(t("correct", "正确"), data)
        data[name] = [this.shown(known.get(int(idx), -1)) for idx in rows]
        settings[name] = st.column_config.TextColumn(width=_width(name, data[name]))
    for k, one in enumerate(this.names):
        name = _free(f"p · {classify_task.shown(this.labels, one)}", data)
        data[name] = [None if np.isnan(p) else float(p) for p in given.probability[at, k]]
        settings[name] = st.column_config.ProgressColumn(
            format="%.3f", min_value=0.0, max_value=1.0, width=110
        )
    for title, values, shown in (
        ()
        if this.bare
        else (
            (t("margin", "领先"), given.margin[at], "%.3f"),
            (t("outside", "标签之外"), given.outside[at], "%.4f"),
        )
    ):
        name = _free(title, data)
        data[name] = [float(value) for value in values]
        settings[name] = st.column_config.NumberColumn(format=shown, width=80)
    reasons = [given.reasons[i] for i in at]
    if any(reasons):
        from pages.shared.text import said

        name = _free(t("reason to review", "送审原因"), data)
        data[name] = [said(reason) for reason in reasons]
        settings[name] = st.column_config.TextColumn(width=_width(name, data[name]))
    index = pd.Index([int(idx) + 1 for idx in rows], name=t("row", "行"))
    return pd.DataFrame(data, index=index), settings


def _free(name: str, taken: dict[str, Any]) -> str:
    """A column name nobody else has; white space at its end does not show."""
    while name in taken:
        name += " "
    return name


def _width(name: str, texts: Sequence[str], most: int = 300) -> int:
    def pixels(text: str) -> float:
        return sum(7.4 if ord(c) < 0x2E80 else 14 for c in text.split("\n", 1)[0][:60]) + 24

    return int(min(most, max(64, pixels(name), *(pixels(text) for text in texts))) if texts else pixels(name))
