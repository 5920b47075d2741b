"""Five rows answered before a job starts: run without blocking the screen, kept for the session, shown with the time."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import batch
from glm_core.errors import GLMError
from pages.shared import job_panel, panels, state, table_input
from pages.shared.text import said, t

if TYPE_CHECKING:
    from glm_core.batch import BatchTask
    from glm_core.engine import Engine
    from pages.shared.table_input import Chosen


def run(engine: Engine, task: BatchTask, chosen: Chosen) -> None:
    """Answer the first rows and keep what came; any click meanwhile ends it."""
    rows = chosen.first[: batch.TRIAL_ROWS]
    kept = state.session("trial", {})
    kept.clear()
    state.session_set("trial", kept)
    stop, begun = threading.Event(), time.monotonic()
    with st.container(horizontal=True, vertical_alignment="center"):
        place = st.empty()
        st.button(t("Stop", "停止"), icon=":material/stop:", key="stop_trial")  # any click ends this run
    with ThreadPoolExecutor(1, "glm-trial") as pool:
        work = pool.submit(batch.trial, engine, task, rows, stop)
        try:
            while not work.done():
                seconds = panels.format_duration(time.monotonic() - begun)
                count = len(rows)
                place.caption(
                    ":material/progress_activity: "
                    + t(f"Answering {count} rows … {seconds}", f"正在回答 {count} 行……{seconds}")
                )
                time.sleep(0.2)
        finally:
            stop.set()
    try:
        kept.update(trial=work.result(), task=identity(task), rows=rows)
    except GLMError as error:
        kept.update(error=error, task=identity(task))
    st.rerun()


def identity(task: BatchTask) -> str:
    """What makes a trial out of date when it changes; not how many rows there are to be."""
    return json.dumps(replace(task, limit_rows=None, output_column="").to_json(), sort_keys=True)


def show(task: BatchTask, total: int) -> None:
    """The answers of the last trial, its speed, and what that means for the whole table."""
    kept = state.session("trial") or {}
    if error := kept.get("error"):
        if kept.get("task") == identity(task):
            panels.problem(error)
        return
    if "trial" not in kept or kept["trial"].results == ():
        return
    found, stale = kept["trial"], kept["task"] != identity(task)
    speed(found.seconds_per_row, total, stale, "trial_speed")
    columns = json.loads(kept["task"])["columns"]
    used = _used(json.loads(kept["task"])["template"], columns)
    rows = [
        (
            *(cells[i] for i in used),
            one.prediction or said(one.error),
            f"{one.prompt_tokens:,} → {one.new_tokens:,}",
            f"{one.seconds:.2f} s",
            said(one.error) if one.prediction else "",
        )
        for one, cells in zip(found.results, kept["rows"], strict=False)
    ]
    names = (
        t("answer ", "回答 "),
        t("tokens in → out", "词元 入 → 出"),
        t("time ", "用时 "),
        t("note ", "备注 "),
    )
    names = (*(columns[i] for i in used), *names)
    st.dataframe(
        table_input.frame(names, rows), column_config=table_input.widths(names, rows, 330), key="trial_rows"
    )


def speed(per_row: float, total: int, stale: bool, key: str) -> None:
    """The pace of a trial, in seconds per row, and what it means for the whole table."""
    whole = panels.format_duration(batch.estimate(per_row, total))
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key=key):
        st.badge(
            job_panel.rate_text(1 / per_row if per_row else 0.0), icon=":material/speed:", color="violet"
        )
        st.badge(
            t(f"about {whole} for {total:,} rows", f"{total:,} 行约需 {whole}"),
            icon=":material/timer:",
            color="violet",
            help=t(
                "At the pace of these rows. A long table is usually faster, as more rows are computed together.",
                "按这几行的速度估计。表格较长时通常更快，因为同时计算的行更多。",
            ),
        )
        if stale:
            st.badge(
                t("measured before the last change", "修改之前测得"),
                icon=":material/history:",
                color="orange",
            )


def _used(template: str, columns: list[str]) -> list[int]:
    try:
        return batch.Template(template, columns).used[:3]
    except GLMError:
        return []
