"""Runs on the same file beside each other: who leads, and whether that is certain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import evaluate_data, evaluate_figures, evaluate_words, page, panels, state
from pages.shared.evaluate_figures import Line
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.compare import Verdict
    from glm_core.evaluate import Run

MOST = 12
MOST_COMPARED = 4
MOST_LOOKED_INTO = 5
COLORS = {"better": "green", "same": "blue", "not decisive": "orange"}
WORDS = {
    "better": ("certain", "差异确定", "verified"),
    "same": ("the same", "没有差异", "drag_handle"),
    "not decisive": ("not decisive", "尚不能确定", "help"),
}


def alike(run: Run, found: list[Run]) -> list[Run]:
    """The scored runs that were asked the same rows in the same way, the best first; the run is among them.

    Predictions made elsewhere lie in a file each: of those with as many rows, the newest are looked into.
    """
    from glm_core.evaluate.task import same_question

    if run.scores is None or run.scores.headline.estimate is None:
        return []
    same, others = [run], []
    for one in found:
        if one.id == run.id or one.scores is None or one.scores.headline.estimate is None:
            continue
        if one.task.kind != run.task.kind or same_question(one.task, run.task):
            continue
        if (one.task.input_sha256, one.task.reference) == (run.task.input_sha256, run.task.reference):
            same.append(one)
        elif (one.imported or run.imported) and one.scores.n == run.scores.n:
            others.append(one)
    same += [one for one in others[:MOST_LOOKED_INTO] if not isinstance(verdict(run, one), str)]
    return sorted(same, key=_headline, reverse=True)


def _headline(run: Run) -> float:
    assert run.scores is not None
    return float(run.scores.headline.estimate or 0.0)


@st.cache_data(max_entries=64, show_spinner=False)
def _verdict(database: str, a: str, b: str, stamps: str) -> Verdict | str:
    from glm_core import compare

    try:
        return compare.compare(state.job_store(), a, b).verdict
    except GLMError as error:
        return error.message


def verdict(a: Run, b: Run) -> Verdict | str:
    """What may be said about two runs, b against a; a sentence where they cannot be compared."""
    stamps = f"{evaluate_data.stamp(a)} {evaluate_data.stamp(b)}"
    return _verdict(str(state.settings().database), a.id, b.id, stamps)


def card(run: Run, found: list[Run]) -> None:
    """This run among those on the same file, the leader named, and the way to the comparison."""
    runs = alike(run, found)
    if len(runs) < 2:
        return
    with st.container(border=True, key="evaluate_beside"):
        draw(runs, run.id, f"evaluate_beside_{run.id}")


def draw(runs: list[Run], strong: str, key: str) -> None:
    """The leader in a sentence, the scores with intervals, and the link to the comparison; runs are sorted."""
    first, second = runs[0], runs[1]
    assert first.scores is not None
    row = panels.section(t("On the same file", "同一文件上的各次评测"), "leaderboard")
    said_of = verdict(second, first)
    if not isinstance(said_of, str):
        en, zh, icon = WORDS[said_of.outcome]
        with row:
            st.badge(t(en, zh), icon=f":material/{icon}:", color=COLORS[said_of.outcome])  # type: ignore[arg-type]
    with row:
        st.space("stretch")
        ids = [one.id for one in runs[:MOST_COMPARED]]
        if strong in {one.id for one in runs} and strong not in ids:
            ids[-1] = strong
        page.link("compare", ("Compare", "对比"), ":material/compare:", runs=",".join(ids))
    a, b = f"**{plain(first.title)}**", f"**{plain(second.title)}**"
    if not isinstance(said_of, str) and said_of.outcome == "better":
        text = t(
            f"{a} leads with {score(first)}; next is {b} with {score(second)}.",
            f"{a} 领先，{score(first)}；其次是 {b}，{score(second)}。",
        )
    else:
        text = t(
            f"{a} has the highest score, {score(first)}, but is not certain to be better than {b} with {score(second)}.",
            f"{a} 分数最高，{score(first)}，但不能确定优于 {b}（{score(second)}）。",
        )
    st.markdown(text)
    st.caption(plain(said(said_of if isinstance(said_of, str) else said_of.text)))
    kind, metric = first.task.kind, first.scores.main
    shown = runs[:MOST]
    evaluate_figures.forest(
        [
            Line(short(one), one.scores.headline, one.id == strong, note=evaluate_words.precision(one.task))
            for one in shown
            if one.scores is not None
        ],
        kind,
        metric,
        key,
        f"{first.task.input_name}-{metric}",
    )
    if len(runs) > len(shown):
        st.caption(t(f"The best {len(shown)} of {len(runs)}.", f"{len(runs)} 个中最好的 {len(shown)} 个。"))


def short(run: Run) -> str:
    """A run's name without the file, which all of them share."""
    return run.title.replace(f" on {run.task.input_name}", "")


def score(run: Run) -> str:
    """The headline of a run with its interval."""
    assert run.scores is not None
    return evaluate_words.score(run.scores.headline, run.task.kind, run.scores.main)
