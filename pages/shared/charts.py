"""Figures in the colours of the theme, which plotly does not take by itself: the frame they share, and small parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT = "Source Sans, Noto Sans CJK SC, PingFang SC, Microsoft YaHei, sans-serif"
# .streamlit/config.toml has the same colours; "inside" is text on a bar.
LIGHT = {
    "text": "#1b1f33", "faint": "#565b73", "line": "#e2e4f0", "inside": "#ffffff", "page": "#fbfbfe",
    "main": "#4f46e5", "second": "#d97706", "good": "#059669", "bad": "#e11d48", "other": "#0891b2",
    "more": "#7c3aed", "quiet": "#c3c5d9",
}  # fmt: skip
DARK = {
    "text": "#e8eaf6", "faint": "#a9afc8", "line": "#2a2f47", "inside": "#0f1220", "page": "#0f1220",
    "main": "#818cf8", "second": "#fbbf24", "good": "#34d399", "bad": "#fb7185", "other": "#22d3ee",
    "more": "#a78bfa", "quiet": "#4a5070",
}  # fmt: skip


def plotly() -> Any:
    """plotly.graph_objects, imported when it is needed.

    plotly looks for numpy and pandas among the modules there are, and fails on one that another thread is still
    importing, as the start of the program does behind the first screen: to import them here waits for that.
    """
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import plotly.graph_objects as go

    return go


def colors() -> dict[str, str]:
    """The colours of the theme this browser shows."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def escaped(text: str, most: int = 24) -> str:
    """A text of the analyst's as a label: plotly reads a little HTML in those."""
    shown = " ".join(text.split())
    shown = shown if len(shown) <= most else shown[: most - 1] + "…"
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def dress(figure: Figure, height: int, x: str = "", y: str = "", **layout: Any) -> Figure:
    """Give a figure the page's font, colours and margins, and its axes their names."""
    c = colors()
    figure.update_layout(
        **{
            "height": height,
            "margin": {"l": 0, "r": 8, "t": 8, "b": 0},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13, "color": c["text"]},
            "showlegend": False,
            "dragmode": False,
            "hoverlabel": {"bgcolor": c["line"], "font": {"color": c["text"], "family": FONT}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": c["text"]}},
        }
        | layout
    )  # fmt: skip
    axis = {
        "gridcolor": c["line"], "linecolor": c["line"], "zeroline": False, "automargin": True, "fixedrange": True,
        "tickfont": {"color": c["faint"], "size": 12}, "title_font": {"color": c["faint"], "size": 12},
        "title_standoff": 10,
    }  # fmt: skip
    figure.update_xaxes(title_text=x or None, showgrid=False, **axis)
    figure.update_yaxes(title_text=y or None, **axis)
    return figure


def draw(figure: Figure, key: str) -> None:
    """Put a figure on the page, without plotly's own buttons."""
    st.plotly_chart(figure, key=key, theme=None, width="stretch", config={"displayModeBar": False})
