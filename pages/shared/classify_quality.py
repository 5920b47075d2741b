"""How right a classification is: cards with intervals, the confusion of labels down to its rows, and the worst errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from glm_core import metrics
from pages.shared import classify_data, classify_measures, classify_results, panels, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.statistics import Interval
    from pages.shared.classify_data import Found

MOST_SHOWN = 12  # labels whose table of counts fits a screen
MOST_PAIRS = 30
MOST_ERRORS = 200


def cards(this: Found) -> None:
    """Accuracy, macro F1, MCC and AUC with their intervals, and the scores of every label."""
    assert this.rows is not None
    found = headline(this)
    words = {
        "accuracy": (t("Accuracy", "准确率"), "target"),
        "macro-f1": (t("Macro F1", "宏平均 F1"), "balance"),
        "mcc": ("MCC", "join"),
        "roc-auc": (t("ROC AUC", "ROC AUC"), "stacked_line_chart"),
    }
    with st.grid(4, min_column_width=150):
        for name, (title, icon) in words.items():
            one = found[name]
            st.metric(
                title,
                number(one, percent=name == "accuracy"),
                between(one, percent=name == "accuracy"),
                icon=f":material/{icon}:",
                border=True,
                delta_color="off",
                delta_arrow="off",
                help=f"{metrics.FORMULAS[name]} {said(one.reason)}".strip(),
            )
    n = len(this.rows)
    st.caption(
        t(
            f"On {n:,} rows with a correct label; 95 % intervals: Wilson, bootstrap of 2,000 resamples, DeLong.",
            f"基于 {n:,} 行正确标签；95% 区间：Wilson、2,000 次自助法、DeLong。",
        )
        + (" " + t("Few rows: the intervals are wide.", "行数较少，区间较宽。") if n < 100 else "")
    )
    _by_label(this)


@st.cache_data(max_entries=16, show_spinner="Measuring …")
def _headline(job_id: str, stamp: str, mapping: str) -> dict[str, Interval]:
    this = classify_data.found(state.job_store().get(job_id))
    assert this.rows is not None
    return classify_measures.headline(this.rows, this.positive)


def headline(this: Found) -> dict[str, Interval]:
    """The four figures, kept for as long as the results and the correct labels stay."""
    return _headline(this.job.id, this.stamp, repr(this.truth))


def number(one: Interval, percent: bool = False) -> str:
    """An estimate with the digits that mean something."""
    if one.estimate is None:
        return "–"
    return f"{one.estimate:.1%}" if percent else f"{one.estimate:.3f}"


def between(one: Interval, percent: bool = False) -> str:
    """The interval of an estimate."""
    if one.low is None or one.high is None:
        return t("no interval", "无区间")
    return f"{one.low:.1%} – {one.high:.1%}" if percent else f"{one.low:.3f} – {one.high:.3f}"


def _by_label(this: Found) -> None:
    import pandas as pd

    assert this.rows is not None
    scores = classify_measures.classification(this.rows)
    names = (
        t("label", "标签"), t("rows", "行数"), t("answered", "给出"), t("precision", "精确率"),
        t("recall", "召回率"), "F1",
    )  # fmt: skip
    rows = [
        (this.shown(i), one.support, one.predicted, one.precision, one.recall, one.f1)
        for i, one in enumerate(scores.by_label)
    ]
    st.dataframe(
        pd.DataFrame(rows, columns=list(names)),
        hide_index=True,
        column_config={
            name: st.column_config.ProgressColumn(format="%.3f", min_value=0.0, max_value=1.0)
            for name in names[3:]
        },
        key=f"classify_by_label_{this.job.id}",
    )


# --- confusion ---------------------------------------------------------------------------------------------------


def confusion(this: Found) -> None:
    """The counts of (correct label, answer) as buttons; a click shows the rows of a cell."""
    assert this.rows is not None
    panels.section(t("What is taken for what", "混淆矩阵"), "grid_on")
    table = classify_measures.table_of(this.rows)
    size = len(this.names)
    if table[:, size].sum() == 0:
        table = table[:, :size]
    key = f"classify.cell.{this.job.id}"
    if size > MOST_SHOWN:
        _pairs(this, table, key)
    else:
        _grid(this, table, key)
    cell = state.session(key)
    if cell is None or not (cell[0] < size and cell[1] < table.shape[1]):
        st.caption(t("Click a number to see its rows.", "点击数字查看对应的行。"))
        return
    correct, answer = cell
    wanted = answer if answer < size else -1
    rows = this.rows.idx[(this.rows.truth == correct) & (this.rows.answer == wanted)]
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="confusion_head"):
        st.markdown(
            t(
                f"**{len(rows):,} rows**: correct {plain(this.shown(correct))}, answer {plain(this.shown(wanted))}",
                f"**{len(rows):,} 行**：正确 {plain(this.shown(correct))}，答案 {plain(this.shown(wanted))}",
            ),
            width="content",
        )
        st.button(
            t("Close", "关闭"),
            icon=":material/close:",
            key="confusion_close",
            type="tertiary",
            on_click=lambda: state.session_set(key, None),
        )
    confidence = this.answers.confidence[this.place(rows)]
    rows = rows[np.lexsort((rows, -confidence))]
    classify_results.page_of(this, rows, f"cell_{correct}_{answer}")


def _grid(this: Found, table: np.ndarray, key: str) -> None:
    """The table as a grid of buttons, the darker the larger the share of the row."""
    size, columns = table.shape
    heads = [this.shown(k) if k < size else t("none", "无") for k in range(columns)]
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    shades = "".join(
        f".st-key-cell_{i}_{j} button {{background: rgba({'5, 150, 105' if i == j else '225, 29, 72'}, "
        f"{0.06 + 0.5 * share[i, j]:.2f}); border-color: transparent;}}"
        for i in range(size)
        for j in range(columns)
    )
    # Streamlit stacks its columns on a phone, which would tear a table apart.
    st.html(
        f"""<style>
        .st-key-confusion {{display: grid; grid-template-columns: minmax(70px, max-content)
          repeat({columns}, minmax(52px, 150px)); gap: 6px; align-items: center; overflow-x: auto;}}
        .st-key-confusion > div {{width: auto !important; min-width: 0;}}
        .st-key-confusion button {{width: 100%; min-height: 3rem; font-variant-numeric: tabular-nums;}}
        .st-key-confusion [data-testid="stCaptionContainer"] p {{overflow-wrap: anywhere;}}
        {shades}</style>"""
    )
    with st.container(key="confusion"):
        st.caption(t("correct ↓ answer →", "正确 ↓ 答案 →"))
        for head in heads:
            st.caption(f"**{plain(head)}**")
        for i in range(size):
            st.caption(f"**{plain(this.shown(i))}**")
            for j in range(columns):
                st.button(
                    f"{int(table[i, j]):,}",
                    key=f"cell_{i}_{j}",
                    width="stretch",
                    help=t(
                        f"{share[i, j]:.1%} of the rows that are {plain(this.shown(i))}",
                        f"占 {plain(this.shown(i))} 行的 {share[i, j]:.1%}",
                    ),
                    on_click=state.session_set,
                    args=(key, (i, j)),
                )


def _pairs(this: Found, table: np.ndarray, key: str) -> None:
    """The most frequent confusions of many labels, as a choice."""
    size = len(this.names)
    pairs = [
        (int(table[i, j]), i, j) for i in range(size) for j in range(table.shape[1]) if i != j and table[i, j]
    ]
    pairs.sort(key=lambda one: -one[0])
    if not pairs:
        st.caption(t("No label is taken for another.", "没有标签被混淆。"))
        return
    words = {
        (i, j): f"{this.shown(i)} → {this.shown(j if j < size else -1)}: {count:,}"
        for count, i, j in pairs[:MOST_PAIRS]
    }
    chosen = st.selectbox(
        t("Correct label → answer, most frequent first", "正确标签 → 答案，按次数排序"),
        [None, *words],
        format_func=lambda one: t("choose", "请选择") if one is None else words[one],
        key=f"classify_pair_{this.job.id}",
    )
    state.session_set(key, chosen)


# --- errors ------------------------------------------------------------------------------------------------------


def errors(this: Found) -> None:
    """The wrong answers, the surest first: label noise and blind spots stand at the top."""
    assert this.rows is not None
    panels.section(t("Most confident errors", "最确信的错误"), "priority_high")
    places = classify_measures.errors(this.rows, MOST_ERRORS)
    if not len(places):
        st.caption(t("No row is wrong.", "没有错误的行。"))
        return
    st.caption(
        t(
            "The surest wrong answers first. Some of them may be wrong labels in your file.",
            "最确信的错误答案排在前面，其中有些可能是文件中的标签有误。",
        )
    )
    rows = [int(idx) for idx in this.rows.idx[places]]
    own = [*classify_data.text_columns(this.job)]
    frame, settings = classify_data.frame(this, rows, own)
    st.dataframe(
        frame,
        column_config=settings,
        height=min(36 * (len(rows) + 1) + 2, 400),
        key=f"classify_errors_{this.job.id}",
    )
    wrong = int((~this.rows.right).sum())
    if wrong > len(rows):
        st.caption(t(f"The first {len(rows)} of {wrong:,}.", f"{wrong:,} 行中的前 {len(rows)} 行。"))
