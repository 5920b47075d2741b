"""Which model, device and kind of work the predictions are for, and the predictions themselves, computed once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import memory
from glm_core.errors import GLMError
from glm_core.settings import MINI
from pages.shared import panels, remote_engines, state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.memory import Level, Prediction, Shape

WORK = ("answer", "lora", "p-tuning-v2", "freeze", "full")
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80)
LEVEL_NAMES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8", "int4": "INT4",
               "int4-g32": "INT4 g32", "int4-g64": "INT4 g64", "int4-g128": "INT4 g128",
               "int8-dynamic": "INT8 dynamic"}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What is to be predicted: `model` is a built-in name or a folder; info is None for a built-in shape."""

    model: str
    of: Shape
    info: CheckpointInfo | None
    device: str
    work: str
    context: int
    batch: int

    @property
    def levels(self) -> tuple[str, ...]:
        found = memory.levels(self.of, self.device)
        if self.device == "cpu":
            found = tuple(one for one in found if one != "fp16")  # slow or missing there
        if self.work != "answer":
            found = tuple(one for one in found if one != "int8-dynamic")
        if self.work in ("full", "freeze"):
            found = tuple(one for one in found if not one.startswith("int"))
        return found


def level_name(level: str) -> str:
    """A level as it is called on screen."""
    return LEVEL_NAMES.get(level, level)


def rows_text(batch: int) -> str:
    """So many rows, in words."""
    return t("1 row" if batch == 1 else f"{batch} rows", f"{batch} 行")


def gib(count: float) -> str:
    """Bytes as 13.1 GiB, or 512 MiB below one."""
    return panels.format_bytes(count) if count < 1 << 30 else f"{count / 2**30:.2f} GiB"


def choose() -> Asked | None:
    """The card at the top; None while the model cannot be read."""
    with st.container(border=True, key="memory_model"):
        panels.section(t("Model and work", "模型与用途"), "deployed_code")
        infos = {str(one.path): one for one in _installed()}
        options = [*infos, *memory.BUILT_IN]
        titles = {name: title for name, (title, _, _) in memory.BUILT_IN.items()}
        default = str(MINI) if str(MINI) in options else options[0]
        if (asked := state.query("model")) in options and state.session("memory.asked") != asked:
            state.session_set("memory.asked", asked)
            state.remember_set("memory.model", asked)
            state.session_set("widget.memory.model", asked)
        with st.grid(2, min_column_width=260):
            model = str(
                st.selectbox(
                    t("Model", "模型"),
                    options,
                    format_func=lambda one: (
                        infos[one].name
                        if one in infos
                        else t(f"{titles[one]} (no weights needed)", f"{titles[one]}（无需权重）")
                    ),
                    help=t(
                        "Your checkpoints, and the published shapes, which are predicted without any file.",
                        "您的检查点，以及无需任何文件即可预测的公开模型结构。",
                    ),
                    **state.kept_widget("memory.model", default, options, "index"),
                )
            )
            work = str(
                st.selectbox(
                    t("What it does", "用途"),
                    WORK,
                    format_func=work_name,
                    **state.kept_widget("memory.work", "answer", WORK, "index"),
                )
            )
        remote_engines.note(
            (
                "Remote engines are not offered: what a model takes on a server only the server knows.",
                "此处不提供远程引擎：模型在服务器上占用多少只有服务器知道。",
            )
        )
        try:
            of = shape(model, _stamp(model))
        except GLMError as error:
            panels.problem(error)
            return None
        with st.grid(3, min_column_width=200):
            device = str(
                st.segmented_control(
                    t("Device", "设备"),
                    ["cpu", "cuda"],
                    format_func=lambda one: panels.device_name(one).strip(),
                    required=True,
                    **state.kept_widget("memory.device", "cpu", ["cpu", "cuda"], "default"),
                )
            )
            contexts = contexts_of(of)
            training = work != "answer"
            usual = 128 if training else min(2048, contexts[-1])
            context = int(
                st.select_slider(
                    t("Tokens of a row", "每行词元数"),
                    contexts,
                    format_func=lambda one: f"{one:,}",
                    help=t("Prompt and answer together.", "提示词与回答合计。"),
                    **state.kept_widget(
                        f"memory.context.{'train' if training else 'answer'}",
                        usual if usual in contexts else contexts[-1],
                        contexts,
                    ),
                )
            )
            batch = int(
                st.select_slider(
                    t("Rows at a time", "同时处理的行数"),
                    BATCHES,
                    **state.kept_widget("memory.batch", 1, BATCHES),
                )
            )
        st.caption(_facts(of))
    return Asked(model, of, infos.get(model), device, work, context, batch)


def work_name(work: str) -> str:
    """What a model does, as it is called on screen."""
    names = {
        "answer": t("Answering", "回答"),
        "lora": t("Fine-tuning: LoRA", "微调：LoRA"),
        "p-tuning-v2": t("Fine-tuning: P-tuning v2", "微调：P-tuning v2"),
        "freeze": t("Fine-tuning: last layers", "微调：最后几层"),
        "full": t("Fine-tuning: all weights", "微调：全部权重"),
    }
    return names[work]


def contexts_of(of: Shape) -> tuple[int, ...]:
    """The contexts to choose from, up to the model's own."""
    limit = of.context or CONTEXTS[-1]
    found = tuple(one for one in CONTEXTS if one <= limit)
    return found if found and found[-1] == limit else (*found, limit)


def _installed() -> list[CheckpointInfo]:
    """Whole checkpoints that can be loaded, the embedded one first."""
    roots = [*state.settings().model_roots]
    for folder in state.remember("models.folders", []):
        try:
            roots.append(state.settings().allowed_model(folder))
        except GLMError:
            continue  # the disk is not mounted today
    found = [one for one in state.checkpoints(tuple(roots)) if one.loadable and not one.needs_base]
    return sorted(found, key=lambda one: one.path != MINI)


def _stamp(model: str) -> int:
    config = Path(model) / "config.json"
    return config.stat().st_mtime_ns if config.is_file() else 0


@st.cache_data(max_entries=32, show_spinner="Reading the configuration …")
def shape(model: str, stamp: int) -> Shape:
    """The sizes of a model; the first call may wait for torch."""
    return memory.shape(model)


def _facts(of: Shape) -> str:
    heads = of.keys // max(1, of.queries // max(1, of.heads))
    parts = [
        t(f"{panels.format_count(of.parameters)} parameters", f"{panels.format_count(of.parameters)} 参数"),
        t(f"{of.layers} layers of {of.hidden:,}", f"{of.layers} 层 × {of.hidden:,}"),
        t(f"{heads} heads keep keys and values", f"{heads} 个键值头"),
        t(f"context {of.context:,}", f"上下文 {of.context:,}"),
        t(f"vocabulary {of.vocabulary:,}", f"词表 {of.vocabulary:,}"),
    ]
    if of.bits:
        parts.append(t(f"stored as {of.codes}", f"以 {of.codes} 存储"))
    return plain(of.family) + " · " + " · ".join(parts)


# --- numbers -------------------------------------------------------------------------------------------------


def _method(work: str) -> Any:
    from glm_core.finetune.methods import Method

    return None if work == "answer" else Method(work)  # type: ignore[arg-type]


@st.cache_data(max_entries=512, show_spinner=False)
def _predicted(
    of: Shape, level: str, context: int, batch: int, work: str, device: str, program: int | None
) -> Prediction:
    return memory.predict(of, level, context, batch, _method(work), device, program)


def predicted(asked: Asked, level: str, context: int = 0, batch: int = 0) -> Prediction:
    """The prediction of a level, at the context and batch chosen where no others are given."""
    program = measured_program(asked.device, level) if asked.device == "cpu" else None
    return _predicted(
        asked.of, level, context or asked.context, batch or asked.batch, asked.work, asked.device, program
    )


@st.cache_data(max_entries=64, show_spinner=False, ttl=5)
def measured_program(device: str, level: str) -> int | None:
    """What Python and its libraries take on this computer, where it was measured."""
    return memory.measured_program(state.job_store(), device, level)


@st.cache_data(max_entries=256, show_spinner=False)
def longest(of: Shape, level: str, room: int, batch: int, device: str) -> int:
    """Tokens that fit into so many bytes."""
    return memory.longest_context(of, level, room, batch, device)


def measured(asked: Asked) -> dict[str, Level]:
    """What was measured of a checkpoint on a kind of device, by level."""
    if asked.info is None:
        return {}
    return _measured(asked.model, _stamp(asked.model), asked.device)


@st.cache_data(max_entries=16, show_spinner=False, ttl=5)
def _measured(model: str, stamp: int, device: str) -> dict[str, Level]:
    from glm_core import checkpoints

    found = memory.measurements(state.job_store(), checkpoints.fingerprint(Path(model)), device)
    return {one.level: one for one in found}


def manifest(asked: Asked, rows: list[dict[str, Any]]) -> str:
    """The predictions as JSON, with what they are for."""
    what = {
        "model": asked.of.name, "family": asked.of.family, "parameters": asked.of.parameters,
        "device": asked.device, "work": asked.work, "measured": False,
    }  # fmt: skip
    return json.dumps(what | {"predictions": rows}, ensure_ascii=False, indent=1)
