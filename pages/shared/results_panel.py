"""The results of a job: a page of the table at a time, how often each answer came, and the downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import batch
from glm_core.errors import GLMError
from pages.shared import charts, panels, state, table_input
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from collections.abc import Callable

    from glm_core.jobs import Job

PAGE_ROWS = 100
MOST_ANSWERS = 12
IN_MEMORY_BYTES = 100_000_000
FORMATS = {
    "csv": ("CSV", "text/csv"),
    "xlsx": ("Excel", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
    "jsonl": ("JSONL", "application/jsonl"),
    "parquet": ("Parquet", "application/vnd.apache.parquet"),
}
COLORS = {  # plotly does not take them from the theme: bar, text on the bar, text, line
    "light": ("#4f46e5", "#ffffff", "#1b1f33", "#e2e4f0"),
    "dark": ("#6d6ff0", "#ffffff", "#e8eaf6", "#2a2f47"),
}
FONT = "Source Sans, Noto Sans CJK SC, PingFang SC, Microsoft YaHei, sans-serif"


def results(job: Job) -> None:
    """Answers, downloads, the table and how it was made."""
    counts = _answers(job.id, f"{job.attempt}-{job.done}-{job.failed}")
    if counts:
        left, right = st.columns([1, 1])
        with left.container(border=True, height="stretch", key="answers"):
            _distribution(job, counts)
        card = right.container(border=True, height="stretch", key="downloads")
    else:
        card = st.container(border=True, key="downloads")
    with card:
        downloads(
            job,
            batch.export,
            t(
                "Your columns unchanged and in their order, then the answer, its status, whether the prompt was "
                "truncated, the seconds and a note.",
                "原有列及顺序不变，其后依次为回答、状态、是否截断、用时和备注。",
            ),
        )
    with st.container(border=True, key="results"):
        _table(job)


# --- the table --------------------------------------------------------------------------------------------


def _table(job: Job) -> None:
    row = panels.section(t("Results", "结果"), "table_rows")
    sizes = {"all": job.total, "failed": job.failed, "truncated": job.truncated}
    labels = {"all": t("All", "全部"), "failed": t("Failed", "失败"), "truncated": t("Truncated", "被截断")}
    with row:
        st.space("stretch")
        chosen = st.segmented_control(
            t("Rows shown", "显示的行"),
            list(sizes),
            format_func=lambda one: f"{labels[one]} {sizes[one]:,}",
            default="all",
            required=True,
            key=f"filter_{job.id}",
            label_visibility="collapsed",
        )
    pages = max(1, -(-sizes[chosen] // PAGE_ROWS))
    place = st.container()
    number = 1
    if pages > 1:
        number = st.pagination(pages, key=f"page_{job.id}_{chosen}_{pages}")
    found = state.job_store().results_page(
        job.id, (number - 1) * PAGE_ROWS, PAGE_ROWS, None if chosen == "all" else chosen
    )
    task = batch.BatchTask.from_json(job.task)
    width, rows = len(task.columns), []
    for _, cells, result in found:
        own = (*cells, *[""] * width)[:width]
        if result is None:
            rows.append((*own, "", t("not run", "未运行"), "", "", ""))
        else:
            status = t("ok", "成功") if result.status == "ok" else t("failed", "失败")
            cut = t("yes", "是") if result.truncated else ""
            rows.append((*own, result.prediction, status, cut, f"{result.seconds:.2f} s", said(result.error)))
    columns = tuple(batch.export_columns(task))
    if not rows:
        place.caption(t("No rows here.", "没有这样的行。"))
        return
    place.dataframe(
        table_input.frame(columns, rows, [idx + 1 for idx, _, _ in found]),
        height=min(36 * (len(rows) + 1) + 2, 470),
        column_config=table_input.widths(columns, rows, 290),
        key=f"table_{job.id}_{chosen}",
    )


# --- how often each answer came ---------------------------------------------------------------------------


@st.cache_data(max_entries=16, show_spinner="Counting the answers …")
def _answers(job_id: str, stamp: str) -> list[tuple[str, int]]:
    """The answers with their counts, most frequent first; none where there are more than a chart can hold."""
    return state.job_store().answer_counts(job_id, MOST_ANSWERS)


def _distribution(job: Job, counts: list[tuple[str, int]]) -> None:
    go = charts.plotly()

    kinds = len(counts)
    row = panels.section(t("Answers", "回答分布"), "bar_chart")
    with row:
        st.space("stretch")
        st.caption(t(f"{kinds} different", f"{kinds} 种"), width="content")
    bar, inside, text, line = COLORS.get(st.context.theme.type or "light", COLORS["light"])
    total, most = sum(count for _, count in counts), counts[0][1]
    names = [_short(answer) for answer, _ in counts]
    wide = [count > most * 0.3 for _, count in counts]  # where the figure has room on its bar
    figure = go.Figure(
        go.Bar(
            x=[count for _, count in counts],
            y=list(range(kinds)),
            orientation="h",
            marker={"color": bar, "cornerradius": 4},
            text=[f"{count:,} · {count / total:.0%}" for _, count in counts],
            textposition=["inside" if fits else "outside" for fits in wide],
            insidetextanchor="end",
            insidetextfont={"color": inside},
            outsidetextfont={"color": text},
            customdata=names,
            hovertemplate="%{customdata}: %{x:,}<extra></extra>",
            constraintext="none",
            cliponaxis=False,
        )
    )
    figure.update_layout(
        height=40 * kinds + 16,
        margin={"l": 0, "r": 8, "t": 4, "b": 4},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": text},
        bargap=0.28,
        showlegend=False,
        dragmode=False,
        hoverlabel={"bgcolor": line, "font": {"color": text, "family": FONT}},
    )
    figure.update_xaxes(visible=False, fixedrange=True, range=[0, most * 1.02])
    figure.update_yaxes(
        autorange="reversed", tickvals=list(range(kinds)), ticktext=[f"{name}  " for name in names], fixedrange=True,
        showgrid=False, zeroline=False, automargin=True, tickfont={"color": text},
    )  # fmt: skip
    st.plotly_chart(figure, key=f"chart_{job.id}", theme=None, config={"displayModeBar": False})


def _short(answer: str) -> str:
    shown = " ".join(answer.split()) or t("(empty)", "（空）")
    shown = shown if len(shown) <= 18 else shown[:17] + "…"
    # plotly reads a little HTML in its labels; an answer is text
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- downloads --------------------------------------------------------------------------------------------


def downloads(job: Job, export: Callable[..., object], behind: str) -> None:
    """The analyst's table with the answers beside it, in four formats, and the manifest.

    export  writes it: batch.export, or that of another kind of job
    behind  which columns follow the analyst's own
    """
    panels.section(t("Download", "下载"), "download")
    form = st.segmented_control(
        t("Format", "格式"),
        list(FORMATS),
        format_func=lambda one: FORMATS[one][0],
        required=True,
        width="stretch",
        label_visibility="collapsed",
        **state.kept_widget("batch.export_format", "csv", list(FORMATS), "default"),
    )
    guard = True
    if form == "csv":
        guard = st.toggle(
            t("Safe to open in Excel", "可安全用 Excel 打开"),
            help=t(
                "A cell that Excel would run as a formula, such as =1+1, gets an apostrophe in front. Switch it off "
                "where a program reads the file: then every cell is written exactly as it is.",
                "会被 Excel 当作公式的单元格（如 =1+1）前会加一个撇号。若由程序读取，请关闭：单元格将原样写出。",
            ),
            **state.kept_widget("batch.export_guard", True),
        )
    file = _file(job, form, guard)
    if not file.is_file():
        if job.total > table_input.AT_ONCE_ROWS and not st.button(
            t(f"Write the file ({job.total:,} rows)", f"生成文件（{job.total:,} 行）"),
            icon=":material/save:",
            key=f"write_{job.id}",
        ):
            return
        try:
            with st.spinner(t("Writing the file …", "正在生成文件……")):
                export(state.job_store(), job.id, file, form, guard=guard)
        except GLMError as error:
            panels.problem(error)
            return
    _offer(job, form, file)
    st.caption(behind)


def _file(job: Job, form: str, guard: bool) -> Path:
    """Where an export lies: a name that changes whenever its content does, and never the analyst's."""
    stamp = f"{job.attempt}-{job.done}-{job.failed}" + ("" if guard else "-plain")
    return state.exports() / f"{job.id}-{stamp}.{form}"


def _offer(job: Job, form: str, file: Path) -> None:
    manifest = file.with_name(f"{file.name}.manifest.json")
    name = f"{Path(job.title).stem or 'table'}-{job.id[:15]}"
    with st.container(horizontal=True, vertical_alignment="center"):
        if file.stat().st_size <= IN_MEMORY_BYTES:
            with file.open("rb") as data:
                st.download_button(
                    f"{FORMATS[form][0]} · {panels.format_bytes(file.stat().st_size)}",
                    data,
                    file_name=f"{name}.{form}",
                    mime=FORMATS[form][1],
                    icon=":material/download:",
                    type="primary",
                    key=f"download_{job.id}_{file.name}",
                    on_click="ignore",
                )
        if manifest.is_file():
            st.download_button(
                t("Manifest", "清单"),
                manifest.read_bytes(),
                file_name=f"{name}.{form}.manifest.json",
                mime="application/json",
                icon=":material/receipt_long:",
                key=f"manifest_{job.id}_{file.name}",
                on_click="ignore",
                help=t(
                    "Model and its hash, prompt, settings, labels, file hash, versions, counts: how these answers were made.",
                    "模型及其哈希、提示词、设置、标签、文件哈希、版本和计数：回答是如何产生的。",
                ),
            )
    if file.stat().st_size > IN_MEMORY_BYTES:
        size = panels.format_bytes(file.stat().st_size)
        st.caption(
            t(f"{size} is too large for the browser; it lies here:", f"{size}，过大而无法由浏览器下载：")
        )
        st.code(str(file), language=None, wrap_lines=True)
    for note in _notes(manifest):
        st.caption(f":material/info: {plain(said(note))}")


def _notes(manifest: Path) -> list[str]:
    try:
        return [
            str(note) for note in json.loads(manifest.read_text(encoding="utf-8")).get("export_notes", [])
        ]
    except (OSError, ValueError):
        return []
