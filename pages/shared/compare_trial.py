"""Prompts answered by several checkpoints: the form for a new trial, and those of before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import votes
from glm_core.errors import GLMError
from glm_core.remote import is_remote
from glm_core.settings import MINI
from glm_core.votes import Side, Trial, Trials
from pages.shared import access, compare_answers, panels, remote_engines, state
from pages.shared.pickers import PRECISIONS
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.checkpoints import CheckpointInfo
    from glm_core.engine import GenerationSettings

LISTED = 8
LONGEST_ANSWER = 128  # tokens, where nothing else is chosen
SAMPLES = (
    "What is the capital of France?",
    "红楼梦的作者是谁？",
    "Write one sentence about rain.",
    "语言模型的温度是什么？",
)


def section() -> None:
    """The trial of the address, else the form for a new one."""
    trials = Trials(state.job_store())
    if state.query("trial"):
        compare_answers.show(trials, state.query("trial"))
    else:
        new(trials)
        earlier(trials)


def new(trials: Trials) -> None:
    """Which checkpoints, which prompts, how."""
    found = _checkpoints()
    with st.container(border=True, key="compare_sides"):
        panels.section(t("Checkpoints", "检查点"), "deployed_code")
        chosen = _sides(found)
        st.caption(
            t(
                "One model is in memory at a time: they answer one after the other, and take the place of the model "
                "that is loaded now. A base and an adapter on it share one load.",
                "内存中同时只有一个模型：各检查点依次回答，并取代当前加载的模型。基座与其适配器共用一次加载。",
            )
        )
    with st.container(border=True, key="compare_prompts"):
        panels.section(t("Prompts", "提示词"), "edit_note")
        prompts = _prompts()
        settings, system = _decoding()
        blind = st.toggle(
            t("Blind vote", "盲投"),
            help=t(
                "Names are hidden and the order is shuffled for every prompt until you have voted on it.",
                "投票前隐藏名称，且每个提示词的显示顺序随机。",
            ),
            **state.kept_widget("compare.blind", True),
        )
        count, sides = len(prompts), len(chosen)
        label = (
            t(f"Ask {sides} checkpoints {count} prompts", f"向 {sides} 个检查点提 {count} 个问题")
            if count != 1
            else t(f"Ask {sides} checkpoints", f"向 {sides} 个检查点提问")
        )
        if st.button(
            label,
            type="primary",
            icon=":material/send:",
            key="compare_ask",
            disabled=not prompts or sides < 2 or not state.may("load"),
        ):
            _start(trials, chosen, prompts, settings, system, bool(blind))
        access.not_allowed("load")
    if error := state.session("compare.problem"):
        panels.problem(error)


def _start(
    trials: Trials,
    chosen: list[dict[str, Any]],
    prompts: tuple[str, ...],
    settings: GenerationSettings,
    system: str,
    blind: bool,
) -> None:
    state.session_set("compare.problem", None)
    try:
        sides: list[Side] = [votes.side(**one) for one in chosen]
        trial = trials.create(sides, prompts, settings, system, blind, seed=int(time.time()) % 100_000)
        votes.begin(trials, trial.id)
    except GLMError as error:
        state.session_set("compare.problem", error)
        st.rerun()
    state.query_set("mode", None)
    state.query_set("trial", trial.id)
    st.rerun()


# --- checkpoints ----------------------------------------------------------------------------------------------


def _checkpoints() -> list[CheckpointInfo]:
    roots = list(state.settings().model_roots)
    for text in state.remember("models.folders", []):  # those added on the Models page
        try:
            roots.append(state.settings().allowed_model(text))
        except GLMError:
            continue  # the disk is not mounted today
    found = [info for info in state.checkpoints(tuple(roots)) if info.loadable]
    return [*found, *remote_engines.infos()]


def _sides(found: list[CheckpointInfo]) -> list[dict[str, Any]]:
    """The arguments of `votes.side` for each line of the form that is whole."""
    count = int(state.remember("compare.sides", 2))
    chosen = []
    for number in range(count):
        if one := _side(number, found):
            chosen.append(one)
    with st.container(horizontal=True, gap="small"):
        st.button(
            t("Add a checkpoint", "添加检查点"), icon=":material/add:", key="compare_add", type="tertiary",
            disabled=count >= votes.MOST, on_click=state.remember_set, args=("compare.sides", count + 1),
        )  # fmt: skip
        if count > votes.FEWEST:
            st.button(
                t("Remove the last", "移除最后一个"), icon=":material/remove:", key="compare_remove", type="tertiary",
                on_click=state.remember_set, args=("compare.sides", count - 1),
            )  # fmt: skip
    return chosen


def _side(number: int, found: list[CheckpointInfo]) -> dict[str, Any] | None:
    by_key = {str(info.path): info for info in found}
    # A whole checkpoint with a prefix of its own can also answer without it.
    bare = {f"{info.path}|": info for info in found if info.adapter is not None and not info.needs_base}
    options = [*by_key, *bare]
    if not options:
        st.info(t("There is no checkpoint here.", "这里没有检查点。"), icon=":material/info:")
        return None

    def label(key: str) -> str:
        info = by_key.get(key) or bare[key]
        if key in bare:
            return t(f"{info.name} without its prefix", f"{info.name}（不带前缀）")
        method = panels.METHODS.get(info.method, "")
        if is_remote(info.path):
            return info.name
        return f"{info.name} · {method}" if method else f"{info.name} · {info.family}"

    left, right = st.columns([7, 2])
    with left:
        key = st.selectbox(
            t(f"Checkpoint {number + 1}", f"检查点 {number + 1}"),
            options,
            format_func=label,
            **state.kept_widget(
                f"compare.side.{number}", str(MINI) if str(MINI) in options else options[0], options, "index"
            ),
        )
    info = by_key.get(str(key)) or bare[str(key)]
    base: Path | None = None
    with left:
        if info.needs_base:
            fits, _ = state.bases(info, found)
            if not fits:
                st.caption(f":orange[:material/link_off: {t('No base here fits it.', '没有相符的基座。')}]")
                return None
            paths = [str(one.path) for one in fits]
            base = Path(
                str(
                    st.selectbox(
                        t("Base", "基座"),
                        paths,
                        format_func=lambda path: Path(path).name,
                        **state.kept_widget(f"compare.base.{number}.{info.name}", paths[0], paths, "index"),
                    )
                )
            )
    with right:
        on_server = is_remote(info.path)
        precision = st.selectbox(
            t("Precision", "精度"),
            PRECISIONS,
            disabled=on_server,
            help=t("The server's own.", "由服务器决定。") if on_server else None,
            format_func=lambda one: t("auto", "自动") if one == "auto" else one.upper(),
            **state.kept_widget(
                f"compare.precision.{number}", "int4" if number == 1 else "auto", PRECISIONS, "index"
            ),
        )
    return {
        "checkpoint": info.path, "base": base, "precision": str(precision), "adapter": str(key) not in bare
    }  # fmt: skip


# --- prompts --------------------------------------------------------------------------------------------------


def _prompts() -> tuple[str, ...]:
    by_line = st.segmented_control(
        t("What the box holds", "文本框内容"),
        ["lines", "one"],
        format_func={
            "lines": t("A prompt per line", "每行一个提示词"),
            "one": t("One prompt", "一个提示词"),
        }.__getitem__,
        required=True,
        label_visibility="collapsed",
        **state.kept_widget("compare.by_line", "lines", ["lines", "one"], "default"),
    )
    text = st.text_area(
        t("Prompts", "提示词"),
        height=150,
        placeholder=t("Write, or paste up to 20 lines", "输入，或粘贴最多 20 行"),
        label_visibility="collapsed",
        **state.kept_widget("compare.prompts", "\n".join(SAMPLES)),
    )
    found = votes.prompts_of(str(text or ""), by_line == "lines")
    many = len(found) > votes.MOST_PROMPTS
    said = t(
        f"{len(found)} of at most {votes.MOST_PROMPTS} prompts",
        f"{len(found)} / {votes.MOST_PROMPTS} 个提示词",
    )
    st.caption(f":orange[{said}]" if many else said)
    return found


def _decoding() -> tuple[GenerationSettings, str]:
    """How every checkpoint answers: the same for all, greedy where nothing is changed."""
    from glm_core.engine import GenerationSettings

    with st.expander(t("How they answer", "解码设置"), icon=":material/tune:"):
        st.caption(
            t(
                "The same for all checkpoints. Temperature 0 is greedy: the likeliest token every time.",
                "所有检查点相同。温度 0 为贪心解码：每次取概率最大的词元。",
            )
        )
        with st.grid(4, min_column_width=130):
            longest = st.number_input(
                t("Longest answer (tokens)", "最长回答（词元）"), 1, 4096, step=16,
                **state.kept_widget("compare.max_new_tokens", LONGEST_ANSWER),
            )  # fmt: skip
            temperature = st.number_input(
                t("Temperature", "温度"), 0.0, 2.0, step=0.1, **state.kept_widget("compare.temperature", 0.0)
            )
            greedy = not temperature
            top_p = st.number_input(
                "top_p", 0.05, 1.0, step=0.05, disabled=greedy, **state.kept_widget("compare.top_p", 1.0)
            )
            seed = st.number_input(
                t("Seed", "随机种子"), 0, None, step=1, disabled=greedy,
                **state.kept_widget("compare.seed", 0),
            )  # fmt: skip
        system = st.text_input(
            t("System prompt", "系统提示词"),
            placeholder=t("none", "无"),
            **state.kept_widget("compare.system", ""),
        )
    settings = GenerationSettings(
        max_new_tokens=int(longest),
        temperature=float(temperature),
        top_p=1.0 if greedy else float(top_p),
        seed=None if greedy else int(seed),
    )
    return settings, str(system or "")


# --- the trials so far ----------------------------------------------------------------------------------------


def earlier(trials: Trials) -> None:
    """The newest trials, each with a button that opens it."""
    found = trials.newest(LISTED)
    if not found:
        return
    with st.container(border=True, key="compare_earlier", gap="xsmall"):
        panels.section(t("Earlier", "之前的对比"), "history")
        for one in found:
            with st.container(
                horizontal=True, vertical_alignment="center", gap="small", key=f"trial_{one.id}"
            ):
                if st.button(plain(one.title), key=f"open_{one.id}", type="tertiary"):
                    state.query_set("mode", None)
                    state.query_set("trial", one.id)
                    st.rerun()
                st.caption(_in_words(trials, one))


def _in_words(trials: Trials, one: Trial) -> str:
    count, given = len(one.prompts), len(trials.votes(one.id))
    parts = [
        t(f"{count} prompt{'' if count == 1 else 's'}", f"{count} 个提示词"),
        t(f"{given} vote{'' if given == 1 else 's'}", f"{given} 票") if given else "",
        panels.format_ago(one.created, time.time()),
    ]
    return " · ".join(part for part in parts if part)
