"""Blind votes: two answers without names, four buttons, the names after each vote, and what all votes say."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import charts, compare_diff, panels, state
from pages.shared.reruns import live
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from collections.abc import Callable

    from glm_core.votes import Ballot, Choice, Tally, Trial, Trials, Vote

BUTTONS: tuple[tuple[Choice, str, tuple[str, str], str], ...] = (
    ("left", "1", ("Left is better", "左边更好"), ":material/arrow_back:"),
    ("right", "2", ("Right is better", "右边更好"), ":material/arrow_forward:"),
    ("tie", "3", ("Equally good", "一样好"), ":material/drag_handle:"),
    ("bad", "4", ("Both bad", "都差"), ":material/thumb_down:"),
)
VOTER = "compare.voter"
# Enter in the box of the name leaves it, so that the keys vote.
LEAVE = """<script>(() => {
  if (window.glmVoterLeaves) return;
  window.glmVoterLeaves = true;
  document.addEventListener("keydown", (event) => {
    const box = event.target.closest && event.target.closest("[class*=st-key-widget-compare-voter] input");
    if (box && event.key === "Enter") setTimeout(() => box.blur(), 50);
  });
})();</script>"""


def section(trials: Trials, trial: Trial) -> None:
    """The vote, its tally, and the ways out."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.text_input(
            t("Your name (optional)", "姓名（可选）"),
            placeholder=t("who votes", "投票人"),
            max_chars=60,
            width=260,
            help=t(
                "Several people can vote on the same answers; each prompt then counts once.",
                "多人可对相同的回答投票；每个提示词只计一次。",
            ),
            **state.kept_widget(VOTER, ""),
        )
    st.html(LEAVE, unsafe_allow_javascript=True)
    ballots(trial.id)


def _voter() -> str:
    return str(state.session(f"widget.{VOTER}") or "")


@live()
def ballots(trial_id: str) -> None:
    """The next two answers of this person; drawn alone when a button is pressed."""
    from glm_core.votes import Trials

    trials = Trials(state.job_store())
    try:
        trial = trials.get(trial_id)
        found, given = trials.ballots(trial), trials.votes(trial_id)
    except GLMError as error:
        panels.problem(error)
        return
    with st.container():
        if error := state.session("compare.vote_problem"):
            panels.problem(error)
    mine = [one for one in given if one.voter == " ".join(_voter().split())]
    voted = {one.ballot for one in mine}
    left = [one for one in found if one not in voted]
    if found:
        st.progress((len(found) - len(left)) / len(found))
        count, whole = len(found) - len(left), len(found)
        st.caption(t(f"{count} of {whole} voted on", f"已投 {count} / {whole}"))
    if mine:
        _last(trial, mine[-1])
    else:
        st.empty()  # in its place: moved up when a vote is taken back, the ballot would be there twice for a moment
    if left:
        _ballot(trials, trial, left[0], bool(mine))
    else:
        _nothing_left(trial, bool(mine))
    if given:
        tally(trials, trial)
    if not left:
        _all_names(trials, trial)


def _last(trial: Trial, vote: Vote) -> None:
    """Who was who in the ballot just voted on."""
    names = [plain(one.name) for one in trial.sides]
    at = vote.ballot
    said_ = {
        "left": t("you chose left", "您选了左边"),
        "right": t("you chose right", "您选了右边"),
        "tie": t("equally good", "一样好"),
        "bad": t("both bad", "都差"),
    }[vote.choice]
    with st.container(key="vote_revealed"):
        st.markdown(
            ":material/visibility: "
            + t(
                f"Prompt {at.prompt + 1}: left was **{names[at.left]}**, right was **{names[at.right]}**; {said_}.",
                f"提示词 {at.prompt + 1}：左边是 **{names[at.left]}**，右边是 **{names[at.right]}**；{said_}。",
            )
        )


def _ballot(trials: Trials, trial: Trial, ballot: Ballot, any_: bool) -> None:
    answers = trials.answers(trial.id)
    texts = [answers[ballot.prompt, number].text for number in (ballot.left, ballot.right)]
    with st.container(border=True, key="vote_ballot"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.badge(t(f"prompt {ballot.prompt + 1}", f"提示词 {ballot.prompt + 1}"), color="gray")
        compare_diff.text(trial.prompts[ballot.prompt])
        mark = bool(state.remember("compare.mark", True))
        for place, (column, title) in enumerate(
            zip(st.columns(2, gap="small"), (t("Left", "左"), t("Right", "右")), strict=True)
        ):
            with column.container(
                border=True, height="stretch", gap="xxsmall", key=f"vote_{('left', 'right')[place]}"
            ):
                st.caption(f"**{title}**")
                compare_diff.text(texts[place], texts[1 - place] if mark else None)
        with st.container(horizontal=True, gap="small", key="vote_buttons"):
            for choice, key, words, icon in BUTTONS:
                st.button(
                    t(*words), key=f"vote_choice_{choice}", shortcut=key, icon=icon, on_click=_vote,
                    args=(trial.id, ballot, choice),
                )  # fmt: skip
            st.space("stretch")
            st.button(
                t("Undo", "撤销"), key="vote_undo", shortcut="u", icon=":material/undo:", type="tertiary",
                disabled=not any_, on_click=_undo, args=(trial.id,),
            )  # fmt: skip
    with st.container(horizontal=True, gap="small"):
        st.toggle(t("Mark other words", "标出不同之处"), **state.kept_widget("compare.mark", True))
        st.space("stretch")
        if st.button(
            t("Show the names", "显示名称"), icon=":material/visibility:", key="vote_reveal", type="tertiary",
            help=t("Ends the blind vote; the votes given so far stay.", "结束盲投；已投的票保留。"),
        ):  # fmt: skip
            trials.reveal(trial.id)
            st.rerun()


def _nothing_left(trial: Trial, any_vote: bool) -> None:
    with st.container(border=True, key="vote_ballot"):
        st.markdown(f"**:material/task_alt: {t('You have voted on everything.', '您已全部投完。')}**")
        if any_vote:
            st.button(
                t("Undo", "撤销"), key="vote_undo", shortcut="u", icon=":material/undo:", type="tertiary",
                on_click=_undo, args=(trial.id,),
            )  # fmt: skip


def _all_names(trials: Trials, trial: Trial) -> None:
    if st.button(
        t("Show all answers with names", "显示全部回答与名称"),
        icon=":material/visibility:",
        key="vote_reveal_all",
    ):
        trials.reveal(trial.id)
        st.rerun()


def _vote(trial_id: str, ballot: Ballot, choice: Choice) -> None:
    _done(lambda trials: trials.vote(trial_id, ballot, choice, _voter()))


def _undo(trial_id: str) -> None:
    _done(lambda trials: trials.undo(trial_id, _voter()))


def _done(act: Callable[[Trials], object]) -> None:
    from glm_core.votes import Trials

    try:
        act(Trials(state.job_store()))
    except GLMError as error:
        state.session_set("compare.vote_problem", error)
    else:
        state.session_set("compare.vote_problem", None)


# --- what the votes say ---------------------------------------------------------------------------------------


def tally(trials: Trials, trial: Trial) -> None:
    """Who was preferred how often, and whether that is certain."""
    found = trials.tally(trial)
    with st.container(border=True, key="vote_tally"):
        panels.section(t("Votes", "投票结果"), "how_to_vote")
        for one in found:
            if not one.votes and len(found) > 1:
                continue
            certain = one.decided is not None
            icon = ":green[:material/trophy:]" if certain else ":orange[:material/help:]"
            st.markdown(f"{icon} {sentence(trial, one)}")
            _bar(trial, one)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.download_button(
                t("Votes (CSV)", "投票（CSV）"),
                lambda: _file(trials, trial).read_bytes(),
                file_name=f"votes-{trial.id}.csv",
                mime="text/csv",
                icon=":material/download:",
                key="vote_csv",
                on_click="ignore",
            )
            if st.button(
                t("Delete the votes", "删除投票"),
                icon=":material/delete:",
                key="vote_forget",
                type="tertiary",
            ):
                st.dialog(t("Delete all votes?", "删除全部投票？"))(_forget)(trials, trial)


def sentence(trial: Trial, one: Tally) -> str:
    """What the votes between two checkpoints say."""
    a, b = plain(trial.sides[one.a].name), plain(trial.sides[one.b].name)
    n = one.wins_a + one.wins_b
    if not n:
        return t(f"Nobody preferred {a} or {b} yet.", f"还没有人在 {a} 与 {b} 之间作出选择。")
    ahead, most = (a, one.wins_a) if one.wins_a > one.wins_b else (b, one.wins_b)
    low, high = one.share.low or 0.0, one.share.high or 0.0
    if one.wins_a > one.wins_b:
        low, high = 1 - high, 1 - low
    between = t(f"95 % interval {low:.0%} to {high:.0%}", f"95% 区间 {low:.0%} 至 {high:.0%}")
    if one.p_value is None:
        return t(
            f"**{a}** {one.wins_a}, **{b}** {one.wins_b}: with fewer than 6 preferences no test can decide.",
            f"**{a}** {one.wins_a}，**{b}** {one.wins_b}：偏好少于 6 次时任何检验都无法判定。",
        )
    p = "p < 0.001" if one.p_value < 0.001 else f"p = {one.p_value:.3f}"
    if one.decided is not None:
        return t(
            f"**{ahead} is preferred, for certain:** on {most} of {n} prompts with a preference ({between}; sign test "
            f"{p}).",
            f"**{ahead} 更受偏好，结论可靠：** 在 {n} 个有偏好的提示词中占 {most} 个（{between}；符号检验 {p}）。",
        )
    if one.wins_a == one.wins_b:
        return t(
            f"Not decided: {a} and {b} were preferred equally often ({n} prompts; sign test {p}).",
            f"未定：{a} 与 {b} 被偏好的次数相同（{n} 个提示词；符号检验 {p}）。",
        )
    return t(
        f"Not decided: {ahead} was preferred on {most} of {n} prompts, which may be chance ({between}; sign test {p}).",
        f"未定：{ahead} 在 {n} 个提示词中有 {most} 个被偏好，可能只是偶然（{between}；符号检验 {p}）。",
    )


def _bar(trial: Trial, one: Tally) -> None:
    """The prompts as one bar: preferred a, ties, both bad, same words, preferred b."""
    go = charts.plotly()

    c = charts.colors()
    parts = (
        (trial.sides[one.a].name, one.wins_a, c["main"]),
        (t("equally good", "一样好"), one.ties, c["quiet"]),
        (t("both bad", "都差"), one.bad, c["faint"]),
        (t("same words", "完全相同"), one.identical, c["line"]),
        (trial.sides[one.b].name, one.wins_b, c["second"]),
    )
    figure = go.Figure()
    for name, count, color in parts:
        if not count:
            continue
        figure.add_bar(
            x=[count], y=[0], orientation="h", marker={"color": color}, text=[str(count)], textposition="inside",
            insidetextanchor="middle", hovertemplate=f"{charts.escaped(name, 40)}: {count}<extra></extra>",
        )  # fmt: skip
    charts.dress(figure, 52, barmode="stack")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    charts.draw(figure, f"vote_bar_{one.a}_{one.b}")
    # A legend of plotly's lies on the bar where a phone leaves it no room.
    st.html(
        '<div style="font-size: 0.85rem; line-height: 1.7">'
        + " &nbsp; ".join(
            f'<span style="color: {color}">&#9632;</span> {html.escape(name)}: {count}'
            for name, count, color in parts
            if count
        )
        + "</div>"
    )


def _file(trials: Trials, trial: Trial) -> Path:
    file = state.exports() / f"votes-{trial.id}.csv"
    trials.export(trial.id, file)
    return file


def _forget(trials: Trials, trial: Trial) -> None:
    """The body of the delete dialog."""
    given = len(trials.votes(trial.id))
    st.caption(t(f"{given} votes cannot be brought back.", f"{given} 张票将无法恢复。"))
    if st.button(
        t("Delete", "删除"), type="primary", key="vote_forget_yes", on_click=trials.forget, args=(trial.id,)
    ):
        st.rerun()
