"""A job on a screen: its figures while it runs, and the buttons that pause, resume, cancel, retry and delete it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import admin_jobs, page, panels, state, table_input
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from glm_core.jobs import Job

MOVING = ("preparing", "queued", "running")
STOPPED = ("paused", "cancelled", "failed")
LAST_ROWS = 6


def steady() -> None:
    """Keep what is polled from fading while the processor is busy, which it is for as long as a job runs."""
    st.html("<style>[class*='st-key-polled'] [data-stale='true'] {opacity: 1; transition: none;}</style>")


def rows_done(job: Job) -> str:
    """How far a job is: 412 of 1,000 rows."""
    finished = job.done + job.failed
    if job.state == "preparing":
        return t(f"{job.total:,} rows copied so far", f"已复制 {job.total:,} 行")
    return t(f"{finished:,} of {job.total:,} rows", f"{finished:,} / {job.total:,} 行")


def rate_text(rate: float) -> str:
    """Rows per second, with the digits that mean something."""
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
    return t(f"{shown} rows/s", f"{shown} 行/秒")


def belongs_elsewhere(job: Job) -> bool:
    """Whether another program on this or another computer runs the job."""
    from glm_core import jobs

    return bool(job.owner) and job.state in MOVING and job.owner != jobs.this_process()


def badges(job: Job) -> None:
    """The state of a job, what it was asked to do, and whose it is."""
    panels.job_badge(job.state)
    admin_jobs.owner(job)
    if job.state == "running" and job.stop_request:
        asked = {"pause": t("pausing", "正在暂停"), "cancel": t("cancelling", "正在取消")}
        st.badge(
            asked.get(job.stop_request, job.stop_request), icon=":material/hourglass_top:", color="orange"
        )
    if job.task.get("engine") == "ray":
        st.badge(
            "Ray",
            icon=":material/hub:",
            color="gray",
            help=plain(str(job.task.get("address") or "")) or t("on this machine", "在本机"),
        )
    if belongs_elsewhere(job):
        st.badge(
            t("another program", "其他程序"),
            icon=":material/terminal:",
            color="gray",
            help=t(
                "A command line or another server runs it; it is shown here and can be paused and cancelled.",
                "由命令行或其他服务运行；可在此查看、暂停和取消。",
            ),
        )


def before(job: Job) -> str:
    """How many jobs, of whomever, come before one that waits; "" for one that does not, or is the next."""
    if job.state != "queued" or not (count := state.job_store().ahead(job.id)):
        return ""
    return t(f"{count} job{'s' * (count > 1)} before it", f"前面还有 {count} 个任务")


def wanted(job_id: str, kind: str, otherwise: tuple[str, str]) -> Job | None:
    """The job of an address; None, with a sentence and a way out, where it is gone or of another kind."""
    try:
        job: Job = state.job_store().get(job_id)
    except GLMError as error:
        panels.problem(error)
        page.link("jobs", ("All jobs", "全部任务"), ":material/checklist:")
        return None
    if job.kind != kind:
        st.warning(t(*otherwise), icon=":material/help:")
        page.link("jobs", ("All jobs", "全部任务"), ":material/checklist:", job=job.id)
        return None
    return job


def still(job_id: str, drawn: str) -> Job:
    """The job as it stands; the whole page is drawn anew where it is gone or no longer in the state drawn."""
    try:
        job: Job = state.job_store().get(job_id)
    except GLMError:
        st.rerun()
    if job.state != drawn:
        st.rerun()
    return job


def head(job: Job) -> DeltaGenerator:
    """Title, state, age and buttons in a row; the row, for more of them."""
    row = st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="job_head")
    with row:
        st.subheader(plain(job.title), anchor=False, width="content")
        badges(job)
        st.caption(" · ".join(filter(None, (panels.format_ago(job.created, time.time()), before(job)))))
        st.space("stretch")
        actions(job, "page")
    return row


def bar(job: Job) -> None:
    """How much of the job is finished."""
    st.progress(min(1.0, (job.done + job.failed) / job.total) if job.total else 0.0)


def figures(job: Job) -> None:
    """Rows, speed, time and trouble in four cards."""
    progress = state.job_store().progress(job.id)
    finished, active = job.done + job.failed, job.state in (*MOVING, "paused")
    with st.grid(4, min_column_width=150):
        _card(
            t("Finished", "已完成"),
            f"{finished:,}",
            t(f"of {job.total:,} rows", f"共 {job.total:,} 行")
            if job.state != "preparing"
            else rows_done(job),
            "checklist",
        )
        _card(
            t("Speed", "速度"),
            rate_text(progress.rate) if progress.rate else "–",
            t("last 30 s", "最近 30 秒") if job.state == "running" else t("on average", "平均"),
            "speed",
        )
        elapsed = panels.format_duration(job.active_seconds)
        if active:
            eta = panels.format_duration(progress.eta_seconds)
            _card(t("Time left", "剩余时间"), eta, t(f"ran {elapsed}", f"已运行 {elapsed}"), "timer")
        else:
            ended = panels.format_ago(job.finished, time.time()) or "–"
            _card(t("Time", "用时"), elapsed, t(f"ended {ended}", f"{ended}结束"), "timer")
        cut = t(f"{job.truncated:,} truncated", f"{job.truncated:,} 行被截断")
        _card(t("Failed", "失败"), t(f"{job.failed:,} rows", f"{job.failed:,} 行"), cut, "error")


def _card(label: str, value: str, detail: str, icon: str) -> None:
    st.metric(
        label, value, detail, icon=f":material/{icon}:", border=True, delta_color="off", delta_arrow="off"
    )


def message(job: Job) -> None:
    """What the job says about itself, and what was noticed while it ran."""
    if job.message and job.state in STOPPED:
        (st.error if job.state == "failed" else st.warning)(plain(said(job.message)))
    elif job.message and job.state in MOVING:
        st.caption(f":material/info: {plain(said(job.message))}")
    for warning in job.warnings:
        st.caption(f":material/info: {plain(said(warning))}")


def actions(job: Job, place: str) -> None:
    """The buttons that fit the state of a job; `place` is "page" on the job's own page and "list" among others."""
    key = f"{place}_{job.id}"
    rows = job.kind in (
        "batch",
        "classify",
        "evaluate",
        "memory",
    )  # others count something else, and say themselves what is left
    if job.state in ("queued", "running") and job.stop_request != "cancel":
        if job.stop_request != "pause":
            if rows:
                _button("pause", t("Pause", "暂停"), "pause", job, key)
            else:
                _button("pause", t("Stop", "停止"), "stop_circle", job, key)
    if job.state in STOPPED and job.complete and (job.left or not rows):
        _button("resume", t("Resume", "继续"), "play_arrow", job, key, primary=place == "page")
    if not rows and place == "page":
        return
    if job.failed and job.state not in MOVING and job.complete:
        label = t(f"Retry {job.failed:,} failed", f"重试失败的 {job.failed:,} 行")
        _button("retry", label, "replay", job, key)
    if job.state in (*MOVING, "paused") and job.stop_request != "cancel":
        with st.popover(t("Cancel", "取消"), icon=":material/stop:", key=f"ask_cancel_{key}"):
            st.markdown(
                t(
                    f"End this job? Its {job.done + job.failed:,} finished rows stay; it can be resumed.",
                    f"结束这个任务？已完成的 {job.done + job.failed:,} 行会保留，之后可以继续。",
                )
                if rows
                else t(
                    "End this training? Its newest checkpoint stays; it can be resumed.",
                    "结束这次训练？最新的检查点会保留，之后可以继续。",
                )
            )
            _button("cancel", t("Yes, cancel the job", "确认取消"), "stop", job, key, primary=True)
    if job.state not in ("preparing", "running"):
        with st.popover(t("Delete", "删除"), icon=":material/delete:", key=f"ask_delete_{key}"):
            st.markdown(
                t(
                    f"Delete this job with its {job.done + job.failed:,} answers and downloads? "
                    "This cannot be undone.",
                    f"删除此任务及其 {job.done + job.failed:,} 个回答和导出文件？此操作无法撤销。",
                )
                if rows
                else t(
                    "Take this training off the list? Its folder with the checkpoints stays on the disk.",
                    "从列表中删除这次训练？含检查点的文件夹仍保留在磁盘上。",
                )
            )
            _button("delete", t("Yes, delete it", "确认删除"), "delete_forever", job, key, primary=True)


def _button(what: str, label: str, icon: str, job: Job, key: str, primary: bool = False) -> None:
    st.button(
        label,
        icon=f":material/{icon}:",
        key=f"{what}_{key}",
        type="primary" if primary else "secondary",
        on_click=_act,
        args=(what, job.id),
    )


def _act(what: str, job_id: str) -> None:
    store = state.job_store()
    calls = {
        "pause": store.request_pause,
        "resume": store.resume,
        "retry": store.retry_failed,
        "cancel": store.request_cancel,
        "delete": _delete,
    }
    try:
        calls[what](job_id)
    except GLMError as error:  # the job moved on between the drawing and the click
        state.session_set("job_problem", error)
    else:
        state.session_set("job_problem", None)


def _delete(job_id: str) -> None:
    from glm_core import evaluate
    from glm_core.review import Reviews

    store = state.job_store()
    if store.get(job_id).kind == "evaluate":
        evaluate.delete(store, job_id)
    else:
        store.delete(job_id)
    Reviews(store).forget(job_id)
    for file in state.exports().glob(f"{job_id}-*"):
        file.unlink(missing_ok=True)


def problem() -> None:
    """Why the last click on a job changed nothing; in a place of its own, so that nothing moves up as it goes."""
    with st.container():
        if error := state.session("job_problem"):
            panels.problem(error)


def last_rows(job: Job) -> None:
    """The rows finished last, with the text they were asked about."""
    store = state.job_store()
    found = []
    for result in store.last_results(job.id, LAST_ROWS):
        page = store.results_page(job.id, result.idx, 1)
        found.append((result, page[0][1] if page else ()))
    if not found:
        return
    used = used_columns(job)
    columns = [job.task["columns"][i] for i in used]
    answer = str(job.task.get("output_column", ""))
    rows = [
        (
            *(cells[i] if i < len(cells) else "" for i in used),
            one.prediction or said(one.error),
            f"{one.seconds:.2f} s",
        )
        for one, cells in found
    ]
    names = (*(name if name != answer else f"{name} " for name in columns), answer, t("time", "用时"))
    st.caption(t("Finished last", "最近完成"))
    st.dataframe(
        table_input.frame(names, rows, [one.idx + 1 for one, _ in found]),
        key=f"last_{job.id}",
        width="stretch",
    )


def used_columns(job: Job) -> list[int]:
    """Which columns of the table the template reads."""
    from glm_core import batch

    try:
        return batch.Template(job.task["template"], job.task["columns"]).used[:3]
    except (GLMError, KeyError):
        return []
