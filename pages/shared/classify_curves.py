"""Calibration and automatic acceptance of a classification, each judged on rows it was not chosen on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from glm_core import metrics, statistics
from pages.shared import charts, classify_carry, classify_data, classify_measures, panels, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.statistics import Calibration
    from pages.shared.classify_data import Found


# --- calibration -------------------------------------------------------------------------------------------------


@st.cache_data(max_entries=8, show_spinner="Calibrating …")
def _calibrated(job_id: str, stamp: str, mapping: str, positive: int | None) -> classify_measures.Calibrated:
    this = classify_data.found(state.job_store().get(job_id))
    assert this.rows is not None
    return classify_measures.calibrated(this.rows, positive, bool(this.job.task.get("content_free")))


def calibration(this: Found) -> None:
    """How far probabilities can be taken at their word, before and after calibration."""
    assert this.rows is not None
    found = _calibrated(this.job.id, this.stamp, repr(this.truth), this.positive)
    with st.container(border=True, key="classify_calibration"):
        panels.section(t("Calibration", "校准"), "straighten")
        st.caption(
            t(
                "Of the rows said to be 90 % sure, 90 % should be right. The calibration is fitted on four fifths of the "
                "rows and judged on the rest, five times over.",
                "标称 90% 把握的行应有 90% 正确。校准在五分之四的行上拟合，在其余行上评测，共五次。",
            )
        )
        with st.grid(4, min_column_width=150):
            for title, name in (("ECE", "ece"), ("Brier", "brier"), (t("Log loss", "对数损失"), "log-loss")):
                before, after = found.before.scores[name], found.after.scores[name]
                st.metric(
                    title,
                    "–" if after is None else f"{after:.4f}",
                    "–" if before is None else t(f"before {before:.4f}", f"校准前 {before:.4f}"),
                    border=True, delta_color="off", delta_arrow="off", help=metrics.FORMULAS[name],
                )  # fmt: skip
            fit = found.fit
            st.metric(
                t("Temperature", "温度"), f"{fit.temperature:.3g}", _bias(fit), border=True, delta_color="off",
                delta_arrow="off",
                help=t("Above 1 the model was too sure, below 1 not sure enough.", "大于 1 表示模型过于自信，小于 1 表示不够自信。"),
            )  # fmt: skip
        if not fit.reason and classify_carry.can_keep_calibration(this.job):
            classify_carry.button(
                f"carry_calibration_{this.job.id}",
                classify_carry.uses(this.job, temperature=fit.temperature, bias=list(fit.bias)),
                classify_carry.keep_calibration,
                this.job,
                fit,
            )
        if fit.at_limit:
            st.caption(":orange[:material/info:] " + t("The temperature is at its limit.", "温度已达极限。"))
        if fit.reason:
            st.caption(f":orange[:material/info:] {plain(said(fit.reason))}")
        if len(found.truth) < found.n_of:
            st.caption(
                t(
                    f"On {len(found.truth):,} of {found.n_of:,} rows, drawn at random with seed 0.",
                    f"随机抽取 {found.n_of:,} 行中的 {len(found.truth):,} 行（种子 0）。",
                )
            )
        _reliability(found, this.job.id)
    with st.container(border=True, key="classify_histogram"):
        panels.section(t("Confidence of right and wrong answers", "正确与错误答案的置信度"), "bar_chart")
        _histogram(this)


def _bias(fit: Calibration) -> str:
    if not fit.bias:
        return t("no bias", "无偏置")
    return t(f"bias {fit.bias[-1]:+.2f}", f"偏置 {fit.bias[-1]:+.2f}")


def _reliability(found: classify_measures.Calibrated, job_id: str) -> None:
    import plotly.graph_objects as go

    c = charts.colors()
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": c["quiet"], "dash": "dot"}, hoverinfo="skip",
        name=t("as it should be", "理想"),
    )  # fmt: skip
    low = 1.0
    for title, color, symbol, scores in (
        (t("before", "校准前"), c["second"], "diamond", found.before),
        (t("after", "校准后"), c["main"], "circle", found.after),
    ):
        bins = [
            one for one in scores.bins if one.n and one.confidence is not None and one.accuracy is not None
        ]
        low = min([low, *(min(one.confidence or 0, one.accuracy or 0) for one in bins)])
        most = max((one.n for one in bins), default=1)
        ranges = [statistics.wilson(round((one.accuracy or 0) * one.n), one.n) for one in bins]
        figure.add_scatter(
            x=[one.confidence for one in bins],
            y=[one.accuracy for one in bins],
            name=title,
            mode="lines+markers",
            line={"color": color, "width": 1.5},
            marker={
                "color": color, "symbol": symbol, "size": [8 + 12 * (one.n / most) ** 0.5 for one in bins],
                "line": {"color": c["page"], "width": 1.5},
            },
            error_y={
                "type": "data", "symmetric": False, "color": color, "thickness": 1, "width": 3,
                "array": [(r.high or 0) - (one.accuracy or 0) for r, one in zip(ranges, bins, strict=True)],
                "arrayminus": [(one.accuracy or 0) - (r.low or 0) for r, one in zip(ranges, bins, strict=True)],
            },
            customdata=[one.n for one in bins],
            hovertemplate="%{x:.1%} → %{y:.1%}, n = %{customdata:,}<extra>" + title + "</extra>",
        )  # fmt: skip
    charts.dress(
        figure, 380, t("Said to be sure: mean probability", "标称把握（平均概率）"),
        t("Right: share of the rows", "实际正确率"), showlegend=True,
    )  # fmt: skip
    start = max(0.0, low - 0.05)
    figure.update_xaxes(range=[start, 1.02], tickformat=".0%")
    figure.update_yaxes(range=[start, 1.03], tickformat=".0%")
    charts.draw(figure, f"classify_reliability_{job_id}")


def _histogram(this: Found) -> None:
    import plotly.graph_objects as go

    assert this.rows is not None
    c = charts.colors()
    edges, right, wrong = classify_measures.histogram(this.rows)
    middle = (edges[1:] + edges[:-1]) / 2
    bands = [f"{a:.1%} – {b:.1%}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    figure = go.Figure()
    for title, color, counts in (
        (t("right", "正确"), c["good"], right),
        (t("wrong", "错误"), c["bad"], wrong),
    ):
        figure.add_bar(
            x=middle.tolist(), y=counts.tolist(), name=title, marker={"color": color}, customdata=bands,
            hovertemplate="%{customdata}: %{y:,}<extra>" + title + "</extra>",
        )  # fmt: skip
    charts.dress(
        figure, 300, t("Probability of the answer", "答案的概率"), t("Rows, on a log scale", "行数（对数刻度）"),
        showlegend=True, barmode="group", bargap=0.12,
    )  # fmt: skip
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(
        type="log", dtick=1, tickformat=",d", range=[-0.3, np.log10(max(2, right.max(), wrong.max())) + 0.15]
    )
    charts.draw(figure, f"classify_histogram_{this.job.id}")


# --- automatic acceptance ------------------------------------------------------------------------------------------


def abstain(this: Found) -> None:
    """How many rows can be taken without a look at them, and what that proves."""
    with st.container(border=True, key="classify_abstain"):
        panels.section(t("Accept without review", "免复核采纳"), "verified")
        _abstain(this.job.id)


@live()
def _abstain(job_id: str) -> None:
    this = classify_data.found(state.job_store().get(job_id))
    rows = this.rows
    if rows is None or not len(rows):
        return
    percent = st.select_slider(
        t("Wrong among the accepted rows, at most", "采纳行中允许的错误比例"),
        [0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0],
        format_func=lambda one: f"{one:g} %",
        **state.kept_widget("classify.risk", 1.0, [0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0]),
    )
    risk = float(percent) / 100
    dev = classify_measures.halves(rows.groups)
    both = min(int(dev.sum()), int((~dev).sum())) >= classify_measures.HALF
    chosen_on = rows.part(dev) if both else rows
    checked = rows.part(~dev) if both else rows
    found = statistics.choose_acceptance(chosen_on.confidence, chosen_on.right, risk, rows=chosen_on.names)
    curve = statistics.risk_coverage(checked.confidence, checked.right)
    if found.value is None:
        st.warning(plain(said(found.reason)), icon=":material/do_not_disturb_on:")
    else:
        proof = statistics.certify(found, checked.confidence, checked.right, rows=checked.names)
        accepted = float((this.answers.confidence >= found.value).mean())
        holds = proof.at_least is not None and proof.at_least >= 1 - risk
        (st.success if holds and not proof.optimistic else st.info)(
            t(
                f"Accept answers of probability **{found.value:.4f}** and more: {accepted:.1%} of all rows. On {proof.n:,} "
                f"other rows {proof.accepted:,} were accepted and {proof.errors:,} of them wrong, so at least "
                f"**{(proof.at_least or 0):.2%}** are right ({proof.level:.0%} certain, exact binomial bound).",
                f"采纳概率不低于 **{found.value:.4f}** 的答案：占全部行的 {accepted:.1%}。在另外 {proof.n:,} 行中采纳 "
                f"{proof.accepted:,} 行，其中 {proof.errors:,} 行错误，因此正确率至少为 "
                f"**{(proof.at_least or 0):.2%}**（置信度 {proof.level:.0%}，精确二项界）。",
            ),
            icon=":material/verified:" if holds and not proof.optimistic else ":material/info:",
        )
        classify_carry.button(
            f"carry_review_{job_id}",
            classify_carry.uses(this.job, abstain_below=round(found.value, 6)),
            classify_carry.keep_review,
            this.job,
            found.value,
        )
        if proof.optimistic:
            st.caption(
                ":orange[:material/warning:] "
                + t(
                    "Chosen and checked on the same rows, as there are too few to halve: it proves less than it says.",
                    "行数太少无法分半，选择与检验使用了相同的行：结论偏乐观。",
                )
            )
        elif not holds:
            st.caption(
                t(
                    "The bound on the other rows does not reach what was asked for; more labelled rows may.",
                    "在另一半上得到的界未达到要求；更多标注行可能会达到。",
                )
            )
    _risk(curve, risk, found.value, job_id)
    st.caption(
        t(
            f"Observed on these rows: {curve.coverage_at(risk):.1%} of them can be kept at a risk of {percent:g} %. "
            f"Mean risk over all coverages (AURC) {0 if curve.area is None else curve.area:.4f}.",
            f"在这些行上观察到：风险 {percent:g}% 时可保留 {curve.coverage_at(risk):.1%}。"
            f"平均风险（AURC）{0 if curve.area is None else curve.area:.4f}。",
        )
    )


def _risk(curve: statistics.RiskCoverage, risk: float, value: float | None, job_id: str) -> None:
    import plotly.graph_objects as go

    c = charts.colors()
    some = curve.thinned(classify_measures.POINTS)
    figure = go.Figure()
    figure.add_scatter(
        x=[*some.coverage, *reversed(some.coverage)], y=[*some.high, *reversed(some.low)], fill="toself", mode="none",
        fillcolor="rgba(99, 102, 241, 0.18)", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=some.coverage, y=some.risk, mode="lines", line={"color": c["main"], "width": 2.5},
        customdata=some.thresholds,
        hovertemplate=t("kept", "保留") + " %{x:.1%}, " + t("wrong", "错误") + " %{y:.2%}, p ≥ %{customdata:.4f}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=risk, line={"color": c["second"], "dash": "dash", "width": 1.5})
    if value is not None:
        kept = max(
            (x for x, one in zip(curve.coverage, curve.thresholds, strict=True) if one >= value), default=0.0
        )
        figure.add_vline(x=kept, line={"color": c["good"], "dash": "dot", "width": 1.5})
    top = max([risk * 2, *[y for x, y in zip(some.coverage, some.risk, strict=True) if x > 0.02]])
    charts.dress(
        figure, 320, t("Rows kept, the surest first", "保留的行（最确定优先）"), t("Wrong among them", "其中错误的比例"),
    )  # fmt: skip
    figure.update_xaxes(range=[0, 1.01], tickformat=".0%")
    figure.update_yaxes(range=[0, min(1.0, top * 1.15)], tickformat=".1%")
    charts.draw(figure, f"classify_risk_{job_id}")
