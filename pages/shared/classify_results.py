"""The results of a classification: how often each label came, the rows, and the downloads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from pages.shared import charts, classify_data, classify_truth, panels, results_panel, state
from pages.shared.classify_data import Found
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.jobs import Job

PAGE_ROWS = 100


def overview(this: Found) -> None:
    """Labels and downloads beside each other."""
    left, right = st.columns(2)
    with left.container(border=True, height="stretch", key="classify_labels"):
        _distribution(this)
    with right.container(border=True, height="stretch", key="classify_downloads"):
        downloads(this.job)


def _distribution(this: Found) -> None:
    """How many rows each label got; with correct labels, how many have it."""
    import plotly.graph_objects as go

    panels.section(t("Labels", "标签分布"), "bar_chart")
    c = charts.colors()
    names = [this.shown(k) for k in range(len(this.names))]
    total = len(this.answers)
    counts = np.bincount(this.answers.answer[this.answers.answer >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable") if len(names) > 6 else np.arange(len(names))
    bars = [(t("answers", "答案"), c["main"], counts, total)]
    if this.rows is not None and len(this.rows):
        true = np.bincount(this.rows.truth, minlength=len(names))
        bars.append((t("correct labels", "正确标签"), c["quiet"], true, len(this.rows)))
    figure = go.Figure()
    for title, color, values, whole in bars:
        shares = [values[k] / max(whole, 1) for k in order]
        figure.add_bar(
            name=title,
            x=shares,
            y=[charts.escaped(names[k]) + "  " for k in order],
            orientation="h",
            marker={"color": color, "cornerradius": 4},
            text=[f"{values[k]:,} · {share:.1%}" for k, share in zip(order, shares, strict=True)],
            textposition=["inside" if share > 0.45 else "outside" for share in shares],
            insidetextanchor="end",
            insidetextfont={"color": c["inside"] if color == c["main"] else c["text"]},
            outsidetextfont={"color": c["text"]},
            hovertemplate="%{y}: %{text}<extra>" + title + "</extra>",
            cliponaxis=False,
            constraintext="none",
        )
    height = (34 if len(bars) == 1 else 56) * len(names) + (20 if len(bars) == 1 else 50)
    charts.dress(figure, height, barmode="group", bargap=0.25, showlegend=len(bars) > 1)
    figure.update_xaxes(visible=False, range=[0, 1.08])
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"color": c["text"], "size": 13})
    charts.draw(figure, f"classify_counts_{this.job.id}")
    review = sum(1 for reason in this.answers.reasons if reason)
    if review:
        st.caption(
            ":orange[:material/rate_review:] "
            + t(f"{review:,} rows are marked for review.", f"{review:,} 行标记为待审。")
        )


# --- the rows --------------------------------------------------------------------------------------------------


def table(this: Found) -> None:
    """The rows in pages, all or some of them, in the order of the table or the doubtful ones first."""
    row = panels.section(t("Rows", "各行结果"), "table_rows")
    kinds = {"all": (t("All", "全部"), this.answers.idx)}
    marked = np.array([bool(reason) for reason in this.answers.reasons], dtype=bool)
    if marked.any():
        kinds["review"] = (t("To review", "待审"), this.answers.idx[marked])
    if this.rows is not None:
        kinds["wrong"] = (t("Wrong", "错误"), this.rows.idx[~this.rows.right])
    with row:
        st.space("stretch")
        chosen = st.segmented_control(
            t("Rows shown", "显示的行"),
            [*kinds, *(["failed"] if this.job.failed else [])],
            format_func=lambda one: (
                f"{kinds[one][0]} {len(kinds[one][1]):,}"
                if one in kinds
                else t(f"Failed {this.job.failed:,}", f"失败 {this.job.failed:,}")
            ),
            default="all",
            required=True,
            key=f"classify_filter_{this.job.id}",
            label_visibility="collapsed",
        )
        first = st.selectbox(
            t("Order", "排序"),
            ["table", "doubtful", "sure"],
            format_func={
                "table": t("as in the table", "按表格顺序"),
                "doubtful": t("least sure first", "最不确定优先"),
                "sure": t("surest first", "最确定优先"),
            }.__getitem__,
            key=f"classify_order_{this.job.id}",
            label_visibility="collapsed",
            width=180,
        )
    if chosen == "failed":
        _failed(this.job)
        return
    rows = kinds[chosen][1]
    if first != "table" and len(rows):
        margin = this.answers.margin[this.place(rows)]
        rows = rows[np.lexsort((rows, margin if first == "doubtful" else -margin))]
    page_of(this, rows, f"{chosen}_{first}")


def page_of(this: Found, rows: np.ndarray, name: str) -> None:
    """Some answered rows, a hundred at a time."""
    if not len(rows):
        st.caption(t("No rows here.", "没有这样的行。"))
        return
    pages = -(-len(rows) // PAGE_ROWS)
    place = st.container()
    number = st.pagination(pages, key=f"classify_page_{this.job.id}_{name}_{pages}") if pages > 1 else 1
    some = [int(idx) for idx in rows[(number - 1) * PAGE_ROWS : number * PAGE_ROWS]]
    frame, settings = classify_data.frame(this, some)
    place.dataframe(
        frame,
        column_config=settings,
        height=min(36 * (len(some) + 1) + 2, 470),
        key=f"classify_rows_{this.job.id}_{name}",
    )


def _failed(job: Job) -> None:
    from pages.shared import table_input

    columns = list(job.task["columns"])
    found = state.job_store().results_page(job.id, 0, PAGE_ROWS, "failed")
    width = len(columns)
    rows = [((*cells, *[""] * width)[:width]) + (said(one.error) if one else "",) for _, cells, one in found]
    names = (*columns, t("why ", "原因 "))
    st.dataframe(
        table_input.frame(names, rows, [idx + 1 for idx, _, _ in found]),
        column_config=table_input.widths(names, rows, 290),
        key=f"classify_failed_{job.id}",
    )
    if job.failed > PAGE_ROWS:
        st.caption(t(f"The first {PAGE_ROWS}.", f"前 {PAGE_ROWS} 行。"))


# --- correct labels --------------------------------------------------------------------------------------------


def truth(this: Found) -> None:
    """The column of correct labels: which it is, and the way to choose or change it after the run."""
    from glm_core.review import Reviews

    job, reviews = this.job, Reviews(state.job_store())
    columns = list(job.task["columns"])
    used = tuple(columns[i] for i in classify_data.text_columns(job))
    now = this.truth.column if this.truth else ""
    title = (
        t(f"Correct labels: {plain(now)}", f"正确标签：{plain(now)}")
        if now
        else t("Measure against correct labels", "与正确标签比较")
    )
    with st.expander(title, icon=":material/fact_check:"):
        column = classify_truth.column(columns, used, f"classify_truth_{job.id}", now)
        if not column:
            if now and st.button(t("Measure no longer", "不再评测"), key="truth_drop"):
                reviews.set_truth(job.id, None)
                st.rerun()
            return
        counts = classify_data.value_counts(job, columns.index(column))
        if len(counts) > classify_data.MOST_KINDS:
            st.warning(
                t(
                    f"{plain(column)} has more than {classify_data.MOST_KINDS:,} different values: it holds no labels.",
                    f"{plain(column)} 有超过 {classify_data.MOST_KINDS:,} 种取值，不像标签列。",
                )
            )
            return
        chosen = classify_truth.mapping(column, counts, this.labels, f"job_{job.id}", this.truth)
        if chosen is not None and chosen != this.truth:
            if st.button(t("Measure with these labels", "用这些标签评测"), type="primary", key="truth_set"):
                reviews.set_truth(job.id, chosen)
                st.rerun()


# --- downloads ---------------------------------------------------------------------------------------------------


def downloads(job: Job) -> None:
    """The table with the answers beside it, in four formats."""
    from glm_core import classify

    results_panel.downloads(
        job,
        classify.export,
        t(
            "Your columns unchanged and in their order, then the label, the probability of each label, the margin, "
            "the mass outside and the reason to review.",
            "原有列及顺序不变，其后依次为标签、各标签的概率、领先幅度、标签之外的概率和送审原因。",
        ),
    )
