"""The rows of two runs: what became of each, who was right where, and both answers with the other words marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from glm_core.errors import GLMError
from pages.shared import compare_diff, panels, state
from pages.shared.compare_runs import Found, metric_name
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.compare import Comparison

PAGE_ROWS = 8
NAMES = ("fixed", "broken", "both_wrong", "both_right")
LONGEST = 1500  # characters of a prompt that are shown at once
COLOURS = {"fixed": "green", "broken": "red", "both_wrong": "orange", "both_right": "gray"}
TEXT_ICONS = {
    "fixed": "trending_up",
    "broken": "trending_down",
    "both_wrong": "close",
    "both_right": "drag_handle",
}
ICONS = {"fixed": "build", "broken": "heart_broken", "both_wrong": "close", "both_right": "check"}


def icon(one: Comparison, name: str) -> str:
    """The sign of what became of a row."""
    by_score = one.kind == "text" and one.verdict.metric != "exact-match"
    return f":material/{(TEXT_ICONS if by_score else ICONS)[name]}:"


def fate(one: Comparison, name: str) -> str:
    """What became of a row from A to B."""
    if one.kind == "text" and one.verdict.metric != "exact-match":
        words = {
            "fixed": t("Higher", "更高"),
            "broken": t("Lower", "更低"),
            "both_wrong": "",
            "both_right": t("Equal", "相同"),
        }
    else:
        words = {
            "fixed": t("Fixed", "改对"),
            "broken": t("Broken", "改错"),
            "both_wrong": t("Both wrong", "都错"),
            "both_right": t("Both right", "都对"),
        }
    return words[name]


@live()
def section(this: Found, one: Comparison) -> None:
    """The 2 x 2 table, the choice of rows and the rows; drawn alone when something in it is clicked."""
    names = this.names
    counts = {name: len(getattr(one.flips, name)) for name in NAMES}
    shown = [name for name in NAMES if counts[name] or (fate(one, name) and name in ("fixed", "broken"))]
    key = f"compare_rows_{one.a}_{one.b}"
    if state.session(key) not in shown:
        state.session_set(key, next((name for name in shown if counts[name]), shown[0]))
    panels.section(t("Row by row", "逐行对比"), "table_rows")
    if one.kind == "text":
        st.caption(
            t(
                f"By {metric_name(one.verdict.metric)}: higher or lower in {plain(names[one.b])}, the largest change first.",
                f"按 {metric_name(one.verdict.metric)}：在 {plain(names[one.b])} 中更高或更低，变化最大的在前。",
            )
        )
    if one.agreement is not None:
        _agreement(this, one, key)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        chosen = st.segmented_control(
            t("Rows", "行"),
            shown,
            format_func=lambda name: f"{icon(one, name)} {fate(one, name)} {counts[name]:,}",
            required=True,
            key=key,
            label_visibility="collapsed",
        )
        st.space("stretch")
        only = st.toggle(
            t("Only other words", "仅显示措辞不同的"),
            help=t(
                "Leaves out the rows that both answered with the same words.", "略去两者回答完全相同的行。"
            ),
            **state.kept_widget("compare.only_different", False),
        )
    places = one.flips.places.get(str(chosen))
    if places is None or not len(places):
        st.caption(t("No such rows.", "没有这样的行。"))
        return
    if only:
        other = _other_words(one.a, one.b, _stamp(this, one), one)
        places = np.array([pair for pair in places.tolist() if pair[0] in other]).reshape(-1, 2)
        if not len(places):
            st.caption(t("Both say the same on all of them.", "这些行的回答完全相同。"))
            return
    pages = -(-len(places) // PAGE_ROWS)
    number = 1
    if pages > 1:
        number = st.pagination(pages, key=f"{key}_{chosen}_{only}_{pages}")
    begin = (number - 1) * PAGE_ROWS
    try:
        for place, pair in enumerate(places[begin : begin + PAGE_ROWS].tolist()):
            _row(this, one, str(chosen), pair, place)
    except GLMError as error:
        panels.problem(error)
    if pages > 1:
        end = min(len(places), begin + PAGE_ROWS)
        st.caption(
            t(
                f"Rows {begin + 1:,} to {end:,} of {len(places):,}.",
                f"第 {begin + 1:,} 至 {end:,} 行，共 {len(places):,} 行。",
            )
        )


def _stamp(this: Found, one: Comparison) -> str:
    runs = {run.id: run.job for run in this.runs}
    return "-".join(f"{runs[id_].attempt}.{runs[id_].done}.{runs[id_].failed}" for id_ in (one.a, one.b))


@st.cache_data(max_entries=6, show_spinner="Reading the answers …")
def _other_words(a: str, b: str, stamp: str, _one: Comparison) -> set[int]:
    from glm_core import compare

    return compare.other_words(state.job_store(), _one)


def _row(this: Found, one: Comparison, name: str, pair: list[int], place: int) -> None:
    """A row: its prompt, the reference and both answers."""
    from glm_core import evaluate

    store, names = state.job_store(), this.names
    a, b = (
        evaluate.answers_page(store, run, idx, 1)[0] for run, idx in zip((one.a, one.b), pair, strict=True)
    )
    with st.container(border=True, gap="xsmall", key=f"compare_row_{place}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.badge(t(f"row {a['number']:,}", f"第 {a['number']:,} 行"), color="gray")
            st.badge(fate(one, name), color=COLOURS[name], icon=icon(one, name))  # type: ignore[arg-type]
            if one.kind == "text":
                _gain(this, one, pair)
        question = str(a["question"] or b["question"]) or _other_cells(this, one, pair[0])
        if question:
            compare_diff.text(question[:LONGEST] + ("…" if len(question) > LONGEST else ""))
        reference = str(a["reference"] or b["reference"])
        said_a, said_b = str(a["prediction"]), str(b["prediction"])
        if one.kind == "text":
            st.caption(t("Reference", "参考答案"))
            compare_diff.text(reference)
            places = st.columns(2, gap="small")
        else:  # a word or a number each: they fit beside the reference
            first, *places = st.columns(3, gap="small")
            with first.container(gap="xxsmall"):
                st.caption(t("Reference", "参考答案"))
                compare_diff.text(reference)
        for column, id_, told, other, kind, row in (
            (places[0], one.a, said_a, said_b, _shade(one, name == "broken"), a),
            (places[1], one.b, said_b, said_a, _shade(one, name == "fixed"), b),
        ):
            with column.container(border=one.kind == "text", height="stretch", gap="xxsmall"):
                st.caption(f"**{plain(names[id_])}**")
                compare_diff.text(told, other, kind)
                _note(row)


def _other_cells(this: Found, one: Comparison, idx: int) -> str:
    """What else the row of an imported file says, where none of its columns is known to be the question."""
    task = next(run.task for run in this.runs if run.id == one.a)
    _, cells, _ = state.job_store().results_page(one.a, idx, 1)[0]
    return "\n".join(
        f"{column}: {cell}"
        for column, cell in zip(task.columns, cells, strict=False)
        if column not in (task.reference, task.prediction) and cell.strip()
    )


def _shade(one: Comparison, right: bool) -> str:
    """The colour of the words that are one answer's own: right, wrong, or neither where texts only score."""
    return "other" if one.kind == "text" else "good" if right else "bad"


def _note(row: dict[str, Any]) -> None:
    if row["note"]:
        st.caption(f":orange[:material/info:] {plain(said(str(row['note'])))}")
    if row["reasoning"]:
        with st.expander(t("Reasoning", "推理过程")):
            st.text(str(row["reasoning"])[:4000])


def _gain(this: Found, one: Comparison, pair: list[int]) -> None:
    """The scores of both answers."""
    metric = one.verdict.metric
    a, b = (
        _measure(run, _stamp(this, one), metric)[idx] for run, idx in zip((one.a, one.b), pair, strict=True)
    )
    st.badge(f"{a:.1f} → {b:.1f}", color="gray", help=metric_name(metric))


@st.cache_data(max_entries=8, show_spinner=False)
def _measure(run_id: str, stamp: str, metric: str) -> dict[int, float]:
    from glm_core import evaluate

    rows = evaluate.per_row(state.job_store(), run_id)
    return dict(zip(rows.idx.tolist(), rows.measure(metric).tolist(), strict=True))


# --- who was right where --------------------------------------------------------------------------------------


def _agreement(this: Found, one: Comparison, key: str) -> None:
    """The 2 x 2 table as buttons, the darker the more rows; a click shows its rows below."""
    assert one.agreement is not None
    names = this.names
    both, only_a, only_b, neither = one.agreement
    cells = (("both_right", both), ("broken", only_a), ("fixed", only_b), ("both_wrong", neither))
    total = max(1, sum(one.agreement))
    tint = {
        "both_right": "5, 150, 105",
        "fixed": "5, 150, 105",
        "broken": "225, 29, 72",
        "both_wrong": "217, 119, 6",
    }
    shades = "".join(
        f".st-key-agree_{name} button {{background: rgba({tint[name]}, {0.06 + 0.45 * count / total:.2f}); "
        "border-color: transparent;}"
        for name, count in cells
    )
    # Streamlit stacks its columns on a phone, which would tear a table apart.
    st.html(
        f"""<style>
        .st-key-compare_agreement {{display: grid; grid-template-columns: minmax(70px, max-content)
          repeat(2, minmax(90px, 190px)); gap: 6px; align-items: center; max-width: 40rem;}}
        .st-key-compare_agreement > div {{width: auto !important; min-width: 0;}}
        .st-key-compare_agreement button {{width: 100%; min-height: 3.2rem; font-variant-numeric: tabular-nums;}}
        .st-key-compare_agreement [data-testid="stCaptionContainer"] p {{overflow-wrap: anywhere;}}
        {shades}</style>"""
    )
    with st.container(key="compare_agreement"):
        st.caption(" ")
        st.caption(t(f"**{plain(names[one.b])}** right", f"**{plain(names[one.b])}** 正确"))
        st.caption(t(f"**{plain(names[one.b])}** wrong", f"**{plain(names[one.b])}** 错误"))
        for i, head in enumerate(
            (
                t(f"**{plain(names[one.a])}** right", f"**{plain(names[one.a])}** 正确"),
                t(f"**{plain(names[one.a])}** wrong", f"**{plain(names[one.a])}** 错误"),
            )
        ):
            st.caption(head)
            for name, count in cells[2 * i : 2 * i + 2]:
                st.button(
                    f"{count:,} · {fate(one, name)}",
                    key=f"agree_{name}",
                    width="stretch",
                    disabled=not count,
                    help=t(
                        f"{count / total:.1%} of the rows; click to see them",
                        f"占 {count / total:.1%}；点击查看",
                    ),
                    on_click=state.session_set,
                    args=(key, name),
                )
    if one.kappa is not None and one.kappa.value is not None:
        st.caption(
            t(
                f"Both give the same answer beyond chance: Cohen's kappa {one.kappa.value:.2f}.",
                f"两者答案超出偶然的一致程度：Cohen κ {one.kappa.value:.2f}。",
            )
        )
