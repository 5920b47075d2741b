"""The registry: every run with its headline, to find, open, name, repeat, compare and delete."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import evaluate
from glm_core.errors import GLMError
from pages.shared import evaluate_beside, evaluate_data, evaluate_words, job_panel, page, panels, state
from pages.shared.reruns import live
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run

PAGE_RUNS = 12
MOST_COMPARED = 4
PICKED = "evaluate.picked"
PROBLEM = "evaluate.problem"


def show() -> None:
    """Runs under way, the runs so far with their filters, and what can be done with those that are chosen."""
    plain_links()
    found = evaluate_data.runs()
    if error := state.session(PROBLEM):
        panels.problem(error)
        state.session_set(PROBLEM, None)
    if not found:
        return
    moving = [one.id for one in found if one.state in job_panel.MOVING]
    if moving:
        under_way(moving)
    with st.container(border=True, key="evaluate_registry"):
        row = panels.section(t("Runs", "评测记录"), "inventory_2")
        with row:
            st.caption(f"{len(found):,}")
        shown = _filtered(found)
        by_id = {one.id: one for one in found}
        _chosen([by_id[one] for one in picked() if one in by_id])  # the first chosen is A
        if not shown:
            st.caption(t("No run fits these filters.", "没有符合条件的评测。"))
            return
        pages = -(-len(shown) // PAGE_RUNS)
        place = st.container(gap="xsmall")
        number = st.pagination(pages, key=f"evaluate_page_{pages}") if pages > 1 else 1
        with place:
            for run in shown[(number - 1) * PAGE_RUNS : number * PAGE_RUNS]:
                _line(run)
    _best(shown)


def plain_links() -> None:
    """Links to runs look like links, not like the entry of the menu that is open."""
    st.html(
        """<style>
        :is([class*="st-key-run_"], [class*="st-key-moving_"], [class*="st-key-series_"])
          [data-testid="stPageLink-NavLink"] {background: none; padding-left: 0;}
        </style>"""
    )


@live(run_every=1)
def under_way(drawn: list[str]) -> None:
    """The runs that are not finished, looked at every second; the page is drawn anew when one ends."""
    store = state.job_store()
    jobs = store.list(limit=100, kind="evaluate", states=job_panel.MOVING)
    if {one.id for one in jobs} != set(drawn):
        st.rerun()
    with st.container(border=True, key="polled_runs", gap="xsmall"):
        for job in jobs:
            with st.container(
                horizontal=True, vertical_alignment="center", gap="small", key=f"moving_{job.id}"
            ):
                panels.job_badge(job.state)
                title = evaluate.run_of(store, job.id, job).title
                page.link("evaluate", (plain(title),) * 2, "", run=job.id)
                st.caption(job_panel.rows_done(job))


def picked() -> list[str]:
    """The ids of the chosen runs, in the order they were chosen."""
    return list(state.session(PICKED, []))


def _filtered(found: list[Run]) -> list[Run]:
    """The runs that fit what is searched for, in the order asked for."""
    tags = sorted({tag for one in found for tag in one.tags})
    kinds = [one for one in evaluate.KINDS if any(run.task.kind == one for run in found)]
    with st.grid(4, min_column_width=150):
        text = st.text_input(
            t("Find", "查找"),
            placeholder=t("name, checkpoint, file", "名称、检查点、文件"),
            icon=":material/search:",
            key="evaluate_find",
            persist_state="session",
        )
        kind = st.selectbox(
            t("Kind of task", "任务类型"),
            ["", *kinds],
            format_func=lambda one: evaluate_words.kind(one) if one else t("all", "全部"),
            key="evaluate_filter_kind",
        )
        tag = st.selectbox(
            t("Tag", "标记"),
            ["", *tags],
            format_func=lambda one: one or t("all", "全部"),
            key="evaluate_filter_tag",
        )
        order = st.selectbox(
            t("Order", "排序"),
            ["new", "best"],
            format_func={
                "new": t("newest first", "最新优先"),
                "best": t("best first", "最好优先"),
            }.__getitem__,
            key="evaluate_order",
        )
    wanted = str(text or "").strip().casefold()
    shown = [
        one
        for one in found
        if (not kind or one.task.kind == kind)
        and (not tag or tag in one.tags)
        and (not wanted or wanted in _searched(one))
    ]
    if order == "best":
        shown.sort(key=_value, reverse=True)
    return shown


def _searched(run: Run) -> str:
    parts = (run.title, run.id, run.task.input_name, evaluate_words.checkpoint(run.task), *run.tags)
    return "\n".join(parts).casefold()


def _value(run: Run) -> float:
    """The headline as a share of all there is to reach; -1 where there is none."""
    if run.scores is None or run.scores.headline.estimate is None:
        return -1.0
    return float(run.scores.headline.estimate) / run.scores.unit


def headline(run: Run) -> str:
    """A run's main score in a few words, or how far it is."""
    if run.scores is None or run.scores.headline.estimate is None:
        return ""
    return f"{evaluate_words.metric(run.scores.main)} {evaluate_beside.score(run)}"


def _line(run: Run) -> None:
    """One run: a box to choose it, its name, headline, rows, checkpoint, tags and age."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"run_{run.id}"):
        st.checkbox(
            t(f"Choose {_spoken(run.title)}", f"选择 {_spoken(run.title)}"),
            value=run.id in picked(),
            key=f"evaluate_pick_{run.id}",
            label_visibility="collapsed",
            on_change=_pick,
            args=(run.id,),
        )
        with st.container(gap=None, width="stretch"):
            with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                page.link("evaluate", (f"**{plain(run.title)}**",) * 2, "", run=run.id)
                if run.state != "done":
                    panels.job_badge(run.state)
                for tag in run.tags[:6]:
                    st.badge(plain(tag), icon=":material/sell:", color="gray")
                st.space("stretch")
                if text := headline(run):
                    st.markdown(f"**{text}**", width="content")
            st.caption(" · ".join(part for part in _facts(run) if part))


def _spoken(title: str) -> str:
    """A title for a label that is read out and not drawn, where escapes would be read as well."""
    return "".join(" " if one in "[]()<>!`$*_\\" else one for one in title)


def _facts(run: Run) -> list[str]:
    scores = run.scores
    return [
        evaluate_words.kind(run.task.kind),
        t(f"{scores.n:,} rows", f"{scores.n:,} 行") if scores is not None else job_panel.rows_done(run.job),
        plain(evaluate_words.checkpoint(run.task)),
        evaluate_words.precision(run.task),
        plain(run.task.input_name),
        t(f"step {run.step:,}", f"第 {run.step:,} 步") if run.step is not None else "",
        panels.format_ago(run.job.created, time.time()),
    ]


def _pick(run_id: str) -> None:
    chosen = picked()
    if state.session(f"evaluate_pick_{run_id}"):
        chosen = [*chosen, run_id] if run_id not in chosen else chosen
    else:
        chosen = [one for one in chosen if one != run_id]
    state.session_set(PICKED, chosen)


def _clear() -> None:
    for run_id in picked():
        state.session_set(f"evaluate_pick_{run_id}", False)
    state.session_set(PICKED, [])


def _chosen(runs: list[Run]) -> None:
    """What can be done with the chosen runs."""
    if not runs:
        st.caption(
            t(
                "Tick runs to compare, rename, repeat or delete them.",
                "勾选评测记录后可对比、重命名、重跑或删除。",
            )
        )
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="evaluate_chosen"):
        st.badge(t(f"{len(runs)} chosen", f"已选 {len(runs)} 个"), icon=":material/check:", color="violet")
        if 2 <= len(runs) <= MOST_COMPARED:
            ids = ",".join(one.id for one in runs)
            if not page.link("compare", ("Compare", "对比"), ":material/compare:", runs=ids):
                st.caption(t("The Comparison page is not installed.", "未安装“对比”页。"))
        elif len(runs) > MOST_COMPARED:
            st.caption(t(f"At most {MOST_COMPARED} can be compared.", f"最多对比 {MOST_COMPARED} 个。"))
        if len(runs) == 1:
            names(runs[0], "list")
            again(runs[0], "list")
        with st.popover(t("Delete", "删除"), icon=":material/delete:", key="evaluate_ask_delete"):
            busy = [one for one in runs if one.state in ("preparing", "running")]
            if busy:
                st.markdown(
                    t("Cancel what is running before you delete it.", "请先取消正在运行的任务，再删除。")
                )
            else:
                st.markdown(
                    t(
                        f"Delete {len(runs)} runs with their answers and scores? This cannot be undone.",
                        f"删除 {len(runs)} 个评测及其回答和分数？此操作无法撤销。",
                    )
                )
                st.button(
                    t("Yes, delete", "确认删除"),
                    type="primary",
                    icon=":material/delete_forever:",
                    key="evaluate_delete",
                    on_click=_delete,
                    args=([one.id for one in runs],),
                )
        st.button(t("Clear", "清除选择"), key="evaluate_clear", type="tertiary", on_click=_clear)


def names(run: Run, place: str) -> None:
    """Title and tags of a run, to change."""
    key = f"{place}_{run.id}"
    with (
        st.popover(t("Name, tags", "名称与标记"), icon=":material/sell:", key=f"evaluate_names_{key}"),
        st.form(f"evaluate_form_{key}", border=False),
    ):
        title = st.text_input(t("Name", "名称"), value=run.title, key=f"evaluate_name_{key}")
        tags = st.text_input(
            t("Tags, separated by commas", "标记，用逗号分隔"),
            value=", ".join(run.tags),
            key=f"evaluate_tags_{key}",
        )
        if st.form_submit_button(
            t("Save", "保存"), type="primary", icon=":material/save:", key=f"evaluate_save_{key}"
        ):
            try:
                store = state.job_store()
                if title.strip() != run.title:
                    evaluate.rename(store, run.id, title)
                evaluate.tag(store, run.id, tags.replace("，", ",").split(","))
            except GLMError as error:
                state.session_set(PROBLEM, error)
            st.rerun()


def again(run: Run, place: str) -> None:
    """The same rows once more, with the same settings and seed: equal answers, if nothing changed."""
    if run.imported or run.state in job_panel.MOVING:
        return
    st.button(
        t("Run again", "重跑"),
        icon=":material/replay:",
        key=f"evaluate_again_{place}_{run.id}",
        help=t(
            "The same rows, checkpoint, settings and seed as a new run; its scores are equal to the digit on this machine.",
            "相同的行、检查点、设置和种子，作为新的评测；在本机上分数逐位相等。",
        ),
        on_click=_again,
        args=(run.id,),
    )


def _again(run_id: str) -> None:
    try:
        made = evaluate.rerun(state.job_store(), run_id)
    except GLMError as error:
        state.session_set(PROBLEM, error)
        return
    state.supervisor()
    state.query_set("run", made.id)
    _clear()


def _delete(ids: list[str]) -> None:
    store = state.job_store()
    for run_id in ids:
        try:
            evaluate.delete(store, run_id)
        except GLMError as error:
            state.session_set(PROBLEM, error)
        for file in state.exports().glob(f"{run_id}-*"):
            file.unlink(missing_ok=True)
    _clear()


def _best(shown: list[Run]) -> None:
    """The checkpoints of the file that most of these runs are on, the best first."""
    groups: dict[str, list[Run]] = {}
    for one in shown:
        if one.scores is not None:
            groups.setdefault(one.task.input_sha256, []).append(one)
    for runs in sorted(groups.values(), key=len, reverse=True)[:1]:
        same = evaluate_beside.alike(runs[0], runs)
        if len(same) > 1:
            with st.container(border=True, key="evaluate_best"):
                st.caption(plain(runs[0].task.input_name))
                evaluate_beside.draw(same, same[0].id, "evaluate_best_chart")
