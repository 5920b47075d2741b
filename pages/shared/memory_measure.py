"""Measuring a checkpoint: which levels, contexts and batches, labelled rows for the quality, and the start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import memory
from glm_core.errors import GLMError
from pages.shared import access, evaluate_file, evaluate_task, memory_model, panels, state
from pages.shared.memory_model import level_name
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.evaluate import EvaluationTask
    from pages.shared.memory_model import Asked


def form(draft: dict[str, Any], asked: Asked) -> None:
    """The card, and below it those of an evaluation where quality is to be measured too."""
    if asked.info is None:
        with st.container(border=True, key="memory_measure"):
            panels.section(t("Measure on this computer", "在本机实测"), "speed")
            st.caption(
                t(
                    "A published shape has no weights here, so this stays a prediction. Choose one of your checkpoints "
                    "above to measure it.",
                    "公开模型结构在本机没有权重，因此只能预测。请在上方选择您的检查点进行实测。",
                )
            )
        return
    with st.container(border=True, key="memory_measure"):
        row = panels.section(t("Measure on this computer", "在本机实测"), "speed")
        st.caption(
            t(
                "Every level is loaded in a fresh process beside the workbench, answers rows of these lengths, and is timed. "
                "The job goes on when you close the browser.",
                "每个精度都在独立的新进程中加载，回答这些长度的行并计时。关闭浏览器后任务仍会继续。",
            )
        )
        device = pick_device()
        kind = device.partition(":")[0]
        levels = memory.levels(asked.of, kind)
        with st.grid(3, min_column_width=220):
            chosen = st.multiselect(
                t("Levels", "精度"), list(levels), default=memory.usual(asked.of, kind), format_func=level_name,
                key=f"memory_levels_{asked.model}", persist_state="session",
            )  # fmt: skip
            lengths = memory_model.contexts_of(asked.of)
            contexts = st.multiselect(
                t("Tokens of a row", "每行词元数"), list(lengths),
                default=[one for one in (128, 512, 2048) if one in lengths][:3] or [lengths[-1]],
                format_func=lambda one: f"{one:,}", key=f"memory_contexts_{asked.model}", persist_state="session",
            )  # fmt: skip
            batches = st.multiselect(
                t("Rows at a time", "同时处理的行数"), list(memory_model.BATCHES), default=[1, 4],
                key=f"memory_batches_{asked.model}", persist_state="session",
            )  # fmt: skip
        quality = st.toggle(
            t("Ask labelled rows at every level, too", "同时用带答案的行评测每个精度"),
            help=t(
                "An evaluation of the same rows at every level: what it costs in quality, and which answers change.",
                "每个精度都评测相同的行：质量损失多少，哪些回答发生变化。",
            ),
            **state.kept_widget("memory.quality", False),
        )
        place = row
    task = None
    if quality:
        found = evaluate_file.choose()
        if found is not None:
            task = evaluate_task.ask(*found)
    ready = bool(chosen and contexts and batches) and (task is not None or not quality)
    count = len(chosen) * len(contexts) * len(batches)
    access.not_allowed("load")
    with place:
        st.space("stretch")
        go = st.button(
            t(f"Measure {len(chosen)} levels", f"实测 {len(chosen)} 个精度"),
            type="primary",
            icon=":material/play_arrow:",
            key=f"memory_start_{draft['number']}",  # a second click of a double click finds no button
            disabled=not ready or not state.may("load"),
            help=t(f"{count} measurements", f"{count} 次测量"),
        )
    if go:
        try:
            start(draft, asked.info, chosen, contexts, batches, device, task)
        except GLMError as error:
            panels.problem(error)


def pick_device() -> str:
    """Where to measure; nothing is drawn where there is only the processor."""
    from pages.shared import pickers

    choices = [one for one in pickers.devices() if one != "auto"]
    if len(choices) < 2:
        return choices[0]
    return str(
        st.selectbox(
            t("Device", "设备"), choices, format_func=panels.device_name,
            **state.kept_widget("memory.measured_device", choices[-1], choices, "index"),
        )
    )  # fmt: skip


def start(
    draft: dict[str, Any],
    info: CheckpointInfo,
    levels: list[str],
    contexts: list[int],
    batches: list[int],
    device: str,
    task: EvaluationTask | None,
) -> None:
    """Queue the measurement, and an evaluation for every level behind it; go to the job."""
    store = state.job_store()
    with st.spinner(t("Starting …", "正在启动……")):
        plan = memory.plan(info.path, sorted(levels, key=memory.place), contexts, batches, device)
        job = memory.start(store, plan, Path(plan.checkpoint).name)
        draft.update(job=job.id, number=draft["number"] + 1)
        if task is not None:
            try:
                memory.start_quality(store, job, task)
            except GLMError as error:
                store.warn(job.id, f"The labelled rows are not asked: {error}")
    state.supervisor()
    st.rerun()


def no_gpu_note(device: str) -> None:
    """That the figures of a GPU are computed and not measured here."""
    import sys

    torch = sys.modules.get("torch")
    if device == "cuda" and not (torch is not None and torch.cuda.is_available()):
        st.badge(
            t("predictions: there is no GPU here", "仅为预测：本机没有 GPU"),
            icon=":material/calculate:",
            color="orange",
        )
