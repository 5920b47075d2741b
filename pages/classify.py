"""Classification: labels in, a probability for each of them per row out; measured, reviewed, and handed on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import (
    classify_curves,
    classify_data,
    classify_file,
    classify_more,
    classify_one,
    classify_quality,
    classify_results,
    classify_review,
    classify_task,
    classify_threshold,
    job_panel,
    page,
    panels,
    remote_words,
    state,
    table_input,
)
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.jobs import Job
    from pages.shared.classify_data import Found

LISTED = 30
LAST_ROWS = 6


def main() -> None:
    """Draw the page: the job in the address, else the form for a new one."""
    corner = page.frame(
        "classify",
        ("Classification", "分类"),
        ":material/label:",
        (
            "Your labels, with a probability for each. Doubtful rows go to a person, and the result is measured.",
            "按您的标签分类，并给出每个标签的概率；存疑的行交给人复核，结果可评测。",
        ),
    )
    draft = state.session("classify.draft") or {"job": "", "number": 0}
    state.session_set("classify.draft", draft)
    if draft["job"]:  # also where a second click ended the run that started it
        state.query_set("job", draft["job"])
        draft["job"] = ""
    if job_id := state.query("job"):
        with corner:
            if st.button(t("New classification", "新建分类"), icon=":material/add:", key="new_classify"):
                state.query_set("job", None)
                state.query_set("view", None)
                st.rerun()
        show_job(job_id)
    else:
        new(draft)


def new(draft: dict[str, Any]) -> None:
    """Task, one text, a file; and what was classified before."""
    jobs = state.job_store().list(limit=LISTED, kind="classify")
    for job in (one for one in jobs if one.state in job_panel.MOVING):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"now_{job.id}"):
            panels.job_badge(job.state)
            page.link("classify", (plain(job.title),) * 2, ":material/label:", job=job.id)
            st.caption(job_panel.rows_done(job))
    engine = panels.need_model()
    if engine is not None:
        asked = classify_task.ask(engine)
        if asked is not None:
            classify_one.card(engine, asked)
            classify_file.card(draft, engine, asked)
    past = [one for one in jobs if one.state not in job_panel.MOVING]
    if past:
        with st.container(border=True, key="classify_past", gap="xsmall"):
            panels.section(t("Earlier", "之前的分类"), "history")
            for job in past[:8]:
                with st.container(
                    horizontal=True, vertical_alignment="center", gap="small", key=f"past_{job.id}"
                ):
                    page.link("classify", (plain(job.title),) * 2, ":material/label:", job=job.id)
                    panels.job_badge(job.state)
                    st.caption(f"{job_panel.rows_done(job)} · {panels.format_ago(job.created, time.time())}")
    panels.rerun_on_model_change()


# --- a job ----------------------------------------------------------------------------------------------------


def show_job(job_id: str) -> None:
    """A job by its id: live while it moves, its results once there are some."""
    job = job_panel.wanted(job_id, "classify", ("This job is no classification.", "该任务不是分类任务。"))
    if job is None:
        return
    table_input.leave_address()
    job_panel.steady()
    (watch if job.state in (*job_panel.MOVING, "paused") else progress)(job_id, job.state)
    if job.state not in job_panel.MOVING and job.done:
        try:
            results(classify_data.found(job))
        except GLMError as error:
            panels.problem(error)
    how_it_was_made(job)


@live(run_every=1)
def watch(job_id: str, drawn: str) -> None:
    """`progress`, looked at every second."""
    with st.container(key="polled_job"):
        progress(job_id, drawn)


def progress(job_id: str, drawn: str) -> None:
    """Figures, buttons and the last rows; the page is drawn anew when the state is no longer the one drawn."""
    job = job_panel.still(job_id, drawn)
    job_panel.head(job)
    job_panel.problem()
    classify_review.goes_with(job)
    if job.state != "done":
        job_panel.figures(job)
        job_panel.bar(job)
    else:
        done_line(job)
    job_panel.message(job)
    if job.state in job_panel.MOVING:
        last_rows(job)


def done_line(job: Job) -> None:
    """A finished job in a line: rows, speed, time."""
    found = state.job_store().progress(job.id)
    parts = [
        job_panel.rows_done(job),
        job_panel.rate_text(found.rate) if found.rate else "",
        panels.format_duration(job.active_seconds),
        t(f"{job.failed:,} failed", f"{job.failed:,} 行失败") if job.failed else "",
        t(f"{job.truncated:,} truncated", f"{job.truncated:,} 行被截断") if job.truncated else "",
    ]
    st.caption(" · ".join(part for part in parts if part))


def last_rows(job: Job) -> None:
    """The rows finished last with their labels."""
    store = state.job_store()
    labels = list(job.task["labels"])
    used = classify_data.text_columns(job)[:2]
    rows = []
    for one in store.last_results(job.id, LAST_ROWS):
        cells = store.results_page(job.id, one.idx, 1)[0][1]
        label = classify_task.shown(labels, one.prediction) if one.status == "ok" else said(one.error)
        rows.append((*(classify_data.shortened(cells[i]) if i < len(cells) else "" for i in used), label))
    if rows:
        names = (*(str(job.task["columns"][i]) for i in used), t("answer ", "答案 "))
        st.caption(t("Finished last", "最近完成"))
        st.dataframe(
            table_input.frame(names, rows),
            column_config=table_input.widths(names, rows),
            key=f"last_{job.id}",
        )


VIEWS = {
    "results": (("Results", "结果"), "table_rows"),
    "quality": (("Quality", "质量"), "fact_check"),
    "threshold": (("Threshold", "阈值"), "tune"),
    "calibration": (("Calibration", "校准"), "straighten"),
    "abstain": (("Auto-accept", "自动采纳"), "verified"),
    "slices": (("Slices", "分组"), "view_week"),
    "share": (("Share", "占比"), "percent"),
    "baseline": (("Baseline", "基线"), "functions"),
    "review": (("Review", "复核"), "rate_review"),
}


def results(this: Found) -> None:
    """One view of the results at a time; those that compare need correct labels."""
    with_truth = this.rows is not None and len(this.rows) > 0
    views = [one for one in VIEWS if with_truth or one in ("results", "review")]
    if way := str((this.job.task.get("remote") or {}).get("labels") or ""):
        st.caption(f":material/cloud: {remote_words.way(way)}")
    if this.bare:
        views = [one for one in views if one in ("results", "quality", "review")]
        st.warning(
            t(
                "Without probabilities there is no threshold, no calibration and no auto-accept.",
                "没有概率，因此没有阈值、校准和自动采纳。",
            ),
            icon=":material/percent:",
        )
    asked = state.query("view")
    key = f"classify_view_{this.job.id}"
    if state.session(key) not in views:
        state.session_set(key, asked if asked in views else "quality" if with_truth else "results")
    chosen = st.segmented_control(
        t("View", "视图"),
        views,
        format_func=lambda one: f":material/{VIEWS[one][1]}: {t(*VIEWS[one][0])}",
        required=True,
        key=key,
        label_visibility="collapsed",
    )
    state.query_set("view", chosen)
    if chosen in ("results", "quality"):
        classify_results.truth(this)
    if this.truth is not None and this.rows is not None and not len(this.rows):
        st.info(t("No row has a correct label.", "没有任何行带有正确标签。"), icon=":material/info:")
    drawn = {
        "results": _results,
        "quality": _quality,
        "threshold": classify_threshold.threshold,
        "calibration": classify_curves.calibration,
        "abstain": classify_curves.abstain,
        "slices": classify_more.slices,
        "share": classify_more.share,
        "baseline": classify_more.baseline,
        "review": classify_review.section,
    }
    drawn[str(chosen)](this)


def _results(this: Found) -> None:
    classify_results.overview(this)
    with st.container(border=True, key="classify_table"):
        classify_results.table(this)


def _quality(this: Found) -> None:
    classify_quality.cards(this)
    with st.container(border=True, key="classify_confusion"):
        classify_quality.confusion(this)
    with st.container(border=True, key="classify_errors"):
        classify_quality.errors(this)


def how_it_was_made(job: Job) -> None:
    """Labels, question, model and versions of a job."""
    from glm_core import batch

    with st.expander(t("How it was made", "任务设置"), icon=":material/receipt_long:"):
        st.caption(t("Question", "提问模板"))
        st.code(str(job.task.get("template", "")), language=None, wrap_lines=True)
        st.json(batch.manifest(state.job_store(), job.id), expanded=1)


main()
