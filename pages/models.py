"""Models: what the allowed folders hold, load it with its base, and whether it does what it should."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import streamlit as st

from glm_core.errors import GLMError
from glm_core.settings import MINI
from pages.shared import access, convert_panel, page, panels, pickers, remote_engines, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.effect import EffectReport
    from glm_core.engine import Engine

NAMED = 12  # unused tensors shown by name


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
    convert_panel.outcome()
    with st.container(key="models_columns"):
        left, right = st.columns([3, 2])
    with right.container(border=True):
        load_panel(found)
    with left:
        listing(found)
        remote_engines.card()
    if state.may("finetune"):
        convert_panel.dialog(found)
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
                if engine.remote is None:
                    panels.exact_badge(engine.status().exact, engine.status().exact_text)
                st.space("stretch")
                with st.container(horizontal=True, width="content", gap="xsmall"):
                    actions(engine)
        if engine is not None and kind == "ready" and engine.remote is not None:
            remote_facts(engine)
        elif engine is not None and kind == "ready":
            loaded_facts(engine)
            adapter_effect(engine)
            if panels.is_demo(name):
                st.caption(f":material/school: {panels.demo_text()}")
        elif kind in ("loading", "starting"):
            loading_now()
        else:
            st.caption(t("Nothing is loaded. Choose a checkpoint below.", "尚未加载模型，请在下方选择。"))
        if state.testing().busy:
            comparing = t("Comparing batched with single …", "正在比较批量与单条……")
            st.caption(f":material/progress_activity: {comparing}")
        for text in (*state.session("models_said", []), plain(said(state.testing().said))):
            if text:
                st.caption(f":material/info: {text}")
        if error := (
            state.session("models_problem")
            or state.testing().error
            or state.measuring().error
            or state.model_error()
        ):
            panels.problem(error)


@live(run_every=0.5)
def loading_now() -> None:
    """How far the load under way is."""
    kind, name = state.model_state()
    if kind not in ("loading", "starting"):
        st.rerun()
    panels.loading_bar(name)


def actions(engine: Engine) -> None:
    """What can be done with the loaded model."""
    if not state.may("load"):
        return
    if engine.remote is None and st.button(
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
    leave = t("Unload", "卸载") if engine.remote is None else t("Disconnect", "断开")
    if st.button(leave, icon=":material/eject:", key="unload"):
        unload()


def remote_facts(engine: Engine) -> None:
    """Name and place of a model on a server, and what there is none of here."""
    remote, served = engine.remote, engine.served  # type: ignore[attr-defined]
    assert remote is not None
    with st.grid(3, min_column_width=170):
        fact(t("Model", "模型"), remote.model, served.reported or remote.name, "cloud")
        fact(t("Server", "服务器"), remote.host, served.kind, "dns")
        context = f"{served.context:,}" if served.context else "–"
        fact(
            t("Context (tokens)", "上下文（词元）"),
            context,
            t("as the server says", "由服务器给出") if served.context else t("not said", "未说明"),
            "data_usage",
        )
    st.caption(
        ":material/info: "
        + t(
            "Its weights are on the server: memory, precision, self-test and fine-tuning are there, not here.",
            "权重在服务器上：内存、精度、自检和微调均不在本机。",
        )
    )


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
            t(
                f"Computes with {status.threads_text}: the fastest in a second of trying after the load, per token.",
                f"线程数由加载后一秒内的实测选定：{status.threads_text}（每词元用时）。",
            )
            if status.threads_text
            else None,
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
    report = engine.loaded.report
    with st.container(gap="xxsmall"):
        if info.adapter is not None:
            method = panels.METHODS.get(info.adapter.method, plain(info.adapter.method))
            base = engine.loaded.base
            on = (
                t(f" on **{plain(base.name)}**", f"，基座 **{plain(base.name)}**") if base is not None else ""
            )
            colon = t(": ", "：")
            st.caption(f":material/extension: {method}{colon}{panels.adapter_text(info.adapter)}{on}")
        used, unused, missing = len(report.used), len(report.unused), len(report.missing)
        st.caption(
            f":material/{'warning' if unused or missing else 'check'}: "
            + t(
                f"{used:,} tensors used, {unused:,} unused, {missing:,} missing",
                f"张量：已用 {used:,}，未用 {unused:,}，缺少 {missing:,}",
            )
        )
        if report.unused:
            names = ", ".join(plain(name) for name in report.unused[:NAMED])
            more = f" … +{unused - NAMED:,}" if unused > NAMED else ""
            st.caption(t(f"Not used: {names}{more}", f"未使用：{names}{more}"))
        for note in (*engine.loaded.notes, *status.notes):
            st.caption(f":material/info: {plain(said(note))}")


def adapter_effect(engine: Engine) -> None:
    """Whether the loaded adapter changes any answer: the button, how far it is, and what was found."""
    from glm_core import effect

    if not effect.has_adapter(engine):
        return
    measuring = state.measuring()
    report = measuring.report(engine)
    with st.container(border=True, gap="small", key="effect"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.markdown(f"**:material/difference: {t('The adapter', '适配器')}**", width="content")
            if report is not None:
                effect_badge(report)
            st.space("stretch")
            if st.button(
                t("Did it take effect?", "是否生效？"),
                icon=":material/compare_arrows:",
                key="effect_start",
                disabled=measuring.busy or not state.may("load"),
                help=t(
                    "Answers 8 short prompts with and without the adapter, greedily, and compares them. Other "
                    "requests go on meanwhile, with the adapter.",
                    "对 8 个简短的提示词分别在有和没有适配器时贪心作答并比较。其间其他请求照常进行，仍使用适配器。",
                ),
            ):
                forget_what_was_said()
                measuring.start(engine)
                st.rerun()
        if measuring.busy:
            measuring_now()
        elif report is not None:
            effect_found(report)
        else:
            st.caption(
                t(
                    "Not tried yet: an adapter that was never trained loads as well as any other.",
                    "尚未检查：从未训练过的适配器也能正常加载。",
                )
            )


@live(run_every=1)
def measuring_now() -> None:
    """How far the answers with and without the adapter are."""
    measuring = state.measuring()
    if not measuring.busy:
        st.rerun()
    done, total = measuring.done, measuring.total
    st.progress(min(1.0, done / total) if total else 0.0)
    side = (
        t("without the adapter", "没有适配器")
        if 2 * done < total or not total
        else t("with the adapter", "有适配器")
    )
    st.caption(t(f"Answering 8 prompts {side} …", f"正在回答 8 个提示词（{side}）……"))


def effect_badge(report: EffectReport) -> None:
    """How many answers the adapter changed."""
    differing, total = report.effect.differing, report.effect.total
    st.badge(
        t(f"{differing} of {total} answers changed", f"{total} 个回答中有 {differing} 个改变"),
        icon=":material/check_circle:" if differing else ":material/warning:",
        color="green" if differing else "orange",
    )


def effect_found(report: EffectReport) -> None:
    """The warning where no answer differs, and the answers side by side."""
    if report.effect.warning:
        st.warning(plain(said(report.effect.warning)), icon=":material/warning:")
    with st.expander(t("The answers side by side", "回答对照")):
        for prompt, without, with_ in zip(report.prompts, report.without, report.with_, strict=True):
            same = without == with_
            mark = ":gray[:material/equal:]" if same else ":green[:material/difference:]"
            st.markdown(f"{mark} **{plain(prompt)}**")
            with st.grid(2, min_column_width=220):
                for label, answer in (
                    (t("without the adapter", "没有适配器"), without),
                    (t("with the adapter", "有适配器"), with_),
                ):
                    with st.container(border=True, gap="xxsmall"):
                        st.caption(label)
                        empty = f"*{t('empty', '空')}*"
                        st.markdown("  \n".join(map(plain, answer.splitlines())) if answer.strip() else empty)


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
    engine = state.current_engine()
    on_server = engine is not None and engine.remote is not None
    try:
        state.unload_model()
    except GLMError as error:
        state.session_set("models_problem", error)
    else:
        if on_server:
            st.rerun()
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
    if not state.measuring().busy:
        state.measuring().error = None


def load_panel(found: list[CheckpointInfo]) -> None:
    """Checkpoint, base, precision and device, what memory they will take, and the button."""
    panels.section(t("Load a model", "加载模型"), "play_circle")
    if access.not_allowed("load"):
        return
    choices = [info for info in found if info.loadable]
    if not choices:
        st.caption(t("No folder here can be loaded; the list says why.", "没有可加载的模型；原因见列表。"))
        return
    by_path = {str(info.path): info for info in choices}
    if state.session("models_choice") not in by_path:
        state.session_set("models_choice", likely_choice(by_path))
    chosen = st.selectbox(
        t("Checkpoint", "模型"),
        list(by_path),
        format_func=lambda path: choice_name(by_path[path]),
        key="models_choice",
    )
    info = by_path[str(chosen)]
    if info.needs_base and convert_panel.asks_for_base(found):
        return  # the dialog above has the one base picker a page can have
    on = pickers.base(info, choices) if info.needs_base else info
    if on is None:
        return
    precision, device, generation = pickers.precision(on), pickers.device(), pickers.generation(on)
    resolved, need = pickers.expected_memory(on, precision, device, info)
    engine = state.current_engine()
    available = psutil.virtual_memory().available
    free = available + (engine.status().weight_bytes if engine is not None else 0)
    st.progress(min(1.0, need / free) if free else 1.0)
    needs, has = panels.format_bytes(need), panels.format_bytes(free)
    stored = f"{on.codes} + {resolved.upper()}" if on.bits else resolved.upper()
    st.caption(
        t(
            f"**{needs}** for the weights in {stored}, plus working memory. "
            f"{has} will be free once the present model is out.",
            f"{stored} 权重约需 **{needs}**，另需工作内存。卸载当前模型后可用 {has}。",
        )
    )
    busy = state.model_state()[0] == "loading" or state.making().busy
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
        state.load_model(info.path, precision, device, generation, on.path if info.needs_base else None)
        st.rerun()


def likely_choice(by_path: dict[str, CheckpointInfo]) -> str:
    """What is being loaded or is loaded, else the embedded model, else the first."""
    loading, engine = state.loading(), state.current_engine()
    wanted = (
        loading.path if loading.busy else None,
        engine.loaded.info.path if engine is not None else None,
        MINI,
    )
    return next((str(path) for path in wanted if path and str(path) in by_path), next(iter(by_path)))


def choice_name(info: CheckpointInfo) -> str:
    """A folder's name, with its method where it is an adapter."""
    return f"{info.name} · {panels.METHODS[info.method]}" if info.method in panels.METHODS else info.name


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
    if state.may("load"):
        add_folder()


def checkpoint_card(info: CheckpointInfo) -> None:
    """What a checkpoint folder holds, or what is wrong with it."""
    engine = state.current_engine()
    current = engine is not None and engine.loaded.info.path == info.path
    beneath = engine is not None and engine.loaded.base is not None and engine.loaded.base.path == info.path
    with st.container(border=True, gap="xsmall", key=f"checkpoint_{abs(hash(info.path))}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.markdown(f"**{plain(info.name)}**", width="content")
            kinds(info)
            if current:
                st.badge(t("in memory", "已加载"), icon=":material/check_circle:", color="green")
            elif beneath:
                st.badge(t("base in memory", "已加载为基座"), icon=":material/check_circle:", color="green")
            if not info.loadable:
                st.badge(t("cannot be loaded", "无法加载"), icon=":material/block:", color="orange")
            st.space("stretch")
            if info.loadable:
                with st.container(horizontal=True, width="content", gap="small"):
                    if state.may("finetune"):
                        convert_panel.open_button(info)
                    if not current and state.may("load"):
                        choose_button(info)
        if info.adapter is not None:
            st.markdown(adapter_facts(info))
        if facts := checkpoint_facts(info):
            st.markdown(facts)
        for one in info.problems:
            st.markdown(f":orange[:material/warning:] {plain(said(one))}")
        if state.may("load"):
            st.caption(f":material/folder: {plain(str(info.path))}")
        convert_panel.card_note(info)


def choose_button(info: CheckpointInfo) -> None:
    """The button that selects a checkpoint in the load panel."""
    st.button(
        t("Choose", "选择"),
        key=f"choose {info.path}",
        type="tertiary",
        icon=":material/arrow_forward:",
        icon_position="right",
        on_click=state.session_set,
        args=("models_choice", str(info.path)),
    )


def kinds(info: CheckpointInfo) -> None:
    """Badges of the family, the adapter's method and the precision stored."""
    if info.family != "LoRA":  # which says nothing of the base
        st.badge(plain(info.family), color="violet" if info.loadable else "gray")
    if info.method:
        st.badge(
            panels.METHODS.get(info.method, plain(info.method.upper())),
            icon=":material/extension:",
            color="blue" if info.loadable else "gray",
            help=t(
                "An adapter alone: it is loaded onto the checkpoint it was trained on.",
                "仅含适配器：加载到训练时所用的检查点之上。",
            )
            if info.needs_base
            else t("A whole checkpoint with a prefix in it.", "完整的检查点，内含前缀。"),
        )
    if info.bits:
        st.badge(
            info.codes,
            icon=":material/compress:",
            color="gray",
            help=t("How the linear layers are stored.", "线性层的存储方式。"),
        )


def adapter_facts(info: CheckpointInfo) -> str:
    """Length or rank and layers of an adapter, its size, and the base it names."""
    adapter = info.adapter
    assert adapter is not None
    parts = [text] if (text := panels.adapter_text(adapter)) else []
    if adapter.parameters:
        count, disk = panels.format_count(adapter.parameters), panels.format_bytes(adapter.size_bytes)
        parts.append(t(f"{count} parameters, {disk}", f"{count} 参数，{disk}"))
    if info.base:
        parts.append(t(f"trained on {plain(info.base)}", f"基座：{plain(info.base)}"))
    elif info.needs_base:
        parts.append(t("names no base", "没有记录基座"))
    return ":material/extension: " + " · ".join(parts)


PROMPTS = {
    "chatglm": "[Round 0]\\n问：",
    "chatglm2": "[Round 1]\\n\\n问：",
    "chatglm3": "<|user|>\\n",
    "glm4": "[gMASK]<sop><|user|>\\n",
}


def checkpoint_facts(info: CheckpointInfo) -> str:
    """Parameters, size, precision stored, layers, context and prompts in one line, as far as they are known."""
    if info.needs_base:  # what its config.json says is the base's
        return ""
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
        stored = f" {plain(info.dtype)}" if info.dtype else ""
        parts.append(t(f"{disk}{stored} on disk", f"磁盘 {disk}{stored}"))
    if info.layers:
        parts.append(
            t(f"{info.layers} layers of {info.hidden_size:,}", f"{info.layers} 层 × {info.hidden_size:,}")
        )
    if info.context:
        parts.append(t(f"context {info.context:,}", f"上下文 {info.context:,}"))
    if info.generation in PROMPTS:
        parts.append(t("prompts", "提示") + f" `{PROMPTS[info.generation]}`")
    elif info.generation == "template":
        parts.append(t("prompts by its chat template", "提示由对话模板生成"))
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
