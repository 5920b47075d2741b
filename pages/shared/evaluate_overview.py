"""The first view of a run: the other metrics with interval and formula, how rows spread, and runs on the same file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from glm_core import evaluate
from pages.shared import (
    charts,
    evaluate_beside,
    evaluate_data,
    evaluate_figures,
    evaluate_words,
    panels,
)
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run, Scores

FIRST = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")  # of the released recipe
MOST_LABELS = 20


def show(run: Run, scores: Scores) -> None:
    """The metrics, the spread of the rows, the labels, and the runs beside this one."""
    _metrics(run, scores)
    evaluate_beside.card(run, evaluate_data.runs())
    if scores.kind == "text":
        with st.container(border=True, key="evaluate_spread"):
            _spread(run, scores)
    elif scores.labels:
        with st.container(border=True, key="evaluate_labels"):
            _labels(run, scores)
    _sureness(run, scores)


def _metrics(run: Run, scores: Scores) -> None:
    others = [one for one in scores.values if one != scores.main or scores.kind == "text"]
    if others not in ([], [scores.main]):
        with st.container(border=True, key="evaluate_metrics"):
            panels.section(t("All metrics", "全部指标"), "straighten")
            first = [one for one in others if one in FIRST]
            rest = [one for one in others if one not in FIRST]
            if first:
                _cards(scores, first)
            if first and rest:
                st.caption(
                    t(
                        "Above as in the released recipe (words by jieba, BLEU of characters). Below other definitions, "
                        "which give other numbers.",
                        "以上与官方脚本一致（jieba 分词的 ROUGE，按字的 BLEU）。以下为其他定义，数值不同。",
                    )
                )
            if rest:
                _cards(scores, rest)
            st.caption(
                t(
                    "The formula of each is behind its question mark. 95 % intervals: ",
                    "公式见各指标的问号。95% 区间：",
                )
                + _intervals(scores)
            )
            _published(run, scores)
    if scores.hidden:
        names = ", ".join(evaluate_words.metric(one) for one in ("rouge-l", "bleu-4"))
        reason = next(iter(scores.hidden.values()))
        st.caption(
            f":material/visibility_off: {t('Not shown here', '此处不显示')}: {names}. {plain(said(reason))}"
        )


def _cards(scores: Scores, names: list[str]) -> None:
    with st.grid(5 if len(names) > 4 else 4, min_column_width=140):
        for name in names:
            one = scores.values[name]
            st.metric(
                evaluate_words.metric(name),
                evaluate_words.number(one.estimate, scores.kind, name),
                evaluate_words.between(one, scores.kind, name),
                border=True,
                delta_color="off",
                delta_arrow="off",
                help=f"{plain(said(scores.formulas[name]))} {plain(said(one.reason))}".strip(),
            )


def _intervals(scores: Scores) -> str:
    words = {
        "percentile": t("bootstrap of 2,000 resamples", "2,000 次自助法"),
        "normal": t("normal, from the spread of the rows", "正态近似"),
        "wilson": "Wilson",
    }
    used = dict.fromkeys(one.method for one in scores.values.values() if one.low is not None)
    return "; ".join(words.get(one, one) for one in used) + "."


def _published(run: Run, scores: Scores) -> None:
    """Published scores of the data set beside these, where the columns are those of one."""
    import pandas as pd

    for data_set, checkpoint, values in evaluate.published(run.task):
        rows = []
        for name, value in values.items():
            if name not in scores.values:
                continue
            mine = scores.values[name]
            rows.append(
                {
                    t("metric", "指标"): evaluate_words.metric(name),
                    t("this run", "本次"): evaluate_words.score(mine, scores.kind, name),
                    f"{checkpoint}, {data_set}": f"{value:.2f}",
                    t("difference", "差"): f"{mine.estimate - value:+.1f}"
                    if mine.estimate is not None
                    else "–",
                }
            )
        if not rows:
            continue
        with st.expander(
            t(f"Published scores of {data_set}: {checkpoint}", f"{data_set} 的公开分数：{checkpoint}"),
            icon=":material/menu_book:",
        ):
            st.dataframe(
                pd.DataFrame(rows), hide_index=True, key=f"evaluate_published_{data_set}_{checkpoint}"
            )
            st.caption(
                t(
                    f"Compare only where your file is {data_set}'s own test file; another file has another difficulty.",
                    f"仅当您的文件就是 {data_set} 的测试集时才可比较；不同的文件难度不同。",
                )
            )


# --- the spread -------------------------------------------------------------------------------------------------


def _spread(run: Run, scores: Scores) -> None:
    """How the rows spread over the scores of a metric."""
    from glm_core.metrics import OF_ROWS

    row = panels.section(t("How the rows spread", "各行得分分布"), "bar_chart")
    names = [one for one in scores.values if one in OF_ROWS and one != "exact-match"]
    with row:
        st.space("stretch")
        name = st.selectbox(
            t("Metric", "指标"),
            names,
            index=names.index(scores.main) if scores.main in names else 0,
            format_func=evaluate_words.metric,
            key=f"evaluate_spread_{run.id}",
            label_visibility="collapsed",
            width=220,
        )
    table = evaluate_data.rows(run)
    values = table.measure(str(name))
    bins = evaluate.views.histogram(values)
    published = {
        checkpoint: known[str(name)]
        for _, checkpoint, known in evaluate.published(run.task)
        if str(name) in known
    }
    evaluate_figures.spread(
        bins,
        scores.values[str(name)].estimate,
        published,
        str(name),
        f"evaluate_spread_chart_{run.id}",
        f"{run.title}-{name}",
    )
    rows, low = sum(one.n for one in bins), bins[0].n
    parts = [
        t(
            f"{low:,} of {rows:,} rows score under {bins[0].high:g}.",
            f"{rows:,} 行中有 {low:,} 行低于 {bins[0].high:g} 分。",
        ),
        *(t(f"Dashed: published mean of {one}.", f"虚线：{one} 的公开均值。") for one in published),
    ]
    st.caption(" ".join(parts))


def _sureness(run: Run, scores: Scores) -> None:
    """How sure the model was of right and of wrong answers, where the possible answers were scored."""
    import numpy as np

    table = evaluate_data.rows(run)
    known = table.scored & ~np.isnan(table.confidence)
    if scores.kind == "text" or not known.any():
        return
    go = charts.plotly()
    c = charts.colors()
    with st.container(border=True, key="evaluate_sureness"):
        panels.section(t("How sure it was", "答案的置信度"), "speed")
        figure = go.Figure()
        rows: list[tuple[float, float, int, int]] = []
        counted = []
        for right, title, color in (
            (True, t("right", "正确"), c["good"]),
            (False, t("wrong", "错误"), c["bad"]),
        ):
            bins = evaluate.views.histogram(table.confidence[known & (table.right == right)], top=1.0)
            counted.append([one.n for one in bins])
            figure.add_bar(
                x=[100 * (one.low + one.high) / 2 for one in bins],
                y=[one.n for one in bins],
                width=4.6,
                name=title,
                marker={"color": color},
                hovertemplate=f"{title}: %{{y:,}}<extra></extra>",
            )
        rows = [(one.low, one.high, a, b) for one, a, b in zip(bins, *counted, strict=True)]
        evaluate_figures.dressed(
            figure, 260, t("probability of the answer, %", "答案的概率（%）"), t("rows", "行"),
            barmode="stack", showlegend=True,
        )  # fmt: skip
        figure.update_xaxes(range=[0, 100])
        evaluate_figures.draw(
            figure, f"evaluate_sureness_{run.id}", f"{run.title}-confidence", ("from", "to", "right", "wrong"), rows
        )  # fmt: skip


# --- labels and options -----------------------------------------------------------------------------------------


def _labels(run: Run, scores: Scores) -> None:
    """What was taken for what, and every label's own scores."""
    import pandas as pd

    assert scores.labels is not None
    panels.section(t("What is taken for what", "混淆矩阵"), "grid_on")
    labels = [str(one) for one in scores.labels["labels"]]
    table = scores.labels["confusion"]
    none = t("none of them", "其他")
    if len(labels) <= MOST_LABELS:
        evaluate_figures.confusion(
            labels, table, none, f"evaluate_confusion_{run.id}", f"{run.title}-confusion"
        )
    else:
        pairs = sorted(
            ((count, i, j) for i, row in enumerate(table) for j, count in enumerate(row) if i != j and count),
            reverse=True,
        )[:MOST_LABELS]
        st.caption(t("The most frequent confusions", "最常见的混淆"))
        st.dataframe(
            pd.DataFrame(
                [
                    {
                        t("correct", "正确"): labels[i],
                        t("answer", "答案"): labels[j] if j < len(labels) else none,
                        t("rows", "行"): count,
                    }
                    for count, i, j in pairs
                ]
            ),
            hide_index=True,
            key=f"evaluate_pairs_{run.id}",
        )
    names = [t("label", "标签"), t("rows", "行数"), t("answered", "给出"), t("precision", "精确率"), t("recall", "召回率"), "F1"]  # fmt: skip
    rows = [
        (one["label"], one["support"], one["predicted"], one["precision"], one["recall"], one["f1"])
        for one in scores.labels["by_label"]
    ]
    st.dataframe(
        pd.DataFrame(rows, columns=names),
        hide_index=True,
        column_config={
            name: st.column_config.ProgressColumn(format="%.3f", min_value=0.0, max_value=1.0)
            for name in names[3:]
        },
        key=f"evaluate_by_label_{run.id}",
    )
    if outside := scores.labels.get("outside"):
        shown = ", ".join(
            f"{plain(str(text)) if text is not None else none} ({count:,})" for text, count in outside[:6]
        )
        st.caption(t(f"Answers outside the labels: {shown}", f"标签之外的回答：{shown}"))
