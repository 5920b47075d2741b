"""Batch prediction: a table and a prompt with {column} placeholders in, one answer per row out, as a job."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import (
    cluster_panel,
    job_panel,
    page,
    panels,
    pickers_batch,
    remote_words,
    results_panel,
    state,
    table_input,
    trial,
)
from pages.shared.reruns import live
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.batch import BatchTask
    from glm_core.engine import Engine
    from pages.shared.pickers_batch import Asked
    from pages.shared.table_input import Chosen


def main() -> None:
    """Draw the page: the job in the address, else the form for a new one."""
    corner = page.frame(
        "batch",
        ("Batch prediction", "批量预测"),
        ":material/table_rows:",
        (
            "A table and a prompt in, one answer per row out. Your columns come back as they are.",
            "输入表格和提示词，每行得到一个回答；原有列原样返回。",
        ),
    )
    draft = state.session("batch.draft") or {"job": "", "number": 0}
    state.session_set("batch.draft", draft)
    if draft["job"]:  # also where a second click ended the run that started it
        state.query_set("job", draft["job"])
        draft["job"] = ""
    if job_id := state.query("job"):
        with corner:
            if st.button(t("New batch", "新建批量任务"), icon=":material/add:", key="new_batch"):
                state.query_set("job", None)
                st.rerun()
        show_job(job_id)
    else:
        new_batch(draft)


# --- a new job ------------------------------------------------------------------------------------------------


def new_batch(draft: dict) -> None:
    """Table, prompt, settings, trial and start."""
    for job in state.job_store().list(limit=3, kind="batch", states=job_panel.MOVING):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"now_{job.id}"):
            panels.job_badge(job.state)
            page.link("batch", (plain(job.title),) * 2, ":material/table_rows:", job=job.id)
            st.caption(job_panel.rows_done(job))
    chosen = table_input.choose()
    if chosen is None:
        return
    left, right = st.columns([1, 1])
    with left.container(border=True, height="stretch", key="prompt_card"):
        asked = pickers_batch.prompt(chosen)
    with right.container(border=True, height="stretch", key="preview_card"):
        engine = preview(chosen, asked)
    with st.container(border=True, key="run_card"):
        run_card(draft, chosen, asked, engine)
    panels.rerun_on_model_change()


def preview(chosen: Chosen, asked: Asked) -> Engine | None:
    """The exact prompt of any row with its tokens; the engine where the prompt can be built."""
    from glm_core import batch

    row = panels.section(t("Exact prompt", "实际提示词"), "visibility")
    engine = panels.need_model()
    if engine is None:
        return None
    if not chosen.rows:
        st.caption(t("The table has no rows below its header.", "表头之下没有数据行。"))
        return None
    with row:
        st.space("stretch")
        number = st.number_input(
            t("Row", "行"),
            min_value=1,
            max_value=chosen.rows,
            key=f"preview_row_{chosen.key}",
            width=130,
            label_visibility="collapsed",
            help=t("Row of the table", "表格中的行"),
        )
    on_server = engine.remote is not None
    try:
        prompt = batch.build_prompt(
            engine.tokenizer, asked.template, asked.system, chosen.info.columns, chosen.row(number),
            engine.context, asked.settings.max_new_tokens,
        )  # fmt: skip
    except GLMError as error:
        panels.problem(error)
        if asked.template != (suggested := table_input.suggested_template(chosen)):
            pickers_batch.use_button(chosen, suggested)
        return None
    st.code(
        engine.tokenizer.decode(prompt.ids, skip_special=False), language=None, wrap_lines=True, height=250
    )
    if on_server:
        st.caption(
            ":material/cloud: "
            + t(
                f"Row {number:,}: {len(prompt.text):,} characters, sent as messages. Only the server knows how many tokens "
                "that is; a row that is too long for it fails with its reason.",
                f"第 {number:,} 行：{len(prompt.text):,} 个字符，以消息形式发送。词元数只有服务器知道；"
                "过长的行会失败并注明原因。",
            )
        )
        return engine
    room = engine.context - asked.settings.max_new_tokens
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.badge(
            t(
                f"row {number:,}: {len(prompt.ids):,} of {room:,} tokens",
                f"第 {number:,} 行：{len(prompt.ids):,} / {room:,} 词元",
            ),
            icon=":material/token:",
            color="orange" if prompt.truncated else "gray",
            help=t(
                f"The model takes {engine.context:,} tokens; {asked.settings.max_new_tokens:,} are kept for the answer.",
                f"模型上下文为 {engine.context:,} 词元，其中 {asked.settings.max_new_tokens:,} 留给回答。",
            ),
        )
        if prompt.prefix_length:
            st.badge(
                t(f"{prompt.prefix_length:,} computed once", f"{prompt.prefix_length:,} 词元只计算一次"),
                icon=":material/bolt:",
                color="gray",
                help=t("All rows begin with these tokens.", "所有行都以这些词元开头。"),
            )
    if prompt.truncated:
        kept = len(prompt.text)
        whole = len(batch.render(asked.template, chosen.info.columns, chosen.row(number)))
        st.caption(
            ":orange[:material/content_cut:] "
            + t(
                f"Too long for the model: {whole - kept:,} of {whole:,} characters are cut from the ends of the longest "
                "cells. The template is never cut; the row is marked as truncated.",
                f"超出模型长度：从最长单元格的末尾截去 {whole - kept:,} / {whole:,} 个字符。模板不会被截断；该行会标记为“被截断”。",
            )
        )
    return engine


def run_card(draft: dict, chosen: Chosen, asked: Asked, engine: Engine | None) -> None:
    """The trial and the start."""
    row = panels.section(t("3 · Try and run", "3 · 试跑与运行"), "play_circle")
    total = state.most_rows(min(chosen.rows, asked.limit or chosen.rows))
    with row:
        st.space("stretch")
        where = cluster_panel.choose(engine, "batch") if engine is not None else None
        try_it = st.button(
            t("Try five rows", "试跑五行"), icon=":material/science:", key="try", disabled=engine is None
        )
        run_it = st.button(
            t(f"Run {total:,} rows", f"运行 {total:,} 行"),
            type="primary",
            icon=":material/play_arrow:",
            key=f"run_{draft['number']}",  # a second click of a double click finds no button
            disabled=engine is None,
        )
    if engine is None:
        st.caption(t("This needs a model, a row and a prompt that fits.", "需要模型、数据行和可用的提示词。"))
        return
    loaded = engine.loaded
    st.caption(
        remote_words.answered_by(engine)
        if engine.remote is not None
        else t(
            f"Answers come from **{plain(loaded.info.name)}** ({loaded.precision.upper()}, "
            f"{panels.device_name(loaded.device)}). The job goes on when you close the browser.",
            f"由 **{plain(loaded.info.name)}**（{loaded.precision.upper()}，{panels.device_name(loaded.device)}）回答。"
            "关闭浏览器后任务仍会继续。",
        )
    )
    try:
        asked.settings.check()
        task = make_task(engine, chosen, asked)
        trial.show(task, total)
        if try_it:
            trial.run(engine, task, chosen)
        if run_it:
            start(draft, where.put(task) if where else task, chosen)
    except GLMError as error:
        panels.problem(error)


def make_task(engine: Engine, chosen: Chosen, asked: Asked) -> BatchTask:
    """Everything a job needs to give the same answers again."""
    from glm_core import batch

    loaded = engine.loaded
    return batch.BatchTask(
        checkpoint=str(loaded.info.path),
        checkpoint_fingerprint=fingerprint(engine),
        precision=loaded.precision,
        device=loaded.devices,
        template=asked.template,
        system=asked.system,
        settings=asked.settings,
        output_column=asked.output_column,
        input_name=chosen.name,
        input_path=str(chosen.path),
        input_sha256="",  # read at the start: a large file takes seconds
        columns=chosen.info.columns,
        read_options=chosen.options.to_json(),
        limit_rows=asked.limit,
        generation=engine.tokenizer.generation,
        base=str(loaded.base.path) if loaded.base else "",
        versions=batch.versions(),
        remote=engine.record() if engine.remote is not None else {},  # type: ignore[attr-defined]
    )


def fingerprint(engine: Engine) -> str:
    """The hash of a checkpoint, and of the base under an adapter, as they are now; of a server its address."""
    from glm_core import checkpoints

    if engine.remote is not None:
        return engine.remote.fingerprint
    loaded = engine.loaded
    return checkpoints.fingerprint(loaded.info.path, loaded.base.path if loaded.base else None)


def start(draft: dict, task: BatchTask, chosen: Chosen) -> None:
    """Copy the table into a job and go to it; a large one is copied while the job is already on the screen."""
    from glm_core import batch

    with st.spinner(t("Copying the rows into the job …", "正在将各行复制到任务……")):
        task = replace(task, input_sha256=batch.file_sha256(chosen.path))
        begin = batch.start if chosen.rows <= table_input.AT_ONCE_ROWS else batch.start_in_background
        job = begin(state.job_store(), task, chosen.open())
        draft.update(job=job.id, number=draft["number"] + 1)
    state.supervisor()
    st.rerun()


# --- a job ----------------------------------------------------------------------------------------------------


def show_job(job_id: str) -> None:
    """A job by its id: live while it moves, its results once it stopped."""
    job = job_panel.wanted(job_id, "batch", ("This job is no batch.", "该任务不是批量任务。"))
    if job is None:
        return
    table_input.leave_address()
    job_panel.steady()
    over = job.state in ("done", "cancelled", "failed")
    (progress if over else watch)(job_id, job.state)
    if job.state not in job_panel.MOVING and job.total:
        results_panel.results(job)
    how_it_was_made(job.id)


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
    job_panel.figures(job)
    if job.state in (*job_panel.MOVING, "paused"):
        job_panel.bar(job)
    job_panel.message(job)
    if job.state in job_panel.MOVING:
        job_panel.last_rows(job)


def how_it_was_made(job_id: str) -> None:
    """Prompt, settings, model and versions of a job."""
    from glm_core import batch

    with st.expander(t("How it was made", "任务设置"), icon=":material/receipt_long:"):
        task = state.job_store().get(job_id).task
        st.caption(t("Prompt template", "提示词模板"))
        st.code(task.get("template", ""), language=None, wrap_lines=True)
        st.json(batch.manifest(state.job_store(), job_id), expanded=1)


main()
