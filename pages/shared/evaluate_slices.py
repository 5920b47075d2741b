"""The scores of a run by the values of a column: each with its rows and interval; fewer than 30 rows are pale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from glm_core.evaluate.scoring import FEW
from pages.shared import evaluate_data, evaluate_figures, evaluate_words, panels
from pages.shared.evaluate_figures import Line
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run, Scores

LENGTH = "#length"
MOST_DRAWN = 25


def show(run: Run, scores: Scores) -> None:
    """A column, and the scores by its values."""
    from glm_core.metrics import OF_ROWS

    task = run.task
    with st.container(border=True, key="evaluate_slices"):
        panels.section(t("By the values of a column", "按列取值分组"), "view_week")
        choices = [*_columns(run), LENGTH]
        names = [one for one in scores.values if one in OF_ROWS] if scores.kind == "text" else ["accuracy"]
        with st.grid(3, min_column_width=180):
            column = st.selectbox(
                t("Column", "列"),
                choices,
                index=choices.index(task.subject) if task.subject in choices else 0,
                format_func=lambda one: t("length of the answer", "回答长度") if one == LENGTH else one,
                key=f"evaluate_slice_{run.id}",
                persist_state="session",
            )
            metric = names[0]
            if len(names) > 1:
                metric = st.selectbox(
                    t("Metric", "指标"),
                    names,
                    index=names.index(scores.main) if scores.main in names else 0,
                    format_func=evaluate_words.metric,
                    key=f"evaluate_slice_metric_{run.id}",
                    persist_state="session",
                )
            order = st.selectbox(
                t("Order", "排序"),
                ["n", "low", "high"],
                format_func={
                    "n": t("most rows first", "行数多的优先"),
                    "low": t("lowest first", "分数低的优先"),
                    "high": t("highest first", "分数高的优先"),
                }.__getitem__,
                key=f"evaluate_slice_order_{run.id}",
                persist_state="session",
            )
        _draw(run, scores, str(column), str(metric), str(order))


def _columns(run: Run) -> list[str]:
    """The columns that may cut the scores: those with few values first, the question and the answers last."""
    task = run.task
    last = {task.prompt, task.reference, task.prediction, *task.options}
    return sorted(task.columns, key=lambda one: (one in last, one != task.subject))


def _draw(run: Run, scores: Scores, column: str, metric: str, order: str) -> None:
    import pandas as pd

    found, how = evaluate_data.slices(run, column, metric)
    if how != "value":
        st.caption(
            t(
                "Too many values: cut into ranges of about equally many rows",
                "取值过多：按行数大致相等划分为区间",
            )
            + {
                "number": t(", by number.", "（按数值）。"),
                "length": t(", by length in characters.", "（按字符长度）。"),
            }[how]
        )
    if not found:
        st.caption(t("No row is scored.", "没有已评分的行。"))
        return
    if order != "n":
        found = sorted(found, key=lambda one: one.score.estimate or 0.0, reverse=order == "high")
    name = t("length of the answer", "回答长度") if column == LENGTH else column
    shown = found[:MOST_DRAWN]
    whole = scores.values.get(metric)
    evaluate_figures.forest(
        [Line(one.value, one.score, not one.few, one.few, f"n = {one.n:,}") for one in shown],
        scores.kind,
        metric,
        f"evaluate_slices_{run.id}",
        f"{run.title}-{name}",
        (t("all rows", "全部"), whole.estimate) if whole is not None and whole.estimate is not None else None,
    )
    if len(found) > len(shown):
        st.caption(
            t(f"The first {len(shown)} of {len(found)}; all are in the table.", f"{len(found)} 个中的前 {len(shown)} 个；全部见表格。")
        )  # fmt: skip
    if any(one.few for one in found):
        st.caption(
            t(
                f"Grey: fewer than {FEW} rows, which say little.",
                f"灰色：不足 {FEW} 行，参考意义有限。",
            )
        )
    rows = [
        {
            plain(name).replace("\\", ""): one.value,
            t("rows", "行数"): one.n,
            evaluate_words.metric(metric): evaluate_words.number(one.score.estimate, scores.kind, metric),
            t("95 % interval", "95% 区间"): evaluate_words.between(one.score, scores.kind, metric),
            t("certainty", "可信度"): t("few rows", "行数少") if one.few else "",
        }
        for one in found
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=min(36 * (len(rows) + 1) + 2, 360),
        key=f"evaluate_slice_table_{run.id}",
    )
