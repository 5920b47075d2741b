"""Where a job runs: on this machine, or on a Ray cluster; one choice for every page that starts jobs of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import streamlit as st

from glm_core import cluster
from pages.shared import state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.batch import BatchTask
    from glm_core.classify import LabelTask
    from glm_core.engine import Engine

    Task = TypeVar("Task", BatchTask, LabelTask)

HERE, RAY = "here", "ray"
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Where:
    """What was chosen: the values of a task that say where its rows are done, and whether each worker has a GPU."""

    values: dict[str, Any]
    on_gpu: bool = False

    def put(self, task: Task) -> Task:
        """The task, to be run there. GLMError where that cannot be."""
        if not self.values:
            return task
        cluster.check(
            task.checkpoint,
            self.values.get("address", ""),
            self.values.get("workers", 0),
            self.values.get("cpus_per_worker", 0.0),
        )
        return replace(task, **self.values, **({"device": "cuda"} if self.on_gpu else {}))


def choose(engine: Engine, key: str) -> Where:
    """A button that says where the job will run, and the choice behind it.

    Nothing is drawn for a model on a server, and for people who may not change what computes.
    """
    if engine.remote is not None or not state.may("load"):
        return Where({})
    missing = cluster.problem()
    on = state.remember("cluster.on", HERE) if missing is None else HERE
    title = t("On this machine", "本机运行") if on == HERE else t("On a Ray cluster", "Ray 集群")
    icon = ":material/computer:" if on == HERE else ":material/hub:"
    with st.popover(title, icon=icon, key=f"where_{key}"):
        st.markdown(f"**{t('Run on', '运行位置')}**")
        on = st.segmented_control(
            t("Run on", "运行位置"),
            (HERE, RAY),
            format_func=lambda one: (
                t(":material/computer: This machine", ":material/computer: 本机")
                if one == HERE
                else t(":material/hub: Ray cluster", ":material/hub: Ray 集群")
            ),
            required=True,
            disabled=missing is not None,
            label_visibility="collapsed",
            **state.kept_widget("cluster.on", HERE, (HERE, RAY), "default"),
        )
        if missing is not None:
            st.caption(f":material/info: {plain(said(missing.message))}")
            st.code(missing.todo, language=None)
            return Where({})
        if on != RAY:
            st.caption(t("By the model that is loaded.", "由已加载的模型完成。"))
            return Where({})
        return _cluster(engine)


def _cluster(engine: Engine) -> Where:
    address = st.text_input(
        t("Address", "地址"),
        placeholder=t("empty: a cluster of its own on this machine", "留空：在本机临时启动"),
        help=t(
            "host:port of the head of a running cluster. Left empty, Ray is started on this machine for the job and "
            "ended with it: one worker per GPU, or per share of the processors.",
            "正在运行的集群主节点的 host:port。留空则为此任务在本机启动 Ray，任务结束后关闭：每个 GPU 或每份 CPU 一个工作进程。",
        ),
        **state.kept_widget("cluster.address", ""),
    )
    left, right = st.columns(2)
    with left:
        workers = st.number_input(
            t("Workers", "工作进程"),
            min_value=0,
            max_value=MOST_WORKERS,
            step=1,
            help=t("0: as many as fit. Each loads the model.", "0：尽可能多。每个都会加载模型。"),
            **state.kept_widget("cluster.workers", 0),
        )
    with right:
        cpus = st.number_input(
            t("CPUs per worker", "每个的 CPU 数"),
            min_value=0,
            max_value=MOST_WORKERS,
            step=1,
            help=t("0: an equal share.", "0：平均分配。"),
            **state.kept_widget("cluster.cpus", 0),
        )
    on_gpu = st.toggle(
        t("One GPU for each worker", "每个工作进程一个 GPU"),
        help=t(
            "Turn it on where the nodes have GPUs that this machine lacks.",
            "节点有 GPU 而本机没有时请打开。",
        ),
        **state.kept_widget("cluster.gpu", False),
    )
    folder = plain(str(engine.loaded.info.path))
    st.caption(
        t(
            f"Every node needs the checkpoint in the same place, {folder}, and the same packages.",
            f"每个节点都需要在相同位置有检查点 {folder}，并安装相同的软件包。",
        )
    )
    values = {
        "engine": cluster.RAY,
        "address": str(address or "").strip(),
        "workers": int(workers or 0),
        "cpus_per_worker": float(cpus or 0),
    }
    return Where(values, bool(on_gpu))
