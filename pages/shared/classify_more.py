"""A classification by the values of a column, the share of a label among all rows, and a plain classifier beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from glm_core.review import Reviews
from pages.shared import charts, classify_data, classify_measures, panels, state
from pages.shared.classify_quality import between, number
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.statistics import Interval
    from pages.shared.classify_data import Found
    from pages.shared.classify_measures import Compared, Prevalence, Slice

MOST_DRAWN = 15
SEEN_ROWS = 500  # looked at to find a column to group by
COMPARED_ROWS = 20_000


def slices(this: Found) -> None:
    """Accuracy per value of a column; values of fewer than 30 rows are pale, as they say little."""
    assert this.rows is not None
    with st.container(border=True, key="classify_slices"):
        panels.section(t("By the values of a column", "按列取值分组"), "view_week")
        columns = list(this.job.task["columns"])
        used = [columns[i] for i in classify_data.text_columns(this.job)]
        choices = [
            one for one in columns if one not in used and (this.truth is None or one != this.truth.column)
        ]
        if not choices:
            st.caption(t("The table has no other column.", "表格没有其他列。"))
            return
        column = st.selectbox(
            t("Column", "列"),
            choices,
            index=choices.index(_grouping(this, choices)),
            key=f"classify_slice_{this.job.id}",
            persist_state="session",
        )
        values = classify_data.column(this.job.id, this.job.total, columns.index(column))
        found = classify_measures.slices(
            this.rows, [values[i] for i in this.rows.idx.tolist()], this.positive
        )
        if len(found) > 1 and all(one.few for one in found):
            st.caption(
                ":orange[:material/info:] "
                + t(
                    f"No value of {plain(column)} has {classify_measures.FEW} rows: none of this is reliable.",
                    f"{plain(column)} 的各取值都不足 {classify_measures.FEW} 行，结果不可靠。",
                )
            )
        if any(not one.few for one in found) or len(found) <= MOST_DRAWN:
            _draw_slices(found[:MOST_DRAWN], this, column)
        _table_of_slices(found, this)


def _grouping(this: Found, choices: list[str]) -> str:
    """The column with the fewest different values in the first rows, two at least: the likeliest one to group by."""
    columns = list(this.job.task["columns"])
    rows = Reviews(state.job_store()).cells(this.job.id, range(min(SEEN_ROWS, this.job.total))).values()
    kinds = {
        one: len({row[columns.index(one)] for row in rows if columns.index(one) < len(row)})
        for one in choices
    }
    return min(choices, key=lambda one: (kinds[one] < 2, kinds[one]))


def _draw_slices(found: list[Slice], this: Found, column: str) -> None:
    import plotly.graph_objects as go

    assert this.rows is not None
    c = charts.colors()
    figure = go.Figure()
    whole = float(this.rows.right.mean())
    for few, color in ((False, c["main"]), (True, c["quiet"])):
        some = [one for one in found if one.few == few]
        points = [one.accuracy.estimate or 0.0 for one in some]
        figure.add_scatter(
            x=points,
            y=[charts.escaped(one.value) or t("(empty)", "（空）") for one in some],
            mode="markers",
            marker={"color": color, "size": 11},
            error_x={
                "type": "data", "symmetric": False, "color": color, "thickness": 2, "width": 4,
                "array": [(one.accuracy.high or 0) - p for one, p in zip(some, points, strict=True)],
                "arrayminus": [p - (one.accuracy.low or 0) for one, p in zip(some, points, strict=True)],
            },
            customdata=[f"n = {one.n:,}" for one in some],
            hovertemplate="%{y}: %{x:.1%}, %{customdata}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=whole, line={"color": c["second"], "dash": "dash", "width": 1.5})
    charts.dress(figure, 34 * len(found) + 60, t("Accuracy (dashed: all rows)", "准确率（虚线：全部行）"))
    figure.update_xaxes(tickformat=".0%", showgrid=True)
    order = [charts.escaped(one.value) or t("(empty)", "（空）") for one in found]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(dict.fromkeys(order)), autorange="reversed",
        tickfont={"color": c["text"]},
    )  # fmt: skip
    charts.draw(figure, f"classify_slices_{this.job.id}_{column}")


def _table_of_slices(found: list[Slice], this: Found) -> None:
    import pandas as pd

    names = [t("value", "取值"), t("rows", "行数"), t("accuracy", "准确率"), t("95 % interval", "95% 区间")]
    if this.positive is not None:
        shown = this.shown(this.positive)
        names += [
            t(f"answered {shown}", f"判为 {shown}"),
            t(f"is {shown}", f"实为 {shown}"),
        ]
    rows = []
    for one in found:
        row = [one.value, one.n, number(one.accuracy, True), between(one.accuracy, True)]
        if this.positive is not None:
            row += [f"{one.positive_rate or 0:.1%}", f"{one.positive_true or 0:.1%}"]
        rows.append(row)
    pale = [one.few for one in found]
    frame = pd.DataFrame(rows, columns=names)
    styled = frame.style.apply(
        lambda row: ["opacity: 0.45; color: gray" if pale[row.name] else ""] * len(row), axis=1
    )
    st.dataframe(
        styled, hide_index=True, height=min(36 * (len(rows) + 1) + 2, 400), key=f"slices_{this.job.id}"
    )
    if any(pale):
        st.caption(
            t(
                f"Grey: fewer than {classify_measures.FEW} rows, which say little.",
                f"灰色：不足 {classify_measures.FEW} 行，参考意义有限。",
            )
        )


# --- how many there are of a label -----------------------------------------------------------------------------


@st.cache_data(max_entries=8, show_spinner=False)
def _prevalence(job_id: str, stamp: str, mapping: str, positive: int) -> Prevalence:
    this = classify_data.found(state.job_store().get(job_id))
    assert this.rows is not None
    return classify_measures.prevalence(this.answers, this.rows, positive)


def share(this: Found) -> None:
    """How many of all rows have a label, with what is known of the model's errors."""
    with st.container(border=True, key="classify_share"):
        panels.section(t("Share of a label among all rows", "某标签在全部行中的占比"), "percent")
        positive = st.selectbox(
            t("Label", "标签"),
            range(len(this.names)),
            index=this.positive if this.positive is not None else 0,
            format_func=this.shown,
            key=f"classify_share_{this.job.id}",
            persist_state="session",
        )
        found = _prevalence(this.job.id, this.stamp, repr(this.truth), int(positive))
        rest = found.n - found.n_labelled
        if not rest:
            st.info(
                t(
                    "All rows have a correct label, so their share is simply counted: there is nothing to estimate.",
                    "所有行都有正确标签，占比可直接计数，无需估计。",
                ),
                icon=":material/info:",
            )
        words = {
            "ppi": (
                t("Corrected (PPI)", "校正（PPI）"),
                t(
                    f"The answers to the {rest:,} rows without a label, put right by the {found.n_labelled:,} labelled "
                    "ones, which have to be a random sample.",
                    f"对 {rest:,} 行无标签数据的答案，用 {found.n_labelled:,} 行标注数据校正；标注行须为随机抽样。",
                ),
                found.ppi,
            ),
            "rogan": (
                t("Corrected (Rogan-Gladen)", "校正（Rogan-Gladen）"),
                t(
                    "The answers corrected by how often the model finds and how often it mistakes the label.",
                    "按模型的灵敏度与特异度校正。",
                ),
                found.rogan_gladen,
            ),
            "naive": (
                t("As answered", "按答案计数"),
                t("The model's mistakes are not corrected.", "未校正模型的错误。"),
                found.naive,
            ),
            "labelled": (
                t("Correct labels alone", "仅正确标签"),
                t("Without the model.", "不使用模型。"),
                found.labelled,
            ),
        }
        if not rest:
            words = {name: words[name] for name in ("labelled", "naive")}
        with st.grid(len(words), min_column_width=170):
            for title, help_, one in words.values():
                st.metric(
                    title, number(one, True), between(one, True), border=True, delta_color="off",
                    delta_arrow="off", help=help_,
                )  # fmt: skip
        _draw_shares([(title, one) for title, _, one in words.values()], this.job.id)
        for title, _, one in words.values():
            if one.reason:
                st.caption(f":material/info: {title}: {plain(said(one.reason))}")


def _draw_shares(found: list[tuple[str, Interval]], job_id: str) -> None:
    import plotly.graph_objects as go

    c = charts.colors()
    some = [(title, one) for title, one in found if one.estimate is not None]
    if not some:
        return
    points = [one.estimate or 0.0 for _, one in some]
    figure = go.Figure(
        go.Scatter(
            x=points,
            y=[title for title, _ in some],
            mode="markers",
            marker={"color": c["main"], "size": 12},
            error_x={
                "type": "data", "symmetric": False, "color": c["main"], "thickness": 2.5, "width": 5,
                "array": [(one.high if one.high is not None else p) - p for (_, one), p in zip(some, points, strict=True)],
                "arrayminus": [p - (one.low if one.low is not None else p) for (_, one), p in zip(some, points, strict=True)],
            },
            hovertemplate="%{y}: %{x:.2%}<extra></extra>",
        )
    )  # fmt: skip
    charts.dress(
        figure, 42 * len(some) + 60, t("Share of all rows, 95 % interval", "占全部行的比例，95% 区间")
    )
    figure.update_xaxes(tickformat=".0%", showgrid=True)
    figure.update_yaxes(autorange="reversed", tickfont={"color": c["text"]})
    charts.draw(figure, f"classify_shares_{job_id}")


# --- a plain classifier on the same rows ------------------------------------------------------------------------


class Comparing(state.Background):
    """The last comparison with the baseline asked for; on many rows it takes a minute."""

    def __init__(self) -> None:
        super().__init__("glm-baseline")
        self.key = ""
        self.found: Compared | None = None
        self.begun = 0.0

    def start(self, this: Found, key: str) -> None:
        """Fit the baseline on the labelled rows in the background."""
        rows = this.rows
        assert rows is not None
        texts = classify_data.texts(this.job)
        own = [texts[i] for i in rows.idx.tolist()]

        def prepare() -> None:
            self.key, self.found, self.begun = key, None, time.monotonic()

        def work() -> None:
            self.found = classify_measures.compared(rows, own, COMPARED_ROWS)

        self.begin(
            prepare,
            work,
            lambda reason: GLMError(
                f"The baseline was not fitted: {reason}.",
                "The terminal shows where; choose other correct labels.",
            ),
        )


_comparing = Comparing()


def baseline(this: Found) -> None:
    """TF-IDF with logistic regression on the same rows, and a paired test of the two."""
    with st.container(border=True, key="classify_baseline"):
        panels.section(t("A plain classifier on the same rows", "同样的行上的普通分类器"), "functions")
        st.caption(
            t(
                "TF-IDF and logistic regression need no language model. Learned here from your labelled rows, each row "
                "judged by a fit on other rows.",
                "TF-IDF 加逻辑回归不需要语言模型。用您标注的行训练，每一行都由在其他行上训练的模型判断。",
            )
        )
        _baseline(this.job.id)


@live(run_every=1)
def _baseline(job_id: str) -> None:
    this = classify_data.found(state.job_store().get(job_id))
    if this.rows is None:
        return
    key = f"{job_id} {this.stamp} {this.truth!r}"
    if _comparing.busy:
        st.progress(0.0)
        st.caption(
            ":material/progress_activity: " + t("Learning from the labelled rows …", "正在用标注行训练……")
        )
        return
    mine = _comparing.key == key
    if mine and _comparing.error is not None:
        panels.problem(_comparing.error)
    if not (mine and _comparing.found is not None):
        st.button(
            t("Compare", "比较"), type="primary", icon=":material/compare_arrows:", key="baseline_start",
            on_click=_comparing.start, args=(this, key),
        )  # fmt: skip
        return
    _compared(_comparing.found, state.job_store().progress(this.job.id).rate)


def _compared(found: Compared, rate: float) -> None:
    test = found.test
    with st.grid(3, min_column_width=170):
        st.metric(
            t("This model", "本模型"), number(found.model, True), between(found.model, True), icon=":material/neurology:",
            border=True, delta_color="off", delta_arrow="off",
        )  # fmt: skip
        st.metric(
            t("TF-IDF baseline", "TF-IDF 基线"), number(found.baseline, True), between(found.baseline, True),
            icon=":material/functions:", border=True, delta_color="off", delta_arrow="off",
        )  # fmt: skip
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
        st.metric(
            t("Rows per second", "每秒行数"), t(f"{speed} model", f"模型 {speed}"),
            t(f"{found.rows_per_second:,.0f} baseline", f"基线 {found.rows_per_second:,.0f}"),
            icon=":material/speed:", border=True, delta_color="off", delta_arrow="off",
        )  # fmt: skip
    p = "–" if test.p_value is None else f"{test.p_value:.4f}" if test.p_value >= 1e-4 else "< 0.0001"
    decided = test.p_value is not None and test.p_value < 0.05
    better = (test.difference or 0) > 0
    verdict = (
        t("The model is better than the baseline.", "模型优于基线。")
        if decided and better
        else t("The baseline is better: it is faster too.", "基线更好，而且更快。")
        if decided
        else t("Not decided: these rows do not tell the two apart.", "尚无定论：这些行不足以区分两者。")
    )
    box = st.success if decided and better else st.warning if decided else st.info
    interval = "" if test.low is None or test.high is None else f" ({test.low:+.1%} … {test.high:+.1%})"
    box(
        f"**{verdict}** "
        + t(
            f"Difference {(test.difference or 0):+.1%}{interval}; only the model is right on {test.only_a:,} rows, only the "
            f"baseline on {test.only_b:,}; exact McNemar p {p}.",
            f"差值 {(test.difference or 0):+.1%}{interval}；仅模型正确 {test.only_a:,} 行，仅基线正确 {test.only_b:,} 行；"
            f"精确 McNemar p {p}。",
        )
    )
    part = (
        t(
            f"{found.rows:,} of {found.of:,} rows, drawn at random. ",
            f"随机抽取 {found.of:,} 行中的 {found.rows:,} 行。",
        )
        if found.rows < found.of
        else ""
    )
    st.caption(
        part
        + t(
            f"Cross-fitted in {found.folds} parts in {panels.format_duration(found.fit_seconds)}. ",
            f"{found.folds} 折交叉训练，用时 {panels.format_duration(found.fit_seconds)}。",
        )
        + plain(said(found.description))
    )
