"""Fine-tuning: rows with the answers wanted in, a checkpoint out, with a check before and a report after."""

from __future__ import annotations

import streamlit as st

from pages.shared import (
    finetune_adapt,
    finetune_audit,
    finetune_check,
    finetune_data,
    finetune_method,
    finetune_plan,
    finetune_prepare,
    finetune_report,
    finetune_run,
    job_panel,
    page,
    panels,
    state,
)
from pages.shared import finetune_form as form
from pages.shared.reruns import live
from pages.shared.text import plain, t

LISTED = 50


def main() -> None:
    """Draw the page: the training in the address, else one that is open, else the form for a new one."""
    corner = page.frame(
        "finetune",
        ("Fine-tuning", "微调"),
        ":material/tune:",
        (
            "Rows with the answers you want in, a model that gives them out. Checked before, measured after.",
            "输入带期望回答的数据，得到会这样回答的模型。训练前检查，训练后评测。",
        ),
    )
    if job_id := form.value("job", ""):  # also where a second click ended the run that started it
        state.query_set("job", job_id)
        form.put("job", None)
    jobs = state.job_store().list(limit=LISTED, kind="finetune")
    moving = [job for job in jobs if job.state in (*job_panel.MOVING, "paused")]
    asked = state.query("job")
    if not asked and moving and not form.value("new", False) and not state.query("sample"):
        asked = moving[0].id
        state.query_set("job", asked)
    if asked:
        with corner:
            if st.button(t("New training", "新建训练"), icon=":material/add:", key="new_training"):
                state.query_set("job", None)
                form.put("new", True)
                st.rerun()
        show_job(asked)
        return
    for job in moving:
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"now_{job.id}"):
            panels.job_badge(job.state)
            page.link("finetune", (plain(job.title),) * 2, ":material/tune:", job=job.id)
            st.caption(finetune_run.progress_words(job, finetune_run.status_of(job)))
    new_training()
    if jobs:
        with st.container(border=True, key="finetune_list"):
            finetune_run.earlier(jobs)


def new_training() -> None:
    """Data, method, check and start, one under the other."""
    chosen = finetune_data.choose()
    if chosen is None or chosen.columns is None:
        return
    base = finetune_method.base()
    if base is None:
        st.warning(
            t(
                "There is no checkpoint to begin with. Add the folder of one on the Models page.",
                "没有可作为起点的检查点。请在“模型”页添加其文件夹。",
            ),
            icon=":material/deployed_code:",
        )
        page.link("models")
        return
    found = finetune_prepare.prepared(chosen, base)
    if found is None:
        return
    finetune_audit.show(found, finetune_plan.limits_now(found))
    if not found.train:
        return
    asked = finetune_method.choose(found, chosen.file.name)
    if asked is not None:
        finetune_check.show(chosen, found, asked)
    panels.rerun_on_model_change()


def show_job(job_id: str) -> None:
    """A training by its id: live while it moves, its report once it is done."""
    job = job_panel.wanted(job_id, "finetune", ("This job is no training.", "该任务不是训练任务。"))
    if job is None:
        return
    finetune_data.leave_address()
    form.put("new", None)
    job_panel.steady()
    if job.state in job_panel.MOVING:
        watch(job_id, job.state)
        return
    finetune_run.head(job)
    status = finetune_run.status_of(job)
    if (status.manifest or {}).get("state") == "done":
        folder = finetune_run.folder_of(job)
        checkpoint = str(job.task.get("task", {}).get("checkpoint", ""))
        finetune_report.show(folder.name, folder, checkpoint, status)
        finetune_adapt.show(status, folder)
    with st.container(border=True, key="finetune_curves"):
        panels.section(t("How it went", "训练过程"), "monitoring")
        finetune_run.live_view(job, status)


@live(run_every=1)
def watch(job_id: str, drawn: str) -> None:
    """A training that moves, looked at every second; the page is drawn anew when its state changes."""
    job = job_panel.still(job_id, drawn)
    with st.container(key="polled_job"):
        finetune_run.head(job)
        finetune_run.live_view(job, finetune_run.status_of(job))


main()
