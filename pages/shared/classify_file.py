"""A file to classify: which column, what its labels mean, a trial on its first rows, and the start of the job."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import batch, tables
from glm_core.errors import GLMError
from glm_core.review import Reviews, Truth
from glm_core.tables import ReadOptions
from pages.shared import classify_task, classify_truth, cluster_panel, panels, state, table_input, trial
from pages.shared.classify_one import percent
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.classify import LabelTask, Scored
    from glm_core.engine import Engine
    from pages.shared.classify_task import Asked
    from pages.shared.table_input import Chosen

TRIAL_ROWS = 20
MOST_KINDS = 1000  # different values of a column that are counted
TRIED = "classify.trial"


@dataclass(frozen=True)
class Trial:
    """The first rows, classified now, and how long they took together."""

    task: str
    scored: list[Scored]
    texts: list[str]
    seconds: float


def card(draft: dict[str, Any], engine: Engine, asked: Asked) -> None:
    """Table, columns, trial and start."""
    chosen = table_input.choose()
    if chosen is None or not chosen.info.columns:
        return
    with st.container(border=True, key="classify_run"):
        row = panels.section(t("2 · Columns and run", "2 · 列与运行"), "play_circle")
        if not chosen.rows:
            st.caption(t("The table has no rows below its header.", "表头之下没有数据行。"))
            return
        left, right = st.columns(2, gap="large")
        with left:
            text = _text_column(chosen)
        with right:
            gold = classify_truth.column(chosen.info.columns, (text,), f"classify_gold_{chosen.key}")
        truth, waits = None, False
        if gold:
            counts = value_counts(chosen, gold)
            if len(counts) > MOST_KINDS:
                waits = True
                st.warning(
                    t(
                        f"{plain(gold)} has more than {MOST_KINDS:,} different values: it holds no labels.",
                        f"{plain(gold)} 有超过 {MOST_KINDS:,} 种取值，不像标签列。",
                    )
                )
            else:
                truth = classify_truth.mapping(gold, counts, asked.labels, f"file_{chosen.key}")
                waits = truth is None
        rows = state.most_rows(chosen.rows)
        with row:
            st.space("stretch")
            where = cluster_panel.choose(engine, "classify")
            try_it = st.button(
                t("Try the first rows", "试跑前几行"), icon=":material/science:", key="classify_trial"
            )
            run_it = st.button(
                t(f"Classify {rows:,} rows", f"分类 {rows:,} 行"),
                type="primary",
                icon=":material/play_arrow:",
                key=f"classify_start_{draft['number']}",  # a second click of a double click finds no button
                disabled=waits,
                help=t("Say first what the values of the label column mean.", "请先确认标签列各取值的含义。")
                if waits
                else None,
            )
        try:
            template = classify_task.for_column(asked.template, text, chosen.info.columns)
            task = classify_task.make(engine, asked, template, chosen.info.columns, chosen)
            _show_trial(task, chosen, asked)
            if try_it:
                _try(engine, task, chosen, text)
            if run_it:
                _start(draft, where.put(task), chosen, truth)
        except GLMError as error:
            panels.problem(error)


def _text_column(chosen: Chosen) -> str:
    """The column to classify; by default the one with the longest texts."""
    columns = list(chosen.info.columns)
    lengths = [sum(len(row[i]) for row in chosen.first) for i in range(len(columns))]
    return str(
        st.selectbox(
            t("Text", "文本列"),
            columns,
            index=lengths.index(max(lengths)),
            key=f"classify_text_{chosen.key}",
            persist_state="session",
            help=t("The column that {text} in the question stands for.", "提问模板中 {text} 所代表的列。"),
        )
    )


def value_counts(chosen: Chosen, column: str) -> Counter[str]:
    """How often each value occurs in a column of the table; counting ends beyond `MOST_KINDS` of them."""
    stamp = chosen.path.stat().st_mtime_ns
    return Counter(
        _counted(str(chosen.path), stamp, chosen.name, json.dumps(chosen.options.to_json()), column)
    )


@st.cache_data(max_entries=16, show_spinner="Counting the labels …")
def _counted(path: str, stamp: int, name: str, options: str, column: str) -> dict[str, int]:
    table = tables.open_table(Path(path), ReadOptions.from_json(json.loads(options)), name)
    place, found = table.info.columns.index(column), Counter[str]()
    for cells in table.rows():
        found[cells[place]] += 1
        if len(found) > MOST_KINDS:
            break
    return dict(found)


# --- the trial -------------------------------------------------------------------------------------------------


def _identity(task: LabelTask) -> str:
    return json.dumps(task.to_json(), sort_keys=True, default=str)


def _try(engine: Engine, task: LabelTask, chosen: Chosen, text: str) -> None:
    from glm_core import classify

    rows = chosen.first[:TRIAL_ROWS]
    place = chosen.info.columns.index(text)
    begun = time.monotonic()
    with st.spinner(t(f"Classifying {len(rows)} rows …", f"正在分类 {len(rows)} 行……")):
        scored = classify.classify_rows(engine, task, rows)
    seconds = time.monotonic() - begun
    texts = [row[place] if place < len(row) else "" for row in rows]
    state.session_set(TRIED, Trial(_identity(task), scored, texts, seconds))
    st.rerun()


def _show_trial(task: LabelTask, chosen: Chosen, asked: Asked) -> None:
    tried: Trial | None = state.session(TRIED)
    if tried is None or not tried.scored:
        return
    stale = tried.task != _identity(task)
    given = any(one.probabilities for one in tried.scored)
    if stale and given and len(tried.scored[0].probabilities) != len(asked.labels):
        return
    trial.speed(tried.seconds / len(tried.scored), chosen.rows, stale, "classify_speed")
    names = (
        t("text", "文本"),
        t("label", "标签"),
        *(f"p · {asked.shown(name)}" for name in asked.names),
        t("margin", "领先"),
        t("outside", "标签之外"),
        t("reason to review", "送审原因"),
    )
    rows = [
        (
            text,
            asked.shown(one.label),
            *((f"{p:.3f}" for p in one.probabilities) if one.probabilities else [""] * len(asked.names)),
            f"{one.margin:.3f}" if one.probabilities else "",
            percent(one.outside) if one.probabilities else "",
            said(one.reason),
        )
        for one, text in zip(tried.scored, tried.texts, strict=True)
    ]
    st.dataframe(
        table_input.frame(names, rows),
        column_config=table_input.widths(names, rows, 330),
        height=min(36 * (len(rows) + 1) + 2, 320),
        key="classify_trial_rows",
    )


# --- the start -------------------------------------------------------------------------------------------------


def _start(draft: dict[str, Any], task: LabelTask, chosen: Chosen, truth: Truth | None) -> None:
    """Copy the table into a job, keep what its labels mean, and go to it."""
    from glm_core import classify

    store = state.job_store()
    with st.spinner(t("Copying the rows into the job …", "正在将各行复制到任务……")):
        task = replace(task, input_sha256=batch.file_sha256(chosen.path))
        begin = classify.start if chosen.rows <= table_input.AT_ONCE_ROWS else classify.start_in_background
        job = begin(store, task, chosen.open())
        if truth is not None:
            Reviews(store).set_truth(job.id, truth)
        draft.update(job=job.id, number=draft["number"] + 1)
    state.session_set(TRIED, None)
    state.supervisor()
    st.rerun()
