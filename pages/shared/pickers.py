"""Inputs used on several screens: precision, device and prompt format of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from pages.shared import panels, state
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def precision() -> str:
    """The precision of the weights in memory."""
    return str(
        st.segmented_control(
            t("Precision in memory", "内存精度"),
            PRECISIONS,
            format_func=lambda one: t("auto", "自动") if one == "auto" else one.upper(),
            required=True,
            width="stretch",
            help=t(
                "FP32 gives the reference's numbers exactly; BF16 and FP16 take half the memory and round "
                "more. Auto: FP32 for small models, else BF16 (FP16 on GPUs without BF16).",
                "FP32 与参考实现的数值一致；BF16 和 FP16 内存减半，舍入误差更大。"
                "自动：小模型用 FP32，其余用 BF16（不支持 BF16 的显卡用 FP16）。",
            ),
            **state.kept_widget("models.precision", "auto"),
        )
    )


def device() -> str:
    """The device that computes; only those this computer has."""
    choices = devices()
    return str(
        st.selectbox(
            t("Device", "设备"),
            choices,
            format_func=lambda one: t("auto", "自动") if one == "auto" else panels.device_name(one),
            help=t("Auto takes a GPU where torch can use one.", "自动：优先使用可用的 GPU。"),
            **state.kept_widget("models.device", "auto", choices),
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


def generation(info: CheckpointInfo) -> str | None:
    """The prompt format a checkpoint was trained with; None leaves it to what its folder says."""
    labels = {"auto": t(f"as found ({info.family})", f"自动识别（{info.family}）")}
    labels |= {"chatglm2": "ChatGLM2 [Round 1] 问/答", "chatglm3": "ChatGLM3 <|user|> / <|assistant|>"}
    chosen = st.selectbox(
        t("Prompt format", "提示格式"),
        list(labels),
        format_func=lambda one: labels[one],
        key="models_generation",
        help=t(
            "The weights of ChatGLM2 and ChatGLM3 look the same; only their prompts differ. Set it where a "
            "renamed folder is taken for the wrong one.",
            "ChatGLM2 与 ChatGLM3 的权重结构相同，只有提示格式不同。文件夹改名后识别有误时请手动选择。",
        ),
    )
    return None if chosen == "auto" else str(chosen)


def expected_memory(info: CheckpointInfo, precision: str, device: str) -> tuple[str, int]:
    """(the precision "auto" stands for, bytes the weights will take)."""
    from glm_core import checkpoints

    if precision == "auto":
        if state.startup().imported.is_set():
            precision = checkpoints.best_precision(
                info, checkpoints.best_device() if device == "auto" else device
            )
        else:
            precision = "fp32" if info.parameters < 200_000_000 else "bf16"  # as on a computer without a GPU
    return precision, info.memory_bytes(precision)
