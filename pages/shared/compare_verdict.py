"""What may be said of the runs compared: the verdict, the chart of scores and differences, the table of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from pages.shared import charts
from pages.shared.compare_runs import (
    Found,
    decimals,
    factor,
    main_row,
    metric_name,
    p_text,
    score,
)
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.compare import Comparison, MetricRow

FEWEST = 6
ROW = 46  # pixels of a line of the chart


# --- the verdict ----------------------------------------------------------------------------------------------


def verdict(this: Found) -> None:
    """The sentence that answers "which is best, and is that certain", in its colour, and one per pair."""
    place = this.standing.place
    outcomes = {one.verdict.outcome for one in this.pairs}
    if place == "best":
        box, icon = st.success, ":material/trophy:"
    elif place == "shared":
        box, icon = st.info, ":material/equal:"
    else:
        box, icon = st.warning, ":material/help:"
    lines = [f"### {headline(this)}"]
    if len(this.pairs) == 1:
        lines.append(sentence(this, this.pairs[0]))
    else:
        lines += [f"- {sentence(this, one)}" for one in this.pairs]
    with st.container(key="compare_verdict"):
        box("\n".join([lines[0], "", *lines[1:]]), icon=icon)
    for note in dict.fromkeys(note for one in this.pairs for note in one.notes):
        st.caption(f":material/filter_alt: {plain(said(note))}")
    if len(this.pairs) > 1 and outcomes - {"same"}:
        count = len(this.pairs)
        st.caption(
            t(
                f"Each pair is compared; the p values are raised by Holm's method for {count} comparisons.",
                f"两两对比；p 值已按 Holm 方法对 {count} 次比较作了校正。",
            )
        )


def headline(this: Found) -> str:
    """Who is best and whether that is certain, in a few words."""
    shown = {title: plain(title) for one in this.pairs for title in (one.title_a, one.title_b)}
    standing = this.standing
    leader = shown[standing.title]
    if standing.place == "best":
        if len(this.runs) == 2:
            return t(f"{leader} is better. This is certain.", f"{leader} 更好，结论可靠。")
        return t(
            f"{leader} is the best of {len(this.runs)}. This is certain.",
            f"{leader} 是 {len(this.runs)} 个中最好的，结论可靠。",
        )
    if standing.place == "shared":
        others = ", ".join(shown[title] for title in standing.equal)
        if all(one.verdict.difference == 0 and not main_row(one).n_different for one in this.pairs):
            return t("They answer alike: no difference at all.", "两者答案一致，没有差异。")
        if len(this.runs) == 2:
            return t("They are the same.", "两者相同。")
        return t(f"{leader} and {others} share the first place.", f"{leader} 与 {others} 并列第一。")
    against = ", ".join(shown[title] for title in standing.undecided)
    if any(0 < (main_row(one).n_different or 0) < FEWEST for one in this.pairs) and len(this.runs) == 2:
        return t("No test can decide.", "任何检验都无法判定。")
    if len(this.runs) == 2:
        return t("Not decided: nobody can tell yet which is better.", "未定：目前无法判断哪个更好。")
    return t(
        f"Not decided: {leader} is ahead, but not for certain of {against}.",
        f"未定：{leader} 领先，但对 {against} 尚无定论。",
    )


def sentence(this: Found, one: Comparison) -> str:
    """What may be said of a pair, with its numbers."""
    v, row = one.verdict, main_row(one)
    unit = 100.0 if one.kind == "text" else 1.0
    gap = (v.difference or 0.0) / unit * 100
    ahead, behind = (one.title_b, one.title_a) if gap > 0 else (one.title_a, one.title_b)
    ahead, behind = plain(ahead), plain(behind)
    metric, rows = metric_name(v.metric), f"{one.n:,}"
    low, high = _edges(one)
    within = f"{v.delta * 100:g}"
    if not row.n_different:
        return t(
            f"{plain(one.title_a)} and {plain(one.title_b)} score the same on all {rows} rows ({metric}).",
            f"{plain(one.title_a)} 与 {plain(one.title_b)} 在全部 {rows} 行上得分相同（{metric}）。",
        )
    between = t(f"95 % interval {low} to {high}", f"95% 区间 {low} 至 {high}")
    if v.outcome == "better":
        return t(
            f"{ahead} beats {behind} by **{abs(gap):.1f} points** of {metric} ({between}; {rows} rows; "
            f"{p_text(v.p_value)}).",
            f"{ahead} 的{metric}比 {behind} 高 **{abs(gap):.1f} 个百分点**（{between}；{rows} 行；{p_text(v.p_value)}）。",
        )
    if v.outcome == "same":
        return t(
            f"{plain(one.title_b)} and {plain(one.title_a)} are the same within **{within} points** of {metric} "
            f"({between}; {rows} rows).",
            f"{plain(one.title_b)} 与 {plain(one.title_a)} 的{metric}在 **{within} 个百分点**以内相同"
            f"（{between}；{rows} 行）。",
        )
    if (row.n_different or 0) < FEWEST:
        found = t(
            f"Only {row.n_different} of {rows} rows differ between {plain(one.title_a)} and {plain(one.title_b)}; with "
            f"fewer than {FEWEST} no test can decide.",
            f"{plain(one.title_a)} 与 {plain(one.title_b)} 在 {rows} 行中只有 {row.n_different} 行不同；"
            f"少于 {FEWEST} 行时任何检验都无法判定。",
        )
    else:
        found = t(
            f"{ahead} is {abs(gap):.1f} points of {metric} ahead of {behind}, which may be chance ({between}; {rows} "
            f"rows; {p_text(v.p_value)}).",
            f"{ahead} 的{metric}比 {behind} 高 {abs(gap):.1f} 个百分点，但可能只是偶然（{between}；{rows} 行；"
            f"{p_text(v.p_value)}）。",
        )
    return f"{found} {_needed(one)}".strip()


def _needed(one: Comparison) -> str:
    v = one.verdict
    if v.rows_needed is None or v.rows_needed <= one.n:
        return ""
    shown = f"{two_digits(v.rows_needed):,}"
    if v.rows_needed == v.to_differ:
        return t(
            f"**About {shown} rows** would probably settle it.", f"**大约 {shown} 行**很可能足以得出结论。"
        )
    within = f"{v.delta * 100:g}"
    return t(
        f"**About {shown} rows** would probably show that it is less than {within} points.",
        f"**大约 {shown} 行**很可能足以说明差异小于 {within} 个百分点。",
    )


def two_digits(count: int) -> int:
    """Rounded up to two digits, which is as many as an estimate has."""
    step: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step


def _edges(one: Comparison) -> tuple[str, str]:
    """The interval of the deciding difference in points, seen from who is ahead."""
    v = one.verdict
    times = 1.0 if one.kind == "text" else 100.0
    low, high = (v.low or 0.0) * times, (v.high or 0.0) * times
    if (v.difference or 0.0) < 0 and v.outcome != "same":
        low, high = -high, -low
    return f"{low:+.1f}", f"{high:+.1f}"


# --- the chart ------------------------------------------------------------------------------------------------


def chart(this: Found) -> None:
    """Each run's score with its interval, and each difference from the reference with its own."""
    first = this.against_first
    metric = first[0].verdict.metric
    left, right = st.columns(2, gap="medium")
    with left:
        st.markdown(f"**{metric_name(metric)}** · {t('with 95 % interval', '附 95% 区间')}")
        _scores(this, first, metric)
    with right:
        reference = plain(this.runs[0].title)
        st.markdown(
            t(f"**Difference** from {reference}", f"与 {reference} 的**差异**")
            + f" · {t('points', '百分点')}"
        )
        _differences(this, first)


def shade(one: Comparison) -> str:
    """The colour of a difference: better, worse, the same, or not decided."""
    c = charts.colors()
    if one.verdict.outcome == "better":
        return c["good"] if (one.verdict.difference or 0.0) > 0 else c["bad"]
    return c["other"] if one.verdict.outcome == "same" else c["second"]


def _scores(this: Found, first: tuple[Comparison, ...], metric: str) -> None:
    go = charts.plotly()

    c = charts.colors()
    rows = [main_row(first[0]).a, *(main_row(one).b for one in first)]
    times = factor(first[0], metric)
    figure = go.Figure()
    labels = []
    for place, (run, found) in enumerate(zip(this.runs, rows, strict=True)):
        labels.append(charts.escaped(run.title, 28))
        if found.estimate is None:
            continue
        value = found.estimate * times
        low = (found.low if found.low is not None else found.estimate) * times
        high = (found.high if found.high is not None else found.estimate) * times
        leads = this.standing.leader == run.id and this.standing.place == "best"
        _line(figure, place, value, low, high, c["main"] if leads else c["faint"], f"{value:.1f}")
    _dress(figure, labels, "%" if first[0].kind != "text" else t("score, 0 to 100", "分数（0 到 100）"))
    show(figure, "compare_scores", "scores")


def _differences(this: Found, first: tuple[Comparison, ...]) -> None:
    go = charts.plotly()

    c = charts.colors()
    figure = go.Figure()
    edge, reach = this.delta * 100, this.delta * 100
    labels = []
    for place, one in enumerate(first):
        times = 1.0 if one.kind == "text" else 100.0
        v = one.verdict
        value, low, high = ((x or 0.0) * times for x in (v.difference, v.low, v.high))
        reach = max(reach, abs(low), abs(high))
        labels.append(charts.escaped(one.title_b, 28))
        _line(figure, place, value, low, high, shade(one), f"{value:+.1f}")
    if edge:
        figure.add_vrect(x0=-edge, x1=edge, fillcolor=c["quiet"], opacity=0.3, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": c["faint"], "width": 1, "dash": "dot"})
    _dress(figure, labels, t(f"grey: the same within {edge:g}", f"灰色：{edge:g} 以内视为相同"))
    figure.update_xaxes(range=[-reach * 1.15 or -1, reach * 1.15 or 1])
    show(figure, "compare_differences", "differences")


def _line(figure: Any, place: int, value: float, low: float, high: float, color: str, label: str) -> None:
    figure.add_scatter(
        x=[value], y=[place], mode="markers+text", text=[label], textposition="top center",
        marker={"size": 13, "color": color}, textfont={"color": color, "size": 13},
        error_x={"type": "data", "array": [high - value], "arrayminus": [value - low], "color": color, "thickness": 3,
                 "width": 7},
        hovertemplate=f"{label} ({low:.2f} … {high:.2f})<extra></extra>", cliponaxis=False,
    )  # fmt: skip


def _dress(figure: Any, labels: list[str], x: str) -> None:
    charts.dress(figure, 74 + ROW * len(labels), x, "")
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=[f"{one}  " for one in labels], showgrid=False,
        range=[len(labels) - 0.45, -0.75], tickfont={"color": charts.colors()["text"], "size": 13},
    )  # fmt: skip
    figure.update_xaxes(showgrid=True)


def show(figure: Any, key: str, name: str) -> None:
    """A figure with one button, which saves it as a vector picture."""
    st.plotly_chart(
        figure, key=key, theme=None, width="stretch",
        config={
            "displaylogo": False, "modeBarButtons": [["toImage"]],
            "toImageButtonOptions": {"format": "svg", "filename": f"comparison-{name}"},
        },
    )  # fmt: skip


# --- the table ------------------------------------------------------------------------------------------------


def table(this: Found, one: Comparison) -> None:
    """Every metric of both runs of a pair with intervals, difference and p."""
    import pandas as pd

    names = this.names
    a, b = names[one.a], names[one.b]
    head = [
        t("metric", "指标"), a, b, t("difference", "差异"), t("95 % interval", "95% 区间"), "p", t("test", "检验"),
    ]  # fmt: skip
    rows = [[*_cells(one, row)] for row in one.metrics]
    frame = pd.DataFrame(rows, columns=head)
    st.dataframe(
        frame,
        hide_index=True,
        key=f"compare_metrics_{one.b}",
        height=36 * (len(rows) + 1) + 2,
        column_config={head[0]: st.column_config.TextColumn(pinned=True)},
    )
    st.caption(
        t(
            f"Differences are {plain(b)} less {plain(a)}, in points, on the same {one.n:,} rows. Only the deciding "
            "metric gives the verdict; the p values of the others are each for themselves.",
            f"差异为 {plain(b)} 减 {plain(a)}（百分点），基于相同的 {one.n:,} 行。结论只由判定指标给出；"
            "其他指标的 p 值各自独立。",
        )
    )
    with st.expander(t("What the numbers are", "各指标的含义"), icon=":material/functions:"):
        for row in one.metrics:
            st.caption(f"**{metric_name(row.metric)}**: {plain(said(row.formula))}")


def _cells(one: Comparison, row: MetricRow) -> list[str]:
    times, digits = factor(one, row.metric), decimals(row.metric)
    decides = row.metric == one.verdict.metric
    gap = "–" if row.difference is None else f"{row.difference * times:+.{digits}f}"
    between = "–"
    if row.low is not None and row.high is not None:
        low, high = f"{row.low * times:+.{digits}f}", f"{row.high * times:+.{digits}f}"
        between = t(f"{low} to {high}", f"{low} 至 {high}")
    p = one.verdict.p_value if decides and row.p_value is not None else row.p_value
    shown = said(row.reason) if row.p_value is None else p_text(p)
    tests = {
        "exact McNemar": t("exact McNemar", "McNemar 精确检验"),
        "paired bootstrap": t("paired bootstrap", "配对自助法"),
        "paired z": t("paired z", "配对 z 检验"),
    }
    return [
        f"{metric_name(row.metric)}{' ★' if decides else ''}", score(row.a, times, digits),
        score(row.b, times, digits), gap, between, shown, tests.get(row.test, row.test),
    ]  # fmt: skip
