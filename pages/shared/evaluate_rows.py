"""The rows of a run: the worst, the best, some by chance, those without an answer; and one of them beside its reference."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from glm_core import evaluate
from pages.shared import evaluate_data, evaluate_words, panels, state, table_input
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import PerRow, Run, Scores

PAGE_ROWS = 50
LONGEST = 200  # characters of a cell in the list
LONGEST_SHOWN = 20_000  # characters of a text beside its reference


def words() -> dict[str, str]:
    """The choices of rows as they are called on screen."""
    return {
        "worst": t("Worst", "最差"),
        "best": t("Best", "最好"),
        "random": t("By chance", "随机"),
        "file": t("In order", "按文件顺序"),
        "empty": t("Empty", "空回答"),
        "no answer": t("No answer", "无答案"),
        "truncated": t("Shortened", "被截断"),
        "failed": t("Not answered", "未回答"),
    }


def show(run: Run, scores: Scores) -> None:
    """A list of rows, and the row that was picked from it in full."""
    from glm_core.metrics import OF_ROWS

    table = evaluate_data.rows(run)
    names = [one for one in scores.values if one in OF_ROWS] if scores.kind == "text" else [scores.main]
    with st.container(border=True, key="evaluate_rows"):
        row = panels.section(t("Rows", "逐行"), "table_rows")
        metric = names[0]
        if len(names) > 1:
            with row:
                st.space("stretch")
                metric = str(
                    st.selectbox(
                        t("By", "按"),
                        names,
                        index=names.index(scores.main) if scores.main in names else 0,
                        format_func=evaluate_words.metric,
                        key=f"evaluate_rows_metric_{run.id}",
                        label_visibility="collapsed",
                        width=220,
                    )
                )
        order, found = _order(run, scores, table, metric)
        if not len(found):
            st.caption(t("No rows here.", "没有这样的行。"))
            return
        chosen = _list(run, scores, table, metric, order, found)
    _one(run, scores, table, chosen)


def _order(run: Run, scores: Scores, table: PerRow, metric: str) -> tuple[str, Any]:
    titles = words()
    counts = {
        "empty": scores.n_empty,
        "no answer": scores.n_no_answer if scores.kind != "label" else 0,
        "truncated": scores.n_truncated,
        "failed": scores.n_failed + scores.n_left,
    }
    orders = [one for one in titles if counts.get(one, 1)]
    if scores.kind != "text":
        right = int(table.right[table.scored].sum())
        titles["worst"], titles["best"] = t("Wrong", "错误"), t("Right", "正确")
        counts |= {"worst": int(table.scored.sum()) - right, "best": right}
    order = str(
        st.segmented_control(
            t("Which rows", "显示哪些行"),
            orders,
            format_func=lambda one: f"{titles[one]} {counts[one]:,}" if one in counts else titles[one],
            default="worst",
            required=True,
            key=f"evaluate_order_{run.id}",
            label_visibility="collapsed",
        )
    )
    seed = 0
    if order == "random":
        key = f"evaluate_random_{run.id}"
        seed = int(state.session(key, 0))
        st.button(
            t("Others", "换一批"),
            icon=":material/casino:",
            key=f"{key}_next",
            on_click=state.session_set,
            args=(key, seed + 1),
        )
    return order, evaluate.views.places(table, order, metric, seed)  # type: ignore[arg-type]


def _list(run: Run, scores: Scores, table: PerRow, metric: str, order: str, found: Any) -> int:
    """A page of the rows; the place of the one to show in full, the first where none is picked."""
    pages = -(-len(found) // PAGE_ROWS)
    place = st.container()
    number = (
        st.pagination(pages, key=f"evaluate_rows_page_{run.id}_{order}_{metric}_{pages}") if pages > 1 else 1
    )
    some = [int(one) for one in found[(number - 1) * PAGE_ROWS : number * PAGE_ROWS]]
    answers = shown(run, some)
    rows = [
        (
            str(one["number"]),
            _score(scores, table, metric, at),
            cut(one["question"]),
            cut(_told(one)) or t("(empty)", "（空）"),
            cut(one["reference"]),
        )
        for at, one in zip(some, answers, strict=True)
    ]
    names = (
        t("row", "行"),
        evaluate_words.metric(metric),
        t("question", "问题"),
        t("answer", "回答"),
        t("correct answer", "参考答案"),
    )
    with place:
        picked = st.dataframe(
            table_input.frame(names, rows),
            column_config=table_input.widths(names, rows, 240),
            hide_index=True,
            height=min(36 * (len(rows) + 1) + 2, 400),
            on_select="rerun",
            selection_mode="single-row",
            key=f"evaluate_list_{run.id}_{order}_{metric}_{number}",
        )
        st.caption(
            t(
                f"{len(found):,} rows. Tick a row to read it in full; with the keyboard: Shift+Space.",
                f"共 {len(found):,} 行。勾选某行查看全文；键盘操作：Shift+空格。",
            )
        )
    at = picked["selection"]["rows"] if picked else []
    return some[at[0]] if at and at[0] < len(some) else some[0]


def shown(run: Run, places: list[int]) -> list[dict[str, Any]]:
    """Some rows as they were asked and answered; neighbouring ones are read together."""
    store, found = state.job_store(), {}
    wanted = sorted(places)
    start = 0
    while start < len(wanted):
        end = start
        while end + 1 < len(wanted) and wanted[end + 1] == wanted[end] + 1:
            end += 1
        for one in evaluate.answers_page(store, run.id, wanted[start], end - start + 1):
            found[int(one["idx"])] = one
        start = end + 1
    return [found[place] for place in places]


def cut(text: str) -> str:
    """A cell as a list shows it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _told(one: dict[str, Any]) -> str:
    return str(one["reasoning"] or one["prediction"] or said(str(one["note"])))


def _score(scores: Scores, table: PerRow, metric: str, place: int) -> str:
    if not table.scored[place]:
        return "–"
    if scores.kind == "text":
        return f"{float(table.measure(metric)[place]):.1f}"
    return t("right", "正确") if table.right[place] else t("wrong", "错误")


# --- one row ----------------------------------------------------------------------------------------------------


def _one(run: Run, scores: Scores, table: PerRow, place: int) -> None:
    """A row in full: the question, and the answer beside the reference with what differs marked."""
    one = shown(run, [place])[0]
    with st.container(border=True, key="evaluate_row"):
        row = panels.section(t(f"Row {one['number']:,}", f"第 {one['number']:,} 行"), "compare_arrows")
        with row:
            for text, color in _badges(scores, table, place):
                st.badge(text, color=color)  # type: ignore[arg-type]
        st.caption(t("Question", "问题"))
        with st.container(height=180 if len(one["question"]) > 600 else "content", border=False):
            st.text(one["question"][:LONGEST_SHOWN] or "–")
        told = str(one["reasoning"] or one["prediction"])
        reference = str(one["reference"])
        left, right = marks(told, reference) if scores.kind == "text" else (escape(told), escape(reference))
        columns = st.columns(2, gap="medium")
        for column, title, html, key in (
            (columns[0], t("Answer", "回答"), left, "answer"),
            (columns[1], t("Correct answer", "参考答案"), right, "reference"),
        ):
            with column.container(border=True, height="stretch", key=f"evaluate_row_{key}"):
                st.caption(f"**{title}**")
                st.html(f"{STYLE}<div class='ev-text'>{html or '–'}</div>")
        if one["reasoning"]:
            st.caption(
                t(f"Option found: {plain(one['prediction'])}", f"得到的选项：{plain(one['prediction'])}")
            )
        if one["log_probabilities"]:
            _probabilities(one["log_probabilities"])
        if one["note"]:
            st.caption(f":material/info: {plain(said(str(one['note'])))}")
        if scores.kind == "text":
            st.caption(
                t(
                    "Red: only in the answer. Green: only in the reference. Word by word, Chinese cut by jieba.",
                    "红色：仅在回答中。绿色：仅在参考答案中。按词比较，中文用 jieba 分词。",
                )
            )


STYLE = """<style>
.ev-text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65; max-height: 26rem; overflow-y: auto;}
.ev-text del {text-decoration: none; background: rgba(225, 29, 72, .24); border-radius: .2rem; padding: .05rem .1rem;}
.ev-text ins {text-decoration: none; background: rgba(5, 150, 105, .26); border-radius: .2rem; padding: .05rem .1rem;}
</style>"""


@st.cache_data(max_entries=64, show_spinner=False)
def marks(told: str, reference: str) -> tuple[str, str]:
    """Answer and reference as HTML, with what only one of them has marked."""
    left, right = evaluate.views.marked(told[:LONGEST_SHOWN], reference[:LONGEST_SHOWN])
    return (
        "".join(f"<del>{escape(text)}</del>" if other else escape(text) for text, other in left),
        "".join(f"<ins>{escape(text)}</ins>" if other else escape(text) for text, other in right),
    )


def _badges(scores: Scores, table: PerRow, place: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if scores.kind == "text":
        for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
            if name in table.scores and not np.isnan(table.scores[name][place]):
                color = "violet" if name == scores.main else "gray"
                found.append((f"{evaluate_words.metric(name)} {float(table.scores[name][place]):.1f}", color))
    elif table.scored[place]:
        right = bool(table.right[place])
        found.append((t("right", "正确") if right else t("wrong", "错误"), "green" if right else "red"))
        if str(table.answer[place]) == "":
            found.append((t("no answer found", "未找到答案"), "orange"))
        elif scores.kind != "label" or not right:
            answer, truth = plain(str(table.answer[place])), plain(str(table.truth[place]))
            found.append((t(f"read as {answer}, correct {truth}", f"读作 {answer}，正确 {truth}"), "gray"))
    if table.truncated[place]:
        found.append((t("prompt shortened", "提示词被截断"), "orange"))
    return found


def _probabilities(values: dict[str, float]) -> None:
    """The probability of each possible answer."""
    given = np.array(list(values.values()))
    share = np.exp(given - given.max())
    share /= share.sum()
    with st.container(horizontal=True, gap="xsmall"):
        for name, value in sorted(zip(values, share, strict=True), key=lambda one: -one[1])[:12]:
            st.badge(f"{plain(name)} {value:.1%}", color="gray")
