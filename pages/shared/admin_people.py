"""Who uses a shared workbench, when they were last here, and how much of it is theirs."""

from __future__ import annotations

import time

import streamlit as st

from glm_core import access, belongings
from glm_core.errors import GLMError
from pages.shared import admin_jobs, panels, state
from pages.shared.text import t

COMMAND = "python -m glm_core users add NAME"


def section() -> None:
    """A table of all people; nothing for whoever is no administrator."""
    if not admin_jobs.is_admin():
        return
    with st.expander(t("People and their share", "用户与占用"), icon=":material/group:", key="admin_people"):
        try:
            _table()
        except GLMError as error:
            panels.problem(error)
        st.caption(
            t(
                "Users are added, removed and given another password in the shell:",
                "用户的添加、删除和修改密码在命令行中进行：",
            )
            + f" `{COMMAND}`"
        )


def _table() -> None:
    import pandas as pd

    found = state.settings()
    users = access.users_of(found).all()
    seen = access.logins_of(found).seen()
    now, roles = time.time(), {"admin": t("administrator", "管理员"), "user": t("user", "用户")}
    rows = [
        {
            t("Name", "名称"): one.name or t("(without a login)", "（未登录时创建）"),
            t("Role", "角色"): roles[users[one.name].role] if one.name in users else "",
            t("Last seen", "最近访问"): panels.format_ago(seen.get(one.name), now),
            t("Jobs", "任务"): one.jobs,
            t("Rows", "行数"): one.rows,
            t("Conversations", "对话"): one.conversations,
            t("Prompt trials", "提示词对比"): one.trials,
            t("Files", "文件"): panels.format_bytes(one.file_bytes),
        }
        for one in belongings.everything(found, state.job_store(), users)
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", key="people")
