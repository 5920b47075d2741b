"""Figures of an evaluation: scores with their intervals, spread over rows, over steps; each can be saved."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages.shared import charts, evaluate_words, state
from pages.shared.text import t

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from glm_core.evaluate.views import Bin
    from glm_core.statistics import Interval

FORMATS = ("png", "svg")
DENSE = 8  # lines, above which the numbers stand in the table alone
UNWANTED = [
    "zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d",
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One score of a figure: what it is called, the score, and how it is to look.

    strong   the one the page is about; pale: too few rows to say much
    """

    name: str
    score: Interval
    strong: bool = False
    pale: bool = False
    note: str = ""


def picture_format() -> str:
    """Whether the camera of a figure saves PNG or SVG."""
    found = state.remember("evaluate.picture", "png")
    return str(found) if found in FORMATS else "png"


def format_choice() -> None:
    """The choice between PNG and SVG for all figures of the page."""
    st.segmented_control(
        t("Figures are saved as", "图片保存格式"),
        FORMATS,
        format_func=str.upper,
        required=True,
        help=t(
            "The camera at the top right of a figure saves it; the table behind it is beside it as CSV.",
            "图表右上角的相机按钮用于保存图片；旁边的 CSV 按钮下载其数据。",
        ),
        **state.kept_widget("evaluate.picture", "png", FORMATS, "default"),
    )


def draw(figure: Figure, key: str, name: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Put a figure on the page, with its camera and its numbers as CSV."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-") or "figure"
    st.plotly_chart(
        figure,
        key=key,
        theme=None,
        width="stretch",
        config={
            "displaylogo": False,
            "displayModeBar": True,
            "modeBarButtonsToRemove": UNWANTED,
            "toImageButtonOptions": {"format": picture_format(), "filename": safe, "scale": 2},
        },
    )
    with st.container(horizontal=True, horizontal_alignment="right"):
        st.download_button(
            "CSV",
            comma_separated(heads, rows),
            file_name=f"{safe}.csv",
            mime="text/csv",
            icon=":material/download:",
            type="tertiary",
            key=f"{key}_csv",
            on_click="ignore",
            help=t("The numbers of this figure.", "此图的数据。"),
        )


def comma_separated(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A small table as CSV, which Excel opens as UTF-8; a cell it would run as a formula gets an apostrophe."""
    from glm_core.tables.writing import guarded

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(heads)
    for row in rows:
        writer.writerow(
            [guarded(cell) if isinstance(cell, str) else "" if cell is None else cell for cell in row]
        )
    return text.getvalue().encode("utf-8-sig")


def dressed(figure: Figure, height: int, x: str = "", y: str = "", **layout: Any) -> None:
    """The page's look, with room for the camera."""
    c = charts.colors()
    charts.dress(
        figure, height, x, y, modebar={"bgcolor": "rgba(0,0,0,0)", "color": c["faint"], "activecolor": c["main"]},
        margin={"l": 0, "r": 30, "t": 26, "b": 0}, **layout,
    )  # fmt: skip


def forest(
    lines: Sequence[Line],
    task_kind: str,
    metric: str,
    key: str,
    name: str,
    reference: tuple[str, float] | None = None,
) -> None:
    """Scores with their 95 % intervals, one under the other.

    reference   (what it is, its value) of a line to compare with
    """
    go = charts.plotly()
    c = charts.colors()
    factor = 100.0 if evaluate_words.is_share(task_kind, metric) else 1.0
    dense = len(lines) > DENSE
    figure = go.Figure()
    for place, one in enumerate(lines):
        if one.score.estimate is None:
            continue
        value = one.score.estimate * factor
        low, high = (value if edge is None else edge * factor for edge in (one.score.low, one.score.high))
        color = c["quiet"] if one.pale else c["main"] if one.strong else c["faint"]
        words = evaluate_words.score(one.score, task_kind, metric)
        figure.add_scatter(
            x=[value], y=[place], mode="markers",
            marker={"size": 13 if one.strong else 10, "color": color},
            error_x={"type": "data", "array": [high - value], "arrayminus": [value - low], "color": color,
                     "thickness": 3 if one.strong else 2, "width": 6},
            hovertemplate=f"{charts.escaped(one.name, 60)}: {words}, n = {one.score.n:,}<extra></extra>",
        )  # fmt: skip
        if not dense:
            figure.add_annotation(
                x=1, xref="paper", xanchor="right", y=place,
                text=words + (f" · {charts.escaped(one.note)}" if one.note else ""),
                showarrow=False, yshift=15, font={"size": 11, "color": c["text"] if one.strong else c["faint"]},
            )  # fmt: skip
    if reference is not None:
        figure.add_vline(x=reference[1] * factor, line={"color": c["second"], "dash": "dash", "width": 1.5})
        figure.add_annotation(
            x=reference[1] * factor, y=1, yref="paper", yanchor="bottom", text=charts.escaped(reference[0], 40),
            showarrow=False, font={"size": 11, "color": c["second"]},
        )  # fmt: skip
    unit = (
        t(f"{evaluate_words.metric(metric)}, %", f"{evaluate_words.metric(metric)}（%）")
        if factor == 100
        else evaluate_words.metric(metric)
    )
    dressed(figure, 70 + (25 if dense else 46) * len(lines), unit)
    figure.update_yaxes(
        tickvals=list(range(len(lines))),
        ticktext=[f"{'<b>' if one.strong else ''}{charts.escaped(one.name, 34)}{'</b>' if one.strong else ''}  "
                  for one in lines],
        range=[len(lines) - 0.4, -0.75], showgrid=False, tickfont={"color": c["text"], "size": 12},
    )  # fmt: skip
    figure.update_xaxes(showgrid=True)
    draw(
        figure, key, name, ("name", "n", metric, "low", "high"),
        [(one.name, one.score.n, one.score.estimate, one.score.low, one.score.high) for one in lines],
    )  # fmt: skip


def spread(
    bins: Sequence[Bin], mean: float | None, published: Mapping[str, float], metric: str, key: str, name: str
) -> None:
    """How many rows got which score, with the mean, and published means: whose -> value."""
    go = charts.plotly()
    c = charts.colors()
    total = max(1, sum(one.n for one in bins))
    rows = t("rows", "行")
    figure = go.Figure(
        go.Bar(
            x=[(one.low + one.high) / 2 for one in bins],
            y=[one.n for one in bins],
            width=[0.92 * (one.high - one.low) for one in bins],
            marker={"color": c["main"], "cornerradius": 3},
            customdata=[
                f"{one.low:g} – {one.high:g}: {one.n:,} {rows} ({one.n / total:.1%})" for one in bins
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    if mean is not None:
        figure.add_vline(x=mean, line={"color": c["second"], "width": 2})
        figure.add_annotation(
            x=mean, y=1, yref="paper", yanchor="bottom", text=t(f"mean {mean:.1f}", f"均值 {mean:.1f}"),
            showarrow=False, font={"size": 12, "color": c["second"]},
        )  # fmt: skip
    for value in published.values():
        left = mean is not None and value < mean  # its name stands on the side away from the mean
        figure.add_vline(x=value, line={"color": c["other"], "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=value, y=0.93, yref="paper", xanchor="right" if left else "left", xshift=-4 if left else 4, text=t(f"published {value:.1f}", f"公开 {value:.1f}"),
            showarrow=False, font={"size": 11, "color": c["other"]},
        )  # fmt: skip
    dressed(figure, 280, evaluate_words.metric(metric), rows)
    figure.update_xaxes(range=[bins[0].low, bins[-1].high] if bins else None)
    draw(figure, key, name, ("from", "to", "rows"), [(one.low, one.high, one.n) for one in bins])


def trend(series: Mapping[str, Sequence[tuple[int, Interval]]], task_kind: str, key: str, name: str) -> None:
    """Scores over the steps of a training, with their intervals: metric -> [(step, score), ...]."""
    go = charts.plotly()
    c = charts.colors()
    shades = (c["main"], c["second"], c["good"], c["other"], c["more"])
    figure = go.Figure()
    table: list[tuple[Any, ...]] = []
    for (metric, points), shade in zip(series.items(), shades, strict=False):
        factor = 100.0 if evaluate_words.is_share(task_kind, metric) else 1.0
        known = [(step, one) for step, one in points if one.estimate is not None]
        values = [one.estimate * factor for _, one in known]
        figure.add_scatter(
            x=[step for step, _ in known], y=values, mode="lines+markers", name=evaluate_words.metric(metric),
            line={"color": shade, "width": 2}, marker={"size": 8, "line": {"color": c["page"], "width": 1}},
            error_y={
                "type": "data", "color": shade, "thickness": 1.5, "width": 4,
                "array": [(one.high * factor if one.high is not None else value) - value
                          for (_, one), value in zip(known, values, strict=True)],
                "arrayminus": [value - (one.low * factor if one.low is not None else value)
                               for (_, one), value in zip(known, values, strict=True)],
            },
            customdata=[evaluate_words.score(one, task_kind, metric) for _, one in known],
            hovertemplate="%{x:,}: %{customdata}<extra>" + evaluate_words.metric(metric) + "</extra>",
        )  # fmt: skip
        table += [(metric, step, one.n, one.estimate, one.low, one.high) for step, one in known]
    dressed(figure, 340, t("step", "步"), "", showlegend=True, hovermode="closest")
    figure.update_xaxes(rangemode="tozero")
    draw(figure, key, name, ("metric", "step", "n", "score", "low", "high"), table)


def confusion(labels: Sequence[str], table: Sequence[Sequence[int]], none: str, key: str, name: str) -> None:
    """What was answered where what was correct, as shares of each correct label."""
    go = charts.plotly()
    c = charts.colors()
    size = len(labels)
    outside = any(row[size] for row in table)
    heads = [*labels, none] if outside else list(labels)
    counts = [list(row[: len(heads)]) for row in table]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    # The diagonal in the colour of what is right, the rest in that of what is wrong.
    signed = [[share if i == j else -share for j, share in enumerate(row)] for i, row in enumerate(shares)]
    ground = c["page"]
    figure = go.Figure(
        go.Heatmap(
            z=signed, x=list(range(len(heads))), y=list(range(size)), zmin=-1.7, zmax=1.7, showscale=False,
            colorscale=[[0, c["bad"]], [0.5, ground], [1, c["good"]]], xgap=3, ygap=3,
            text=[[f"{count:,}" for count in row] for row in counts], texttemplate="%{text}",
            textfont={"size": 13 if size <= 8 else 10, "color": c["text"]},
            customdata=[[f"{charts.escaped(labels[i])} → {charts.escaped(heads[j])}: {count:,} ({shares[i][j]:.1%})"
                         for j, count in enumerate(row)] for i, row in enumerate(counts)],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    dressed(
        figure, 110 + max(40, min(64, 640 // max(1, size))) * size, t("answer", "答案"), t("correct", "正确")
    )
    figure.update_xaxes(tickvals=list(range(len(heads))), ticktext=[charts.escaped(one, 14) for one in heads])
    figure.update_yaxes(
        tickvals=list(range(size)), ticktext=[f"{charts.escaped(one, 14)}  " for one in labels],
        autorange="reversed", showgrid=False,
    )  # fmt: skip
    draw(
        figure, key, name, ("correct", *heads),
        [(labels[i], *row) for i, row in enumerate(counts)],
    )  # fmt: skip
