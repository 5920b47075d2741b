"""The labelled file of an evaluation: a sample of the workbench, or a table the analyst uploads or names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from glm_core import tables
from glm_core.errors import GLMError
from glm_core.settings import DATA
from glm_core.tables import ReadOptions
from pages.shared import panels, state, table_input
from pages.shared.table_input import Chosen
from pages.shared.text import plain, t

SHOWN_ROWS = 5
ADDRESS = "data"  # of a sample, in the page's address
KEPT = "evaluate.sample"


@dataclass(frozen=True)
class Sample:
    """A labelled file that comes with the workbench, and what is asked of it."""

    path: Path
    name: str
    text: tuple[str, str]
    prompt: str
    reference: str
    template: str = ""


SAMPLES = {
    "adverts": Sample(
        DATA / "adverts" / "test.jsonl", "adverts-test.jsonl",
        ("216 adverts to write from key words", "216 条广告，由关键词写文案"), "content", "summary",
    ),
    "comments": Sample(
        DATA / "comments" / "test.csv", "comments-test.csv",
        ("2,958 comments, spam or normal", "2,958 条评论，垃圾或正常"), "text", "answer",
        "判断下面的评论是垃圾还是正常，只回答一个词。\n评论：{text}",
    ),
}  # fmt: skip


def choose() -> tuple[Chosen, Sample | None] | None:
    """The file of this session, and its sample where it is one; None until there is one that can be read."""
    asked = state.query(ADDRESS) or state.session(KEPT, "")
    if state.query("table") or state.query("path"):
        asked = ""
    if asked in SAMPLES:
        take(asked)
        return _sample(asked), SAMPLES[asked]
    take("")
    if any(state.query(name) for name in table_input.ADDRESS) or state.session("table.address"):
        found = table_input.choose()
        return None if found is None else (found, None)
    _offer()
    return None


def take(name: str) -> None:
    """Make a sample the file of this session and of the page's address; "" for none."""
    state.session_set(KEPT, name)
    state.query_set(ADDRESS, name or None)


def leave_address() -> None:
    """Take the file out of the page's address, as where a run is shown; the session still knows it."""
    state.query_set(ADDRESS, None)
    table_input.leave_address()


def _offer() -> None:
    with st.container(border=True, key="evaluate_file"):
        panels.section(t("1 · Choose a labelled file", "1 · 选择带参考答案的文件"), "dataset")
        st.caption(
            t(
                "One row per question, with the answer you want: content/summary (ADGEN), text/label, "
                "question/A/B/C/D/answer (C-Eval, MMLU), question/answer (GSM8K), prompt/response, messages.",
                "每行一个问题和参考答案：content/summary（ADGEN）、text/label、question/A/B/C/D/answer（C-Eval、MMLU）、"
                "question/answer（GSM8K）、prompt/response、messages。",
            )
        )
        if stored := table_input.upload(
            "evaluate_file", t("JSON, JSONL, CSV or Excel", "JSON、JSONL、CSV 或 Excel")
        ):
            table_input.take(stored)
            st.rerun()
        left, right = st.columns(2, gap="large")
        with left:
            st.markdown(f"**{t('Or try a sample', '或试用示例')}**")
            with st.container(gap="xxsmall"):
                for name, sample in SAMPLES.items():
                    st.button(
                        f"{sample.name} · {t(*sample.text)}",
                        key=f"evaluate_sample_{name}",
                        icon=":material/draft:",
                        type="tertiary",
                        on_click=take,
                        args=(name,),
                    )
        with right:
            table_input.path_box("evaluate_path", "~/tables/test.jsonl", resolve, table_input.take)


def resolve(asked: dict[str, str]) -> Path:
    """The file of a path that was typed; GLMError where it is not there or may not be read."""
    found = state.allowed_table(asked["path"])
    if not found.is_file():
        raise GLMError(f"{found} is a folder.", "Give the path of a file in it.")
    return found


def _sample(name: str) -> Chosen:
    sample = SAMPLES[name]
    chosen = read(f"sample:{name}", sample.path, sample.name)
    with st.container(border=True, key="evaluate_file"):
        row = panels.section(t("1 · File", "1 · 文件"), "dataset")
        with row:
            st.space("stretch")
            st.button(
                t("Another file", "换一个文件"),
                icon=":material/swap_horiz:",
                key="evaluate_other",
                on_click=_forget,
            )
        facts(chosen)
        first_rows(chosen, "evaluate_first_rows")
    return chosen


def _forget() -> None:
    take("")
    table_input.take({})


def facts(chosen: Chosen) -> None:
    """A file in a line: name, format, rows and columns."""
    columns = len(chosen.info.columns)
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**{plain(chosen.name)}**", width="content")
        st.badge(chosen.info.format.upper(), color="violet")
        if chosen.info.encoding:
            st.badge(table_input.encoding_name(chosen.info.encoding), color="gray")
        st.caption(t(f"{chosen.rows:,} rows · {columns:,} columns", f"{chosen.rows:,} 行 · {columns:,} 列"))


def first_rows(chosen: Chosen, key: str) -> None:
    """The first rows of a file."""
    rows = chosen.first[:SHOWN_ROWS]
    names = chosen.info.columns
    st.dataframe(
        table_input.frame(names, rows),
        height=36 * (len(rows) + 1) + 2,
        column_config=table_input.widths(names, rows, 420),
        key=key,
    )
    for warning in chosen.warnings:
        st.caption(f":orange[:material/warning:] {plain(warning)}")


def read(key: str, path: Path, name: str) -> Chosen:
    """A file read with what it says about itself. GLMError where it cannot be read."""
    return Chosen(key, path, name, ReadOptions(), *_read(str(path), path.stat().st_mtime_ns, name))


@st.cache_data(max_entries=6, show_spinner="Reading the file …")
def _read(
    path: str, stamp: int, name: str
) -> tuple[tables.TableInfo, list[tuple[str, ...]], int, tuple[str, ...]]:
    table = tables.open_table(Path(path), ReadOptions(), name)
    first, count = [], 0
    for cells in table.rows():
        count += 1
        if count <= table_input.KEPT_ROWS:
            first.append(cells)
    return table.info, first, count, tuple(dict.fromkeys(table.warnings))
