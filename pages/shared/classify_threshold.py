"""The threshold of a label, chosen on one half of the labelled rows and judged on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from glm_core import metrics, statistics
from pages.shared import charts, classify_carry, classify_data, classify_measures, panels, state
from pages.shared.classify_quality import between, number
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.statistics import Goal, Judgement, Threshold
    from pages.shared.classify_data import Found
    from pages.shared.classify_measures import Judged


def threshold(this: Found) -> None:
    """PR and ROC with the threshold that is chosen on one half of the rows and judged on the other."""
    with st.container(border=True, key="classify_threshold"):
        panels.section(t("Threshold", "阈值"), "tune")
        if _positive(this) is not None:
            _threshold(this.job.id)


def _positive(this: Found) -> int | None:
    """The positive label: the task's, else one chosen here."""
    if this.positive is not None:
        return this.positive
    chosen = st.selectbox(
        t("Label looked for", "要找的标签"),
        [None, *range(len(this.names))],
        format_func=lambda k: t("choose", "请选择") if k is None else this.shown(k),
        key=f"classify_positive_{this.job.id}",
        persist_state="session",
    )
    return None if chosen is None else int(chosen)


def _again(job_id: str) -> tuple[Found, Judged, int] | None:
    """The job's data inside a part that is drawn alone."""
    this = classify_data.found(state.job_store().get(job_id))
    positive = this.positive if this.positive is not None else state.session(f"classify_positive_{job_id}")
    return None if this.rows is None or positive is None else (this, this.rows, int(positive))


@live()
def _threshold(job_id: str) -> None:
    again = _again(job_id)
    if again is None:
        return
    this, rows, positive = again
    truth, scores = rows.truth == positive, rows.probability[:, positive]
    dev = classify_measures.halves(rows.groups)
    both = min(int(dev.sum()), int((~dev).sum())) >= classify_measures.HALF
    goals = {
        "f1": t("highest F1", "F1 最高"),
        "precision": t("precision at least …", "精确率不低于……"),
        "cost": t("least cost", "代价最小"),
        "hand": t("by hand", "手动"),
    }
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left:
        goal = st.segmented_control(
            t("Choose by", "选择方式"), list(goals), format_func=goals.__getitem__, required=True,
            **state.kept_widget("classify.goal", "f1", list(goals), "default"),
        )  # fmt: skip
    wanted, costs = 0.95, (1.0, 1.0)
    with right:
        if goal == "precision":
            wanted = float(
                st.slider(
                    t("Precision", "精确率"),
                    0.5,
                    1.0,
                    step=0.01,
                    **state.kept_widget("classify.precision", 0.95),
                )
            )
        elif goal == "cost":
            costs = _costs()
    found = None
    chosen_on = dev if both else np.ones(len(rows), dtype=bool)
    if goal != "hand":
        found = statistics.choose_threshold(
            scores[chosen_on],
            truth[chosen_on],
            _goal(goal),
            rows=rows.part(chosen_on).names,
            precision=wanted,
            costs=costs,
        )
        if found.reason:
            st.caption(f":orange[:material/info:] {plain(said(found.reason))}")
    start = min(1.0, max(0.0, found.value if found is not None and found.value is not None else 0.5))
    key = f"classify_threshold_{job_id}_{goal}_{wanted}_{costs}_{positive}"
    if state.session(key) is None:
        state.session_set(key, round(start, 4))
    value = float(
        st.slider(
            t(f"{plain(this.shown(positive))} from this probability upward", f"概率达到该值判为 {plain(this.shown(positive))}"),
            0.0, 1.0, step=0.0001, format="%.4f", key=key,
        )
    )  # fmt: skip
    moved = found is None or found.value is None or abs(value - start) > 5e-5
    used = _by_hand(value, rows, chosen_on) if moved or found is None else found
    judged_on = ~chosen_on if both else chosen_on
    judged = statistics.judge(used, scores[judged_on], truth[judged_on], rows=rows.part(judged_on).names)
    _judgement(judged, both, costs if goal == "cost" else None)
    left, right = st.columns(2)
    part = rows.part(judged_on)
    with left:
        _curve(
            metrics.precision_recall(part.truth == positive, part.probability[:, positive]),
            value,
            judged,
            "pr",
            job_id,
        )
    with right:
        _curve(
            metrics.roc(part.truth == positive, part.probability[:, positive]), value, judged, "roc", job_id
        )
    name = this.names[positive]
    classify_carry.button(
        f"carry_threshold_{job_id}",
        classify_carry.uses(this.job, positive=name, threshold=round(value, 6)),
        classify_carry.keep_threshold,
        this.job,
        name,
        value,
    )
    called = float((this.answers.probability[:, positive] >= value).mean())
    st.caption(
        t(
            f"At this threshold {called:.1%} of all {len(this.answers):,} rows count as {plain(this.shown(positive))}.",
            f"按此阈值，全部 {len(this.answers):,} 行中有 {called:.1%} 判为 {plain(this.shown(positive))}。",
        )
    )


def _goal(goal: str) -> Goal:
    return "precision" if goal == "precision" else "cost" if goal == "cost" else "f1"


def _costs() -> tuple[float, float]:
    left, right = st.columns(2)
    with left:
        alarm = st.number_input(
            t("Cost of a false alarm", "误报代价"),
            0.0,
            1e6,
            step=1.0,
            **state.kept_widget("classify.cost_alarm", 1.0),
        )
    with right:
        miss = st.number_input(
            t("Cost of a miss", "漏报代价"),
            0.0,
            1e6,
            step=1.0,
            **state.kept_widget("classify.cost_miss", 1.0),
        )
    return float(alarm), float(miss)


def _by_hand(value: float, rows: Judged, looked_at: Any) -> Threshold:
    """A threshold set by hand, by somebody who saw the scores of these rows."""
    return statistics.Threshold(
        value, "f1", None, (1.0, 1.0), int(looked_at.sum()), None, None, None, None,
        rows=frozenset(rows.part(looked_at).names),
    )  # fmt: skip


def _judgement(judged: Judgement, both: bool, costs: tuple[float, float] | None) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        if judged.optimistic:
            st.badge(
                t("optimistic", "偏乐观"),
                icon=":material/warning:",
                color="orange",
                help=t(
                    "Chosen and judged on the same rows, as there are too few to halve: expect less on other rows.",
                    "行数太少无法分半，阈值的选择与评测使用了相同的行：实际效果会更差。",
                ),
            )
        else:
            st.badge(
                t("judged on the other half", "在另一半上评测"),
                icon=":material/verified:",
                color="green",
                help=t(
                    "Chosen on one half of the labelled rows, judged on the other; equal texts are on one side.",
                    "阈值在一半标注行上选择，在另一半上评测；相同文本在同一侧。",
                ),
            )
        st.caption(t(f"{judged.n:,} rows", f"{judged.n:,} 行"), width="content")
    with st.grid(4, min_column_width=150):
        for title, one in (
            (t("Precision", "精确率"), judged.precision),
            (t("Recall", "召回率"), judged.recall),
            (t("Accuracy", "准确率"), judged.accuracy),
        ):
            st.metric(
                title,
                number(one, True),
                between(one, True),
                border=True,
                delta_color="off",
                delta_arrow="off",
            )
        false = t(
            f"{judged.false_positives:,} false alarms, {judged.false_negatives:,} missed",
            f"误报 {judged.false_positives:,}，漏报 {judged.false_negatives:,}",
        )
        if costs is None:
            value = "–" if judged.f1 is None else f"{judged.f1:.3f}"
            st.metric("F1", value, false, border=True, delta_color="off", delta_arrow="off")
        else:
            spent = judged.false_positives * costs[0] + judged.false_negatives * costs[1]
            st.metric(
                t("Cost", "代价"), f"{spent:,.0f}", false, border=True, delta_color="off", delta_arrow="off"
            )


def _curve(curve: Any, value: float, judged: Judgement, kind: str, job_id: str) -> None:
    import plotly.graph_objects as go

    c = charts.colors()
    if curve is None:
        st.caption(t("It needs rows of both kinds.", "需要两类行。"))
        return
    keep = classify_measures.thinned(curve.x, classify_measures.POINTS)
    x, y = [curve.x[i] for i in keep], [curve.y[i] for i in keep]
    at = [curve.thresholds[i] for i in keep]
    names = {
        "pr": (t("Recall", "召回率"), t("Precision", "精确率"), t("average precision", "平均精确率")),
        "roc": (t("False alarms, share of the others", "误报率"), t("Recall", "召回率"), "AUC"),
    }[kind]
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": c["main"], "width": 2.5, "shape": "hv" if kind == "roc" else "linear"},
        customdata=["–" if one is None else f"{one:.4f}" for one in at],
        hovertemplate=f"{names[0]} %{{x:.1%}}<br>{names[1]} %{{y:.1%}}<br>≥ %{{customdata}}<extra></extra>",
    )  # fmt: skip
    if kind == "roc":
        figure.add_scatter(
            x=[0, 1], y=[0, 1], mode="lines", line={"color": c["quiet"], "dash": "dot"}, hoverinfo="skip"
        )
    recall = judged.recall.estimate
    others = judged.false_positives + judged.true_negatives
    spot = (
        (recall, judged.precision.estimate)
        if kind == "pr"
        else (judged.false_positives / others if others else None, recall)
    )
    if None not in spot:
        figure.add_scatter(
            x=[spot[0]], y=[spot[1]], mode="markers",
            marker={"color": c["second"], "size": 13, "line": {"color": c["page"], "width": 2}},
            hovertemplate=f"≥ {value:.4f}<extra></extra>",
        )  # fmt: skip
    charts.dress(figure, 300, names[0], names[1])
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    figure.update_yaxes(
        range=[-0.02, 1.05] if kind == "roc" else [max(0.0, min(y) - 0.08), 1.03], tickformat=".0%"
    )
    st.caption(f"**{'PR' if kind == 'pr' else 'ROC'}** · {names[2]} {curve.area:.4f}")
    charts.draw(figure, f"classify_{kind}_{job_id}")
