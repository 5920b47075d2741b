"""Save a checkpoint in another form: what can be made of it, the dialog that asks, and how far the making is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import streamlit as st

from glm_core.errors import GLMError
from pages.shared import panels, pickers, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo, Progress

OPEN = "convert_for"  # key of the path whose dialog is open
FORM = ("convert_kind", "convert_precision", "convert_precision_for", "convert_name", "convert_named")
FLOATS = ("fp32", "bf16", "fp16")
PRECISIONS = (*FLOATS, "int8", "int4", "int4-g32", "int4-g64", "int4-g128")
STORED = {
    "F32": "fp32", "F16": "fp16", "BF16": "bf16",
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
}  # fmt: skip
NOT_IN_NAMES = '/\\:*?"<>|'  # on one system or another
LONGEST = 200  # bytes; file systems take 255, and an unfinished folder's name is longer


@dataclass(frozen=True)
class Kind:
    """A form a checkpoint can be saved in."""

    title: tuple[str, str]
    why: tuple[str, str]
    suffix: str  # of the proposed name; "" takes the precision


KINDS: dict[str, Kind] = {
    "convert": Kind(
        ("The layout it has, as safetensors", "保持原有布局，存为 safetensors"),
        (
            "In a precision of your choice: INT4 takes a quarter of the disk and memory of BF16, "
            "and loads without being converted again.",
            "可选择精度：INT4 的磁盘和内存占用是 BF16 的四分之一，以后加载时无需再次转换。",
        ),
        "",
    ),
    "glm": Kind(
        ("The layout of transformers: `glm`", "transformers 的 `glm` 布局"),
        (
            "For other programs: whatever uses transformers loads it without code from the folder.",
            "供其他程序使用：凡是使用 transformers 的程序都能加载，无需文件夹自带的代码。",
        ),
        "glm",
    ),
    "merge": Kind(
        ("One checkpoint with the LoRA merged into its base", "把 LoRA 合并到基座中的完整检查点"),
        (
            "It loads without the adapter beside it, answers a little faster, and can then be converted.",
            "加载时不再需要适配器，回答略快，之后还可以再转换。",
        ),
        "merged",
    ),
    "export": Kind(
        ("The prefix alone, as released", "仅前缀，采用官方格式"),
        (
            "A small file to hand on: pytorch_model.bin and config.json, as the published scripts write and "
            "read them.",
            "便于分发的小文件：pytorch_model.bin 和 config.json，与官方脚本读写的格式相同。",
        ),
        "prefix",
    ),
}


def possible(info: CheckpointInfo) -> tuple[str, ...]:
    """What can be made of a checkpoint, by the keys of KINDS; empty where nothing can."""
    if not info.loadable:
        return ()
    if info.method:  # the other forms would lose the prefix of a whole checkpoint
        return {"lora": ("merge",), "p-tuning-v2": ("export",)}.get(info.method, ())
    return ("convert", "glm") if info.architecture == "chatglm2" and not info.bits else ("convert",)


def open_button(info: CheckpointInfo) -> None:
    """The button on a checkpoint's card that opens the dialog; nothing where there is nothing to make."""
    if possible(info):
        st.button(
            t("Save as …", "另存为……"),
            key=f"save_as {info.path}",
            type="tertiary",
            icon=":material/save_as:",
            on_click=open_for,
            args=(info,),
        )


def open_for(info: CheckpointInfo) -> None:
    """Open the dialog with a fresh form."""
    state.session_set(OPEN, str(info.path))
    for key in FORM:
        state.session_set(key, None)


def close() -> None:
    """Close the dialog."""
    state.session_set(OPEN, None)


def asks_for_base(found: Sequence[CheckpointInfo]) -> bool:
    """Whether the open dialog asks for a base, so that nothing else on the page may."""
    info = opened(found)
    return info is not None and "merge" in possible(info)


def opened(found: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The checkpoint whose dialog is open."""
    path = state.session(OPEN)
    return next((info for info in found if str(info.path) == path and possible(info)), None)


def dialog(found: Sequence[CheckpointInfo]) -> None:
    """The dialog, where it is open; the page is drawn anew below it without closing it."""
    if info := opened(found):
        title = t(f"Save {info.name} as …", f"将 {info.name} 另存为……")
        st.dialog(plain(title), width="medium", icon=":material/save_as:", on_dismiss=close)(form)(
            info, found
        )


def form(info: CheckpointInfo, found: Sequence[CheckpointInfo]) -> None:
    """What to make, in which precision, under which name, what that takes, and the button."""
    kind = which(info)
    base = pickers.base(info, [one for one in found if one.loadable]) if kind == "merge" else info
    if base is None:
        return
    if kind == "merge" and base.bits:
        panels.problem(codes_cannot_take_lora())
        return
    precision = chosen_precision(base, kind)
    folder = state.settings().checkpoints
    name = chosen_name(info, kind, precision, folder)
    disk, memory = expected(info, base, kind, precision)
    costs(disk, memory, folder)
    making, waits = state.making(), ""
    if making.busy:
        waits = t("Another copy is being made; wait for it.", "正在生成另一个副本，请等待其完成。")
    elif state.model_state()[0] in ("loading", "starting"):
        waits = t("A model is being loaded; wait for it.", "正在加载模型，请等待其完成。")
    if waits:
        st.caption(f":material/hourglass_top: {waits}")
    asked = st.button(
        t("Save", "保存"),
        type="primary",
        icon=":material/save:",
        key="convert_start",
        width="stretch",
        disabled=bool(waits),
    )
    if asked and not waits:  # another session may have been faster
        try:
            target = new_folder(name, folder)
            room_for(target, disk)
        except GLMError as error:
            panels.problem(error)
        else:
            making.start(info.path, target, disk, maker(kind, info.path, target, precision, base.path))
            close()
            st.rerun()


def which(info: CheckpointInfo) -> str:
    """What to make; where there is one possibility, it is said."""
    choices = possible(info)
    if len(choices) == 1:
        kind = KINDS[choices[0]]
        with st.container(gap="xxsmall"):
            st.markdown(f"**{t(*kind.title)}**")
            st.caption(t(*kind.why))
        return choices[0]
    if state.session("convert_kind") not in choices:
        state.session_set("convert_kind", choices[0])
    return str(
        st.radio(
            t("What to make", "保存为"),
            choices,
            format_func=lambda key: t(*KINDS[key].title),
            captions=[t(*KINDS[key].why) for key in choices],
            key="convert_kind",
        )
    )


def chosen_precision(info: CheckpointInfo, kind: str) -> str:
    """The precision of the new weights; as stored unless another is chosen. Codes of INT8/INT4 stay what they are."""
    stored = stored_precision(info)
    if kind == "export":
        return ""
    if info.bits:
        st.caption(
            ":material/lock: "
            + t(
                f"The weights are stored as {info.codes} and stay so; what is gained is the file format.",
                f"权重以 {info.codes} 存储并保持不变；改变的只是文件格式。",
            )
        )
        return stored
    choices = PRECISIONS if kind == "convert" else FLOATS
    asked_for = (str(info.path), kind)
    if (
        state.session("convert_precision_for") != asked_for
        or state.session("convert_precision") not in choices
    ):
        state.session_set("convert_precision_for", asked_for)
        state.session_set("convert_precision", stored)
    details = {
        "fp32": "FP32",
        "bf16": "BF16",
        "fp16": "FP16",
        "int8": t("INT8 for the linear layers, the rest BF16", "线性层 INT8，其余 BF16"),
        "int4": t("INT4 for the linear layers, the rest BF16", "线性层 INT4，其余 BF16"),
        **{
            f"int4-g{size}": t(
                f"INT4 in groups of {size}, for this program only", f"INT4 分组 {size}，仅供本程序使用"
            )
            for size in (32, 64, 128)
        },
    }
    as_stored = t(" · as stored", " · 与原文件相同")
    return str(
        st.selectbox(
            t("Precision", "精度"),
            choices,
            format_func=lambda one: details[one] + (as_stored if one == stored else ""),
            key="convert_precision",
            help=t(
                "As stored, no number changes. Any other rounds the weights, and answers change a little.",
                "与原文件相同时数值不变；其他精度会对权重舍入，回答会略有不同。",
            ),
        )
    )


def stored_precision(info: CheckpointInfo) -> str:
    """The precision most weights are stored in; beside INT8/INT4 codes that of the other weights."""
    from glm_core import weights

    if not info.bits:
        return STORED.get(info.dtype, "bf16")
    files, problems = weights.weight_files(info.path)
    if problems or not weights.can_list(files):
        return "fp16"  # in which all of those were published
    numbers: Counter[str] = Counter()
    for name, tensor in weights.listing(files).items():
        if tensor.dtype in STORED and not name.endswith(("weight_scale", "weight_zero", "inv_freq")):
            numbers[STORED[tensor.dtype]] += tensor.numel
    return numbers.most_common(1)[0][0] if numbers else "fp16"


def chosen_name(info: CheckpointInfo, kind: str, precision: str, folder: Path) -> str:
    """The name of the new folder; the proposal follows the other choices until another is typed."""
    stem = info.name.replace("/", "-")
    suffix = KINDS[kind].suffix or (info.codes.lower() or precision)
    proposed = free_name(stem if stem.endswith(f"-{suffix}") else f"{stem}-{suffix}", folder)
    before = state.session("convert_named")
    if before != proposed:
        if state.session("convert_name") in (None, before):
            state.session_set("convert_name", proposed)
        state.session_set("convert_named", proposed)
    name = st.text_input(t("Name of the new folder", "新文件夹的名称"), key="convert_name", max_chars=LONGEST)
    st.caption(f":material/folder: {t('in', '位于')} {plain(str(folder))}")
    return str(name or "").strip()


def free_name(name: str, folder: Path) -> str:
    """A name nothing in a folder has yet: the one given, else with a number behind it."""
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next((one for one in names if not (folder / one).exists()), name)


def expected(info: CheckpointInfo, base: CheckpointInfo, kind: str, precision: str) -> tuple[int, int]:
    """(bytes on disk, bytes in memory while it is made, as loading counts them)."""
    from glm_core import devices

    if kind == "export":
        assert info.adapter is not None
        return info.adapter.size_bytes, info.adapter.size_bytes
    _, memory = pickers.expected_memory(base, precision, "cpu", info)
    return base.memory_bytes(precision), devices.needed(memory)


def costs(disk: int, memory: int, folder: Path) -> None:
    """What the copy takes of the disk and, while it is made, of the memory, beside what is free."""
    rooms = (
        ("hard_drive", t("On disk", "磁盘"), disk, shutil.disk_usage(folder).free),
        (
            "memory",
            t("In memory while it is made", "生成时占用内存"),
            memory,
            psutil.virtual_memory().available,
        ),
    )
    with st.container(gap="xxsmall"):
        for icon, label, need, free in rooms:
            needs, has = panels.format_bytes(need), panels.format_bytes(free)
            text = t(f"{label}: about **{needs}**, {has} free", f"{label}：约 **{needs}**，可用 {has}")
            st.markdown(f":orange[:material/warning: {text}]" if need > free else f":material/{icon}: {text}")
        if memory > rooms[1][3] and state.current_engine() is not None:
            st.caption(t("Unloading the present model frees memory.", "卸载当前模型可释放内存。"))


def new_folder(name: str, folder: Path) -> Path:
    """Where a folder of this name will be; GLMError where it is no name of one folder, or something has it."""
    if not name:
        raise GLMError("The new folder has no name.", "Type one.")
    if (
        name.startswith(".")
        or name.endswith((".", ".partial"))
        or not name.isprintable()
        or any(one in name for one in NOT_IN_NAMES)
        or len(name.encode()) > LONGEST
    ):
        raise GLMError(
            f"A new folder cannot be called {name}.",
            "Choose a short name without slashes and other signs, such as chatglm3-6b-int4.",
        )
    target = folder / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):  # before an hour's work, not after
        raise GLMError(f"{target} exists already.", "Choose a new folder.")
    return target


def room_for(target: Path, size: int) -> None:
    """GLMError where the disk has no room for so many bytes."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise GLMError(
            f"{target} needs {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free there.",
            "Choose a folder with enough room.",
        )


def codes_cannot_take_lora() -> GLMError:
    """Why there is no merging into a quantized base."""
    return GLMError(
        "LoRA cannot be merged into INT8/INT4 weights.", "Choose a base with bf16 or fp16 weights."
    )


def maker(kind: str, source: Path, target: Path, precision: str, base: Path) -> Callable[[Progress], Path]:
    """The call that makes the new folder, given what is to be told of the bytes it has read."""
    from glm_core import checkpoints

    if kind == "merge":
        return lambda progress: checkpoints.merge(source, target, base, precision, progress)
    if kind == "export":
        return lambda _: checkpoints.export(source, target)
    write = checkpoints.convert_to_glm if kind == "glm" else checkpoints.convert
    return lambda progress: write(source, target, precision, progress)


# --- on the page ------------------------------------------------------------------------------------------


def outcome() -> None:
    """How far the copy in the making is, or what became of it; nothing where none was asked for."""
    making = state.making()
    if not (making.busy or making.made or making.error):
        return
    assert making.source is not None and making.target is not None
    with st.container(border=True, key="convert_outcome"):
        if making.busy:
            making_now()
            return
        if making.error:
            panels.problem(making.error)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            made = making.made
            if made:
                saved = t(f"**{plain(made.name)}** is saved", f"**{plain(made.name)}** 已保存")
                st.markdown(f":green[:material/check_circle:] {saved}", width="content")
                st.space("stretch")
            if made and made.loadable:
                st.button(
                    t("Choose", "选择"),
                    key="convert_choose",
                    type="primary",
                    icon=":material/arrow_forward:",
                    on_click=choose,
                    args=(str(made.path),),
                )
            st.button(
                t("Close", "关闭"), key="convert_close", icon=":material/close:", on_click=making.forget
            )
        if made:
            st.caption(f":material/folder: {plain(str(made.path))}")
            for one in made.problems:
                st.warning(plain(said(one)), icon=":material/warning:")


@live(run_every=0.5)
def making_now() -> None:
    """Name, share and bytes of the copy in the making."""
    making = state.making()
    if not making.busy or making.target is None:
        st.rerun()
    writing, done, total = making.progress()
    title = t(f"Saving {plain(making.target.name)} …", f"正在保存 {plain(making.target.name)}……")
    st.markdown(f"**:material/save: {title}**")
    st.progress(min(1.0, done / total) if total else 0.0)
    shown, whole = panels.format_bytes(done), panels.format_bytes(total)
    percent = f"{100 * done / total:.0f} %" if total else ""
    if writing:
        text = t(f"{shown} of about {whole} written ({percent})", f"已写入 {shown} / 约 {whole}（{percent}）")
    elif done >= panels.READ * total > 0:
        text = t("Read. Checking its numbers …", "读取完毕，正在检查数值……")
    elif total:
        text = t(f"{shown} of {whole} read ({percent})", f"已读取 {shown} / {whole}（{percent}）")
    else:
        text = t("Reading …", "正在读取……")
    st.caption(text)


def card_note(info: CheckpointInfo) -> None:
    """On the card of a checkpoint that is or was being copied: under which name."""
    making = state.making()
    if making.source != info.path or making.target is None:
        return
    name = plain(making.target.name)
    if making.busy:
        text = t(f"Being saved as **{name}**; see above.", f"正在另存为 **{name}**，进度见上方。")
        st.caption(f":material/progress_activity: {text}")
    elif making.made:
        text = t(f"Saved as **{name}**; see above.", f"已另存为 **{name}**，见上方。")
        st.caption(f":material/check: {text}")
    elif making.error:
        text = t(f"Not saved as **{name}**; see above.", f"未能另存为 **{name}**，原因见上方。")
        st.caption(f":material/error: {text}")


def choose(path: str) -> None:
    """Select the new folder in the load panel."""
    state.session_set("models_choice", path)
    state.making().forget()
