"""Inputs used on several screens: base, precision, device and prompt format of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from pages.shared import panels, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128",
              "int8-dynamic")  # fmt: skip
# What weights that are stored as INT8/INT4 can be computed in.
COMPUTED = ("auto", "fp32", "bf16", "fp16", "int8-dynamic")


def base(adapter: CheckpointInfo, found: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The checkpoint to put an adapter on, among those whose sizes fit; None where there is none."""
    fits, others = state.bases(adapter, found)
    by_path = {str(info.path): info for info in fits}
    named = plain(adapter.base)
    if fits:
        chosen_for = (str(adapter.path), *by_path)
        if (
            state.session("models_base_for") != chosen_for
        ):  # another adapter, or other folders: the best guess
            state.session_set("models_base_for", chosen_for)
            state.session_set("models_base", str(fits[0].path))
        chosen = st.selectbox(
            t("Base", "基座"),
            list(by_path),
            format_func=lambda path: (
                t(f"{by_path[path].name} (recorded)", f"{by_path[path].name}（适配器所记录）")
                if state.is_recorded(adapter, by_path[path])
                else by_path[path].name
            ),
            key="models_base",
            help=t(
                "The whole checkpoint the adapter was trained on. Only those are offered whose sizes fit it.",
                "训练适配器时所用的完整检查点。只列出尺寸相符的检查点。",
            ),
        )
        if named and not any(state.is_recorded(adapter, info) for info in fits):
            st.caption(
                ":material/help: "
                + t(
                    f"Trained on {named}, which is not here; the sizes of this one fit.",
                    f"训练时所用的基座是 {named}，本机没有；所选的这个尺寸相符。",
                )
            )
    else:
        st.warning(
            t(
                f"No checkpoint here fits this adapter{f', trained on {named}' if named else ''}. "
                "Add the folder of its base under “A folder elsewhere”.",
                f"没有与此适配器相符的检查点{f'（训练时所用的基座：{named}）' if named else ''}。"
                "请在“其他文件夹”中添加其基座所在的文件夹。",
            ),
            icon=":material/link_off:",
        )
    if others:
        with st.expander(t(f"Do not fit: {len(others)}", f"不相符：{len(others)} 个")):
            for info, error in others:
                st.caption(f"**{plain(info.name)}**: {plain(said(error.message))}")
    return by_path[str(chosen)] if fits else None


def precision(info: CheckpointInfo) -> str:
    """The precision of the weights in memory, or of the arithmetic where they are stored as INT8/INT4."""
    stored = info.codes
    choices = COMPUTED if stored else PRECISIONS
    if info.group:  # 8-bit activations go with a scale per row
        choices = tuple(one for one in choices if one != "int8-dynamic")
    details = {
        "auto": t("auto", "自动"),
        "fp32": t("FP32 · the reference's numbers", "FP32 · 与参考实现一致"),
        "bf16": t("BF16 · half the memory", "BF16 · 内存减半"),
        "fp16": t("FP16 · half the memory", "FP16 · 内存减半"),
        "int8": t("INT8 · a quarter", "INT8 · 四分之一"),
        "int4": t("INT4 · an eighth", "INT4 · 八分之一"),
        "int4-g32": t("INT4, groups of 32 · closest to the original", "INT4 分组 32 · 最接近原权重"),
        "int4-g64": t("INT4, groups of 64", "INT4 分组 64"),
        "int4-g128": t("INT4, groups of 128", "INT4 分组 128"),
        "int8-dynamic": t("INT8, dynamic · fastest on a processor", "INT8 动态 · 处理器上最快"),
    }
    chosen = st.selectbox(
        t("Computed in", "计算精度") if stored else t("Precision in memory", "内存精度"),
        choices,
        format_func=lambda one: (
            one.upper() if stored and one not in ("auto", "int8-dynamic") else details[one]
        ),
        help=t(
            "FP32 gives the reference's numbers exactly; BF16 and FP16 round more. INT8 and INT4 are for the "
            "linear layers, the rest is BF16; answers change a little. INT4 in groups has a scale for every 32, 64 or 128 "
            "columns of a row instead of one: nearer to the original weights, for 6 to 25 % more memory. INT8 dynamic rounds what goes into the layers to 8 "
            "bits as well: for large models without a GPU, and coarser still. "
            "Auto: FP32 for small models, else BF16 (FP16 on GPUs without BF16).",
            "FP32 与参考实现的数值一致；BF16 和 FP16 舍入误差更大。"
            "INT8 和 INT4 只用于线性层，其余为 BF16，回答会略有不同。INT4 分组为每行的每 32、64 或 128 列各设一个缩放值，而非整行一个：更接近原权重，内存多 6% 至 25%。INT8 动态还把层的输入舍入到 8 位：适合无显卡的大模型，误差更大。"
            "自动：小模型用 FP32，其余用 BF16（不支持 BF16 的显卡用 FP16）。",
        ),
        **state.kept_widget("models.precision", "auto", choices, "index"),
    )
    if stored:
        st.caption(
            ":material/lock: "
            + t(
                f"The weights are stored as {stored} and stay so; this is what is computed with.",
                f"权重以 {stored} 存储并保持不变；这里选择的是计算时所用的精度。",
            )
        )
    return str(chosen)


def device() -> str:
    """The device that computes; only those this computer has."""
    choices = devices()
    return str(
        st.selectbox(
            t("Device", "设备"),
            choices,
            format_func=lambda one: t("auto", "自动") if one == "auto" else panels.device_name(one),
            help=t("Auto takes a GPU where torch can use one.", "自动：优先使用可用的 GPU。"),
            **state.kept_widget("models.device", "auto", choices, "index"),
        )
    )


def devices() -> list[str]:
    """ "auto", "cpu" and the GPUs; before torch is imported only the first two."""
    found = ["auto", "cpu"]
    if state.startup().imported.is_set():
        import torch

        found += [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            found.append("mps")
    return found


FORMATS = {
    "chatglm": ("ChatGLM [Round 0] 问/答", "ChatGLM [Round 0] 问/答"),
    "chatglm2": ("ChatGLM2 [Round 1] 问/答", "ChatGLM2 [Round 1] 问/答"),
    "chatglm3": ("ChatGLM3 <|user|> / <|assistant|>", "ChatGLM3 <|user|> / <|assistant|>"),
    "glm4": ("GLM-4 <|user|> / <|assistant|>", "GLM-4 <|user|> / <|assistant|>"),
    "template": ("the folder's chat template", "文件夹自带的对话模板"),
    "alpaca": ("Alpaca ### Instruction / ### Response", "Alpaca ### Instruction / ### Response"),
    "vicuna": ("Vicuna USER / ASSISTANT", "Vicuna USER / ASSISTANT"),
}


def generation(info: CheckpointInfo) -> str | None:
    """The prompt format a checkpoint was trained with; None leaves it to what its folder says.

    Offers the formats its weights fit; where that is one, there is nothing to choose and nothing is drawn.
    """
    from glm_core.checkpoints.loading import ALIKE

    alike = next((group for group in ALIKE if info.generation in group), set())
    choices = ["auto", *(one for one in FORMATS if one in alike)]
    if len(choices) < 2:
        return None
    if state.session("models_generation") not in choices:
        state.session_set("models_generation", "auto")
    found = info.family if info.generation in ("chatglm2", "chatglm3") else t(*FORMATS[info.generation])
    chosen = st.selectbox(
        t("Prompt format", "提示格式"),
        choices,
        format_func=lambda one: (
            t(f"as found ({found})", f"自动识别（{found}）") if one == "auto" else t(*FORMATS[one])
        ),
        key="models_generation",
        help=(
            t(
                "The weights of ChatGLM2 and ChatGLM3 look the same; only their prompts differ. Set it where a "
                "renamed folder is taken for the wrong one.",
                "ChatGLM2 与 ChatGLM3 的权重结构相同，只有提示格式不同。文件夹改名后识别有误时请手动选择。",
            )
            if info.generation in ("chatglm2", "chatglm3")
            else t(
                "Models trained on Alpaca or Vicuna data often have no chat template, or a wrong one.",
                "用 Alpaca 或 Vicuna 数据训练的模型往往没有对话模板，或模板有误。",
            )
        ),
    )
    return None if chosen == "auto" else str(chosen)


def expected_memory(
    info: CheckpointInfo, precision: str, device: str, adapter: CheckpointInfo | None = None
) -> tuple[str, int]:
    """(the precision "auto" stands for, bytes the weights will take, an adapter's fp32 tensors included)."""
    from glm_core import checkpoints

    if precision == "auto":
        if state.startup().imported.is_set():
            precision = checkpoints.best_precision(
                info, checkpoints.best_device() if device == "auto" else device
            )
        else:
            precision = "fp32" if info.parameters < 200_000_000 else "bf16"  # as on a computer without a GPU
    carried = (adapter or info).adapter
    return precision, info.memory_bytes(precision) + (4 * carried.parameters if carried else 0)
