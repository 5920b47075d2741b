"""The last step before a training: what it will take, what it will do to the chat model, and the start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import access, charts, finetune_command, finetune_method, finetune_plan, panels, state
from pages.shared import finetune_form as form
from pages.shared.reruns import live
from pages.shared.state import Background
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.finetune.preflight import Prediction, Timing
    from glm_core.finetune.work import FinetuneTask
    from pages.shared.finetune_data import Chosen
    from pages.shared.finetune_method import Asked
    from pages.shared.finetune_prepare import Prepared


class Timer(Background):
    """The last few steps that were timed, and of which task; in a process of their own."""

    def __init__(self) -> None:
        super().__init__("glm-finetune-timing")
        self.task = ""
        self.found: Timing | None = None

    def start(self, task: FinetuneTask) -> None:
        """Run a few real steps on the longest rows."""

        def prepare() -> None:
            self.task, self.found = key_of(task), None

        def work() -> None:
            from glm_core.finetune import preflight

            self.found = preflight.time_steps(task)

        self.begin(
            prepare,
            work,
            lambda reason: GLMError(
                f"The steps could not be timed: {reason}.",
                "The terminal shows where; the training can be started.",
            ),
        )


@st.cache_resource(show_spinner=False)
def timer() -> Timer:
    """The one timing in progress, shared by all sessions."""
    return Timer()


def key_of(task: FinetuneTask) -> str:
    """A task without its output and its length, which change nothing about a step."""
    values = task.to_json() | {"output": ""}
    values["plan"] = {key: value for key, value in values["plan"].items() if key not in PACE}
    return json.dumps(values, sort_keys=True, default=str)


PACE = ("max_steps", "save_steps", "save_total", "logging_steps", "warmup_steps", "seed", "learning_rate")


def task_of(chosen: Chosen, asked: Asked) -> FinetuneTask:
    """The task that screen, job and shell share."""
    from glm_core.finetune.work import FinetuneTask

    return FinetuneTask(
        checkpoint=str(asked.base.path),
        plan=asked.plan,
        train_file=str(chosen.file.path),
        output=str(asked.output),
        dev_file=str(chosen.dev.path) if chosen.dev else "",
        columns=chosen.columns,
        dev_share=0.0 if chosen.dev else chosen.dev_share,
        max_source=asked.max_source,
        max_target=asked.max_target,
        general_share=asked.general_share,
        adapt=asked.adapt,
        device=asked.device,
        read_options=chosen.options.to_json(),
        name=chosen.file.name,
    )


def show(chosen: Chosen, found: Prepared, asked: Asked) -> None:
    """Memory, disk, time, the chat model, the shell's command, everything that prevents it, and the start."""
    task = task_of(chosen, asked)
    with st.container(border=True, key="finetune_check"):
        row = panels.section(t("3 · Check and start", "3 · 检查并开始"), "play_circle")
        prediction, problems = _look(task, found, asked)
        with row:
            st.space("stretch")
            start = st.button(
                t("Start training", "开始训练"),
                type="primary",
                icon=":material/play_arrow:",
                key=f"start_{form.value('number', 0)}",  # a second click of a double click finds no button
                disabled=bool(problems) or not state.may("finetune"),
            )
        access.not_allowed("finetune")
        if prediction is not None:
            _figures(task, prediction)
            _memory(prediction)
        keep, report = _chat_model(prediction, task)
        _timing(task, bool(problems) or not state.may("finetune"))
        for error in problems:
            panels.problem(error)
        with st.expander(t("The same from the shell", "命令行中的等价命令"), icon=":material/terminal:"):
            text, differences = finetune_command.command(task)
            st.code(text, language="bash", wrap_lines=True)
            for one in differences:
                st.caption(f":material/info: {one}")
        if start and not problems:
            _start(task, chosen, keep, report)


def _look(
    task: FinetuneTask, found: Prepared, asked: Asked
) -> tuple[Prediction | None, list[GLMError]]:  # fmt: skip
    """(what it will take, everything that prevents it), all at once."""
    from glm_core.finetune import preflight

    problems = [GLMError(one.message, one.todo) for one in found.problems if one.severity == "stop"]
    if not found.train and not problems:
        problems.append(
            GLMError("There are no rows to learn from.", "Choose a file with rows, or other columns.")
        )
    if named := finetune_plan.name_problem(asked.output):
        problems.append(named)
    problems += [GLMError(message, todo) for message, todo in task.problems()]
    prediction = None
    if found.train:
        longest, counted = found.longest((asked.max_source, asked.max_target))
        try:
            prediction = preflight.predict(task, longest, counted, _freed(task))
            problems += [GLMError(one.message, one.todo) for one in prediction.stops]
        except GLMError as error:
            problems.append(error)
    return prediction, _distinct(problems)


def _freed(task: FinetuneTask) -> int:
    """Memory that the chat model gives back if there is no room beside it."""
    engine = state.current_engine()
    if engine is None or state.remember("finetune.keep_chat", False):
        return 0
    on_gpu = engine.loaded.device.type == "cuda"
    return int(engine.status().weight_bytes) if on_gpu == _trains_on_gpu(task.device) else 0


def _trains_on_gpu(device: str) -> bool:
    from glm_core import devices

    return devices.named(device)[0].startswith("cuda")


def _distinct(problems: list[GLMError]) -> list[GLMError]:
    return list({problem.message: problem for problem in problems}.values())


# --- what it will take --------------------------------------------------------------------------------------


def _figures(task: FinetuneTask, prediction: Prediction) -> None:
    timed = _timed(task)
    with st.grid(4, min_column_width=150):
        _card(
            t("Memory", "内存"),
            panels.format_bytes(prediction.memory_bytes),
            _free(prediction.free_bytes),
            "memory",
        )
        _card(
            t("Disk", "磁盘"),
            panels.format_bytes(prediction.disk_bytes),
            _free(prediction.disk_free_bytes),
            "hard_drive",
        )
        base = panels.format_count(prediction.parameters)
        _card(
            t("Trained", "训练参数"),
            panels.format_count(prediction.trainable),
            t(f"numbers, of {base}", f"共 {base}"),
            "neurology",
        )
        steps = task.plan.max_steps
        _card(
            t("Time", "时间"),
            panels.format_duration(timed.seconds_per_step * steps) if timed else "–",
            t(f"{steps:,} steps", f"{steps:,} 步")
            if not timed
            else t(f"{timed.seconds_per_step:.2f} s a step", f"每步 {timed.seconds_per_step:.2f} 秒"),
            "timer",
        )


def _free(count: int) -> str:
    return t(f"{panels.format_bytes(count)} free", f"可用 {panels.format_bytes(count)}")


def _timed(task: FinetuneTask) -> Timing | None:
    work = timer()
    return work.found if work.task == key_of(task) else None


def _card(label: str, value: str, detail: str, icon: str) -> None:
    st.metric(
        label, value, detail, icon=f":material/{icon}:", border=True, delta_color="off", delta_arrow="off"
    )


def _memory(prediction: Prediction) -> None:
    """What the memory goes into, in one bar, with the free memory beside it."""
    go = charts.plotly()

    words = {
        "program": t("program", "程序"),
        "weights": t("weights", "权重"),
        "trainable": t("trained numbers", "训练参数"),
        "gradients": t("gradients", "梯度"),
        "optimiser": t("optimiser", "优化器"),
        "activations": t("activations", "激活"),
        "head": t("output head", "输出层"),
    }
    c = charts.colors()
    palette = [c["quiet"], c["main"], c["other"], c["second"], c["more"], c["good"], c["bad"]]
    free = prediction.free_bytes
    parts = {name: size for name, size in prediction.memory_parts.items() if size > 0}
    largest = max(prediction.memory_bytes, 1)
    unit, divisor = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    figure = go.Figure()
    legend = []
    for (name, size), color in zip(parts.items(), palette * 2, strict=False):
        label = words.get(name, name)
        figure.add_bar(
            x=[size / divisor], y=[0], orientation="h", name=label, marker={"color": color},
            hovertemplate=f"{label}: {panels.format_bytes(size)}<extra></extra>",
        )  # fmt: skip
        legend.append(
            f'<span style="white-space:nowrap"><span style="color:{color}">■</span> {label} '
            f'<span style="color:{c["faint"]}">{panels.format_bytes(size)}</span></span>'
        )
    end = max(largest, min(free, largest * 3)) * 1.05 / divisor
    if free / divisor <= end:
        figure.add_vline(x=free / divisor, line={"color": c["bad"], "width": 2, "dash": "dash"})
        figure.add_annotation(
            x=free / divisor, y=1, yref="paper", yanchor="bottom", xanchor="right", showarrow=False,
            text=f"{t('free', '可用')} {panels.format_bytes(free)}", font={"color": c["bad"], "size": 12},
        )  # fmt: skip
    charts.dress(figure, 104, barmode="stack", bargap=0.3, margin={"l": 0, "r": 8, "t": 20, "b": 28})
    figure.update_yaxes(visible=False)
    figure.update_xaxes(range=[0, end], showgrid=True, nticks=6, ticksuffix=f" {unit}")
    charts.draw(figure, "finetune_memory")
    # plotly's own legend covers the bar on a phone
    st.html(
        '<div style="display:flex;flex-wrap:wrap;gap:0.2rem 1.1rem;font-size:0.85rem">'
        + "".join(legend)
        + "</div>"
    )
    for note in prediction.notes:
        st.caption(f":material/info: {plain(said(str(note)))}")
    for one in prediction.problems:
        if one.severity != "stop":
            st.caption(f":orange[:material/warning:] {plain(said(one.message))} {plain(said(one.todo))}")


def _chat_model(prediction: Prediction | None, task: FinetuneTask) -> tuple[bool, bool]:
    """(keep the chat model whatever it costs, measure the result); says what will become of the chat model."""
    engine = state.current_engine()
    with st.container(horizontal=True, gap="medium", vertical_alignment="center"):
        report = st.toggle(
            t("Measure the result afterwards", "训练后评测结果"),
            help=t(
                "Answers the dev rows and 80 or so general questions with and without the training, and trains a "
                "plain text classifier on the same rows to compare with. Takes about as long as a few hundred "
                "answers.",
                "用训练前后的模型分别回答开发集和约 80 个通用问题，并在同样的数据上训练一个普通文本分类器作对照。"
                "耗时约相当于数百个回答。",
            ),
            **form.kept("report", True),
        )
        keep = False
        if engine is not None:
            keep = st.toggle(
                t("Keep the chat model loaded", "保留聊天模型"),
                help=t(
                    "On: where both do not fit, the training does not start. Off: the chat model is then unloaded.",
                    "打开：若内存放不下两者，则不开始训练。关闭：此时会卸载聊天模型。",
                ),
                **form.kept("keep_chat", False),
            )
    if engine is not None and prediction is not None:
        name, freed = plain(engine.loaded.info.name), _freed(task)
        fits = prediction.memory_bytes <= prediction.free_bytes - freed
        if fits:
            text = t(
                f"The chat model **{name}** stays loaded: there is room for both.",
                f"聊天模型 **{name}** 保持加载：内存足够两者同时使用。",
            )
        elif keep:
            text = t(
                f"There is no room beside the chat model **{name}**: the training will not start while it is kept.",
                f"聊天模型 **{name}** 占用内存，无法同时训练：保留它时训练不会开始。",
            )
        else:
            text = t(
                f"The chat model **{name}** will be unloaded to make room; load it again when the training is done.",
                f"为腾出内存将卸载聊天模型 **{name}**；训练结束后可重新加载。",
            )
        st.caption(f":material/chat: {text}")
    return bool(keep), bool(report)


@live(run_every=1)
def _timing(task: FinetuneTask, blocked: bool) -> None:
    """The button that times a few steps, and what came of it."""
    work, mine = timer(), timer().task == key_of(task)
    drawn = state.session("finetune.timed")
    now = (work.busy, work.task, work.found is not None)
    state.session_set("finetune.timed", now)
    if mine and drawn is not None and drawn != now and not work.busy:
        st.rerun()
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if st.button(
            t("Time a few steps", "试跑几步计时"),
            icon=":material/timer:",
            key="time_steps",
            disabled=work.busy or blocked,
            help=t(
                "Trains three steps on your longest rows in a process of its own and throws them away.",
                "用最长的几行在独立进程中训练三步，结果丢弃。",
            ),
        ):
            work.start(task)
            st.rerun(scope="fragment")
        if work.busy:
            st.caption(
                f":material/progress_activity: {t('Loading the model and training three steps …', '正在加载模型并训练三步……')}"
            )
        elif mine and work.found is not None:
            seconds = work.found.seconds_per_step
            st.caption(
                t(
                    f"{seconds:.2f} s a step on the longest rows: at most "
                    f"{panels.format_duration(seconds * task.plan.max_steps)} for {task.plan.max_steps:,} steps, "
                    f"{panels.format_bytes(work.found.memory_bytes)} of memory.",
                    f"最长的行每步 {seconds:.2f} 秒：{task.plan.max_steps:,} 步最多需 "
                    f"{panels.format_duration(seconds * task.plan.max_steps)}，"
                    f"内存 {panels.format_bytes(work.found.memory_bytes)}。",
                )
            )
    if mine and work.error is not None and not work.busy:
        panels.problem(work.error)


# --- the start ----------------------------------------------------------------------------------------------


def _start(task: FinetuneTask, chosen: Chosen, keep: bool, report: bool) -> None:
    """Queue the training and go to it."""
    from glm_core.finetune import job

    title = f"{Path(task.output).name} · {finetune_method.name_of(task.plan.method.kind)}"
    try:
        made = job.start(state.job_store(), job.FinetuneJob(replace(task), report, keep), title)
    except GLMError as error:
        panels.problem(error)
        return
    form.put("number", form.value("number", 0) + 1)
    form.put("job", made.id)
    state.supervisor()
    st.rerun()
