"""Models: what the allowed folders hold, what it needs, load, unload, and whether batched equals single."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import streamlit as st

from glm_core.errors import GLMError
from glm_core.settings import MINI
from pages.shared import page, panels, pickers, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.engine import Engine


def main() -> None:
    """Draw the page."""
    page.frame(
        "models",
        ("Models", "模型"),
        ":material/deployed_code:",
        (
            "Checkpoints on this computer. They are read, never executed; one model is in memory at a time.",
            "本机上的模型。只读取文件夹，绝不执行其中的代码；内存中同时只有一个模型。",
        ),
    )
    found = state.checkpoints((*state.settings().model_roots, *added_folders()))
    in_memory()
    with st.container(key="models_columns"):
        left, right = st.columns([3, 2])
    with right.container(border=True):
        load_panel([info for info in found if info.loadable])
    with left:
        listing(found)
    panels.rerun_on_model_change()


def in_memory() -> None:
    """The loaded model, its memory and its self-test."""
    kind, name = state.model_state()
    engine = state.current_engine()
    with st.container(border=True, key="in_memory"):
        row = panels.section(t("In memory", "内存中的模型"), "memory")
        with row:
            panels.state_badge(kind)
            if engine is not None and kind == "ready":
                panels.exact_badge(engine.status().exact, engine.status().exact_text)
                st.space("stretch")
                with st.container(horizontal=True, width="content", gap="xsmall"):
                    actions(engine)
        if engine is not None and kind == "ready":
            loaded_facts(engine)
            if panels.is_demo(name):
                st.caption(f":material/school: {panels.demo_text()}")
        elif kind in ("loading", "starting"):
            st.markdown(f":material/progress_activity: {t('Loading', '正在加载')} **{plain(name)}** …")
        else:
            st.caption(t("Nothing is loaded. Choose a checkpoint below.", "尚未加载模型，请在下方选择。"))
        if state.testing().busy:
            comparing = t("Comparing batched with single …", "正在比较批量与单条……")
            st.caption(f":material/progress_activity: {comparing}")
        for text in (*state.session("models_said", []), plain(said(state.testing().said))):
            if text:
                st.caption(f":material/info: {text}")
        if error := state.session("models_problem") or state.testing().error or state.model_error():
            panels.problem(error)


def actions(engine: Engine) -> None:
    """What can be done with the loaded model."""
    if st.button(
        t("Self-test", "自检"),
        icon=":material/rule:",
        key="self_test",
        help=t(
            "Answers the same rows together and one by one, and compares them token by token.",
            "把相同的行分别批量和逐条生成，并逐个词元比较。",
        ),
        disabled=state.testing().busy,
    ):
        forget_what_was_said()
        state.testing().start(engine)
        st.rerun()
    if st.button(t("Unload", "卸载"), icon=":material/eject:", key="unload"):
        unload()


def loaded_facts(engine: Engine) -> None:
    """Name, size, precision, device and memory of the loaded model."""
    info, status, memory = engine.loaded.info, engine.status(), state.engine_host().memory()
    context = t(f"context {engine.context:,} tokens", f"上下文 {engine.context:,} 词元")
    with st.grid(4, min_column_width=140):
        fact(
            t("Model", "模型"),
            info.name,
            f"{info.family} · {panels.format_count(info.parameters)}",
            "deployed_code",
        )
        fact(
            t("Precision and device", "精度与设备"),
            f"{status.precision.upper()} · {panels.device_name(status.device)}",
            context,
            "memory",
        )
        fact(
            t("Weights", "权重"),
            panels.format_bytes(status.weight_bytes),
            t(
                f"loaded in {panels.format_duration(engine.loaded.load_seconds)}",
                f"加载用时 {panels.format_duration(engine.loaded.load_seconds)}",
            ),
            "scale",
        )
        if memory.before_load_bytes is not None and memory.after_load_bytes is not None:
            before, after = (
                panels.format_bytes(n) for n in (memory.before_load_bytes, memory.after_load_bytes)
            )
            grown = memory.after_load_bytes - memory.before_load_bytes
            fact(
                t("Memory taken", "占用内存"),
                f"{'+' if grown >= 0 else '−'}{panels.format_bytes(abs(grown))}",
                f"{before} → {after}",
                "swap_vert",
                t(
                    "Memory of this process before and after the load, its libraries included. "
                    f"Now {panels.format_bytes(memory.process_bytes)}.",
                    f"加载前后本进程的内存（含程序库）。现在 {panels.format_bytes(memory.process_bytes)}。",
                ),
            )
    for note in status.notes:
        st.caption(f":material/info: {plain(said(note))}")


def fact(label: str, value: str, detail: str, icon: str, explained: str | None = None) -> None:
    """A figure of the loaded model."""
    st.metric(
        label,
        value,
        detail,
        icon=f":material/{icon}:",
        delta_color="off",
        delta_arrow="off",
        help=explained,
    )


def unload() -> None:
    """Unload the model, and say what memory that gave back."""
    before = state.engine_host().memory().process_bytes
    forget_what_was_said()
    try:
        state.unload_model()
    except GLMError as error:
        state.session_set("models_problem", error)
    else:
        now = panels.format_bytes(state.engine_host().memory().process_bytes)
        was = panels.format_bytes(before)
        freed = t(f"Unloaded: the process held {was}, now {now}.", f"已卸载：进程内存由 {was} 变为 {now}。")
        state.session_set("models_said", [freed])
    st.rerun()


def forget_what_was_said() -> None:
    """Take the sentences about the last action off the page; the next one brings its own."""
    state.session_set("models_problem", None)
    state.session_set("models_said", [])
    if not state.testing().busy:
        state.testing().said, state.testing().error = "", None


def load_panel(choices: list[CheckpointInfo]) -> None:
    """Checkpoint, precision and device, what memory they will take, and the button."""
    panels.section(t("Load a model", "加载模型"), "play_circle")
    if not choices:
        st.caption(t("No folder here can be loaded; the list says why.", "没有可加载的模型；原因见列表。"))
        return
    by_path = {str(info.path): info for info in choices}
    if state.session("models_choice") not in by_path:
        engine = state.current_engine()
        likely = str(engine.loaded.info.path if engine is not None else MINI)
        state.session_set("models_choice", likely if likely in by_path else str(choices[0].path))
    chosen = st.selectbox(
        t("Checkpoint", "模型"),
        list(by_path),
        format_func=lambda path: by_path[path].name,
        key="models_choice",
    )
    info = by_path[str(chosen)]
    precision, device, generation = pickers.precision(), pickers.device(), pickers.generation(info)
    resolved, need = pickers.expected_memory(info, precision, device)
    engine = state.current_engine()
    available = psutil.virtual_memory().available
    free = available + (engine.status().weight_bytes if engine is not None else 0)
    st.progress(min(1.0, need / free) if free else 1.0)
    needs, has = panels.format_bytes(need), panels.format_bytes(free)
    st.caption(
        t(
            f"**{needs}** for the weights in {resolved.upper()}, plus working memory. "
            f"{has} will be free once the present model is out.",
            f"{resolved.upper()} 权重约需 **{needs}**，另需工作内存。卸载当前模型后可用 {has}。",
        )
    )
    busy = state.model_state()[0] == "loading"
    if st.button(
        t("Load", "加载"),
        type="primary",
        icon=":material/play_arrow:",
        key="load",
        width="stretch",
        disabled=busy,
    ):
        forget_what_was_said()
        if info.name != MINI.name:
            state.remember_set("models.own_loaded", True)
        state.load_model(info.path, precision, device, generation)
        st.rerun()


def listing(found: list[CheckpointInfo]) -> None:
    """Every checkpoint folder with what it holds, and a box for folders elsewhere."""
    with panels.section(f"{t('On this computer', '本机模型')} · {len(found)}", "hard_drive"):
        st.space("stretch")
        if st.button(t("Look again", "重新查找"), icon=":material/refresh:", key="refresh", type="tertiary"):
            state.checkpoints.clear()
            st.rerun()
    for info in found:
        checkpoint_card(info)
    if not found:
        st.caption(t("There is no checkpoint in the allowed folders.", "允许的文件夹中没有模型。"))
    add_folder()


def checkpoint_card(info: CheckpointInfo) -> None:
    """What a checkpoint folder holds, or what is wrong with it."""
    engine = state.current_engine()
    current = engine is not None and engine.loaded.info.path == info.path
    with st.container(border=True, gap="xsmall", key=f"checkpoint_{abs(hash(info.path))}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"**{plain(info.name)}**", width="content")
            st.badge(info.family, color="violet" if info.loadable else "gray")
            if current:
                st.badge(t("in memory", "已加载"), icon=":material/check_circle:", color="green")
            if not info.loadable:
                st.badge(t("cannot be loaded", "无法加载"), icon=":material/block:", color="orange")
            st.space("stretch")
            if info.loadable and not current:
                st.button(
                    t("Choose", "选择"),
                    key=f"choose {info.path}",
                    type="tertiary",
                    icon=":material/arrow_forward:",
                    icon_position="right",
                    on_click=state.session_set,
                    args=("models_choice", str(info.path)),
                )
        if facts := checkpoint_facts(info):
            st.markdown(facts)
        for one in info.problems:
            st.markdown(f":orange[:material/warning:] {plain(said(one))}")
        st.caption(f":material/folder: {plain(str(info.path))}")


def checkpoint_facts(info: CheckpointInfo) -> str:
    """Parameters, size, precision stored, layers and context in one line, as far as they are known."""
    parts = []
    if info.parameters:
        parts.append(
            t(
                f"{panels.format_count(info.parameters)} parameters",
                f"{panels.format_count(info.parameters)} 参数",
            )
        )
    if info.size_bytes:
        disk = panels.format_bytes(info.size_bytes)
        stored = f" {info.dtype}" if info.dtype else ""
        parts.append(t(f"{disk}{stored} on disk", f"磁盘 {disk}{stored}"))
    if info.layers:
        parts.append(
            t(f"{info.layers} layers of {info.hidden_size:,}", f"{info.layers} 层 × {info.hidden_size:,}")
        )
    if info.context:
        parts.append(t(f"context {info.context:,}", f"上下文 {info.context:,}"))
    return " · ".join(parts)


def add_folder() -> None:
    """A box for a checkpoint folder elsewhere, under the folders this workbench may read."""
    with st.container(border=True, key="add_folder"):
        st.markdown(f"**:material/create_new_folder: {t('A folder elsewhere', '其他文件夹')}**")
        with st.form("folder", border=False):
            with st.container(horizontal=True, vertical_alignment="bottom"):
                text = st.text_input(
                    t(
                        "Path of a checkpoint, or of a folder of checkpoints",
                        "模型文件夹或其上级文件夹的路径",
                    ),
                    placeholder="~/models/chatglm3-6b",
                    key="folder_path",
                )
                sent = st.form_submit_button(t("Add", "添加"), icon=":material/add:", key="folder_add")
        if sent and text.strip():
            try:
                add(text.strip())
            except GLMError as error:
                panels.problem(error)
            else:
                st.rerun()
        for folder in state.remember("models.folders", []):
            with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                st.caption(f":material/folder: {plain(folder)}")
                st.button(
                    t("Remove", "移除"),
                    key=f"remove {folder}",
                    type="tertiary",
                    on_click=forget,
                    args=(folder,),
                )


def add(text: str) -> None:
    """Keep a folder in the list; GLMError where it may not be read or holds no checkpoint."""
    folder = state.settings().allowed_model(text)
    if not state.checkpoints((folder,)):
        raise GLMError(
            f"There is no checkpoint in {folder}, nor up to two folders below it.",
            "Choose the folder that holds config.json and the weights.",
        )
    kept = state.remember("models.folders", [])
    state.remember_set("models.folders", [*(one for one in kept if one != str(folder)), str(folder)])


def forget(folder: str) -> None:
    """Take a folder off the list; nothing on the disk changes."""
    state.remember_set(
        "models.folders", [one for one in state.remember("models.folders", []) if one != folder]
    )


def added_folders() -> tuple[Path, ...]:
    """The folders a user added that may still be read."""
    found = []
    for text in state.remember("models.folders", []):
        try:
            found.append(state.settings().allowed_model(text))
        except GLMError:
            continue  # the disk is not mounted today; the folder stays on the list
    return tuple(found)


main()
