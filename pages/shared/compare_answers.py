"""A trial on screen: the answers as they are written, side by side, with their speed; then the vote."""

from __future__ import annotations

import time

import streamlit as st

from glm_core import votes
from glm_core.errors import GLMError
from glm_core.votes import Answer, Pair, Trial, Trials
from pages.shared import compare_diff, compare_votes, panels, state
from pages.shared.reruns import live
from pages.shared.text import plain, said, t

PAGE_PROMPTS = 5


def show(trials: Trials, trial_id: str) -> None:
    """A trial by its id: live while it is answered, then its answers and votes."""
    try:
        trial = trials.get(trial_id)
    except GLMError as error:
        panels.problem(error)
        _new_button()
        return
    _head(trials, trial)
    if votes.live(trial_id) is not None:
        st.html(
            "<style>[class*='st-key-trial_live'] [data-stale='true'] {opacity: 1; transition: none;}</style>"
        )
        watch(trial_id)
        return
    _missing(trials, trial)
    if trial.hidden and (trials.ballots(trial) or trials.votes(trial_id)):
        compare_votes.section(trials, trial)
    else:
        if trial.hidden:
            st.info(
                t(
                    "There is nothing to vote on: no two whole answers differ.",
                    "没有可投的：没有两个不同的完整回答。",
                ),
                icon=":material/equal:",
            )
        if trials.votes(trial_id):
            compare_votes.tally(trials, trial)
        answers(trials, trial)
    _how(trial)


def _head(trials: Trials, trial: Trial) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="trial_head"):
        st.subheader(plain(trial.title), anchor=False, width="content")
        if trial.blind:
            st.badge(
                t("blind", "盲投") if trial.hidden else t("names shown", "名称已显示"),
                icon=":material/visibility_off:" if trial.hidden else ":material/visibility:",
                color="violet" if trial.hidden else "gray",
            )
        st.caption(panels.format_ago(trial.created, time.time()))
        st.space("stretch")
        _new_button()
        if st.button(
            "", icon=":material/delete:", key="trial_delete", type="tertiary", help=t("Delete", "删除")
        ):
            st.dialog(t("Delete this comparison?", "删除此对比？"))(_delete)(trials, trial)


def _new_button() -> None:
    if st.button(t("New comparison", "新建对比"), icon=":material/add:", key="trial_new"):
        state.query_set("trial", None)
        state.query_set("mode", "prompts")
        st.rerun()


def _delete(trials: Trials, trial: Trial) -> None:
    """The body of the delete dialog."""
    given = len(trials.votes(trial.id))
    st.markdown(plain(trial.title))
    st.caption(
        t(
            f"Its answers and {given} votes cannot be brought back.",
            f"其回答与 {given} 张票将无法恢复。",
        )
    )
    if st.button(
        t("Delete", "删除"),
        type="primary",
        key="trial_delete_yes",
        on_click=_deleted,
        args=(trials, trial.id),
    ):
        st.rerun()


def _deleted(trials: Trials, trial_id: str) -> None:
    trials.delete(trial_id)
    state.query_set("trial", None)
    state.query_set("mode", "prompts")


def _missing(trials: Trials, trial: Trial) -> None:
    """What was not answered, why, and the button that asks again."""
    open_ = trials.unanswered(trial)
    if not open_:
        return
    found = trials.answers(trial.id)
    reasons = dict.fromkeys(
        (trial.sides[number].name, found[prompt, number].error)
        for prompt, number in open_
        if (prompt, number) in found and found[prompt, number].error
    )
    for name, reason in reasons:
        st.error(f"**{plain(name)}**: {plain(said(reason))}", icon=":material/error:")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="trial_missing"):
        count, whole = len(open_), len(trial.prompts) * len(trial.sides)
        st.markdown(
            ":orange[:material/pending:] "
            + t(f"{count} of {whole} answers are missing.", f"{whole} 个回答中缺 {count} 个。"),
            width="content",
        )
        if st.button(
            t("Answer them", "补齐回答"),
            icon=":material/play_arrow:",
            key="trial_again",
            disabled=not state.may("load"),
        ):
            votes.begin(trials, trial.id)
            st.rerun()


# --- while they are written -----------------------------------------------------------------------------------


@live(run_every=0.4)
def watch(trial_id: str) -> None:
    """What is being loaded or answered; the answers so far, unless names are hidden."""
    trials = Trials(state.job_store())
    now = votes.live(trial_id)
    if now is None:
        st.rerun()
    try:
        trial = trials.get(trial_id)
    except GLMError:  # deleted in another tab
        st.rerun()
    found = trials.answers(trial_id)
    whole = len(trial.prompts) * len(trial.sides)
    done = sum(one.usable for one in found.values())
    with st.container(border=True, key="trial_live"):
        if now.stage == "loading":
            panels.loading_bar(now.name)
        else:
            what = (
                t("Waiting for another comparison …", "正在等待另一个对比……")
                if now.stage == "waiting"
                else t(f"{now.name} is answering …", f"{now.name} 正在回答……")
            )
            st.markdown(f"**:material/progress_activity: {plain(what)}**")
            st.progress(done / whole)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption(t(f"{done} of {whole} answers", f"{done} / {whole} 个回答"), width="content")
            if st.button(
                t("Stop", "停止"), icon=":material/stop_circle:", key="trial_stop", disabled=now.stop.is_set()
            ):
                now.stop.set()
    if trial.hidden:
        st.caption(
            ":material/visibility_off: "
            + t(
                "The answers appear when all are written: who writes when would give the names away.",
                "所有回答写完后才会显示，以免从先后顺序看出是谁写的。",
            )
        )
        return
    for prompt in _page(trial, "live"):
        _card(trial, found, prompt, diff=False, now=now)


# --- when they are there --------------------------------------------------------------------------------------


@live()
def answers(trials: Trials, trial: Trial) -> None:
    """The answers with their names, side by side."""
    found = trials.answers(trial.id)
    speeds(trial, found)
    row = panels.section(t("Answers", "回答"), "forum")
    with row:
        st.space("stretch")
        diff = st.toggle(
            t("Mark other words", "标出不同之处"),
            help=t(
                "In each answer the words that the first one does not have.",
                "标出各回答中第一个回答没有的词。",
            ),
            **state.kept_widget("compare.mark", True),
        )
    for prompt in _page(trial, "done"):
        _card(trial, found, prompt, bool(diff))


def _page(trial: Trial, key: str) -> range:
    """The prompts of the page that is shown."""
    pages = -(-len(trial.prompts) // PAGE_PROMPTS)
    number = st.pagination(pages, key=f"trial_page_{key}_{trial.id}") if pages > 1 else 1
    begin = (number - 1) * PAGE_PROMPTS
    return range(begin, min(len(trial.prompts), begin + PAGE_PROMPTS))


def _card(
    trial: Trial, found: dict[Pair, Answer], prompt: int, diff: bool, now: votes.Live | None = None
) -> None:
    with st.container(border=True, gap="xsmall", key=f"trial_card_{prompt}"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.badge(t(f"prompt {prompt + 1}", f"提示词 {prompt + 1}"), color="gray")
            usable = [found.get((prompt, number)) for number in range(len(trial.sides))]
            if (
                all(one is not None and one.usable for one in usable)
                and len({one.text.strip() for one in usable if one is not None}) < 2
            ):
                st.badge(t("same words", "完全相同"), color="green", icon=":material/equal:")
        compare_diff.text(trial.prompts[prompt])
        first = found.get((prompt, 0))
        for number, place in enumerate(st.columns(len(trial.sides), gap="small")):
            with place.container(
                border=True, height="stretch", gap="xxsmall", key=f"trial_answer_{prompt}_{number}"
            ):
                st.caption(f"**{plain(trial.sides[number].name)}**")
                answer = found.get((prompt, number))
                writing = now.text(prompt, number) if now is not None else None
                if writing is not None and (answer is None or not answer.usable):
                    compare_diff.text(writing[0] or "…")
                    st.caption(t(f"{writing[1]} tokens …", f"{writing[1]} 词元……"))
                elif answer is None:
                    st.caption(t("not asked yet", "尚未提问"))
                else:
                    against = first.text if diff and number and first is not None else None
                    compare_diff.text(answer.text, against)
                    how_it_went(answer)


def how_it_went(answer: Answer) -> None:
    """Tokens, speed and how an answer ended."""
    if answer.error:
        st.caption(f":red[{plain(said(answer.error))}]")
        return
    parts = [
        t(f"{answer.tokens:,} tokens", f"{answer.tokens:,} 词元"),
        panels.format_duration(answer.seconds),
    ]
    if answer.rate:
        parts.append(t(f"{answer.rate:.1f} tokens/s", f"{answer.rate:.1f} 词元/秒"))
    ended = {"length": t("cut at the longest answer", "达到最长回答"), "cancelled": t("stopped", "已停止")}
    if answer.finish in ended:
        parts.append(f":orange[{ended[answer.finish]}]")
    st.caption(" · ".join(parts))


def speeds(trial: Trial, found: dict[Pair, Answer]) -> None:
    """Each checkpoint's tokens, time and speed over all prompts."""
    with st.grid(len(trial.sides), min_column_width=170):
        for number, side in enumerate(trial.sides):
            mine = [one for (_, at), one in found.items() if at == number and one.usable]
            tokens = sum(one.tokens for one in mine)
            rates = [one.rate for one in mine if one.rate]
            rate = sum(rates) / len(rates) if rates else 0.0
            same = sum(
                one.text.strip() == found[prompt, 0].text.strip()
                for (prompt, at), one in found.items()
                if at == number and one.usable and (prompt, 0) in found
            )
            detail = t(f"{tokens:,} tokens", f"{tokens:,} 词元")
            if number:
                detail += t(
                    f" · {same} of {len(mine)} the same",
                    f" · {same} / {len(mine)} 相同",
                )
            st.metric(
                plain(side.name),
                t(f"{rate:.1f} tokens/s", f"{rate:.1f} 词元/秒") if rate else "–",
                detail,
                border=True,
                delta_color="off",
                delta_arrow="off",
                help=t(
                    "Per answer, behind the first token, while all prompts are computed together. The same: in the "
                    "words of the first checkpoint.",
                    "每个回答在首词元之后的速度；所有提示词同时计算。“相同”指与第一个检查点的回答完全一致。",
                ),
            )


def _how(trial: Trial) -> None:
    with st.expander(t("How it was asked", "提问设置"), icon=":material/receipt_long:"):
        st.json(
            {
                "sides": [vars(one) | {"name": one.name} for one in trial.sides],
                "settings": trial.settings.to_json(),
                "system": trial.system,
                "blind": trial.blind,
                "seed of the order": trial.seed,
            },
            expanded=1,
        )
