"""One evaluation: live while it runs, then its headline with the interval, and its views."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import evaluate
from glm_core.errors import GLMError
from glm_core.evaluate.scoring import FEW
from pages.shared import (
    evaluate_data,
    evaluate_downloads,
    evaluate_overview,
    evaluate_registry,
    evaluate_rows,
    evaluate_series,
    evaluate_slices,
    evaluate_words,
    job_panel,
    page,
    panels,
    state,
    table_input,
)
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run, Scores
    from glm_core.jobs import Job

LAST_ROWS = 6
SCORING = re.compile(r"Scoring ([\d,]+) of ([\d,]+) rows")
VIEWS = {
    "overview": (("Overview", "概览"), "dashboard"),
    "rows": (("Rows", "逐行"), "table_rows"),
    "slices": (("Slices", "分组"), "view_week"),
    "series": (("Steps & precision", "步数与精度"), "timeline"),
    "download": (("Download", "下载"), "download"),
}


def show(run_id: str) -> None:
    """A run by its id: its progress while it moves, its dashboard once there are answers."""
    job = job_panel.wanted(run_id, "evaluate", ("This job is no evaluation.", "该任务不是评测任务。"))
    if job is None:
        page.link("evaluate", ("All runs", "全部评测"), ":material/arrow_back:")
        return
    if error := state.session(evaluate_registry.PROBLEM):
        panels.problem(error)
        state.session_set(evaluate_registry.PROBLEM, None)
    try:
        run = evaluate.run_of(state.job_store(), run_id, job)
    except GLMError as error:
        panels.problem(error)
        return
    (watch if job.state in (*job_panel.MOVING, "paused") else progress)(run_id, job.state)
    if job.state in job_panel.MOVING or not job.done:
        return
    dashboard(run)


@live(run_every=1)
def watch(run_id: str, drawn: str) -> None:
    """`progress`, looked at every second."""
    with st.container(key="polled_job"):
        progress(run_id, drawn)


def progress(run_id: str, drawn: str) -> None:
    """Title, buttons and how far the run is; the page is drawn anew when the state is no longer the one drawn."""
    job = job_panel.still(run_id, drawn)
    run = evaluate.run_of(state.job_store(), run_id, job)
    with job_panel.head(replace(job, title=run.title)):
        if job.state not in job_panel.MOVING:
            evaluate_registry.names(run, "page")
            evaluate_registry.again(run, "page")
    job_panel.problem()
    st.caption(about(run))
    if job.state != "done":
        _moving(run, job)
    job_panel.message(replace(job, message="") if SCORING.search(job.message) else job)
    if job.state in job_panel.MOVING:
        last_rows(run)


def about(run: Run) -> str:
    """What a run is of, in a line."""
    task = run.task
    parts = [
        plain(evaluate_words.checkpoint(task)),
        evaluate_words.precision(task),
        plain(task.input_name),
        evaluate_words.kind(task.kind),
        "" if run.imported else evaluate_words.method(task.method),
        t(f"{task.few_shot}-shot", f"{task.few_shot} 个示例") if task.few_shot else "",
        t(f"step {run.step:,}", f"第 {run.step:,} 步") if run.step is not None else "",
        *(f":gray-badge[:material/sell: {plain(one)}]" for one in run.tags),
    ]
    return " · ".join(part for part in parts if part)


def _moving(run: Run, job: Job) -> None:
    scoring = SCORING.search(job.message)
    if scoring is not None and job.state == "running":
        done, of = (int(one.replace(",", "")) for one in scoring.groups())
        st.progress(
            done / max(of, 1),
            t(f"Scoring the answers: {done:,} of {of:,} rows", f"正在评分：{done:,} / {of:,} 行"),
        )
        return
    if not run.imported:
        job_panel.figures(job)
    job_panel.bar(job)


def last_rows(run: Run) -> None:
    """The rows answered last."""
    store = state.job_store()
    rows = []
    for result in store.last_results(run.id, LAST_ROWS):
        one = evaluate.answers_page(store, run.id, result.idx, 1)[0]
        told = one["reasoning"] or one["prediction"] or said(str(one["note"]))
        rows.append((str(one["number"]), _short(one["question"]), _short(one["reference"]), _short(told)))
    if rows:
        names = (t("row", "行"), t("question", "问题"), t("correct answer", "参考答案"), t("answer", "回答"))
        st.caption(t("Finished last", "最近完成"))
        st.dataframe(
            table_input.frame(names, rows),
            column_config=table_input.widths(names, rows),
            hide_index=True,
            key=f"evaluate_last_{run.id}",
        )


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


# --- the dashboard ----------------------------------------------------------------------------------------------


def dashboard(run: Run) -> None:
    """The headline, always in sight, and one view under it."""
    try:
        scores = evaluate_data.scores(run)
    except GLMError as error:
        panels.problem(error)
        return
    run = replace(run, scores=scores)
    headline(run, scores)
    views = [one for one in VIEWS if one != "series" or not run.imported]
    key = f"evaluate_view_{run.id}"
    asked = state.query("view")
    if state.session(key) not in views:
        state.session_set(key, asked if asked in views else "overview")
    chosen = st.segmented_control(
        t("View", "视图"),
        views,
        format_func=lambda one: f":material/{VIEWS[one][1]}: {t(*VIEWS[one][0])}",
        required=True,
        key=key,
        label_visibility="collapsed",
    )
    state.query_set("view", chosen if chosen != "overview" else None)
    drawn = {
        "overview": evaluate_overview.show,
        "rows": evaluate_rows.show,
        "slices": evaluate_slices.show,
        "series": evaluate_series.show,
        "download": evaluate_downloads.show,
    }
    drawn[str(chosen)](run, scores)


def headline(run: Run, scores: Scores) -> None:
    """The main score large, where it may lie, on how many rows, and what that means."""
    one, kind = scores.headline, scores.kind
    with st.container(border=True, key="evaluate_headline"):
        st.html(_headline_html(scores))
        st.markdown(sentence(scores))
        if certainty := certain(run, scores):
            st.caption(certainty)
        _counted(scores)
        if one.estimate is not None and one.low is None and one.reason:
            st.caption(f":material/info: {plain(said(one.reason))}")
        for note in scores.notes:
            st.caption(f":material/info: {plain(said(note))}")
        st.caption(
            f":material/function: **{evaluate_words.metric(scores.main)}** · "
            f"{plain(evaluate_words.formula(kind, scores.main))}"
        )


def _headline_html(scores: Scores) -> str:
    """The figure, its interval as a band on the scale, and n; the browser reads the numbers out."""
    from html import escape

    one, kind, name = scores.headline, scores.kind, scores.main
    factor = 100 / scores.unit
    value = evaluate_words.number(one.estimate, kind, name)
    between = evaluate_words.between(one, kind, name)
    interval = (
        t(f"95 % interval {between}", f"95% 区间 {between}")
        if one.low is not None
        else t("no interval", "无区间")
    )
    band = ""
    if one.estimate is not None:
        low = (one.estimate if one.low is None else one.low) * factor
        high = (one.estimate if one.high is None else one.high) * factor
        band = (
            f'<div class="ev-track" aria-hidden="true"><i style="left:{low:.2f}%;width:{max(high - low, 0.6):.2f}%"></i>'
            f'<b style="left:{one.estimate * factor:.2f}%"></b><span>0</span><span class="ev-end">100</span></div>'
        )
    n = t(f"on {scores.n:,} rows", f"共 {scores.n:,} 行")
    return f"""<style>
      .ev-head {{display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem;}}
      .ev-head .ev-name {{font-size: 1.05rem; font-weight: 600; width: 100%; opacity: .8;}}
      .ev-head .ev-value {{font-size: 3.2rem; line-height: 1.05; font-weight: 720; letter-spacing: -.02em;
        font-variant-numeric: tabular-nums;}}
      .ev-head .ev-between {{font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums;}}
      .ev-head .ev-n {{font-size: 1.15rem; opacity: .8;}}
      .ev-track {{position: relative; height: .7rem; margin: .7rem 0 1.3rem; border-radius: .35rem;
        background: rgba(128, 128, 160, .18);}}
      .ev-track i {{position: absolute; top: 0; bottom: 0; border-radius: .35rem; background: #6d6ff0; opacity: .45;}}
      .ev-track b {{position: absolute; top: -.22rem; bottom: -.22rem; width: .26rem; margin-left: -.13rem;
        border-radius: .13rem; background: #6366f1; box-shadow: 0 0 0 1px rgba(128, 128, 160, .5);}}
      .ev-track span {{position: absolute; top: .8rem; left: 0; font-size: .75rem; opacity: .65;}}
      .ev-track .ev-end {{left: auto; right: 0;}}
      </style>
      <div class="ev-head"><span class="ev-name">{escape(evaluate_words.metric(name))}</span>
      <span class="ev-value">{escape(value)}</span><span class="ev-between">{escape(interval)}</span>
      <span class="ev-n">{escape(n)}</span></div>{band}"""


def sentence(scores: Scores) -> str:
    """What the headline means, in words."""
    one, kind, name = scores.headline, scores.kind, scores.main
    if one.estimate is None:
        return t("There is nothing to score yet.", "尚无可评分的内容。")
    between = evaluate_words.between(one, kind, name)
    if kind == "text":
        value = evaluate_words.number(one.estimate, kind, name)
        if one.low is None:
            return t(
                f"The answers share {value} of 100 with the references.",
                f"回答与参考答案的重合度为 {value}（满分 100）。",
            )
        return t(
            f"On average {value} of 100. Over all rows of this sort the mean lies between **{between}** "
            "(95 % confidence).",
            f"平均 {value}（满分 100）。对全部同类数据，均值在 **{between}** 之间（95% 置信度）。",
        )
    right = round(one.estimate * scores.n)
    told = t(
        f"**{right:,} of {scores.n:,}** answers are right.", f"**{scores.n:,} 个回答中 {right:,} 个正确**。"
    )
    if one.low is None:
        return told
    return f"{told} " + t(
        f"Over all rows of this sort the share lies between **{between}** (95 % confidence).",
        f"对全部同类数据，正确率在 **{between}** 之间（95% 置信度）。",
    )


def certain(run: Run, scores: Scores) -> str:
    """How far the headline can be trusted: against always giving the same answer, and by its number of rows."""
    one = scores.headline
    if one.estimate is None or one.low is None or one.high is None:
        return ""
    parts = []
    if scores.kind in ("label", "choice"):
        found = evaluate.views.guess(evaluate_data.rows(run))
        if found is not None:
            share, answer = f"{found.share:.1%}", plain(found.answer)
            if one.low > found.share:
                parts.append(
                    ":green[:material/check_circle:] "
                    + t(
                        f"Certainly better than always answering {answer} ({share}).",
                        f"确定优于始终回答 {answer}（{share}）。",
                    )
                )
            elif one.high < found.share:
                parts.append(
                    ":red[:material/cancel:] "
                    + t(
                        f"Certainly worse than always answering {answer} ({share}).",
                        f"确定不如始终回答 {answer}（{share}）。",
                    )
                )
            else:
                parts.append(
                    ":orange[:material/help:] "
                    + t(
                        f"Not certain to be better than always answering {answer} ({share}).",
                        f"不能确定优于始终回答 {answer}（{share}）。",
                    )
                )
    width = (one.high - one.low) * 100 / scores.unit
    if scores.n < FEW:
        parts.append(
            ":orange[:material/straighten:] "
            + t(f"Only {scores.n:,} rows: they say little.", f"只有 {scores.n:,} 行：参考意义有限。")
        )
    elif width > 10:
        needed = int(scores.n * (width / 10) ** 2)
        parts.append(
            ":orange[:material/straighten:] "
            + t(
                f"The interval is {width:.0f} points wide; about {needed:,} rows would make it 10.",
                f"区间宽 {width:.0f} 分；约需 {needed:,} 行才能缩小到 10 分。",
            )
        )
    return "  \n".join(parts)


def _counted(scores: Scores) -> None:
    """What was counted how, as badges."""
    nothing = {
        "label": t("with none of the labels: wrong", "不是任何标签：算错"),
        "choice": t("without a clear option: wrong", "没有明确选项：算错"),
        "number": t("without a number: wrong", "没有数字：算错"),
        "text": "",
    }[scores.kind]
    parts = [
        (scores.n_empty, t("empty: score 0, counted", "空回答：计 0 分"), "orange", "do_not_disturb_on"),
        (scores.n_no_answer, nothing, "orange", "help"),
        (scores.n_failed, t("failed: not counted", "失败：不计入"), "red", "error"),
        (scores.n_left, t("not answered yet", "尚未回答"), "gray", "pending"),
        (
            scores.n_no_reference,
            t("without a correct answer: not counted", "无参考答案：不计入"),
            "gray",
            "remove",
        ),
        (scores.n_truncated, t("asked with a shortened prompt", "提示词被截断"), "orange", "content_cut"),
    ]
    with st.container(horizontal=True, gap="xsmall", vertical_alignment="center"):
        st.badge(
            t(f"{scores.n:,} rows count", f"计入 {scores.n:,} 行"), icon=":material/tag:", color="violet"
        )
        for count, text, color, icon in parts:
            if count:
                st.badge(f"{count:,} {text}", icon=f":material/{icon}:", color=color)  # type: ignore[arg-type]
