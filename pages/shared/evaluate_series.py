"""A run among its like: the other steps of its training, and the same checkpoint at other precisions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import evaluate
from glm_core.errors import GLMError
from pages.shared import (
    evaluate_data,
    evaluate_figures,
    evaluate_registry,
    evaluate_words,
    job_panel,
    page,
    panels,
    state,
)
from pages.shared.evaluate_figures import Line
from pages.shared.reruns import live
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.evaluate import Run, Scores
    from glm_core.statistics import Interval

FIRST = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
LEVELS = ("fp32", "bf16", "int8", "int4")
PROBLEM = "evaluate.series_problem"
STEPS, LEVELS_KEY = "polled_steps", "polled_levels"


def show(run: Run, scores: Scores) -> None:
    """Both series, with the buttons that fill them."""
    if error := state.session(PROBLEM):
        panels.problem(error)
        state.session_set(PROBLEM, None)
    evaluate_registry.plain_links()
    found = evaluate_data.runs()
    with st.container(border=True, key="evaluate_steps"):
        _steps(run, scores, found)
    with st.container(border=True, key="evaluate_precision"):
        _precision(run, scores, found)


# --- steps of a training ----------------------------------------------------------------------------------------


def training_of(run: Run) -> Path | None:
    """The folder of the training that the run's checkpoint is a step or the result of; None where it is neither."""
    from glm_core.finetune import state as training

    if run.task.group and Path(run.task.group).is_dir():
        return Path(run.task.group)
    if not run.task.checkpoint:
        return None
    folder = Path(run.task.checkpoint)
    for one in (folder, folder.parent):
        if training.checkpoints(one):
            return one
    return None


def _steps(run: Run, scores: Scores, found: list[Run]) -> None:
    panels.section(t("Over the steps of the training", "随训练步数的变化"), "trending_up")
    folder = training_of(run)
    group = run.task.group or (str(folder.resolve()) if folder else "")
    series = evaluate.by_step([one for one in found if group and one.training == group and _same(one, run)])
    waiting = [one for _, one in series if one.state in job_panel.MOVING]
    # One whose last rows are scored may still be on its way to its end.
    done = [(step, one) for step, one in series if one.scores is not None and one not in waiting]
    if done:
        _trend(run, scores, done)
    if waiting:
        watched([one.id for one in waiting], STEPS)
    if folder is None:
        if not done:
            st.caption(
                t(
                    "This checkpoint is no step of a training on this computer. Evaluate one of a training's folder to see "
                    "its scores over the steps.",
                    "该检查点不是本机某次训练的某一步。评测训练文件夹中的检查点即可查看分数随步数的变化。",
                )
            )
        return
    from glm_core.finetune import state as training

    count = len(training.checkpoints(folder))
    st.button(
        t(f"Evaluate every checkpoint of this training ({count})", f"评测此次训练的全部检查点（{count} 个）"),
        icon=":material/timeline:",
        key="evaluate_steps_start",
        disabled=not count or bool(waiting),
        on_click=_start_steps,
        args=(run.id, str(folder)),
        help=t(
            "A run for each step on the same file, and one of the base as step 0.",
            "同一文件上每个步数各一次评测，基座作为第 0 步。",
        ),
    )


def _same(one: Run, run: Run) -> bool:
    """Whether two runs of a training were asked the same."""
    a, b = one.task, run.task
    return (a.input_sha256, a.kind, a.method, a.template, a.limit_rows, a.few_shot) == (
        b.input_sha256, b.kind, b.method, b.template, b.limit_rows, b.few_shot,
    )  # fmt: skip


def _trend(run: Run, scores: Scores, done: list[tuple[int, Run]]) -> None:
    names = [one for one in FIRST if one in scores.values] if scores.kind == "text" else [scores.main]
    series: dict[str, list[tuple[int, Interval]]] = {}
    for name in names:
        series[name] = [
            (step, one.scores.values[name])
            for step, one in done
            if one.scores is not None and name in one.scores.values
        ]
    evaluate_figures.trend(series, scores.kind, f"evaluate_trend_{run.id}", f"{run.title}-steps")
    known = [(step, one) for step, one in series[scores.main] if one.estimate is not None]
    if known:
        best = max(known, key=lambda one: one[1].estimate or 0.0)
        last = known[-1]
        words = evaluate_words.score(best[1], scores.kind, scores.main)
        text = t(
            f"Highest {evaluate_words.metric(scores.main)} at step {best[0]:,}: {words}.",
            f"第 {best[0]:,} 步的 {evaluate_words.metric(scores.main)} 最高：{words}。",
        )
        overlap = best[1].low is not None and last[1].high is not None and last[1].high >= best[1].low
        if best[0] != last[0] and overlap:
            text += t(
                " Its interval overlaps that of the last step: the comparison of the two says whether it is better.",
                " 其区间与最后一步重叠：是否真的更好，请用对比页判断。",
            )
        st.caption(text)
    links([one for _, one in done], "step_done")


def _start_steps(run_id: str, folder: str) -> None:
    store = state.job_store()
    try:
        task = evaluate.run_of(store, run_id).task
        evaluate.start_steps(store, task, folder, task.base or None, task.precision, task.device)
    except GLMError as error:
        state.session_set(PROBLEM, error)
        return
    state.supervisor()


# --- precisions -------------------------------------------------------------------------------------------------


def _precision(run: Run, scores: Scores, found: list[Run]) -> None:
    panels.section(t("What quantization costs", "量化的代价"), "compress")
    series = evaluate.views.by_precision(run, found)
    if len(series) > 1:
        name = scores.main
        names = [one for one in FIRST if one in scores.values] if scores.kind == "text" else [name]
        if len(names) > 1:
            name = str(
                st.segmented_control(
                    t("Metric", "指标"),
                    names,
                    default=name if name in names else names[0],
                    required=True,
                    format_func=evaluate_words.metric,
                    key=f"evaluate_level_metric_{run.id}",
                    label_visibility="collapsed",
                )
            )
        evaluate_figures.forest(
            [
                Line(precision.upper(), one.scores.values[name], one.id == run.id)
                for precision, one in series
                if one.scores is not None and name in one.scores.values
            ],
            scores.kind,
            name,
            f"evaluate_levels_{run.id}",
            f"{run.title}-precision",
        )
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            ids = [one.id for _, one in series][:4]
            page.link(
                "compare", ("Compare them row by row", "逐行对比"), ":material/compare:", runs=",".join(ids)
            )
    have = {precision for precision, _ in series}
    waiting = [
        one
        for one in found
        if one.state in job_panel.MOVING
        and one.task.checkpoint == run.task.checkpoint
        and one.task.input_sha256 == run.task.input_sha256
    ]
    if waiting:
        watched([one.id for one in waiting], LEVELS_KEY)
    missing = [
        one for one in LEVELS if one not in have and one not in {other.task.precision for other in waiting}
    ]
    if not missing:
        return
    names_of = " / ".join(one.upper() for one in missing)
    st.button(
        t(f"The same at {names_of}", f"以 {names_of} 再评测"),
        icon=":material/compress:",
        key="evaluate_levels_start",
        disabled=run.state in job_panel.MOVING or not state.may("load"),
        on_click=_start_levels,
        args=(run.id, tuple(missing)),
        help=t(
            "The same rows and settings, the checkpoint loaded at each of these precisions, one after the other.",
            "相同的行与设置，依次以各精度加载检查点进行评测。",
        ),
    )
    if len(series) < 2:
        st.caption(
            t(
                f"So far only {run.task.precision.upper()}.",
                f"目前只有 {run.task.precision.upper()}。",
            )
        )


def _start_levels(run_id: str, precisions: tuple[str, ...]) -> None:
    try:
        store = state.job_store()
        store.person.require("load")
        evaluate.start_precisions(store, run_id, precisions)
    except GLMError as error:
        state.session_set(PROBLEM, error)
        return
    state.supervisor()


@live(run_every=1)
def watched(ids: list[str], key: str) -> None:
    """Runs that are not finished, looked at every second; the page is drawn anew when one ends."""
    try:
        runs = [evaluate.run_of(state.job_store(), one) for one in ids]
    except GLMError:
        st.rerun()
    if any(one.state not in job_panel.MOVING for one in runs):
        st.rerun()
    with st.container(key=key):
        links(runs, key)


def links(runs: list[Run], place: str) -> None:
    """Runs as links with their state or score; `place` keeps the keys of two lists apart."""
    with st.container(gap="xxsmall"):
        for one in runs:
            with st.container(
                horizontal=True, vertical_alignment="center", gap="xsmall", key=f"{place}_{one.id}"
            ):
                page.link("evaluate", (plain(one.title),) * 2, "", run=one.id)
                if one.scores is None:
                    panels.job_badge(one.state)
                    st.caption(job_panel.rows_done(one.job))
                else:
                    st.caption(evaluate_words.score(one.scores.headline, one.task.kind, one.scores.main))
