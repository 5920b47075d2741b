"""Outputs used on several screens: problem box, model box, badges, sizes and times in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from glm_core.settings import MINI
from pages.shared import state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from glm_core.adapters import AdapterInfo
    from glm_core.engine import Engine

READ = 0.99  # a file's header is not counted as read
METHODS = {"lora": "LoRA", "p-tuning-v2": "P-tuning v2"}
STATES = {
    "ready": ("ready", "就绪", "green", ":material/check_circle:"),
    "loading": ("loading", "加载中", "orange", ":material/progress_activity:"),
    "starting": ("starting", "启动中", "orange", ":material/progress_activity:"),
    "empty": ("no model", "无模型", "gray", ":material/radio_button_unchecked:"),
    "failed": ("no model", "无模型", "red", ":material/error:"),
}
JOB_STATES = {
    "preparing": ("preparing", "准备中", "gray", ":material/hourglass_top:"),
    "queued": ("queued", "排队中", "gray", ":material/schedule:"),
    "running": ("running", "运行中", "violet", ":material/play_circle:"),
    "done": ("done", "已完成", "green", ":material/check_circle:"),
    "paused": ("paused", "已暂停", "orange", ":material/pause_circle:"),
    "cancelled": ("cancelled", "已取消", "gray", ":material/cancel:"),
    "failed": ("failed", "失败", "red", ":material/error:"),
}


def problem(error: GLMError) -> None:
    """What happened and what to do, in a box."""
    todo = f"\n\n:material/build: {plain(said(error.todo))}" if error.todo else ""
    st.error(f"{plain(said(error.message))}{todo}", icon=":material/error:")


def section(title: str, icon: str = "") -> DeltaGenerator:
    """A section's title; returns its row, for badges and buttons at the right of the title."""
    row = st.container(horizontal=True, vertical_alignment="center", gap="xsmall")
    row.subheader(f":primary[:material/{icon}:] {title}" if icon else title, anchor=False, width="content")
    return row


def state_badge(kind: str) -> None:
    """Whether there is a model: ready, loading or none."""
    en, zh, color, icon = STATES[kind]
    st.badge(t(en, zh), icon=icon, color=color)


def job_badge(kind: str) -> None:
    """The state of a job."""
    en, zh, color, icon = JOB_STATES.get(kind, (kind, kind, "gray", ":material/help:"))
    st.badge(t(en, zh), icon=icon, color=color)


def exact_badge(exact: bool | None, text: str = "") -> None:
    """Whether rows answered together equal rows answered alone, as measured on this machine."""
    text = said(text)
    if exact is None:
        st.badge(
            t("batched = single: not tested", "批量 = 单条：未测试"),
            icon=":material/help:",
            color="gray",
            help=t("The self-test on the Models page measures it.", "可在“模型”页运行自检。"),
        )
    elif exact:
        st.badge(
            t("batched = single", "批量 = 单条"), icon=":material/verified:", color="green", help=text or None
        )
    else:
        st.badge(
            t("batched ≠ single", "批量 ≠ 单条"), icon=":material/warning:", color="orange", help=text or None
        )


def need_model() -> Engine | None:
    """The loaded engine; where there is none, a box that loads the embedded model, and None."""
    engine = state.current_engine()
    kind, _ = state.model_state()
    if engine is not None and kind == "ready":
        st.empty()  # in the place of the box: moved up, the page would be there twice until all of it is drawn
        return engine
    _no_model_box()
    return None


@live(run_every=0.7)
def _no_model_box() -> None:
    kind, name = state.model_state()
    if kind == "ready":
        st.rerun()
    with st.container(border=True, key="no_model"):
        if kind in ("loading", "starting"):
            loading_bar(name)
            st.caption(
                t(
                    "The page opens by itself when the model is ready. The first load takes some seconds.",
                    "模型就绪后页面会自动打开。启动后的首次加载需要几秒钟。",
                )
            )
            return
        st.markdown(f"**:material/deployed_code: {t('No model is loaded.', '尚未加载模型。')}**")
        if error := state.model_error():
            problem(error)
        if not state.may("load"):
            st.caption(f":material/lock: {t('An administrator has to load one.', '需要由管理员加载。')}")
            return
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button(
                t("Load the embedded model", "加载内置模型"),
                type="primary",
                icon=":material/play_arrow:",
                key="load_embedded",
            ):
                state.load_model()
                st.rerun(scope="fragment")
            st.page_link(
                "pages/models.py",
                label=t("Choose another model", "选择其他模型"),
                icon=":material/deployed_code:",
            )


def loading_bar(name: str) -> None:
    """Name, share and bytes of the load under way; drawn again and again by a live part."""
    share, total = state.loading_progress()
    st.markdown(f"**:material/progress_activity: {t('Loading', '正在加载')} {plain(name)} …**")
    st.progress(share)
    percent = f"{100 * share:.0f} %"
    if share <= 0:
        text = t("Preparing …", "正在准备……")
    elif share >= READ:
        text = t("Read. Putting it together and checking its numbers …", "读取完毕，正在组装并检查数值……")
    elif total:
        done, all_of_it = format_bytes(share * total), format_bytes(total)
        text = t(f"{done} of {all_of_it} read ({percent})", f"已读取 {done} / {all_of_it}（{percent}）")
    else:
        text = t(f"{percent} read", f"已读取 {percent}")
    st.caption(text)


@live(run_every=1)
def rerun_on_model_change() -> None:
    """Draw the page anew when a model was loaded, unloaded or tested, by whatever screen or job."""
    engine = state.current_engine()
    exact = engine.status().exact if engine is not None else None
    now = (*state.model_state(), exact, state.testing().busy, state.measuring().busy)
    if state.session("model_seen", now) != now:
        state.session_set("model_seen", now)
        st.rerun()
    state.session_set("model_seen", now)


def demo_note() -> None:
    """That the embedded model shows the workbench and does not answer well."""
    st.info(demo_text(), icon=":material/school:")


def demo_text() -> str:
    """The sentence of `demo_note`."""
    return t(
        f"**{MINI.name}** is a demonstration model: small enough to ship with the workbench, so that every "
        "page works at once. Do not rely on its answers; load your own GLM checkpoint on the "
        "Models page.",
        f"**{MINI.name}** 是演示模型：体积小，随工作台一起提供，让每个页面都能立即使用。"
        "请勿依赖它的回答；请在“模型”页加载您自己的 GLM 模型。",
    )


def adapter_text(adapter: AdapterInfo) -> str:
    """What an adapter is in one line: length or rank, strength and layers."""
    if adapter.method == "p-tuning-v2":
        projection = t(" with projection", "，带投影") if adapter.projection else ""
        return t(
            f"prefix of {adapter.prefix_length:,} columns{projection}",
            f"前缀 {adapter.prefix_length:,} 列{projection}",
        )
    if adapter.method == "lora":
        targets = plain(", ".join(adapter.targets))
        return t(
            f"rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}",
            f"秩 {adapter.rank}，alpha {adapter.alpha:g}，作用于 {targets}",
        )
    return ""


def is_demo(name: str) -> bool:
    """Whether a model is the embedded one."""
    return name == MINI.name


def device_name(device: object) -> str:
    """A device as an analyst calls it."""
    name = str(device)
    if name.startswith("cuda"):
        return f"GPU {name.partition(':')[2]}".strip()
    return {"cpu": "CPU", "mps": "Apple GPU"}.get(name, name)


def memory_in_use() -> tuple[int, int, str]:
    """(bytes used, bytes there are, of what): of the device that holds the model, else of the computer."""
    report = state.engine_host().memory()
    if report.device_total_bytes:
        return report.device_used_bytes or 0, report.device_total_bytes, t("GPU memory", "显存")
    return report.system_used_bytes, report.system_total_bytes, t("Memory", "内存")


def format_bytes(count: float | None) -> str:
    """Bytes as 512 MiB or 6.1 GiB."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.1f} {unit}" if unit == "GiB" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: int) -> str:
    """Parameters as 6.2 B or 12.4 M."""
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def format_duration(seconds: float | None) -> str:
    """Seconds as 0.4 s, 12 s, 3 min 20 s or 2 h 05 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return t(f"{whole // 60} min {whole % 60:02d} s", f"{whole // 60} 分 {whole % 60:02d} 秒")
    return t(
        f"{whole // 3600} h {whole % 3600 // 60:02d} min", f"{whole // 3600} 小时 {whole % 3600 // 60:02d} 分"
    )


def format_ago(moment: float | None, now: float) -> str:
    """When something was, seen from now: 5 min ago."""
    if not moment:
        return ""
    past = max(0.0, now - moment)
    if past < 60:
        return t("just now", "刚刚")
    for size, en, zh in ((86400, "d", "天"), (3600, "h", "小时"), (60, "min", "分钟")):
        if past >= size:
            return t(f"{int(past // size)} {en} ago", f"{int(past // size)} {zh}前")
    return ""
