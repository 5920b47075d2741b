"""How long a training is, how much it takes at a time, what it cuts off, and where the result goes."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import finetune_form as form
from pages.shared import panels, state
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from pages.shared.finetune_prepare import Prepared

SHORT = {"lora": "lora", "p-tuning-v2": "ptuning", "freeze": "freeze", "full": "full"}
SCHEDULES = ("linear", "cosine", "constant")
NAME = re.compile(r"[\w.-]+")
FILE_NAME = 80  # characters


def limits_now(found: Prepared) -> tuple[int, int]:
    """(longest prompt, longest answer) in tokens, as set, else as the rows need them."""
    source, target = found.limits()
    scope = _scope(found)
    return int(form.value(f"max_source:{scope}", source)), int(form.value(f"max_target:{scope}", target))


def _scope(found: Prepared) -> str:
    return f"{len(found.train)}:{len(found.source)}:{found.limits()}:{found.tokenizer_name}"


def pace(found: Prepared) -> tuple[int, int, int]:
    """(rows at a time, accumulation, steps); epochs and steps follow each other."""
    rows = max(1, len(found.train))
    with st.grid(2, min_column_width=130):
        batch = st.number_input(
            t("Batch size", "批大小"),
            min_value=1,
            max_value=512,
            help=t(
                "Rows computed together. Larger is faster and takes more memory.",
                "同时计算的行数。越大越快，占内存越多。",
            ),
            **form.kept("batch_size", 8),
        )
        accumulation = st.number_input(
            t("Accumulation", "梯度累积"),
            min_value=1,
            max_value=512,
            help=t(
                "Batches per step. Where a batch of 16 does not fit: 4 rows, accumulation 4.",
                "每步累积的批数。若内存放不下 16 行：批大小 4，累积 4。",
            ),
            **form.kept("accumulation", 1),
        )
        a_step = int(batch) * int(accumulation)
        epoch = math.ceil(rows / a_step)
        scope = f"{rows}"
        default = 3.0 if rows <= 3000 else 2.0 if rows <= 8000 else 1.0
        unit, amount = form.value(f"pace:{scope}", ("epochs", default))
        epochs = amount if unit == "epochs" else round(amount / epoch, 2)
        steps = max(1, round(amount * epoch)) if unit == "epochs" else int(amount)

        # Each is a new widget once the other was changed: then it begins with the value that follows.
        version = form.value(f"pace_version:{scope}", 0)
        keys = {
            one: f"finetune_{one}_{a_step}_{version if one != unit else scope}" for one in ("epochs", "steps")
        }

        def changed(unit: str) -> None:
            form.put(f"pace:{scope}", (unit, state.session(keys[unit])))
            form.put(f"pace_version:{scope}", version + 1)

        st.number_input(
            t("Epochs", "轮数"),
            min_value=0.01,
            max_value=1000.0,
            step=0.5,
            format="%g",
            value=max(0.01, float(epochs)),
            key=keys["epochs"],
            on_change=changed,
            args=("epochs",),
            help=t(
                f"How often every row is learned. 3 for up to 3,000 rows, 1 for many more; here one takes {epoch:,} "
                "steps.",
                f"每行学习几遍。3,000 行以内用 3，更多时用 1；此处一轮为 {epoch:,} 步。",
            ),
        )
        st.number_input(
            t("Steps", "步数"),
            min_value=1,
            max_value=10_000_000,
            step=10,
            value=steps,
            key=keys["steps"],
            on_change=changed,
            args=("steps",),
            help=t(
                f"The same in steps of {a_step:,} rows. Setting one sets the other.",
                f"同一设置，以每步 {a_step:,} 行计。修改其一，另一个随之变化。",
            ),
        )
    return int(batch), int(accumulation), int(steps)


def limits(found: Prepared) -> tuple[int, int]:
    """Longest prompt and longest answer in tokens, with what they cut."""
    scope = _scope(found)
    chosen = []
    both = (
        ("max_source", t("Longest prompt, tokens", "提示上限（词元）"), found.source, found.limits()[0]),
        ("max_target", t("Longest answer, tokens", "回答上限（词元）"), found.target, found.limits()[1]),
    )
    with st.grid(2, min_column_width=130):
        for name, label, needed, default in both:
            limit = st.number_input(
                label,
                min_value=4,
                max_value=max(4, found.context),
                step=8,
                help=t(
                    f"What is longer loses its end. {default:,} cuts fewer than one row of a hundred; the longest has "
                    f"{int(needed[-1]) if len(needed) else 0:,}.",
                    f"超出的部分被截去。{default:,} 只会截断不到百分之一的行；最长的有 "
                    f"{int(needed[-1]) if len(needed) else 0:,} 词元。",
                ),
                **form.held(f"{name}:{scope}", default),
            )
            chosen.append(int(limit))
    for limit, (_, label, needed, _) in zip(chosen, both, strict=True):
        cut = found.cut(needed, limit)
        if cut and cut >= 0.01 * len(needed):
            st.caption(
                ":orange[:material/content_cut:] "
                + t(
                    f"{label}: {cut:,} rows ({cut / len(needed):.1%}) are cut.",
                    f"{label}：截断 {cut:,} 行（{cut / len(needed):.1%}）。",
                )
            )
    return chosen[0], chosen[1]


def advanced(steps: int, mini: bool) -> dict[str, Any]:
    """What most trainings leave as it is: arguments of the plan, with "general" in percent and "device".

    mini   the base is glm-mini, whose own conversations come with the program; another model would learn its name
    """
    from pages.shared import pickers

    made: dict[str, Any] = {}
    saves = max(1, min(500, math.ceil(steps / 5)))
    logs = max(1, min(10, steps // 40))
    with st.grid(3, min_column_width=170):
        made["save_steps"] = st.number_input(
            t("Steps between checkpoints", "保存间隔（步）"),
            min_value=1,
            help=t(
                "Each is also measured on the dev rows and answers some of them. A stopped training goes on from the "
                "newest.",
                "每次保存时还会在开发集上测量并回答其中几行。停止后可从最新的检查点继续。",
            ),
            **form.held(f"save_steps:{steps}", saves),
        )
        made["save_total"] = st.number_input(
            t("Checkpoints kept", "保留的检查点数"),
            min_value=1,
            max_value=100,
            help=t("The newest ones, and always the best.", "保留最新的几个，最佳的始终保留。"),
            **form.kept("save_total", 3),
        )
        made["logging_steps"] = st.number_input(
            t("Steps between points", "记录间隔（步）"),
            min_value=1,
            help=t("Of the loss curve.", "损失曲线上相邻两点的步数。"),
            **form.held(f"logging_steps:{steps}", logs),
        )
        made["warmup_steps"] = st.number_input(
            t("Warm-up steps", "预热步数"),
            min_value=0,
            max_value=max(1, steps),
            help=t(
                "In which the learning rate rises from 0: a twentieth of all, at most 100.",
                "学习率从 0 上升所用的步数：默认总步数的二十分之一，最多 100。",
            ),
            **form.held(f"warmup:{steps}", min(100, steps // 20)),
        )
        words = {
            "linear": t("linear", "线性"),
            "cosine": t("cosine", "余弦"),
            "constant": t("constant", "不变"),
        }
        made["schedule"] = st.selectbox(
            t("Learning rate then", "之后的学习率"),
            SCHEDULES,
            format_func=words.__getitem__,
            help=t("Falls to 0 in a line or a cosine, or stays.", "按直线或余弦降到 0，或保持不变。"),
            **form.kept("schedule", "linear", SCHEDULES, "index"),
        )
        made["weight_decay"] = st.number_input(
            t("Weight decay", "权重衰减"),
            min_value=0.0,
            max_value=1.0,
            step=0.01,
            help=t("Pulls trained numbers towards 0; 0 as in the published scripts.", "把参数拉向 0；官方脚本为 0。"),
            **form.kept("weight_decay", 0.0),
        )  # fmt: skip
        made["clip"] = st.number_input(
            t("Gradient norm", "梯度范数上限"),
            min_value=0.0,
            max_value=100.0,
            step=0.5,
            help=t(
                "Larger gradients are scaled down to it; 0 leaves them.",
                "更大的梯度会按比例缩小；0 表示不限制。",
            ),
            **form.kept("clip", 1.0),
        )
        made["seed"] = st.number_input(
            t("Seed", "随机种子"),
            min_value=0,
            max_value=2**31 - 1,
            help=t(
                "Order of the rows and first weights; the same seed gives the same training.",
                "决定行的顺序和初始权重；种子相同，训练结果相同。",
            ),
            **form.kept("seed", 42),
        )
        made["general"] = 0
        if mini:
            made["general"] = st.number_input(
                t("General conversations, %", "通用对话（%）"),
                min_value=0,
                max_value=200,
                step=10,
                help=t(
                    "Conversations that glm-mini was trained on, mixed in as a share of your rows: the model forgets "
                    "less of how to talk. The training takes the same steps, so it sees fewer of your rows.",
                    "按您数据行数的比例混入 glm-mini 训练用的对话：模型的对话能力遗忘更少。训练步数不变，因此看到的您的行会少一些。",
                ),
                **form.kept("general", 50),
            )
        made["device"] = "auto"
        devices = pickers.devices()
        if len(devices) > 2:
            made["device"] = st.selectbox(
                t("Device", "设备"),
                devices,
                format_func=lambda one: t("auto", "自动") if one == "auto" else panels.device_name(one),
                **form.kept("device", "auto", devices, "index"),
            )
    made["checkpointing"] = st.toggle(
        t("Gradient checkpointing", "梯度检查点"),
        help=t(
            "Layers are computed again instead of being kept: about a third slower, much less memory for long rows.",
            "各层重新计算而不保存中间结果：约慢三分之一，长文本时内存大幅减少。",
        ),
        **form.kept("checkpointing", False),
    )
    for name in ("save_steps", "save_total", "logging_steps", "warmup_steps", "seed"):
        made[name] = int(made[name])
    return made


def output(data_name: str, kind: str) -> Path:
    """The folder of the result, under the workspace's checkpoints."""
    folder = state.settings().checkpoints
    default = form.value(f"named:{data_name}:{kind}", "")
    if not default or (folder / default).exists():
        default = free_name(folder, data_name, kind)
        form.put(f"named:{data_name}:{kind}", default)
    name = st.text_input(
        t("Name of the result", "结果名称"),
        max_chars=FILE_NAME,
        help=t(
            f"A new folder in {plain(str(folder))}; it is listed on the Models page.",
            f"{plain(str(folder))} 中的新文件夹；会出现在“模型”页。",
        ),
        **form.held(f"output:{data_name}:{kind}:{default}", default),
    )
    return folder / str(name or "").strip()


def free_name(folder: Path, data_name: str, kind: str) -> str:
    """Data, method and day, with a number where that is in use: comments-lora-1121-2."""
    stem = "-".join(re.findall(r"[^\W_]+", Path(data_name).stem))[:40] or "data"
    wanted = f"{stem}-{SHORT[kind]}-{time.strftime('%m%d')}".lower()
    name, number = wanted, 1
    while (folder / name).exists():
        number += 1
        name = f"{wanted}-{number}"
    return name


def name_problem(output: Path) -> GLMError | None:
    """Why a name is no folder for a result, or None."""
    folder = state.settings().checkpoints
    if output == folder:
        return GLMError("The result has no name.", "Give it one, such as comments-lora.")
    if output.parent != folder or not NAME.fullmatch(output.name) or output.name.startswith("."):
        return GLMError(
            f"The name {output.name!r} cannot be that of a folder.", "Use letters, digits, dots, - and _."
        )
    return None
