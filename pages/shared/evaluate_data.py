"""What the evaluation page reads again and again: runs, the rows of one, and the cells of a column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from glm_core import evaluate
from pages.shared import state
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.evaluate import PerRow, Run, Scores
    from glm_core.evaluate.views import Slice

LISTED = 300


def stamp(run: Run) -> str:
    """Changes whenever the answers of a run do."""
    return f"{run.job.attempt}-{run.job.done}-{run.job.failed}-{run.job.total}"


def runs() -> list[Run]:
    """The newest runs of this workspace."""
    return evaluate.runs(state.job_store(), limit=LISTED)


def scores(run: Run) -> Scores:
    """The scores of a run; where they are not kept yet they are computed here, with a bar."""
    if run.scores is not None:
        return run.scores
    place = st.empty()
    text = t("Scoring the answers …", "正在评分……")
    place.progress(0.0, text)
    try:
        return evaluate.scores(
            state.job_store(), run.id, lambda done, of: place.progress(done / max(of, 1), text)
        )
    finally:
        place.empty()


@st.cache_resource(max_entries=6, show_spinner=False)
def _rows(database: str, run_id: str, stamp: str) -> PerRow:
    return evaluate.per_row(state.job_store(), run_id)


def rows(run: Run) -> PerRow:
    """The rows of a run; shared by all sessions, so nobody changes them."""
    return _rows(str(state.settings().database), run.id, stamp(run))


@st.cache_resource(max_entries=8, show_spinner="Reading the rows …")
def _column(database: str, run_id: str, stamp: str, name: str) -> list[str]:
    return evaluate.column(state.job_store(), run_id, name)


def column(run: Run, name: str) -> list[str]:
    """The cells of a column of the file, one per row of the run."""
    return _column(str(state.settings().database), run.id, stamp(run), name)


@st.cache_data(max_entries=24, show_spinner="Counting …")
def _slices(database: str, run_id: str, stamp: str, name: str, metric: str) -> tuple[list[Slice], str]:
    run = evaluate.run_of(state.job_store(), run_id)
    table = rows(run)
    if name.startswith("#"):
        return list(evaluate.views.slices(table, lengths(table), metric)), "length"
    values, how = evaluate.views.grouped(column(run, name))
    return list(evaluate.views.slices(table, values, metric)), how


def slices(run: Run, name: str, metric: str) -> tuple[list[Slice], str]:
    """(the scores by the values of a column, largest first; by what the column was cut). "#length": of the answer."""
    return _slices(str(state.settings().database), run.id, stamp(run), name, metric)


def lengths(table: PerRow) -> list[str]:
    """The length of every answer as one of four ranges."""
    given = np.where(table.answered, table.characters, np.nan).astype(np.float64)
    return evaluate.views.ranges(given)
