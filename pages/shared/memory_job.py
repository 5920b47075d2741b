"""A measurement on its page: level by level while it runs, then prediction beside measurement, speed, and quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import memory
from glm_core.errors import GLMError
from pages.shared import job_panel, memory_figures, memory_quality, page, panels, state, table_input
from pages.shared.memory_model import gib, level_name, rows_text
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run
    from glm_core.jobs import Job
    from glm_core.memory import Level

CLOSE = 0.07  # a prediction this near is right


def show(job_id: str) -> None:
    """A measurement by its id: live while it or one of its evaluations moves, its figures as they come."""
    job = job_panel.wanted(job_id, "memory", ("This job is no measurement.", "该任务不是内存实测。"))
    if job is None:
        return
    table_input.leave_address()
    job_panel.steady()
    runs = memory.quality_runs(state.job_store(), job_id)
    moving = job.state in (*job_panel.MOVING, "paused") or any(one.state in job_panel.MOVING for one in runs)
    (_watch if moving else _watch.once)(job_id, _stamp(job, runs))
    results = memory.results(state.job_store(), job_id)
    found = [level for _, level, _ in results if level is not None]
    if found:
        _overview(job, found)
    if runs:
        memory_quality.section(job, runs, found)
    if found:
        _table(job, found)
    with st.expander(t("How it was made", "任务设置"), icon=":material/receipt_long:"):
        st.json(job.task, expanded=1)


def _stamp(job: Job, runs: list[Run]) -> str:
    """Changes when there is something new to draw."""
    parts = [job.state, job.done, job.failed]
    parts += [(one.state, one.scores is None) for one in runs]
    return repr(parts)


@live(run_every=1)
def _watch(job_id: str, drawn: str) -> None:
    """Head, levels and evaluations; the page is drawn anew when one of them came to its end."""
    try:
        job = state.job_store().get(job_id)
    except GLMError:
        st.rerun()
    runs = memory.quality_runs(state.job_store(), job_id)
    if _stamp(job, runs) != drawn:
        st.rerun()
    with st.container(key="polled_job"):
        job_panel.head(job)
        job_panel.problem()
        if job.state != "done":
            job_panel.bar(job)
        else:
            st.empty()  # in its place: moved up, the levels would be there twice until the page is drawn
        with st.container():
            job_panel.message(job)
        asked = {one.task.precision: one for one in runs}
        levels = memory.results(state.job_store(), job_id)
        with st.grid(max(2, len(levels)), min_column_width=150):
            for level, found, error in levels:
                _level(job, level, found, error, asked.get(level))


def _level(job: Job, level: str, found: Level | None, error: str, run: Run | None) -> None:
    """One level: its state, and that of its evaluation."""
    with st.container(border=True, gap="xxsmall", key=f"level_{level}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"**{level_name(level)}**", width="content")
            if error:
                panels.job_badge("failed")
            elif found is not None:
                panels.job_badge("done")
            else:
                waiting = "running" if job.state == "running" and level in job.message.lower() else "queued"
                panels.job_badge(waiting if job.state in job_panel.MOVING else job.state)
        if found is not None:
            st.caption(t(f"loaded {gib(found.at_load)}", f"加载后 {gib(found.at_load)}"))
        elif not error:
            st.caption(t("not measured yet", "尚未实测"))
        if error:
            st.caption(f":red[{plain(said(error))}]")
        if run is not None:
            done = t(
                f"{run.job.done:,} of {run.job.total:,} rows", f"{run.job.done:,} / {run.job.total:,} 行"
            )
            if not page.link("evaluate", (done, done), ":material/analytics:", job=run.id):
                st.caption(done)


def _overview(job: Job, found: list[Level]) -> None:
    """Bars of the largest point of every level, and the speeds."""
    context, batch = _common(found)
    with st.container(border=True, key="memory_measured"):
        row = panels.section(t("Predicted and measured", "预测与实测"), "memory")
        with row:
            st.space("stretch")
            off = [_off(point) for level in found for point in level.points if point.peak]
            if off:
                worst = max(off, key=abs)
                st.badge(
                    t(f"furthest off {worst:+.1%}", f"最大偏差 {worst:+.1%}"),
                    icon=":material/verified:" if abs(worst) <= CLOSE else ":material/info:",
                    color="green" if abs(worst) <= CLOSE else "orange",
                )
        points = {
            level.level: next(
                (one for one in level.points if (one.context, one.batch) == (context, batch)), None
            )
            for level in found
        }
        st.caption(
            t(
                f"{context:,} tokens x {rows_text(batch)} on {plain(found[0].device_name)}, {found[0].date[:10]}",
                f"{context:,} 词元 × {batch} 行，{plain(found[0].device_name)}，{found[0].date[:10]}",
            )
        )
        predictions = [
            memory.Prediction(
                level.model, "", level.level, "cpu", context, batch, "", point.predicted, level.at_load
            )
            for level in found
            if (point := points[level.level]) is not None
        ]
        peaks = {name: point.peak for name, point in points.items() if point is not None and point.peak}
        memory_figures.levels(
            predictions, peaks, (), f"memory_bars_{job.id}", {level.level: level.at_load for level in found}
        )
    with st.container(border=True, key="memory_speed"):
        panels.section(t("Speed and loading", "速度与加载"), "speed")
        memory_figures.speeds(found, f"memory_speed_{job.id}")
        with st.grid(max(2, len(found)), min_column_width=140):
            for level in found:
                read = max((point.prefill_per_s for point in level.points), default=0.0)
                st.metric(
                    level_name(level.level),
                    panels.format_duration(level.load_seconds),
                    t(f"reads {read:,.0f}/s", f"读取 {read:,.0f}/秒") if read else None,
                    border=True, delta_color="off", delta_arrow="off",
                    help=t("Time to load, and tokens of prompts read per second at the fastest.", "加载时间，以及读取提示词的最快速度（词元/秒）。"),
                )  # fmt: skip


def _common(found: list[Level]) -> tuple[int, int]:
    """The largest context and batch that most levels were measured at."""
    points = [(one.context, one.batch) for level in found for one in level.points if one.peak]
    if not points:
        return (0, 0)
    most = max(points.count(one) for one in points)
    return max((one for one in points if points.count(one) == most), key=lambda one: one[0] * one[1])


def _off(point: Any) -> float:
    return float(point.expected / point.peak - 1)


def _table(job: Job, found: list[Level]) -> None:
    """Every point in a row, and the exports."""
    with st.container(border=True, key="memory_table"):
        row = panels.section(t("All measurements", "全部测量"), "table_rows")
        name = f"memory-{Path(str(job.task.get('checkpoint', ''))).name}"
        with row:
            st.space("stretch")
            exports(name, memory.csv_text(found), _json(job, found), f"measured_{job.id}")
        names = (
            t("level", "精度"), t("tokens", "词元"), t("rows", "行"), t("predicted", "预测"), t("measured", "实测"),
            t("off", "偏差"), t("once loaded", "加载后"), t("reads tokens/s", "读取词元/秒"),
            t("writes tokens/s", "生成词元/秒"), t("note", "备注"),
        )  # fmt: skip
        rows: list[tuple[str, ...]] = []
        for level in found:
            for point in level.points:
                ok = bool(point.peak)
                rows.append((
                    level_name(level.level), f"{point.context:,}", str(point.batch), gib(point.expected),
                    gib(point.peak) if ok else "–", f"{_off(point):+.1%}" if ok else "–", gib(level.at_load),
                    f"{point.prefill_per_s:,.0f}" if ok else "–", f"{point.decode_per_s:,.1f}" if ok else "–",
                    said(point.error),
                ))  # fmt: skip
        st.dataframe(table_input.frame(names, rows), hide_index=True, key=f"memory_rows_{job.id}")


def _json(job: Job, found: list[Level]) -> str:
    what = {"job": job.id, "task": job.task, "levels": [level.to_json() for level in found]}
    return json.dumps(what, ensure_ascii=False, indent=1)


def exports(name: str, as_csv: str, as_json: str, key: str) -> None:
    """Two buttons that save the same numbers."""
    st.download_button(
        "CSV", as_csv, f"{name}.csv", "text/csv", icon=":material/download:", key=f"csv_{key}", on_click="ignore"
    )  # fmt: skip
    st.download_button(
        "JSON", as_json, f"{name}.json", "application/json", icon=":material/download:", key=f"json_{key}",
        on_click="ignore",
    )  # fmt: skip
