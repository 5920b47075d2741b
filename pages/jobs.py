"""Jobs: everything that was started, how far it is, and the way to pause, resume, cancel, retry, open and delete it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from pages.shared import (
    admin_jobs,
    admin_people,
    classify_review,
    finetune_run,
    job_panel,
    page,
    panels,
    state,
)
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.jobs import Job

OPEN = (*job_panel.MOVING, "paused")
LISTED = 500
PAGE_JOBS = 15


def main() -> None:
    """Draw the page."""
    page.frame(
        "jobs",
        ("Jobs", "任务"),
        ":material/checklist:",
        (
            "Jobs go on when you close the browser, and after a restart. Every finished row is kept.",
            "关闭浏览器后任务仍会继续，重启后也会接着运行。每个完成的行都会保存。",
        ),
    )
    admin_jobs.choice()
    jobs = state.job_store().list(limit=LISTED, everybody=admin_jobs.everybody())
    job_panel.problem()
    asked = state.query("job")
    jobs.sort(key=lambda job: job.id != asked)  # the one asked for first; the sort keeps the others' order
    if not jobs:
        empty()
        admin_people.section()
        return
    now = [job for job in jobs if job.state in OPEN]
    if now:
        panels.section(t("Now", "当前"), "play_circle")
    job_panel.steady()
    watch([job.id for job in now])
    past = [job for job in jobs if job.state not in OPEN]
    if past:
        row = panels.section(t("Finished", "已结束"), "history")
        with row:
            st.caption(f"{len(past):,}")
        pages = -(-len(past) // PAGE_JOBS)
        place = st.container()
        number = st.pagination(pages, key="past_page") if pages > 1 else 1
        with place:
            for job in past[(number - 1) * PAGE_JOBS : number * PAGE_JOBS]:
                card(job, asked == job.id)
    admin_people.section()


@live(run_every=1)
def watch(drawn: list[str]) -> None:
    """The jobs that run, wait or are paused, looked at every second; a job that ends moves down."""
    jobs = state.job_store().list(limit=LISTED, states=OPEN, everybody=admin_jobs.everybody())
    if {job.id for job in jobs} != set(drawn):
        st.rerun()
    with st.container(key="polled_jobs"):
        for job in sorted(jobs, key=lambda job: drawn.index(job.id)):
            card(job, state.query("job") == job.id)


def card(job: Job, asked: bool) -> None:
    """One job: what, how far, how fast, and its buttons."""
    with st.container(border=True, gap="xsmall", key=f"{'asked' if asked else 'job'}_{job.id}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            if not page.link(
                job.kind, (f"**{plain(job.title)}**",) * 2, job=job.id
            ):  # a job's kind is its page
                st.markdown(f"**{plain(job.title)}**", width="content")
            job_panel.badges(job)
            st.space("stretch")
            admin_jobs.turn(job)
            page.link(job.kind, ("Open", "打开"), ":material/open_in_new:", job=job.id)
            # The rows of a classification are paused, retried and deleted as those of a batch.
            job_panel.actions(job, "list")
        if job.kind == "classify":
            classify_review.goes_with(job)
        training = finetune_run.status_of(job) if job.kind == "finetune" else None
        if training is not None and job.state in OPEN:
            st.progress(finetune_run.share(training))
        elif job.state in OPEN:
            job_panel.bar(job)
        done = job_panel.rows_done(job) if training is None else finetune_run.progress_words(job, training)
        st.caption(" · ".join([done, *facts(job)]))
        told = training is not None and job.state == "running" and training.state == "running"
        if job.message and job.state != "done" and not told:
            st.caption(f":orange[:material/info:] {plain(said(job.message))}")


def facts(job: Job) -> list[str]:
    """Trouble, speed, time left, start and duration, as far as they are known."""
    parts = []
    if place := job_panel.before(job):
        parts.append(place)
    if job.failed:
        parts.append(t(f"{job.failed:,} failed", f"{job.failed:,} 行失败"))
    if job.truncated:
        parts.append(t(f"{job.truncated:,} truncated", f"{job.truncated:,} 行被截断"))
    progress = state.job_store().progress(job.id)
    if progress.rate:
        parts.append(job_panel.rate_text(progress.rate))
    if progress.eta_seconds is not None:
        left = panels.format_duration(progress.eta_seconds)
        parts.append(t(f"{left} left", f"剩余 {left}"))
    if job.active_seconds >= 0.1:
        ran = panels.format_duration(job.active_seconds)
        parts.append(t(f"ran {ran}", f"运行 {ran}"))
    ago = panels.format_ago(job.started or job.created, time.time())
    parts.append(t(f"started {ago}", f"{ago}开始") if job.started else t(f"made {ago}", f"{ago}创建"))
    return parts


def empty() -> None:
    """What a job is, where there is none yet."""
    with st.container(border=True, horizontal_alignment="center", key="no_jobs"):
        st.space("small")
        st.markdown("## :primary[:material/checklist:]", width="content")
        st.markdown(f"**{t('No jobs yet', '还没有任务')}**", width="content")
        st.caption(
            t(
                "A job is a table that the model goes through row by row. Start one on the batch page.",
                "任务就是让模型逐行处理一张表格。请在批量预测页开始。",
            ),
            width="content",
        )
        with st.container(horizontal=True, horizontal_alignment="center"):
            page.link(
                "batch", ("Start with a sample", "用示例开始"), ":material/play_arrow:", sample="comments"
            )
            page.link("batch", ("Open a table", "打开表格"), ":material/table_rows:")
        st.space("small")


main()
