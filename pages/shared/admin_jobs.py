"""The queue as an administrator sees it: everybody's jobs, whose they are, and their turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from glm_core.access import NOBODY
from glm_core.errors import GLMError
from pages.shared import state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.jobs import Job


def is_admin() -> bool:
    """Whether this session is an administrator's, where several people share the workbench."""
    return (state.person() or NOBODY).role == "admin"


def everybody() -> bool:
    """Whether the jobs of all people are to be listed."""
    return is_admin() and bool(state.remember("jobs.everybody", False))


def choice() -> None:
    """Own jobs, or everybody's; nothing for whoever is no administrator."""
    if is_admin():
        st.toggle(
            t("Jobs of everybody", "所有人的任务"),
            help=t(
                "Off: your own, and those that were made without a login.",
                "关闭时仅显示您自己的任务，以及未登录时创建的任务。",
            ),
            **state.kept_widget("jobs.everybody", False),
        )


def owner(job: Job) -> None:
    """Whose job it is, where that is somebody else."""
    who = state.person() or NOBODY
    if who.role != "admin" or job.user == who.name:
        return
    st.badge(
        plain(job.user) if job.user else t("without owner", "无所有者"),
        icon=":material/person:",
        color="blue" if job.user else "gray",
    )


def turn(job: Job) -> None:
    """The buttons that give a queued job another turn."""
    if job.state != "queued" or not is_admin():
        return
    waiting = [one.id for one in state.job_store().in_turn()]
    if job.id not in waiting or len(waiting) < 2:
        return
    now = waiting.index(job.id)
    with st.container(horizontal=True, width="content", gap="xxsmall", key=f"turn_{job.id}"):
        for name, icon, to, words in (
            ("next", "vertical_align_top", 0, t("Run it next", "下一个运行")),
            ("earlier", "arrow_upward", now - 1, t("One place earlier", "提前一位")),
            ("later", "arrow_downward", now + 1, t("One place later", "推后一位")),
        ):
            st.button(
                "",
                icon=f":material/{icon}:",
                key=f"{name}_{job.id}",
                type="tertiary",
                help=words,
                disabled=not 0 <= to < len(waiting) or to == now,
                on_click=_move,
                args=(job.id, to),
            )


def _move(job_id: str, to: int) -> None:
    try:
        state.job_store().move(job_id, to)
    except GLMError as error:
        state.session_set("job_problem", error)
    else:
        state.session_set("job_problem", None)
