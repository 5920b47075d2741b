"""One text tried on the classification page: its label, how sure, and which words moved it."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import batch
from glm_core.errors import GLMError
from pages.shared import charts, classify_task, panels, remote_words, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.classify import Scored, Word
    from glm_core.engine import Engine
    from pages.shared.classify_task import Asked

TRIED = "classify.one"
SAMPLES = (
    ("加我薇❤信 abc888，兼职日结", "spam"),
    ("这期视频讲得真清楚，谢谢老师", "normal"),
)
MOST_WORDS = 1000  # pieces; what comes behind them is shown as it is


@dataclass(frozen=True)
class Tried:
    """A text that was classified, with what made the answer, so that an older one is told from a current one."""

    identity: str
    names: tuple[str, ...]
    scored: Scored
    words: list[tuple[str, float]]
    asked: Asked


def card(engine: Engine, asked: Asked) -> None:
    """The text, the button, and the answer."""
    with st.container(border=True, key="classify_one"):
        panels.section(t("Try one text", "试一条文本"), "science")
        try:
            columns = batch.placeholders(asked.template)
        except GLMError as error:
            panels.problem(error)
            return
        cells = [_text(column, number) for number, column in enumerate(columns)]
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            ready = any(cell.strip() for cell in cells)
            pressed = st.button(
                t("Classify", "分类"),
                type="primary",
                icon=":material/label:",
                key="classify_try",
                disabled=not ready,
            )
            explain = st.toggle(
                t("Which words moved it", "哪些词起了作用"),
                help=t(
                    "Leaves each word out in turn and looks how the answer changes: one more question per word.",
                    "依次去掉每个词，看答案如何变化：每个词多提问一次。",
                ),
                **state.kept_widget("classify.explain", True),
            )
            for number, (text, kind) in enumerate(SAMPLES):
                st.button(
                    t(f"a {kind} example", "垃圾示例" if kind == "spam" else "正常示例"),
                    key=f"classify_sample_{number}",
                    type="tertiary",
                    icon=":material/draft:",
                    on_click=_put,
                    args=(columns[0], text),
                )
        if pressed:
            try:
                with st.spinner(t("Asking the model …", "正在询问模型……")):
                    state.session_set(TRIED, run(engine, asked, columns, cells, bool(explain)))
            except GLMError as error:
                state.session_set(TRIED, None)
                panels.problem(error)
        tried = state.session(TRIED)
        if tried is not None:
            show(tried, tried.identity != identity(engine, asked, cells))


def _text(column: str, number: int) -> str:
    label = t("Text", "文本") if column == classify_task.TEXT else plain(column)
    return str(
        st.text_area(
            label,
            height=90,
            placeholder=t("A comment, a message, a review …", "一条评论、消息或评价……"),
            **state.kept_widget(f"classify.one_text.{column}", ""),
        )
        or ""
    )


def _put(column: str, text: str) -> None:
    state.remember_set(f"classify.one_text.{column}", text)
    state.session_set(f"widget.classify.one_text.{column}", text)


def identity(engine: Engine, asked: Asked, cells: list[str]) -> str:
    """What makes an answer out of date when it changes."""
    task = (asked.labels, asked.template, asked.shots, asked.content_free, asked.positive)
    return json.dumps([str(engine.loaded.info.path), engine.loaded.precision, id(engine), task, cells])


def run(engine: Engine, asked: Asked, columns: list[str], cells: list[str], explain: bool) -> Tried:
    """Classify one text now; GLMError where the template, the labels or the model do not do."""
    from glm_core import classify

    task = classify_task.make(engine, asked, asked.template, columns)
    scored = classify.classify_rows(engine, task, [tuple(cells)], greedy=True)[0]
    words: list[tuple[str, float]] = []
    if explain and len(columns) == 1 and scored.probabilities:
        words = _segments(cells[0], classify.explain(engine, task, cells[0]))
    return Tried(identity(engine, asked, cells), asked.names, scored, words, asked)


def _segments(text: str, words: list[Word]) -> list[tuple[str, float]]:
    """The whole text in pieces with what each changes; what stands between the words changes nothing."""
    found, end = [], 0
    for word in words:
        found += [(text[end : word.start], 0.0), (word.text, word.change)]
        end = word.start + len(word.text)
    return [one for one in (*found, (text[end:], 0.0)) if one[0]]


# --- the answer ------------------------------------------------------------------------------------------------


def show(tried: Tried, stale: bool) -> None:
    """Label, probabilities, margin, what lies outside, and the words."""
    scored, asked = tried.scored, tried.asked
    with st.container(key="classify_answer"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"### {plain(asked.shown(scored.label))}", width="content")
            if scored.probabilities:
                st.badge(f"{max(scored.probabilities):.1%}", color="violet")
            else:
                st.badge(t("no probability", "无概率"), icon=":material/help:", color="orange")
            if scored.reason:
                st.badge(t("to review", "待审"), icon=":material/rate_review:", color="orange")
            if stale:
                st.badge(
                    t("before the last change", "修改之前的结果"), icon=":material/history:", color="orange"
                )
        if not scored.probabilities:
            st.caption(remote_words.way("greedy"))
            return
        left, right = st.columns([3, 2], gap="large")
        with left:
            _bars(tried)
        with right:
            with st.grid(2, min_column_width=120):
                st.metric(
                    t("Margin", "领先"),
                    f"{scored.margin:.1%}",
                    border=True,
                    help=t(
                        "Probability of this label less that of the next one.",
                        "该标签与次高标签的概率之差。",
                    ),
                )
                st.metric(
                    t("Outside", "标签之外"),
                    percent(scored.outside),
                    border=True,
                    help=t(
                        "Probability that the model would say something else than one of the labels. If it is large, "
                        "the question does not lead to the labels.",
                        "模型说出标签以外内容的概率。若较大，说明提问没有引导到这些标签。",
                    ),
                )
            _greedy(tried)
        if scored.reason:
            st.caption(f":orange[:material/rate_review:] {plain(said(scored.reason))}")
        if tried.words:
            _words(tried)


def percent(share: float) -> str:
    """A share with the digits that mean something: 12.3 %, 0.04 %, < 0.01 %."""
    if 0 < share < 1e-4:
        return "< 0.01%"
    return f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


def _bars(tried: Tried) -> None:
    import plotly.graph_objects as go

    c = charts.colors()
    names = [charts.escaped(tried.asked.shown(name)) for name in tried.names]
    values = list(tried.scored.probabilities)
    chosen = tried.names.index(tried.scored.label) if tried.scored.label in tried.names else -1
    figure = go.Figure(
        go.Bar(
            x=values,
            y=list(range(len(values))),
            orientation="h",
            marker={
                "color": [c["main"] if i == chosen else c["quiet"] for i in range(len(values))],
                "cornerradius": 4,
            },
            text=[percent(value) for value in values],
            textposition=["inside" if value > 0.25 else "outside" for value in values],
            insidetextanchor="end",
            insidetextfont={"color": c["inside"]},
            outsidetextfont={"color": c["text"]},
            customdata=names,
            hovertemplate="%{customdata}: %{x:.4%}<extra></extra>",
            cliponaxis=False,
            constraintext="none",
        )
    )
    charts.dress(figure, 42 * len(values) + 16, bargap=0.3)
    figure.update_xaxes(visible=False, range=[0, 1.12])
    figure.update_yaxes(
        autorange="reversed", tickvals=list(range(len(values))), ticktext=[f"{name}  " for name in names],
        showgrid=False, tickfont={"color": c["text"], "size": 13},
    )  # fmt: skip
    charts.draw(figure, "classify_bars")


def _greedy(tried: Tried) -> None:
    """Whether the model, left to itself, says the same."""
    scored: Any = tried.scored
    answer = scored.greedy
    if answer is None:
        st.badge(
            t("free answer: none of the labels", "自由回答：不在标签中"),
            icon=":material/chat_error:",
            color="orange",
            help=t(
                "Left to itself the model would say something else. The probabilities compare the labels only.",
                "模型自由回答时会说别的内容。概率只在标签之间比较。",
            ),
        )
    elif answer == scored.label:
        st.badge(
            t("free answer: the same", "自由回答：一致"),
            icon=":material/check_circle:",
            color="green",
            help=t("Left to itself the model says this label too.", "模型自由回答时也给出该标签。"),
        )
    else:
        shown = plain(tried.asked.shown(answer))
        st.badge(
            t(f"free answer: {shown}", f"自由回答：{shown}"),
            icon=":material/compare_arrows:",
            color="orange",
            help=t(
                "The likeliest word at every step leads elsewhere than the likeliest label as a whole, or the "
                "calibration changed the order.",
                "逐词最可能的回答与整体最可能的标签不同，或校准改变了顺序。",
            ),
        )


def _words(tried: Tried) -> None:
    """The text with a tint behind each word: towards the label, or away from it."""
    words = tried.words[:MOST_WORDS]
    strongest = max((abs(change) for _, change in words), default=0.0)
    toward, away = ("79, 70, 229", "217, 119, 6")
    parts = []
    for word, change in words:
        strength = min(0.6, 0.6 * abs(change) / strongest) if strongest > 1e-6 else 0.0
        color = toward if change > 0 else away
        style = f"background: rgba({color}, {strength:.2f}); border-radius: 4px; padding: 1px 2px;"
        title = f"{change:+.2f}"
        parts.append(f'<span style="{style}" title="{title}">{html.escape(word)}</span>')
    rest = "".join(word for word, _ in tried.words[MOST_WORDS:])
    label = html.escape(tried.asked.shown(tried.scored.label))
    legend = t(
        f"towards <b>{label}</b> <span style='background: rgba({toward}, .5); border-radius: 4px;'>&emsp;</span> · "
        f"away from it <span style='background: rgba({away}, .5); border-radius: 4px;'>&emsp;</span> · "
        "hover for the change of the log-odds",
        f"支持 <b>{label}</b> <span style='background: rgba({toward}, .5); border-radius: 4px;'>&emsp;</span> · "
        f"反对 <span style='background: rgba({away}, .5); border-radius: 4px;'>&emsp;</span> · "
        "悬停查看对数几率的变化",
    )
    st.html(
        f'<div class="classify-words" style="font-size: 1.1rem; line-height: 2; overflow-wrap: anywhere;">'
        f"{''.join(parts)}{html.escape(rest)}</div>"
        f'<div style="opacity: .75; font-size: .85rem; margin-top: .4rem;">{legend}</div>'
    )
    strong = sorted(words, key=lambda one: -abs(one[1]))[:3]
    if strong and math.isfinite(strong[0][1]) and strongest > 1e-6:
        listed = ", ".join(f"{plain(word.strip())} {change:+.1f}" for word, change in strong if word.strip())
        st.caption(t(f"Strongest: {listed}", f"作用最大：{listed}"))
