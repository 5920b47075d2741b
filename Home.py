"""First screen: the model and the machine, recent jobs, where to start, a guided start with sample data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from pages.shared import page, panels, remote_engines, state
from pages.shared.reruns import live
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.jobs import Job

RECENT = 5
OPEN_JOB = ("preparing", "queued", "running", "paused")


def main() -> None:
    """Draw the page."""
    corner = page.frame(
        "home",
        ("GLM Workbench", "GLM 工作台"),
        ":material/neurology:",
        (
            "Put a GLM model to work on this computer: talk to it, or let it go through a table row by row.",
            "在本机使用 GLM 模型：与它对话，或让它逐行处理表格。",
        ),
    )
    with corner:
        where_words_go()
    machine()
    kind, name = state.model_state()
    if kind in ("failed", "empty"):
        panels.need_model()
    elif panels.is_demo(name):
        panels.demo_note()
    left, right = st.columns([1, 1])
    with left.container(border=True, height="stretch"):
        guided_start()
    with right.container(border=True, height="stretch"):
        recent_jobs()
    where_to_start()
    panels.rerun_on_model_change()


def where_words_go() -> None:
    """Whether anything leaves this computer, and where to."""
    engine = state.current_engine()
    if engine is not None and engine.remote is not None:
        st.badge(
            t(f"asks {plain(engine.remote.host)}", f"向 {plain(engine.remote.host)} 提问"),
            icon=":material/cloud:",
            color="orange",
            help=t(
                "What you ask the model in use is sent to this server; nothing is loaded from the internet.",
                "向当前模型提问的内容会发往该服务器；不从互联网加载任何内容。",
            ),
        )
    elif remote_engines.known():
        st.badge(
            t("local model", "本机模型"),
            icon=":material/lock:",
            color="green",
            help=t(
                "No text, file or statistic leaves this computer, but for what you ask a remote engine.",
                "除向远程引擎提问的内容外，文本、文件和统计信息都不会离开本机。",
            ),
        )
    else:
        st.badge(
            t("local only", "仅限本机"),
            icon=":material/lock:",
            color="green",
            help=t(
                "No text, file or statistic leaves this computer; nothing is loaded from the internet.",
                "文本、文件和统计信息都不会离开本机：无遥测，不从互联网加载任何内容。",
            ),
        )


@live(run_every=2)
def machine() -> None:
    """Model, device, memory and jobs in four cards."""
    kind, name = state.model_state()
    engine = state.current_engine()
    used, total, where = panels.memory_in_use()
    jobs = state.job_store().list(limit=100)
    open_jobs = [job for job in jobs if job.state in OPEN_JOB]
    with st.grid(4, min_column_width=165):
        if engine is not None and kind == "ready":
            info, status = engine.loaded.info, engine.status()
            size = f" · {panels.format_count(info.parameters)}" if info.parameters else ""
            card(t("Model", "模型"), name, f"{info.family}{size}", "deployed_code")
            card(t("Device", "设备"), panels.device_name(status.device), status.precision.upper(), "memory")
        else:
            en, zh, *_ = panels.STATES[kind]
            card(t("Model", "模型"), name or t("none", "无"), t(en, zh), "deployed_code")
            card(t("Device", "设备"), "–", t("no model yet", "尚无模型"), "memory")
        card(
            where,
            panels.format_bytes(used),
            t(f"of {panels.format_bytes(total)}", f"共 {panels.format_bytes(total)}"),
            "storage",
        )
        running = sum(job.state == "running" for job in jobs)
        card(
            t("Open jobs", "未完成任务"),
            str(len(open_jobs)),
            t(f"{running} running", f"{running} 个运行中"),
            "checklist",
        )


def card(label: str, value: str, detail: str, icon: str) -> None:
    """One figure with what it is and a word about it."""
    st.metric(
        label,
        value,
        detail,
        icon=f":material/{icon}:",
        border=True,
        height="stretch",
        delta_color="off",
        delta_arrow="off",
    )


def guided_start() -> None:
    """Four steps that open each page with sample data."""
    panels.section(t("Guided start", "快速上手"), "route")
    st.caption(t("Five minutes, with sample data and the model above.", "五分钟，使用示例数据和上方的模型。"))
    jobs = state.job_store().list(limit=100)
    steps = (
        (
            "chat",
            bool(state.conversations().list(limit=1)),
            ("Ask a sample question", "问一个示例问题"),
            ("The answer appears word by word; stop it whenever you like.", "回答逐字出现，可随时停止。"),
            {"q": t("Hello! What can you help me with?", "你好！你能帮我做什么？")},
        ),
        (
            "batch",
            any(job.kind == "batch" for job in jobs),
            ("Run a sample table", "处理示例表格"),
            (
                "Comments in, one answer per row out, your columns unchanged.",
                "输入客户评论，每行得到一个回答，原有列不变。",
            ),
            {"sample": "comments"},
        ),
        (
            "jobs",
            any(job.state == "done" for job in jobs),
            ("Watch the job and download it", "查看任务并下载结果"),
            (
                "It goes on when you close the browser; pause and resume it.",
                "关闭浏览器后仍会继续，可随时暂停。",
            ),
            {},
        ),
        (
            "models",
            bool(state.remember("models.own_loaded", False)),
            ("Load your own checkpoint", "加载自己的模型"),
            (
                "ChatGLM2 or ChatGLM3, from a folder of this computer.",
                "本机上的 ChatGLM2 或 ChatGLM3。",
            ),
            {},
        ),
    )
    number = 0
    for key, done, title, text, query in steps:
        if page.entry(key) is None or (key == "models" and not state.may("load")):
            continue
        number += 1
        icon = ":green[:material/check_circle:]" if done else f":primary[:material/counter_{number}:]"
        with st.container(gap="xxsmall", key=f"step_{key}"):
            page.link(key, tuple(f"{icon} **{label}**" for label in title), "", **query)
            st.caption(t(*text))


@live(run_every=2)
def recent_jobs() -> None:
    """The last jobs with their state and progress."""
    with panels.section(t("Recent jobs", "最近的任务"), "history"):
        st.space("stretch")
        page.link("jobs", ("All jobs", "全部任务"), ":material/arrow_forward:")
    jobs = state.job_store().list(limit=RECENT)
    if not jobs:
        st.caption(
            t(
                "No jobs yet. A job is a table that the model goes through row by row; every finished row is "
                "kept, also when the computer loses power.",
                "还没有任务。任务就是让模型逐行处理一张表格；每个完成的行都会保存，断电也不会丢失。",
            )
        )
    for job in jobs:
        job_line(job)


def job_line(job: Job) -> None:
    """One job: title, state, progress and when."""
    finished = job.done + job.failed
    with st.container(gap="xxsmall", key=f"job_{job.id}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            if not page.link("jobs", (plain(job.title),) * 2, ":material/table_rows:", job=job.id):
                st.markdown(plain(job.title), width="content")
            st.space("stretch")
            panels.job_badge(job.state)
        if job.state in OPEN_JOB and job.total:
            st.progress(min(1.0, finished / job.total))
        parts = [t(f"{finished:,} of {job.total:,} rows", f"{finished:,} / {job.total:,} 行")]
        parts += [t(f"{job.failed:,} failed", f"{job.failed:,} 行失败")] if job.failed else []
        st.caption(" · ".join([*parts, panels.format_ago(job.created, time.time())]))


def where_to_start() -> None:
    """What each page is for, by what the analyst has in hand."""
    st.space("xsmall")
    panels.section(t("Where to start", "从哪里开始"))
    cards = (
        (
            "chat",
            ("I want to try the model", "我想试试模型"),
            (
                "Talk to the loaded model; conversations are kept and exported.",
                "与模型对话，保存并导出对话。",
            ),
        ),
        (
            "batch",
            ("I have a spreadsheet", "我有一张表格"),
            (
                "CSV, Excel or JSON in, one answer per row out. Speed is measured before you start.",
                "输入 CSV、Excel 或 JSON，每行得到一个回答。开始前先测速。",
            ),
        ),
        (
            "jobs",
            ("I started something", "我已启动任务"),
            ("Progress, failed rows, pause, resume and download.", "进度、失败行、暂停、继续与下载。"),
        ),
        (
            "models",
            ("I have a checkpoint", "我有模型文件"),
            (
                "What your folders hold, what memory it takes, load and unload.",
                "查看模型、所需内存，加载与卸载。",
            ),
        ),
    )
    with st.grid(4, min_column_width=220):
        for key, title, text in cards:
            if found := page.entry(key):
                with st.container(border=True, height="stretch", gap="xsmall", key=f"start_{key}"):
                    st.markdown(f":primary[{found.icon}] **{t(*title)}**")
                    st.caption(t(*text))
                    st.space("stretch")
                    page.link(key, icon=":material/arrow_forward:")


main()
