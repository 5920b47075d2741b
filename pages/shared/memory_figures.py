"""The figures of the memory page: bars per level, lines against context and batch, quality against memory and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pages.shared import charts
from pages.shared.memory_model import level_name, rows_text
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.memory import Level, Prediction, Published

GIB = 1 << 30
LEVEL_COLOURS = {"fp32": "bad", "bf16": "second", "fp16": "more", "int8": "main", "int4": "good",
                 "int4-g32": "other", "int4-g64": "quiet", "int4-g128": "faint"}  # fmt: skip
PART_COLOURS = {
    "weights": "main", "cache": "other", "moved": "quiet", "activations": "second", "overhead": "faint",
    "trainable": "more", "gradients": "bad", "optimiser": "good", "head": "quiet",
}  # fmt: skip


def part_name(part: str) -> str:
    """A part of a prediction in words."""
    names = {
        "weights": t("weights", "权重"),
        "cache": t("cache", "缓存"),
        "moved": t("cache while it moves", "缓存搬移"),
        "activations": t("activations", "激活值"),
        "overhead": t("program and libraries", "程序与库"),
        "trainable": t("what is trained, in fp32", "可训练部分（fp32）"),
        "gradients": t("gradients", "梯度"),
        "optimiser": t("optimiser", "优化器"),
        "head": t("logits", "输出层"),
    }
    return names.get(part, part)


def levels(
    found: Sequence[Prediction],
    measured: Mapping[str, int],
    published: Sequence[Published],
    key: str,
    at_load: Mapping[str, int] | None = None,
) -> None:
    """Stacked bars, one per level, with what was measured and what was published as marks.

    measured   bytes by level
    """
    go = charts.plotly()
    c = charts.colors()
    names = [level_name(one.precision) for one in found]
    marked = {
        one.precision: max(one.total, measured.get(one.precision, 0), (at_load or {}).get(one.precision, 0))
        for one in found
    }
    for one in published:
        if same := _same(one.level, set(marked)):
            marked[same] = max(marked[same], int(one.size * GIB))
    unit, size = ("GiB", GIB) if max(marked.values(), default=0) >= GIB else ("MiB", GIB >> 10)
    digits = 2 if unit == "GiB" else 0
    figure = go.Figure()
    for part in dict.fromkeys(part for one in found for part in one.parts):
        values = [one.parts.get(part, 0) / size for one in found]
        if max(values) * 1000 < max(marked.values()) / size:
            continue
        figure.add_bar(
            y=names, x=values, orientation="h", name=part_name(part), width=0.62,
            marker={"color": c[PART_COLOURS.get(part, "quiet")], "line": {"width": 0}},
            hovertemplate="%{x:,.2f} " + unit + "<extra>" + part_name(part) + "</extra>",
        )  # fmt: skip
    for one, name in zip(found, names, strict=True):
        figure.add_annotation(
            x=marked[one.precision] / size, y=name, text=f"{one.total / size:,.{digits}f}", showarrow=False,
            xanchor="left", xshift=12, font={"color": c["text"], "size": 12},
        )  # fmt: skip
    marks = [
        (measured, t("measured at most", "实测峰值"), "diamond", c["text"]),
        (at_load or {}, t("measured once loaded", "实测加载后"), "diamond-open", c["text"]),
    ]
    for values, title, symbol, color in marks:
        have = [one.precision for one in found if one.precision in values]
        if have:
            figure.add_scatter(
                y=[level_name(one) for one in have], x=[values[one] / size for one in have], mode="markers",
                name=title, marker={"symbol": symbol, "size": 11, "color": color,
                                    "line": {"color": c["page"] if symbol == "diamond" else color, "width": 1.5}},
                hovertemplate="%{x:,.2f} " + unit + "<extra>" + title + "</extra>",
            )  # fmt: skip
    symbols = iter(("line-ns", "x-thin", "y-up"))
    for what in dict.fromkeys(one.what for one in published):
        rows = [one for one in published if one.what == what]
        have = {one.precision for one in found}
        shown = [(level_name(_same(one.level, have)), one.size) for one in rows if _same(one.level, have)]
        if shown:
            title = t("published: ", "官方：") + what_name(what)
            figure.add_scatter(
                y=[one[0] for one in shown], x=[one[1] for one in shown], mode="markers", name=title,
                marker={"symbol": next(symbols, "x-thin"), "size": 20, "line": {"color": c["bad"], "width": 3}},
                hovertemplate="%{x} GiB<extra>" + title + "</extra>",
            )  # fmt: skip
    charts.dress(
        figure, 84 + 62 * len(found), t(f"{unit} at most at one time", f"峰值（{unit}）"), barmode="stack", showlegend=True,
        margin={"l": 0, "r": 56, "t": 8, "b": 0},
    )  # fmt: skip
    figure.update_layout(legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", ticksuffix="  ")
    figure.update_xaxes(showgrid=True, rangemode="tozero")
    charts.draw(figure, key)


def _same(level: str, have: set[str]) -> str:
    """The level of the chart that a published one stands at: its half precision is ours, whichever it is."""
    if level in have:
        return level
    return "bf16" if level == "fp16" and "bf16" in have else ""


def what_name(what: str) -> str:
    """What was published, in words."""
    names = {
        "inference": t("inference", "推理"),
        "tuning": t("P-tuning v2", "P-tuning v2 微调"),
        "encode": t("reading 2,048 tokens", "编码 2048 词元"),
        "generate": t("writing 8,192 tokens", "生成 8192 词元"),
    }
    return names.get(what, what)


def lines(
    series: Mapping[str, Sequence[tuple[int, float]]],
    measured: Mapping[str, Sequence[tuple[int, float]]],
    x: str,
    key: str,
    now: int,
    card: int,
) -> None:
    """Bytes of every level against a number; what was measured as points, the card as a line."""
    go = charts.plotly()
    c = charts.colors()
    figure = go.Figure()
    for level, points in series.items():
        color = c[LEVEL_COLOURS.get(level, "main")]
        figure.add_scatter(
            x=[one[0] for one in points], y=[one[1] / GIB for one in points], mode="lines", name=level_name(level),
            line={"color": color, "width": 2.2},
            hovertemplate="%{x:,}: %{y:.2f} GiB<extra>" + level_name(level) + "</extra>",
        )  # fmt: skip
        if points_measured := measured.get(level):
            figure.add_scatter(
                x=[one[0] for one in points_measured], y=[one[1] / GIB for one in points_measured],
                mode="markers", showlegend=False,
                marker={"color": color, "size": 9, "symbol": "diamond", "line": {"color": c["page"], "width": 1.5}},
                hovertemplate="%{x:,}: %{y:.2f} GiB<extra>" + level_name(level) + " · "
                + t("measured", "实测") + "</extra>",
            )  # fmt: skip
    most = max((one[1] for points in series.values() for one in points), default=0) / GIB
    if card <= 1.6 * most:
        figure.add_hline(y=card, line={"color": c["bad"], "dash": "dot", "width": 1.5})
    figure.add_vline(x=now, line={"color": c["faint"], "dash": "dot", "width": 1})
    charts.dress(figure, 300, x, "GiB", showlegend=True, margin={"l": 0, "r": 18, "t": 8, "b": 0})
    ticks = sorted({one[0] for points in series.values() for one in points}, reverse=True)
    ticks = ticks[:: 2 if len(ticks) > 8 else 1]
    figure.update_xaxes(
        type="log", tickvals=ticks,
        ticktext=[_short(one) for one in ticks],
    )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    charts.draw(figure, key)


def _short(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def speeds(found: Sequence[Level], key: str) -> None:
    """Tokens per second of every level, by rows at a time."""
    go = charts.plotly()
    c = charts.colors()
    figure = go.Figure()
    batches = sorted({point.batch for level in found for point in level.points if not point.error})
    shades = [c["main"], c["other"], c["second"], c["more"], c["good"]]
    for number, batch in enumerate(batches):
        rows = []
        for level in found:
            speeds = [
                point.decode_per_s for point in level.points if point.batch == batch and point.decode_per_s
            ]
            rows.append(max(speeds, default=None))
        title = rows_text(batch)
        figure.add_bar(
            x=[level_name(one.level) for one in found], y=rows, name=title,
            marker={"color": shades[number % len(shades)], "cornerradius": 4},
            text=[None if one is None else f"{one:,.0f}" if one >= 10 else f"{one:.1f}" for one in rows],
            textposition="outside", textfont={"color": c["text"], "size": 12}, cliponaxis=False,
            hovertemplate="%{y:,.1f} " + t("tokens/s", "词元/秒") + "<extra>" + title + "</extra>",
        )  # fmt: skip
    charts.dress(
        figure, 290, "", t("tokens/s written", "生成词元/秒"), showlegend=True, bargap=0.3,
        margin={"l": 0, "r": 8, "t": 22, "b": 0},
    )  # fmt: skip
    charts.draw(figure, key)


def pareto(points: Sequence[dict[str, Any]], best: Sequence[str], metric: str, key: str) -> None:
    """Quality with its interval against memory; the larger a point, the faster. Points that are beaten are hollow.

    points   level, bytes, value, low, high, speed; values as shares or scores
    """
    go = charts.plotly()
    c = charts.colors()
    fastest = max((one["speed"] for one in points), default=0) or 1.0
    front = sorted((one for one in points if one["level"] in best), key=lambda one: one["bytes"])
    figure = go.Figure()
    figure.add_scatter(
        x=[one["bytes"] / GIB for one in front], y=[one["value"] for one in front], mode="lines",
        line={"color": c["quiet"], "width": 1.5, "dash": "dot"}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    places = ("top right", "bottom right", "top left", "bottom left")
    for number, one in enumerate(sorted(points, key=lambda one: one["bytes"])):
        color = c[LEVEL_COLOURS.get(one["level"], "main")]
        solid = one["level"] in best
        figure.add_scatter(
            x=[one["bytes"] / GIB], y=[one["value"]], mode="markers+text", text=[level_name(one["level"])],
            textposition=places[number % len(places)], textfont={"color": c["text"], "size": 13}, showlegend=False,
            cliponaxis=False,
            marker={"symbol": "circle" if solid else "circle-open", "size": 12 + 22 * (one["speed"] / fastest) ** 0.5,
                    "color": color, "line": {"color": color, "width": 2}},
            error_y={"type": "data", "symmetric": False, "array": [one["high"] - one["value"]],
                     "arrayminus": [one["value"] - one["low"]], "color": color, "thickness": 1.2, "width": 4},
            hovertemplate="%{x:.2f} GiB, %{y:.3g}, " + f"{one['speed']:,.0f} " + t("tokens/s", "词元/秒")
            + "<extra>" + level_name(one["level"]) + "</extra>",
        )  # fmt: skip
    charts.dress(figure, 360, t("Measured memory, GiB at most", "实测内存峰值（GiB）"), metric)
    sizes = [one["bytes"] / GIB for one in points]
    room = max(0.15 * (max(sizes) - min(sizes)), 0.02 * max(sizes))
    figure.update_xaxes(showgrid=True, range=[min(sizes) - room, max(sizes) + room])
    charts.draw(figure, key)
