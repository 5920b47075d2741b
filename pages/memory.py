"""Quantization and memory: what fits, what it costs in quality and speed; predicted for any model, measured for yours."""

from __future__ import annotations

import time
from typing import Any

import streamlit as st

from glm_core import memory
from glm_core.errors import GLMError
from pages.shared import (
    memory_figures,
    memory_job,
    memory_measure,
    memory_model,
    page,
    panels,
    state,
)
from pages.shared.memory_model import Asked, gib, level_name, rows_text
from pages.shared.reruns import live
from pages.shared.text import plain, t

LISTED = 8


def main() -> None:
    """Draw the page: the measurement in the address, else predictions and the form for a new one."""
    corner = page.frame(
        "memory",
        ("Quantization & memory", "量化与显存"),
        ":material/memory:",
        (
            "Which precision fits, and what it costs: memory predicted for any GLM, measured with speed and quality for "
            "yours.",
            "哪种精度装得下、代价是什么：预测任意 GLM 的内存占用，并实测您的模型的内存、速度与质量。",
        ),
    )
    draft = state.session("memory.draft") or {"job": "", "number": 0}
    state.session_set("memory.draft", draft)
    if draft["job"]:  # also where a second click ended the run that started it
        state.query_set("job", draft["job"])
        draft["job"] = ""
    if job_id := state.query("job"):
        with corner:
            if st.button(t("All models", "全部模型"), icon=":material/arrow_back:", key="new_memory"):
                state.query_set("job", None)
                st.rerun()
        memory_job.show(job_id)
        return
    asked = memory_model.choose()
    if asked is None:
        return
    try:
        levels_card(asked)
        fits_card(asked)
        lines_card(asked)
    except GLMError as error:
        panels.problem(error)
    memory_measure.form(draft, asked)
    earlier()


def levels_card(asked: Asked) -> None:
    """Bars of every level, with what was measured and what was published."""
    with st.container(border=True, key="memory_levels_card"):
        row = panels.section(t("Memory at every precision", "各精度的内存占用"), "bar_chart")
        found = [memory_model.predicted(asked, level) for level in asked.levels]
        measured = memory_model.measured(asked) if asked.work == "answer" else {}
        peaks = {
            name: point.peak
            for name, level in measured.items()
            for point in level.points
            if (point.context, point.batch) == (asked.context, asked.batch) and point.peak
        }
        loaded = {name: level.at_load for name, level in measured.items() if name in asked.levels}
        figures = memory.figures(memory.same_shape(asked.of.config)) if asked.device == "cuda" else ()
        figures = tuple(one for one in figures if (one.what == "tuning") == (asked.work != "answer"))
        with row:
            st.space("stretch")
            memory_measure.no_gpu_note(asked.device)
            if asked.device == "cpu":
                _state_badge(bool(measured))
            rows = [one.to_json() for one in found]
            memory_job.exports(
                "memory-prediction", _csv(rows), memory_model.manifest(asked, rows), "predicted"
            )
        st.caption(
            t(
                f"**{plain(asked.of.name)}**, {asked.context:,} tokens x {rows_text(asked.batch)}, "
                f"{memory_model.work_name(asked.work)}. All bars are predictions from the configuration.",
                f"**{plain(asked.of.name)}**，{asked.context:,} 词元 × {asked.batch} 行，"
                f"{memory_model.work_name(asked.work)}。所有柱形均根据配置预测。",
            )
        )
        memory_figures.levels(found, peaks, figures, "memory_levels_figure", loaded)
        if asked.work == "answer" and asked.device == "cpu" and not asked.of.fused:
            kept = found[0].kept
            st.caption(
                t(
                    f"Of earlier prompts, up to {gib(kept)} more may be kept, so that they need not be read again.",
                    f"此外最多保留 {gib(kept)} 的历史提示词缓存，避免重复读取。",
                )
            )
        if figures:
            _published(figures)


def _state_badge(measured: bool) -> None:
    if measured:
        st.badge(t("measured on this computer", "已在本机实测"), icon=":material/verified:", color="green")
    else:
        st.badge(t("prediction", "预测"), icon=":material/calculate:", color="gray")


def _published(figures: Any) -> None:
    with st.expander(
        t("Published figures beside the prediction", "官方数据与预测对照"), icon=":material/menu_book:"
    ):
        rows = [
            (
                memory_figures.what_name(one.what), level_name(one.level), f"{one.size:g}",
                f"{one.as_published() / 2**30:.2f}", f"{one.deviation():+.1%}", f"{one.predicted().total / 2**30:.2f}",
            )
            for one in figures
        ]  # fmt: skip
        names = (
            t("what", "用途"), t("level", "精度"), t("published GiB", "官方 GiB"), t("predicted its way", "按官方方式预测"),
            t("off", "偏差"), t("this workbench", "本工作台"),
        )  # fmt: skip
        from pages.shared import table_input

        st.dataframe(table_input.frame(names, rows), hide_index=True, key="memory_published")
        st.caption(
            t(
                "Published for GPUs with the makers' own code, which expands the INT8/INT4 codes of a layer as a whole; "
                "reading was measured with the logits of every token. What their quantization leaves reserved is not in "
                "the prediction, which is why INT8 and INT4 come out lower. Whole numbers are sizes of cards.",
                "官方数据来自 GPU 与其自身代码：逐层整体展开 INT8/INT4 权重，编码时保留全部词元的 logits。"
                "其量化过程中保留的显存未计入预测，因此 INT8 与 INT4 的预测值偏低。整数为显卡容量。",
            )
        )


def fits_card(asked: Asked) -> None:
    """A card of N GB: which levels fit, how long a text, and a sentence."""
    with st.container(border=True, key="memory_fits"):
        panels.section(t("What fits?", "装得下吗？"), "fit_screen")
        _fits(asked)


@live()
def _fits(asked: Asked) -> None:
    gpu = asked.device == "cuda"
    size = int(
        st.select_slider(
            t("Memory of the card, GB", "显存（GB）")
            if gpu
            else t("Memory of the computer, GB", "内存（GB）"),
            memory_model.CARDS,
            **state.kept_widget("memory.card", 8, memory_model.CARDS),
        )
    )
    room = size << 30
    rows, fitting = [], []
    for level in asked.levels:
        found = memory_model.predicted(asked, level)
        longest = (
            memory_model.longest(asked.of, level, room, asked.batch, asked.device)
            if asked.work == "answer"
            else 0
        )
        if found.total <= room:
            fitting.append((level, longest))
        rows.append((level, found.total, longest))
    st.markdown(advice(asked, size, rows, fitting))
    with st.grid(max(2, len(rows)), min_column_width=150):
        for level, total, longest in rows:
            fits = total <= room
            st.metric(
                level_name(level),
                gib(total),
                (
                    t(f"up to {longest:,} tokens", f"最多 {longest:,} 词元")
                    if longest
                    else t("fits", "装得下") if fits else t("too large", "装不下")
                ),
                border=True, delta_arrow="off",
                delta_color="normal" if fits else "inverse",
            )  # fmt: skip


def advice(asked: Asked, size: int, rows: list[Any], fitting: list[tuple[str, int]]) -> str:
    """The sentence under the slider."""
    name, work = plain(asked.of.name), memory_model.work_name(asked.work)
    what = t(
        f"{rows_text(asked.batch)} of {asked.context:,} tokens",
        f"{asked.batch} × {asked.context:,} 词元",
    )
    if not fitting:
        level, total, longest = min(rows, key=lambda one: one[1])
        short = t(
            f" Shorter texts would fit: up to {longest:,} tokens at {level_name(level)}.",
            f"较短的文本可以：{level_name(level)} 下最多 {longest:,} 词元。",
        )
        return (
            ":red[:material/block:] "
            + t(
                f"**{name}** does not fit into {size} GB for {what} ({work}): even {level_name(level)} takes {gib(total)}.",
                f"**{name}** 以 {what}（{work}）装不进 {size} GB：即使 {level_name(level)} 也需要 {gib(total)}。",
            )
            + (short if longest else "")
        )
    best, longest = fitting[0]
    more = ""
    if asked.work == "answer" and len(fitting) > 1:
        last, further = fitting[-1]
        if further > longest:
            more = t(
                f" {level_name(last)} leaves room for up to {further:,} tokens.",
                f"{level_name(last)} 最多可容纳 {further:,} 词元。",
            )
    return ":green[:material/check_circle:] " + t(
        f"**{name}** fits into {size} GB at **{level_name(best)}** for {what} ({work}).{more}",
        f"**{name}** 以 **{level_name(best)}** 可在 {size} GB 内处理 {what}（{work}）。{more}",
    )


def lines_card(asked: Asked) -> None:
    """Memory against context and against batch."""
    with st.container(border=True, key="memory_lines"):
        panels.section(t("With longer texts and more rows", "文本更长、行数更多时"), "show_chart")
        contexts = [one for one in memory_model.contexts_of(asked.of) if one >= 128][:12]
        measured = memory_model.measured(asked) if asked.work == "answer" else {}
        card = int(state.remember("memory.card", 8))
        left, right = st.columns(2, gap="medium")
        with left:
            st.caption(
                t(
                    f"By tokens of a row, {rows_text(asked.batch)} at a time",
                    f"按每行词元数，同时 {asked.batch} 行",
                )
            )
            memory_figures.lines(
                {one: [(n, memory_model.predicted(asked, one, n).total) for n in contexts] for one in asked.levels},
                {
                    name: [(p.context, p.peak) for p in level.points if p.batch == asked.batch and p.peak]
                    for name, level in measured.items()
                },
                t("tokens of a row", "每行词元数"), "memory_by_context", asked.context, card,
            )  # fmt: skip
        with right:
            st.caption(
                t(
                    f"By rows at a time, {asked.context:,} tokens each",
                    f"按同时处理的行数，每行 {asked.context:,} 词元",
                )
            )
            memory_figures.lines(
                {one: [(n, memory_model.predicted(asked, one, 0, n).total) for n in memory_model.BATCHES]
                 for one in asked.levels},
                {
                    name: [(p.batch, p.peak) for p in level.points if p.context == asked.context and p.peak]
                    for name, level in measured.items()
                },
                t("rows at a time", "同时处理的行数"), "memory_by_batch", asked.batch, card,
            )  # fmt: skip


def earlier() -> None:
    """Measurements of before, and those under way."""
    jobs = state.job_store().list(limit=LISTED, kind="memory")
    if not jobs:
        return
    with st.container(border=True, key="memory_past", gap="xsmall"):
        panels.section(t("Measurements", "实测记录"), "history")
        for job in jobs:
            with st.container(
                horizontal=True, vertical_alignment="center", gap="small", key=f"past_{job.id}"
            ):
                page.link("memory", (plain(job.title),) * 2, ":material/memory:", job=job.id)
                panels.job_badge(job.state)
                levels = ", ".join(level_name(one) for one in job.task.get("levels", ()))
                done = job.done + job.failed
                st.caption(
                    t(
                        f"{done} of {job.total} levels ({levels}) · {panels.format_ago(job.created, time.time())}",
                        f"{done} / {job.total} 个精度（{levels}）· {panels.format_ago(job.created, time.time())}",
                    )
                )


def _csv(rows: list[dict[str, Any]]) -> str:
    """Predictions as CSV."""
    import csv
    import io

    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    names = ["model", "precision", "device", "context", "batch", "training", *parts, "total"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row["parts"] for row in rows)
    return "\ufeff" + out.getvalue()


main()
