"""The review queue: one doubtful row at a time, labelled by key, kept at once, and handed on as training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from glm_core import review
from glm_core.errors import GLMError
from glm_core.review import AgreementReport, Order, Reviews
from pages.shared import classify_data, page, panels, state
from pages.shared.classify_quality import between, number
from pages.shared.reruns import live
from pages.shared.results_panel import FORMATS
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.jobs import Job
    from pages.shared.classify_data import Found

KEYS = "123456789"
# Enter leaves a field, so that the next key labels a row instead of being typed into the field.
LEAVE = """<script>(() => {
  if (window.glmLeaves) return;
  window.glmLeaves = true;
  document.addEventListener("keydown", (event) => {
    const field = event.target;
    if (event.key === "Enter" && field.tagName === "INPUT" && field.type === "text"
        && field.closest("[class*='reviewer'], [class*='review_note']")) setTimeout(() => field.blur(), 0);
  });
})();</script>"""
LONGEST = 3000  # characters of a text that are shown at once


def section(this: Found) -> None:
    """Who reviews, in which order, the row, and what came of it."""
    panels.section(t("Review", "人工复核"), "rate_review")
    left, middle, right = st.columns([2, 2, 2], vertical_alignment="bottom")
    with left:
        name = st.text_input(
            t("Reviewer", "复核人"),
            placeholder=t("your name or initials", "姓名或缩写"),
            help=t("Two people may review the same rows without seeing each other's labels.",
                   "两人可分别复核相同的行，互不可见。"),
            **state.kept_widget("classify.reviewer", ""),
        )  # fmt: skip
    choices: list[Order] = ["uncertain", *(["disagree"] if this.rows is not None else [])]  # type: ignore[list-item]
    with middle:
        order = st.selectbox(
            t("Order", "顺序"),
            choices,
            format_func={
                "uncertain": t("least sure first", "最不确定优先"),
                "disagree": t("surest disagreements with the file", "与文件标签最确信的分歧"),
            }.__getitem__,
            **state.kept_widget("classify.review_order", "uncertain", choices, "index"),
        )
    with right:
        hide = st.toggle(
            t("Hide the model's answer", "隐藏模型答案"),
            help=t("Whoever sees an answer first tends to agree with it.", "先看到答案的人容易倾向于同意。"),
            **state.kept_widget("classify.hide_answer", False),
        )
    st.html(LEAVE, unsafe_allow_javascript=True)
    if not str(name or "").strip():
        st.caption(t("Enter a name to begin.", "请输入姓名后开始。"))
    else:
        queue(this.job.id, str(name), order, bool(hide))
    agreement(this.job.id)


def ranked(this: Found, order: Order) -> review.Ints:
    """The rows of a job in the order to look at them."""
    return _ranked(this.job.id, this.stamp, order, repr(this.truth))


@st.cache_data(max_entries=8, show_spinner=False)
def _ranked(job_id: str, stamp: str, order: Order, mapping: str) -> review.Ints:
    this = classify_data.found(state.job_store().get(job_id))
    truth = None
    if this.rows is not None:
        truth = np.full(len(this.answers), -1, dtype=np.int64)
        truth[this.place(this.rows.idx)] = this.rows.truth
    return review.rank(this.answers, order, truth)


# --- one row -----------------------------------------------------------------------------------------------------


@live()
def queue(job_id: str, name: str, order: Order, hide: bool) -> None:
    """The next row for this person with the buttons; drawn alone when a button is pressed."""
    reviews = Reviews(state.job_store())
    try:
        this = classify_data.found(state.job_store().get(job_id))
        reviewer = review.reviewer_name(name)
        rows = ranked(this, order)
        again = bool(state.session(f"classify.again.{job_id}", False))
        found = reviews.queue(job_id, rows, reviewer, limit=1, skipped=again)
        mine = reviews.latest(job_id, reviewer)
    except GLMError as error:
        panels.problem(error)
        return
    if error := state.session("classify.review_problem"):
        panels.problem(error)
    here = np.isin([one.idx for one in mine], rows).tolist()
    done = sum(here)
    skipped = sum(one.action == "skip" for one, inside in zip(mine, here, strict=True) if inside)
    st.progress(done / max(len(rows), 1))
    st.caption(
        t(
            f"{done:,} of {len(rows):,} rows seen by {plain(reviewer)}, {skipped:,} of them skipped",
            f"{plain(reviewer)} 已看 {done:,} / {len(rows):,} 行，其中跳过 {skipped:,} 行",
        )
    )
    if not found:
        _nothing_left(job_id, skipped, again, bool(mine), reviewer)
        _way_out(this, reviews)
        return
    idx = found[0]
    with st.container(border=True, key="review_row"):
        _text(this, reviews, idx)
        if not hide:
            _model(this, idx)
        st.text_input(
            t("Note (optional)", "备注（可选）"),
            key=f"review_note_{job_id}_{idx}_{reviewer}",
            placeholder=t("why, or what is odd", "原因或疑点"),
        )
        with st.container(horizontal=True, gap="small", key="review_buttons"):
            for k, label in enumerate(this.names):
                st.button(
                    plain(this.shown(k)),
                    key=f"review_label_{k}",
                    shortcut=KEYS[k] if k < len(KEYS) else None,
                    on_click=_label,
                    args=(job_id, idx, reviewer, label, f"review_note_{job_id}_{idx}_{reviewer}"),
                )
            st.space("stretch")
            st.button(
                t("Skip", "跳过"), key="review_skip", shortcut="s", icon=":material/skip_next:", type="tertiary",
                on_click=_skip, args=(job_id, idx, reviewer, f"review_note_{job_id}_{idx}_{reviewer}"),
            )  # fmt: skip
            _undo_button(job_id, reviewer, bool(mine))
    _way_out(this, reviews)


def _text(this: Found, reviews: Reviews, idx: int) -> None:
    """The text in large letters, and what else the row says."""
    job = this.job
    cells = reviews.cells(job.id, [idx])[idx]
    used = classify_data.text_columns(job)
    columns = list(job.task["columns"])
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.badge(t(f"row {idx + 1:,}", f"第 {idx + 1:,} 行"), color="gray")
        for number, column in enumerate(columns):
            hidden = this.truth is not None and column == this.truth.column
            if number in used or hidden or number >= len(cells) or not cells[number].strip():
                continue
            shown = plain(classify_data.shortened(cells[number], 60))
            st.caption(f"{plain(column)}: {shown}", width="content")
    for number in used:
        text = cells[number] if number < len(cells) else ""
        if len(used) > 1:
            st.caption(plain(columns[number]))
        shown = plain(text[:LONGEST]).replace("\n", "  \n")
        with st.container(key=f"review_text_{number}"):
            st.markdown(
                f"##### {shown}"
                if "\n" not in shown and text.strip()
                else shown or t("*(empty)*", "*（空）*")
            )
        if len(text) > LONGEST:
            with st.expander(
                t(f"{len(text) - LONGEST:,} more characters", f"还有 {len(text) - LONGEST:,} 个字符")
            ):
                st.text(text[LONGEST:])


def _model(this: Found, idx: int) -> None:
    at = int(this.place([idx])[0])
    given = this.answers
    order = np.array([given.answer[at]]) if this.bare else np.argsort(-given.probability[at])[:6]
    with st.container(horizontal=True, gap="xsmall", vertical_alignment="center", key="review_model"):
        st.caption(t("The model:", "模型："), width="content")
        for k in order.tolist():
            st.badge(
                plain(this.shown(k)) + ("" if this.bare else f" {given.probability[at, k]:.1%}"),
                color="violet" if k == given.answer[at] else "gray",
            )
        known = this.rows.truth[this.rows.idx == idx] if this.rows is not None else ()
        if len(known):
            correct = int(known[0])
            st.badge(
                t(f"in the file: {plain(this.shown(correct))}", f"文件中：{plain(this.shown(correct))}"),
                icon=":material/description:",
                color="orange" if correct != given.answer[at] else "green",
            )


def _undo_button(job_id: str, reviewer: str, enabled: bool) -> None:
    st.button(
        t("Undo", "撤销"), key="review_undo", shortcut="u", icon=":material/undo:", type="tertiary",
        disabled=not enabled, on_click=_undo, args=(job_id, reviewer),
    )  # fmt: skip


def _nothing_left(job_id: str, skipped: int, again: bool, any_: bool, reviewer: str) -> None:
    if again:
        state.session_set(f"classify.again.{job_id}", False)
    with st.container(border=True, key="review_row"):
        st.markdown(f"**:material/task_alt: {t('No row is left here.', '这里没有剩余的行。')}**")
        with st.container(horizontal=True, gap="small"):
            if skipped:
                st.button(
                    t(f"Look at the {skipped:,} skipped rows", f"查看跳过的 {skipped:,} 行"),
                    key="review_again",
                    icon=":material/replay:",
                    on_click=state.session_set,
                    args=(f"classify.again.{job_id}", True),
                )
            _undo_button(job_id, reviewer, any_)


def _label(job_id: str, idx: int, reviewer: str, label: str, note: str) -> None:
    _done(lambda reviews: reviews.label(job_id, idx, reviewer, label, str(state.session(note) or "")))


def _skip(job_id: str, idx: int, reviewer: str, note: str) -> None:
    state.session_set(f"classify.again.{job_id}", False)
    _done(lambda reviews: reviews.skip(job_id, idx, reviewer, str(state.session(note) or "")))


def _undo(job_id: str, reviewer: str) -> None:
    _done(lambda reviews: reviews.undo(job_id, reviewer))


def _done(act: Callable[[Reviews], object]) -> None:
    try:
        act(Reviews(state.job_store()))
    except GLMError as error:
        state.session_set("classify.review_problem", error)
    else:
        state.session_set("classify.review_problem", None)


# --- what came of it ---------------------------------------------------------------------------------------------


def _way_out(this: Found, reviews: Reviews) -> None:
    """How much was labelled, and the way out as training data; drawn with every row, so nothing slow is in it."""
    count = reviews.count(this.job.id)
    if not count:
        return
    with st.container(border=True, key="review_export"):
        row = panels.section(t("Corrections", "修正结果"), "edit_note")
        with row:
            st.space("stretch")
            st.badge(t(f"{count:,} rows labelled", f"已标注 {count:,} 行"), color="gray")
        st.caption(
            t(
                "As training data: content, label, and where both come from. The model's answers stay as they are.",
                "导出为训练数据：content、label 及其来源。模型的答案保持不变。",
            )
        )
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.download_button(
                t("Corrections as CSV", "修正结果 CSV"),
                lambda: exported(this.job.id).read_bytes(),  # written when it is asked for
                file_name=f"corrections-{this.job.id[:15]}.csv",
                mime=FORMATS["csv"][1],
                icon=":material/download:",
                key="review_csv",
                on_click="ignore",
            )
            if page.entry("finetune") is not None and st.button(
                t("Fine-tune with these", "用这些数据微调"), icon=":material/tune:", key="review_finetune"
            ):
                try:
                    file = exported(this.job.id)
                except GLMError as error:
                    panels.problem(error)
                else:
                    st.switch_page("pages/finetune.py", query_params={"path": str(file)})


def exported(job_id: str) -> Path:
    """The file with what people say by now. It stays when the job is deleted, as a training may have begun with it."""
    reviews = Reviews(state.job_store())
    last = max((one.seq for one in reviews.latest(job_id)), default=0)
    file = state.exports() / f"corrections-{job_id}-{reviews.count(job_id)}-{last}.csv"
    reviews.export(job_id, file)
    return file


@live()
def agreement(job_id: str) -> None:
    """How far people agree with each other, or one person with the model."""
    reviews = Reviews(state.job_store())
    people = list(reviews.reviewers(job_id).items())
    with st.container(border=True, key="review_people"):
        row = panels.section(t("Agreement", "一致性"), "group")
        with row:
            st.space("stretch")
            st.button(  # a click draws this part anew
                t("Count again", "重新统计"), icon=":material/refresh:", key="review_refresh", type="tertiary"
            )
        if not people:
            st.caption(t("Nobody has labelled a row yet.", "还没有人标注。"))
            return
        st.caption(" · ".join(f"{plain(who)}: {count:,}" for who, count in people))
        names = [who for who, _ in people]
        if len(names) == 1:
            _with_model(job_id, reviews)
            return
        pair = names[:2]
        if len(names) > 2:
            pair = st.multiselect(
                t("Whom to compare", "比较对象"),
                names,
                default=pair,
                max_selections=2,
                key=f"review_pair_{job_id}",
            )
        found = reviews.agreement(job_id, pair) if len(pair) == 2 else None
        if found is None or not found.n:
            st.caption(t("No row was labelled by both.", "没有两人都标注的行。"))
            return
        _measures(found)


def _measures(found: AgreementReport) -> None:
    with st.grid(4, min_column_width=120):
        cards = [(t("Agree", "一致"), number(found.percent, True), between(found.percent, True))]
        for title, one in (("Cohen's κ", found.kappa), ("AC1", found.ac1), ("Krippendorff's α", found.alpha)):
            value = "–" if one.value is None else f"{one.value:.2f}"
            known = one.low is not None and one.high is not None
            cards.append(
                (title, value, f"{one.low:.2f} – {one.high:.2f}" if known else t("no interval", "无区间"))
            )
        for title, value, range_ in cards:
            st.metric(title, value, range_, border=True, delta_color="off", delta_arrow="off")
    st.caption(
        t(
            f"On {found.n:,} rows that both labelled. Kappa and alpha are low where one label is rare; AC1 is not.",
            f"基于两人都标注的 {found.n:,} 行。某标签很少时 κ 与 α 偏低，AC1 不受影响。",
        )
    )
    if found.differing:
        listed = ", ".join(f"{idx + 1:,}" for idx in found.differing[:12])
        more = " …" if len(found.differing) > 12 else ""
        st.caption(t(f"They differ on rows {listed}{more}", f"分歧的行：{listed}{more}"))


def _with_model(job_id: str, reviews: Reviews) -> None:
    try:
        this = classify_data.found(state.job_store().get(job_id))
    except GLMError as error:
        panels.problem(error)
        return
    found = reviews.corrections(job_id)
    answers = dict(zip(this.answers.idx.tolist(), this.answers.answer.tolist(), strict=True))
    same = sum(this.names.index(one.label) == answers.get(one.idx, -1) for one in found)
    st.caption(
        t(
            f"The model's answer stands on {same:,} of {len(found):,} rows. A second reviewer shows how far people "
            "agree.",
            f"{len(found):,} 行中有 {same:,} 行与模型答案一致。再有一位复核人即可看出人与人之间的一致性。",
        )
    )


def goes_with(job: Job) -> None:
    """What people have labelled, said beside the button that deletes the job, since it goes with it."""
    reviews = Reviews(state.job_store())
    if count := reviews.count(job.id):
        st.caption(
            ":orange[:material/info:] "
            + t(
                f"People labelled {count:,} {'row' if count == 1 else 'rows'} of this job; their labels are deleted "
                "with it. Export them first.",
                f"此任务中有 {count:,} 行经人工标注，删除任务时会一并删除，请先导出。",
            )
        )
