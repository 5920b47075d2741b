"""What every level costs in quality: scores with intervals, quality against memory and speed, answers that changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import compare, memory
from glm_core.errors import GLMError
from pages.shared import memory_figures, page, panels, state, table_input
from pages.shared.memory_model import level_name
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run
    from glm_core.jobs import Job
    from glm_core.memory import Change, Level

SHOWN = 200


def section(job: Job, runs: list[Run], found: list[Level]) -> None:
    """The cards of the runs that have scores."""
    scored = [one for one in runs if one.scores is not None and one.scores.n]
    with st.container(border=True, key="memory_quality"):
        row = panels.section(t("Quality on your rows", "您的数据上的质量"), "analytics")
        if not scored:
            st.caption(t("No level has answered its rows yet.", "还没有精度回答完这些行。"))
            return
        with row:
            st.space("stretch")
            if len(scored) > 1:
                page.link("compare", ("Compare", "对比"), ":material/compare:", runs=_ids(scored))
        _scores(scored)
    points = _points(scored, found)
    if len(points) > 1:
        with st.container(border=True, key="memory_pareto"):
            panels.section(t("Quality, memory and speed", "质量、内存与速度"), "scatter_plot")
            best = memory.best([(one["level"], one["bytes"], one["value"], one["speed"]) for one in points])
            memory_figures.pareto(points, best, _metric(scored[0]), f"memory_pareto_{job.id}")
            beaten = [level_name(one["level"]) for one in points if one["level"] not in best]
            st.caption(
                t(
                    "The larger a point, the more tokens per second. "
                    + (f"Hollow: another level is as good in all three and better in one ({', '.join(beaten)})."
                       if beaten else "No level is beaten in all three."),
                    "点越大，每秒词元越多。"
                    + (f"空心：有其他精度三项都不差且至少一项更好（{'、'.join(beaten)}）。"
                       if beaten else "没有精度在三项上都被超过。"),
                )
            )  # fmt: skip
    if len(scored) > 1:
        with st.container(border=True, key="memory_changed"):
            _changed([(one.id, one.task.precision) for one in scored])


def _ids(scored: list[Run]) -> str:
    """The runs as the address of the comparison names them; it takes four."""
    return ",".join(one.id for one in scored[:4])


def _metric(run: Run) -> str:
    assert run.scores is not None
    names = {"accuracy": t("Accuracy", "准确率"), "rouge-l": "ROUGE-L"}
    return names.get(run.scores.main, run.scores.main)


def _percent(run: Run, value: float | None) -> str:
    assert run.scores is not None
    return "–" if value is None else f"{100 * value / run.scores.unit:.1f}"


def _scores(scored: list[Run]) -> None:
    """A card per level: the headline with its interval, and whether it differs from the reference level."""
    reference = scored[0]
    assert reference.scores is not None
    rows = reference.scores.n
    with st.grid(max(2, len(scored)), min_column_width=140):
        for run in scored:
            assert run.scores is not None
            found = run.scores.headline
            st.metric(
                level_name(run.task.precision),
                f"{_percent(run, found.estimate)} %" if run.scores.unit == 1 else _percent(run, found.estimate),
                t(f"{_percent(run, found.low)} to {_percent(run, found.high)}",
                  f"{_percent(run, found.low)} 至 {_percent(run, found.high)}"),
                border=True, delta_color="off", delta_arrow="off", help=run.scores.formulas.get(run.scores.main),
            )  # fmt: skip
    st.caption(
        t(
            f"{_metric(reference)} with its 95 % interval, {rows:,} rows. {level_name(reference.task.precision)} is what the others are "
            "held against.",
            f"{_metric(reference)}及其 95% 置信区间，{rows:,} 行。其他精度以 {level_name(reference.task.precision)} 为参照。",
        )
    )
    for run in scored[1:]:
        try:
            text = _verdict(reference.id, run.id, _stamp(reference), _stamp(run))
        except GLMError as error:
            text = said(str(error))
        st.caption(f"**{level_name(run.task.precision)}** · {plain(said(text))}")


def _stamp(run: Run) -> int:
    return run.job.done + run.job.failed


@st.cache_data(max_entries=64, show_spinner="Comparing …")
def _verdict(a: str, b: str, stamp_a: int, stamp_b: int) -> str:
    return compare.compare(state.job_store(), a, b).verdict.text


def _points(scored: list[Run], found: list[Level]) -> list[dict[str, Any]]:
    """What is plotted: levels with a score and a measurement."""
    by_level = {one.level: one for one in found}
    points = []
    for run in scored:
        level = by_level.get(run.task.precision)
        assert run.scores is not None
        score = run.scores.headline
        if level is None or score.estimate is None or not level.points:
            continue
        factor = 100 / run.scores.unit
        points.append({
            "level": level.level, "bytes": max(point.peak for point in level.points),
            "value": score.estimate * factor,
            "low": (score.estimate if score.low is None else score.low) * factor,
            "high": (score.estimate if score.high is None else score.high) * factor,
            "speed": max(point.decode_per_s for point in level.points),
        })  # fmt: skip
    return points


@live()
def _changed(runs: list[tuple[str, str]]) -> None:
    """The rows that a level answers otherwise than the reference level."""
    store = state.job_store()
    reference, levels = runs[0], {level: run for run, level in runs[1:]}
    row = panels.section(t("Answers that changed", "发生变化的回答"), "published_with_changes")
    names = list(levels)
    key = f"memory_changed_{reference[0]}"
    if state.session(key) not in names:
        state.session_set(key, names[-1])
    level = str(
        st.segmented_control(
            t("Level", "精度"), names, format_func=level_name, required=True, key=key,
            label_visibility="collapsed",
        )
    )  # fmt: skip
    stamps = tuple(_stamp_of(store.get(one)) for one in (reference[0], levels[level]))
    different, both, found = _changes(reference[0], levels[level], stamps)
    with row:
        st.space("stretch")
        st.badge(
            t(f"{different:,} of {both:,} rows", f"{different:,} / {both:,} 行"),
            color="orange" if different else "green",
        )
    if not found:
        st.caption(
            t(
                f"{level_name(level)} answers every row as {level_name(reference[1])} does.",
                f"{level_name(level)} 对每一行的回答都与 {level_name(reference[1])} 相同。",
            )
        )
        return
    names_of = (
        t("row", "行号"), t("question", "问题"), t("correct", "参考答案"), level_name(reference[1]),
        level_name(level), t("what became of it", "变化"),
    )  # fmt: skip
    rows = [
        (f"{one.number:,}", one.question, one.reference, one.answer, one.other, _fate(one)) for one in found[:SHOWN]
    ]  # fmt: skip
    st.dataframe(
        table_input.frame(names_of, rows), hide_index=True, column_config=table_input.widths(names_of, rows),
        key=f"memory_changes_{level}",
    )  # fmt: skip
    if different > len(rows):
        st.caption(t(f"The first {len(rows):,}.", f"前 {len(rows):,} 行。"))


def _stamp_of(job: Job) -> int:
    return job.done + job.failed


@st.cache_data(max_entries=16, show_spinner=False)
def _changes(a: str, b: str, stamps: tuple[int, ...]) -> tuple[int, int, list[Change]]:
    return memory.changed(state.job_store(), a, b)


def _fate(one: Change) -> str:
    if one.before is None or one.after is None:
        return ""
    if one.before == one.after:
        return t("right both times", "都对") if one.before else t("wrong both times", "都错")
    return t("now right", "由错变对") if one.after else t("now wrong", "由对变错")
