"""A training on screen: its curve and figures while it runs, and the buttons that stop and resume it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages.shared import charts, finetune_method, job_panel, page, panels, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.finetune.job import TrainingStatus
    from glm_core.jobs import Job

MOST_POINTS = 1500  # of the curve that are drawn
SMOOTH_FROM = 30  # points
LOG_LINES = 12


def folder_of(job: Job) -> Path:
    """The output folder of a training."""
    return Path(str(job.task.get("task", {}).get("output", "")))


def status_of(job: Job) -> TrainingStatus:
    """Where a training stands."""
    from glm_core.finetune import job as training

    return training.status(folder_of(job))


def progress_words(job: Job, status: TrainingStatus) -> str:
    """How far a training is, in a line: step 120 of 300, loss 0.1234, dev loss 0.2."""
    if job.state == "queued":
        ahead = waiting_before(job)
        return (
            t(f"waiting, {ahead} before it", f"排队中，前面有 {ahead} 个")
            if ahead
            else t("starting", "即将开始")
        )
    if not status.step:
        return t("not a step yet", "尚未开始训练")
    parts = [t(f"step {status.step:,} of {status.steps:,}", f"第 {status.step:,} / {status.steps:,} 步")]
    if status.loss is not None:
        parts.append(t(f"loss {status.loss:.4f}", f"损失 {status.loss:.4f}"))
    if status.dev_loss is not None:
        parts.append(t(f"dev loss {status.dev_loss:.4f}", f"开发集损失 {status.dev_loss:.4f}"))
    return " · ".join(parts)


def waiting_before(job: Job) -> int:
    """Jobs that run or wait before this one: one job runs at a time."""
    return state.job_store().ahead(job.id)


def share(status: TrainingStatus) -> float:
    """Steps done, 0 to 1."""
    return min(1.0, status.step / status.steps) if status.steps else 0.0


def head(job: Job) -> None:
    """Title, state and buttons."""
    with job_panel.head(job):
        if job.state in job_panel.STOPPED:
            page.link("jobs", ("Delete on the Jobs page", "到“任务”页删除"), ":material/delete:", job=job.id)
    job_panel.problem()


def live_view(job: Job, status: TrainingStatus) -> None:
    """Figures, curve, answers to dev questions and what the training says."""
    with st.container():  # what it says goes as the first step comes, and all below it would be there twice
        _told(job, status)
    if job.state in job_panel.MOVING or status.step:
        _figures(job, status)
    if job.state in (*job_panel.MOVING, "paused"):
        st.progress(share(status))
    if status.curve or status.dev:
        _curves(job, status)
    if status.samples:
        _samples(job, status)
    if status.messages:
        _log(job, status)


def _told(job: Job, status: TrainingStatus) -> None:
    if job.state == "queued":
        ahead = waiting_before(job)
        text = (
            t(
                f"{ahead} before it: one job runs at a time. It starts by itself.",
                f"前面有 {ahead} 个任务：一次只运行一个。轮到时自动开始。",
            )
            if ahead
            else t("It starts in a moment.", "即将开始。")
        )
        st.info(text, icon=":material/schedule:")
    elif job.state == "running" and status.state in ("waiting", "starting"):
        st.caption(f":material/progress_activity: {_last(job, status) or t('Starting …', '正在启动……')}")
    elif job.state == "running" and status.state == "measuring":
        st.info(_last(job, status) or t("Measuring …", "正在评测……"), icon=":material/straighten:")
    elif job.state == "failed":
        st.error(plain(said(job.message)), icon=":material/error:")
    elif job.state in ("paused", "cancelled"):
        kept = t(
            f"Stopped after step {status.step:,} of {status.steps:,}. Its newest checkpoint is kept; resume goes on "
            "from there and ends with the same numbers as without the stop.",
            f"在第 {status.step:,} / {status.steps:,} 步后停止。最新检查点已保存；继续后从那里接着训练，结果与不停止时相同。",
        )
        none = t("Stopped before the first step.", "在第一步之前停止。")
        st.warning(kept if status.step else none, icon=":material/pause_circle:")
        if job.message:
            st.caption(plain(said(job.message)))
    for warning in job.warnings:
        st.caption(f":material/info: {plain(said(warning))}")


def _last(job: Job, status: TrainingStatus) -> str:
    text = job.message or (status.messages[-1] if status.messages else "")
    return plain(said(text))


def _figures(job: Job, status: TrainingStatus) -> None:
    with st.grid(4, min_column_width=150):
        rate = status.rate[-1][1] if status.rate else None
        _card(
            t("Step", "步"),
            f"{status.step:,}",
            t(f"of {status.steps:,}", f"共 {status.steps:,}")
            + (t(f" · rate {rate:.1e}", f" · 学习率 {rate:.1e}") if rate is not None else ""),
            "footprint",
        )
        dev = f"{status.dev_loss:.4f}" if status.dev_loss is not None else "–"
        _card(
            t("Loss", "损失"),
            f"{status.loss:.4f}" if status.loss is not None else "–",
            t(f"dev {dev}", f"开发集 {dev}"),
            "trending_down",
        )
        ran = panels.format_duration(job.active_seconds)
        if job.state == "running":
            _card(
                t("Time left", "剩余时间"),
                panels.format_duration(status.eta_s),
                t(f"ran {ran}", f"已运行 {ran}"),
                "timer",
            )
        else:
            ended = panels.format_ago(job.finished, time.time()) or t("so far", "到目前为止")
            _card(t("Time", "用时"), ran, ended, "timer")
        speed = f"{status.rows_per_s:,.1f}" if status.rows_per_s else "–"
        _card(
            t("Rows a second", "每秒行数"),
            speed,
            t(
                f"memory {panels.format_bytes(status.memory_bytes)}",
                f"内存 {panels.format_bytes(status.memory_bytes)}",
            ),
            "speed",
        )


def _card(label: str, value: str, detail: str, icon: str) -> None:
    st.metric(
        label, value, detail, icon=f":material/{icon}:", border=True, delta_color="off", delta_arrow="off"
    )


def _curves(job: Job, status: TrainingStatus) -> None:
    """Loss and dev loss over the steps, the learning rate under them."""
    go = charts.plotly()

    c = charts.colors()
    curve = thinned(status.curve)
    steps, losses = [one[0] for one in curve], [one[1] for one in curve]
    figure = go.Figure()
    step = t("step", "第")
    train = t("training loss", "训练损失")
    noisy = len(curve) >= SMOOTH_FROM
    figure.add_scatter(
        x=steps, y=losses, mode="lines" if len(curve) > 40 else "lines+markers", name=train,
        line={"color": c["main"], "width": 1 if noisy else 2}, marker={"size": 5},
        opacity=0.6 if noisy else 1.0,
        hovertemplate=f"{step} %{{x:,}}: %{{y:.4f}}<extra>{train}</extra>",
    )  # fmt: skip
    if noisy:
        smooth = t("smoothed", "平滑")
        figure.add_scatter(
            x=steps, y=smoothed(losses), mode="lines", name=smooth, line={"color": c["main"], "width": 2.5},
            hovertemplate=f"{step} %{{x:,}}: %{{y:.4f}}<extra>{smooth}</extra>",
        )  # fmt: skip
    if status.dev:
        dev = t("dev loss", "开发集损失")
        figure.add_scatter(
            x=[one[0] for one in status.dev], y=[one[1] for one in status.dev], mode="lines+markers", name=dev,
            line={"color": c["second"], "width": 2}, marker={"size": 8, "line": {"color": c["page"], "width": 1}},
            hovertemplate=f"{step} %{{x:,}}: %{{y:.4f}}<extra>{dev}</extra>",
        )  # fmt: skip
    charts.dress(
        figure, 330, t("step", "步"), t("loss, nats a token", "损失（nat/词元）"), showlegend=True,
        uirevision=job.id, hovermode="closest",
    )  # fmt: skip
    end = max(status.steps, steps[-1] if steps else 1)
    figure.update_xaxes(range=[0, end * 1.01])
    figure.update_yaxes(rangemode="tozero")
    charts.draw(figure, f"finetune_curve_{job.id}")
    if len(status.rate) > 1:
        rates = thinned(status.rate)
        small = go.Figure()
        small.add_scatter(
            x=[one[0] for one in rates], y=[one[1] for one in rates], mode="lines", fill="tozeroy",
            line={"color": c["other"], "width": 1.5}, fillcolor=f"{c['other']}22",
            hovertemplate=f"{step} %{{x:,}}: %{{y:.2e}}<extra>{t('learning rate', '学习率')}</extra>",
        )  # fmt: skip
        charts.dress(small, 96, "", t("rate", "学习率"), uirevision=job.id)
        small.update_xaxes(range=[0, end * 1.01], showticklabels=False)
        small.update_yaxes(nticks=3, exponentformat="e", rangemode="tozero")
        charts.draw(small, f"finetune_rate_{job.id}")


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most so many points, each the mean of those it stands for."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(one[-1][0], sum(value for _, value in one) / len(one)) for one in groups]


def smoothed(values: list[float]) -> list[float]:
    """The exponentially weighted mean, without the pull of its start; over more points where there are more."""
    share = 1 - max(0.05, min(1.0, 12 / max(1, len(values))))
    found, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        found.append(mean / weight)
    return found


def _samples(job: Job, status: TrainingStatus) -> None:
    """The model's answers to the same dev questions, at the checkpoints."""
    import pandas as pd

    steps = sorted({int(one.get("step", 0)) for one in status.samples})
    shown = [steps[0], *steps[-2:]] if len(steps) > 3 else steps
    asked: dict[str, dict[str, Any]] = {}
    for one in status.samples:
        row = asked.setdefault(
            str(one.get("prompt", "")), {t("prompt", "提示"): one.get("prompt"), t("expected", "期望"): one.get("expected")}
        )  # fmt: skip
        if one.get("step") in shown:
            row[t(f"step {one['step']:,}", f"第 {one['step']:,} 步")] = one.get("answer")
    st.markdown(f"**{t('Answers to dev questions', '开发集问题的回答')}**")
    st.dataframe(pd.DataFrame(list(asked.values())), hide_index=True, key=f"finetune_samples_{job.id}")


def _log(job: Job, status: TrainingStatus) -> None:
    with st.expander(t("What it said", "运行日志"), icon=":material/notes:"):
        for text in status.messages[-LOG_LINES:]:
            st.caption(plain(said(text)))
        if job.state == "failed":
            st.caption(plain(str(folder_of(job) / "training.log")))


# --- the trainings so far -----------------------------------------------------------------------------------


def earlier(jobs: list[Job]) -> None:
    """The trainings of this workspace in a table; a click on a row opens it."""
    import pandas as pd

    rows = [_facts(job) for job in jobs]
    row = panels.section(t("Trainings so far", "已有的训练"), "history")
    with row:
        st.caption(f"{len(rows):,}")
    chosen = st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key="finetune_earlier",
        height=min(36 * (len(rows) + 1) + 2, 400),
        column_config={
            t("dev loss", "开发集损失"): st.column_config.NumberColumn(format="%.4f"),
            t("verdict", "结论"): st.column_config.TextColumn(width="large"),
        },
    )
    picked = chosen["selection"]["rows"] if chosen else []
    if picked:
        state.query_set("job", jobs[picked[0]].id)
        st.rerun()
    st.caption(t("Click the box at the left of a row to open it.", "点击行首的方框即可打开。"))


def _facts(job: Job) -> dict[str, Any]:
    status, task = status_of(job), job.task.get("task", {})
    manifest, report = status.manifest or {}, status.report or {}
    kind = str(task.get("plan", {}).get("method", {}).get("kind", ""))
    en, zh, _, _ = panels.JOB_STATES.get(job.state, (job.state, job.state, "", ""))
    best = min((loss for _, loss in status.dev), default=None)
    return {
        t("name", "名称"): Path(str(task.get("output", ""))).name,
        t("state", "状态"): t(en, zh),
        t("method", "方法"): finetune_method.name_of(kind).replace("\\", ""),
        t("rows", "行数"): manifest.get("rows", {}).get("train"),
        t("steps", "步数"): f"{status.step:,} / {status.steps:,}",
        t("dev loss", "开发集损失"): best,
        t("verdict", "结论"): said(str(report.get("verdict", {}).get("text", ""))),
    }
