"""What is trained and how: base checkpoint, method, limits and pace, each with a default and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core.errors import GLMError
from glm_core.settings import MINI
from pages.shared import finetune_adapt, finetune_plan, page, panels, remote_engines, state
from pages.shared import finetune_form as form
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.finetune.adapt import Adapt
    from glm_core.finetune.loop import Plan
    from glm_core.finetune.methods import Kind, Method
    from pages.shared.finetune_prepare import Prepared

HIGHEST: dict[str, float] = {
    "lora": 2e-3,
    "p-tuning-v2": 1e-2,
    "freeze": 5e-4,
    "full": 5e-4,
}  # without a warning
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "int4", "int4-g32", "int4-g64", "int4-g128")


@dataclass(frozen=True)
class Asked:
    """All that the second step asks for."""

    base: CheckpointInfo
    plan: Plan
    max_source: int
    max_target: int
    general_share: float
    adapt: Adapt | None
    device: str
    output: Path


def names() -> dict[str, str]:
    """The methods as they are called on screen."""
    return {
        "lora": "LoRA",
        "p-tuning-v2": "P-tuning v2",
        "freeze": t("Last layers", "末几层（Freeze）"),
        "full": t("All weights", "全参数"),
    }


def name_of(kind: str) -> str:
    """A method as it is called on screen."""
    return names().get(kind, plain(kind))


# --- the base, known before the step is drawn: lengths are counted with its tokenizer -------------------------


def bases() -> list[CheckpointInfo]:
    """The checkpoints that can be fine-tuned: whole ones without an adapter, the embedded one first."""
    roots = [*state.settings().model_roots]
    for folder in state.remember("models.folders", []):
        try:
            roots.append(state.settings().allowed_model(folder))
        except GLMError:
            continue
    found = [one for one in state.checkpoints(tuple(roots)) if one.loadable and one.adapter is None]
    return sorted(found, key=lambda one: one.path != MINI)


def base() -> CheckpointInfo | None:
    """The base chosen last, else the model in memory, else the first; None where there is none."""
    by_path = {str(one.path): one for one in bases()}
    engine = state.current_engine()
    wanted = [form.value("base", "")]
    if engine is not None:
        wanted += [str((engine.loaded.base or engine.loaded.info).path)]
    return next((by_path[one] for one in wanted if one in by_path), next(iter(by_path.values()), None))


# --- the step -----------------------------------------------------------------------------------------------


def choose(found: Prepared, data_name: str) -> Asked | None:
    """The second step; None where there is no checkpoint to begin with."""
    from glm_core.finetune.loop import default_rate

    with st.container(border=True, key="finetune_method"):
        panels.section(t("2 · Method", "2 · 方法"), "tune")
        left, right = st.columns(2, gap="large")
        with left:
            on = _base()
            remote_engines.note(
                (
                    "Remote engines are not offered: their weights cannot be trained from here.",
                    "此处不提供远程引擎：无法从本机训练其权重。",
                )
            )
        if on is None:
            return None
        kind = _cards(on.parameters)
        usual = default_rate(kind, on.parameters)
        with right:
            precision = _precision(on, kind)
        left, right = st.columns(2, gap="large")
        with left:
            st.markdown(f"**{name_of(kind)}**")
            with st.grid(2, min_column_width=130):
                method = _method(kind, on)
                rate = _rate(kind, usual)
            _warn_of_rate(kind, rate, usual)
        with right:
            st.markdown(f"**{t('How long, how much at a time', '训练多久、每次多少')}**")
            batch, accumulation, steps = finetune_plan.pace(found)
            source, target = finetune_plan.limits(found)
        with st.expander(t("Advanced", "高级设置"), icon=":material/settings:"):
            more = finetune_plan.advanced(steps, on.path == MINI)
        adapt = finetune_adapt.choose()
        output = finetune_plan.output(data_name, kind)
    from glm_core.finetune.loop import Plan

    general = more.pop("general") / 100
    device = more.pop("device")
    plan = Plan(
        method=method, precision=precision, learning_rate=rate, batch_size=batch, accumulation=accumulation,
        max_steps=steps, **more,
    )  # fmt: skip
    return Asked(on, plan, source, target, general, adapt, device, output)


def _base() -> CheckpointInfo | None:
    found = {str(one.path): one for one in bases()}
    chosen = base()
    if chosen is None:
        st.warning(
            t(
                "There is no checkpoint to begin with. Add the folder of one on the Models page.",
                "没有可作为起点的检查点。请在“模型”页添加其文件夹。",
            ),
            icon=":material/deployed_code:",
        )
        page.link("models")
        return None

    def shown(path: str) -> str:
        one = found[path]
        return f"{one.name} · {one.family} · {panels.format_count(one.parameters)}"

    form.put("base", str(chosen.path))  # it stays when another model is loaded meanwhile
    path = st.selectbox(
        t("Base checkpoint", "基座检查点"),
        list(found),
        format_func=shown,
        help=t(
            "What the training begins with. It is not changed: the result goes into a folder of its own. Only "
            "whole checkpoints are listed.",
            "训练的起点。它不会被修改，结果写入单独的文件夹。只列出完整的检查点。",
        ),
        **form.held("base", str(chosen.path), list(found), "index"),
    )
    return found[str(path)]


def _cards(parameters: int) -> Kind:
    """The four methods side by side, with when to take which."""
    from glm_core.finetune.loop import default_rate
    from glm_core.finetune.methods import KINDS

    texts = {
        "lora": t(
            "Take this one. Small matrices beside the attention are trained; less is forgotten than "
            "with the others, and the file is small.",
            "推荐。只训练注意力旁的小矩阵；遗忘比其他方法少，文件小。",
        ),
        "p-tuning-v2": t(
            "To repeat published ChatGLM recipes. A trained prefix before every layer; forgets more easily.",
            "复现 ChatGLM 已发布的配方时选用。每层前加一段可训练的前缀；更容易遗忘。",
        ),
        "freeze": t(
            "When LoRA does not learn the task, and there are thousands of rows. Changes the last layers themselves.",
            "LoRA 学不会、且有数千行数据时选用。直接修改最后几层。",
        ),
        "full": t(
            "For small models only. Everything is trained: most memory, and most is forgotten.",
            "仅适合小模型。训练全部权重：占内存最多，遗忘也最多。",
        ),
    }
    defaults = {
        "lora": t("rank 8, alpha 32, dropout 0.1, ", "秩 8，alpha 32，dropout 0.1，"),
        "p-tuning-v2": t("prefix 128, ", "前缀 128，"),
        "freeze": t("3 layers, ", "3 层，"),
        "full": "",
    }
    rates = {kind: f"{default_rate(kind, parameters):g}" for kind in KINDS}
    defaults = {
        kind: text + t(f"rate {rates[kind]}", f"学习率 {rates[kind]}") for kind, text in defaults.items()
    }
    chosen = state.remember("finetune.method", "lora")
    chosen = chosen if chosen in texts else "lora"
    with st.grid(4, min_column_width=200):
        for kind, text in texts.items():
            on = kind == chosen
            with st.container(border=True, height="stretch", gap="xsmall", key=f"method_card_{kind}"):
                with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                    st.markdown(f"**{name_of(kind)}**", width="content")
                    if kind == "lora":
                        st.badge(t("recommended", "推荐"), icon=":material/thumb_up:", color="green")
                st.caption(text)
                st.caption(f":material/settings: {defaults[kind]}")
                st.space("stretch")
                st.button(
                    t("Chosen", "已选择") if on else t("Choose", "选择"),
                    key=f"method_{kind}",
                    icon=":material/radio_button_checked:" if on else ":material/radio_button_unchecked:",
                    type="primary" if on else "secondary",
                    width="stretch",
                    on_click=state.remember_set,
                    args=("finetune.method", kind),
                )
    return chosen  # type: ignore[return-value]


def _precision(on: CheckpointInfo, kind: str) -> str:
    """What the weights that stay as they are take in memory."""
    stored = on.codes.lower()
    choices = [stored] if stored else list(PRECISIONS if kind in ("lora", "p-tuning-v2") else PRECISIONS[:4])
    words = {
        "auto": t("automatic", "自动"),
        "fp32": t("FP32 · exact, most memory", "FP32 · 精确，内存最多"),
        "bf16": t("BF16 · half the memory", "BF16 · 内存减半"),
        "fp16": t("FP16 · half the memory, for GPUs", "FP16 · 内存减半，适合 GPU"),
        "int8": t("INT8 · a quarter", "INT8 · 四分之一"),
        "int4": t("INT4 · an eighth", "INT4 · 八分之一"),
        "int4-g32": t("INT4, groups of 32 · closest to the original", "INT4 分组 32 · 最接近原权重"),
        "int4-g64": t("INT4, groups of 64", "INT4 分组 64"),
        "int4-g128": t("INT4, groups of 128", "INT4 分组 128"),
    }
    if stored:
        st.caption(
            ":material/lock: "
            + t(
                f"The weights are stored as {stored.upper()} and stay so; what is trained beside them is FP32.",
                f"权重以 {stored.upper()} 存储并保持不变；旁边训练的部分为 FP32。",
            )
        )
        return "auto"
    return str(
        st.selectbox(
            t("Precision", "精度"),
            choices,
            format_func=words.__getitem__,
            help=t(
                "What the base is computed in. What is trained is always FP32, whatever is chosen here. Automatic: "
                "FP32 for small models, else BF16. INT8 and INT4 save memory and cost a little quality; they go "
                "with LoRA and P-tuning v2.",
                "基座的计算精度。无论选什么，训练的部分始终为 FP32。自动：小模型用 FP32，其余用 BF16。"
                "INT8 和 INT4 节省内存，质量略降，只能与 LoRA 和 P-tuning v2 一起使用。",
            ),
            **form.kept("precision", "auto", choices, "index", on.path.name),
        )
    )


def _method(kind: Kind, on: CheckpointInfo) -> Method:
    from glm_core.finetune.methods import Method

    made: dict[str, Any] = {"kind": kind}
    if kind == "lora":
        made["lora_rank"] = st.number_input(
            t("Rank", "秩"),
            min_value=1,
            max_value=256,
            help=t(
                "How much can change: 8 is enough for classes and styles; 16 to 64 for new abilities with many rows.",
                "能改变多少：分类和文风用 8 足够；数据多、要学新能力时用 16 到 64。",
            ),
            **form.kept("lora_rank", 8),
        )
        made["lora_alpha"] = st.number_input(
            t("Alpha", "Alpha"),
            min_value=1.0,
            max_value=1024.0,
            format="%g",
            help=t(
                "Strength of the change: alpha / rank multiplies it. Keep it at four times the rank.",
                "改变的强度：按 alpha / 秩 放大。保持为秩的四倍即可。",
            ),
            **form.kept("lora_alpha", 32.0),
        )
        made["lora_dropout"] = st.number_input(
            t("Dropout", "Dropout"),
            min_value=0.0,
            max_value=0.9,
            step=0.05,
            help=t(
                "Share left out at random in every step, against learning single rows by heart. 0 for very few steps.",
                "每步随机丢弃的比例，防止死记个别行。步数很少时可设为 0。",
            ),
            **form.kept("lora_dropout", 0.1),
        )
    elif kind == "p-tuning-v2":
        most = max(1, (on.context or 2048) // 2)
        made["prefix_length"] = st.number_input(
            t("Prefix length", "前缀长度"),
            min_value=1,
            max_value=most,
            help=t(
                "Trained columns before every layer. 128 as in the published scripts; 32 to 64 are enough for classes.",
                "每层前可训练的列数。官方脚本用 128；分类任务 32 到 64 足够。",
            ),
            **form.kept("prefix_length", min(128, most), range(1, most + 1), scope=most),
        )
        made["prefix_projection"] = st.toggle(
            t("Projection", "投影"),
            help=t(
                "Computes the prefix with a small network while training. Many more numbers; rarely better.",
                "训练时由一个小网络计算前缀。参数多很多，效果很少更好。",
            ),
            **form.kept("prefix_projection", False),
        )
    elif kind == "freeze":
        layers = max(1, on.layers or 1)
        default = min(3, layers)
        made["freeze_layers"] = st.number_input(
            t("Last layers to train", "训练最后几层"),
            min_value=1,
            max_value=layers,
            help=t(f"Of {layers} layers. More learn more and forget more.", f"共 {layers} 层。越多学得越多，忘得也越多。"),
            **form.held(f"freeze_layers:{layers}", default),
        )  # fmt: skip
        words = {"mlp": t("their MLPs", "仅 MLP"), "layer": t("all of them", "整层")}
        made["freeze_what"] = st.segmented_control(
            t("What of them", "训练其中"),
            list(words),
            format_func=words.__getitem__,
            required=True,
            help=t("The MLPs hold most of what a layer knows.", "一层的知识大部分在 MLP 中。"),
            **form.kept("freeze_what", "mlp", list(words), "default"),
        )
    return Method(**made)


def _rate(kind: Kind, usual: float) -> float:
    rate = st.number_input(
        t("Learning rate", "学习率"),
        min_value=1e-7,
        max_value=0.5,
        step=usual / 10,
        format="%g",
        help=t(
            f"How far each step goes. {usual:g} suits this method. Too high: the loss jumps or becomes 0 and "
            "the model answers nonsense. Too low: the loss hardly falls.",
            f"每步走多远。此方法适合 {usual:g}。太高：损失跳动或变为 0，模型胡言乱语；太低：损失几乎不降。",
        ),
        **form.kept(f"{kind}.learning_rate", usual, scope=usual),
    )
    return float(rate)


def _warn_of_rate(kind: Kind, rate: float, usual: float) -> None:
    if kind == "p-tuning-v2" and rate > HIGHEST[kind]:
        st.warning(
            t(
                f"{rate:g} is what the published scripts use, and what makes a model forget all else: it then answers "
                f"everything like the training rows. {usual:g} or less learns the task as well.",
                f"官方脚本使用 {rate:g} 左右的学习率，这会让模型忘掉其他一切：之后对任何问题都像训练数据那样回答。"
                f"{usual:g} 或更低同样能学会任务。",
            ),
            icon=":material/warning:",
        )
    elif rate > HIGHEST[kind]:
        st.warning(
            t(
                f"A rate over {HIGHEST[kind]:g} often makes the loss jump with this method; {usual:g} is safe.",
                f"此方法的学习率超过 {HIGHEST[kind]:g} 时损失常会跳动；{usual:g} 较为稳妥。",
            ),
            icon=":material/warning:",
        )
