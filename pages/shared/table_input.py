"""Choosing a table on a screen: upload, path or sample, how it is read, and its first rows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import tables
from glm_core.errors import GLMError
from glm_core.settings import DATA
from glm_core.tables import ReadOptions, Table, TableInfo
from pages.shared import panels, state
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from collections.abc import Callable

TYPES = ["csv", "tsv", "txt", "json", "jsonl", "ndjson", "xlsx", "xls", "parquet"]
SAMPLES = {
    "comments": ("comments.csv", ("60 comments, spam and normal", "60 条评论，垃圾与正常混合")),
    "questions": ("questions.jsonl", ("12 questions in two languages", "12 个中英文问题")),
}
STORED = re.compile(r"[0-9a-f]{32}\.[a-z]{3,7}")
KEPT_ROWS = 100
SHOWN_ROWS = 20
AT_ONCE_ROWS = 20_000  # copied or written within a second; more are copied in the background
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", "": "one column"}
DELIMITERS_ZH = {",": "逗号", "\t": "制表符", ";": "分号", "|": "竖线", "": "单列"}
ADDRESS = ("sample", "table", "file", "path")


@dataclass(frozen=True)
class Chosen:
    """A readable table: where it is, how it is read, what was found, and how many rows it has."""

    key: str
    path: Path
    name: str
    options: ReadOptions
    info: TableInfo
    first: list[tuple[str, ...]]
    rows: int
    warnings: tuple[str, ...]

    def open(self) -> Table:
        """The table, opened anew; GLMError where the file changed into something unreadable."""
        return tables.open_table(self.path, self.options, self.name)

    def row(self, number: int) -> tuple[str, ...]:
        """The cells of a row, counted from one."""
        if number <= len(self.first):
            return self.first[number - 1]
        return _row(str(self.path), _stamp(self.path), self.name, json.dumps(self.options.to_json()), number)


def choose() -> Chosen | None:
    """The table of this session, with its reading options and first rows; None until there is a readable one."""
    found = _source()
    if found is None:
        _offer()
        return None
    key, path, name = found
    if state.session("table.of") != key:
        state.session_set("table.of", key)
        state.session_set("table.options", {})
    with st.container(border=True, key="table_card"):
        row = panels.section(t("1 · Table", "1 · 表格"), "table_rows")
        try:
            options = ReadOptions.from_json(state.session("table.options", {}))
            chosen = _look(key, path, name, options)
        except GLMError as error:
            chosen = None
            _head(row, path, name, None)
            panels.problem(error)
        else:
            _head(row, path, name, chosen)
            _first_rows(chosen)
    return chosen


def suggested_template(chosen: Chosen) -> str:
    """A template to begin with: the sample's own, else the column with the longest texts."""
    from glm_core import batch
    from glm_core.minimodel.examples import CHINESE_TEMPLATES

    columns = chosen.info.columns
    if chosen.key == "sample:comments":
        return CHINESE_TEMPLATES[0].replace("{text}", "{comment}")
    lengths = [sum(len(row[i]) for row in chosen.first) for i in range(len(columns))]
    return batch.reference(columns[lengths.index(max(lengths))], columns) if columns else ""


def frame(columns: tuple[str, ...], rows: list[tuple[str, ...]], numbers: list[int] | None = None) -> Any:
    """Rows as a data frame of text for st.dataframe, numbered from one."""
    import pandas as pd

    index = pd.Index(numbers or range(1, len(rows) + 1), name=t("row", "行"))
    return pd.DataFrame(rows, columns=list(columns), index=index, dtype=object)


def widths(columns: tuple[str, ...], rows: list[tuple[str, ...]], most: int = 300) -> dict[str, Any]:
    """Columns as wide as their texts, none wider than `most` pixels, so that one long column hides no other."""

    def pixels(text: str) -> float:
        first = text.split("\n", 1)[0][:60]
        return sum(7.4 if ord(c) < 0x2E80 else 14 for c in first) + 24

    found = {}
    for i, column in enumerate(columns):
        need = max(pixels(column), *(pixels(row[i]) for row in rows)) if rows else pixels(column)
        found[column] = st.column_config.TextColumn(width=int(min(most, max(64, need))))
    return found


# --- where the table comes from: the address holds it, so that a reload finds it again ----------------------


def _source() -> tuple[str, Path, str] | None:
    """(key, path, name to show) of the table in the address or in this session, or None."""
    asked = {name: state.query(name) for name in ADDRESS if state.query(name)}
    if not any(name in asked for name in ("sample", "table", "path")):
        asked = state.session("table.address", {})
    if not asked:
        return None
    try:
        found = _resolve(asked)
    except GLMError as error:
        panels.problem(error)
        take({})
        return None
    take(asked)
    return found


def _resolve(asked: dict[str, str]) -> tuple[str, Path, str]:
    if name := asked.get("sample"):
        if name not in SAMPLES:
            raise GLMError(f"There is no sample {name!r}.", f"There are: {', '.join(SAMPLES)}.")
        file = SAMPLES[name][0]
        return f"sample:{name}", DATA / "samples" / file, file
    if path := asked.get("path"):
        found = state.allowed_table(path)
        if not found.is_file():
            raise GLMError(f"{found} is a folder.", "Give the path of a file in it.")
        return f"path:{found}", found, found.name
    stored = asked.get("table", "")
    path = state.uploads() / stored
    if not STORED.fullmatch(stored) or not path.is_file():
        raise GLMError("The uploaded table is no longer in the workspace.", "Upload it again.")
    return f"upload:{stored}", path, tables.client_name(asked.get("file", stored))


def take(asked: dict[str, str]) -> None:
    """Make a table the one of this session and of the page's address; {} for none."""
    state.session_set("table.address", asked)
    for name in ADDRESS:
        state.query_set(name, asked.get(name))


def leave_address() -> None:
    """Take the table out of the page's address, as where a job is shown; the session still knows it."""
    for name in ADDRESS:
        state.query_set(name, None)


def _offer() -> None:
    """Ask for a table: upload, sample or path."""
    with st.container(border=True, key="table_card"):
        panels.section(t("1 · Choose a table", "1 · 选择表格"), "table_rows")
        help_ = t(
            "Encoding, delimiter and sheet are found and can be changed afterwards. Every cell is read as text, "
            "so 007 stays 007.",
            "自动识别编码、分隔符和工作表，之后可以修改。所有单元格按文本读取，007 不会变成 7。",
        )
        label = t("CSV, TSV, Excel, JSON, JSONL or Parquet", "CSV、TSV、Excel、JSON、JSONL 或 Parquet")
        if stored := upload("table", label, help_):
            take(stored)
            st.rerun()
        left, right = st.columns(2, gap="large")
        with left:
            st.markdown(f"**{t('Or try a sample', '或试用示例')}**")
            with st.container(gap="xxsmall"):
                for name, (file, text) in SAMPLES.items():
                    if st.button(
                        f"{file} · {t(*text)}", key=f"sample_{name}", icon=":material/draft:", type="tertiary"
                    ):
                        take({"sample": name})
                        st.rerun()
        with right:
            path_box("path_form", "~/tables/comments.csv", _resolve, take)


def upload(place: str, label: str, help_: str | None = None) -> dict[str, str] | None:
    """A file sent just now, as an address names it; a new key drops the widget's copy of it from memory.

    place   keeps the keys of several apart
    """
    if not state.may("uploads"):
        return None
    limit, count = state.settings().max_upload_mb, f"uploads.{place}"
    number = state.session(count, 0)
    sent = st.file_uploader(
        label, type=TYPES, max_upload_size=limit, key=f"{place}_upload_{number}", help=help_
    )
    if sent is None:
        return None
    try:
        stored = tables.save_upload(sent, sent.name, state.uploads(), limit * 1_000_000)
    except GLMError as error:
        panels.problem(error)
        return None
    state.session_set(count, number + 1)
    return {"table": stored.name, "file": tables.client_name(sent.name)}


def path_box(
    key: str, example: str, check: Callable[[dict[str, str]], object], take: Callable[[dict[str, str]], None]
) -> None:
    """A box for a file on this computer; `check` raises GLMError for one that cannot be opened.

    Nothing is drawn for whoever may not open files by their path.
    """
    if not state.may("paths"):
        return
    roots = ", ".join(str(root) for root in state.settings().table_roots)
    st.markdown(f"**{t('Or a file already on this computer', '或本机上的文件')}**")
    with st.form(key, border=False):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            text = st.text_input(
                t("Path, for files too large to upload", "路径（适用于过大的文件）"),
                placeholder=example,
                key=f"{key}_text",
                help=t(f"Folders that may be read: {plain(roots)}", f"允许读取的文件夹：{plain(roots)}"),
            )
            sent = st.form_submit_button(t("Open", "打开"), icon=":material/folder_open:", key="open_path")
    if sent and text.strip():
        try:
            check({"path": text.strip()})
        except GLMError as error:
            panels.problem(error)
        else:
            take({"path": text.strip()})
            st.rerun()


# --- what was found ---------------------------------------------------------------------------------------


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


def _look(key: str, path: Path, name: str, options: ReadOptions) -> Chosen:
    found = _read(str(path), _stamp(path), name, json.dumps(options.to_json()))
    return Chosen(key, path, name, options, *found)


@st.cache_data(max_entries=6, show_spinner="Reading the table …")
def _read(
    path: str, stamp: int, name: str, options: str
) -> tuple[TableInfo, list[tuple[str, ...]], int, tuple[str, ...]]:
    """All of the table once, for its number of rows and for every complaint before a job starts."""
    table = tables.open_table(Path(path), ReadOptions.from_json(json.loads(options)), name)
    first, count = [], 0
    for cells in table.rows():
        count += 1
        if count <= KEPT_ROWS:
            first.append(cells)
    return table.info, first, count, tuple(dict.fromkeys(table.warnings))


@st.cache_data(max_entries=32, show_spinner=False)
def _row(path: str, stamp: int, name: str, options: str, number: int) -> tuple[str, ...]:
    table = tables.open_table(Path(path), ReadOptions.from_json(json.loads(options)), name)
    return next(islice(table.rows(), number - 1, number))


@st.cache_data(max_entries=6, show_spinner=False)
def _sheets(path: str, stamp: int, name: str) -> tuple[str, ...]:
    try:
        return tables.sheets(Path(path), name)
    except GLMError:
        return ()  # the page shows why the file cannot be read


def _head(row: Any, path: Path, name: str, chosen: Chosen | None) -> None:
    """What the file is and how it is read, in a line, with the way to change either."""
    with row:
        st.space("stretch")
        with st.popover(t("How it is read", "读取方式"), icon=":material/tune:", key="reading"):
            _reading(path, name, chosen)
        if st.button(t("Another table", "换一张表"), icon=":material/swap_horiz:", key="another_table"):
            take({})
            st.rerun()
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**{plain(name)}**", width="content")
        if chosen is not None:
            info, columns = chosen.info, len(chosen.info.columns)
            st.badge(info.format.upper(), color="violet")
            if info.encoding:
                st.badge(encoding_name(info.encoding), color="gray")
            if info.format == "csv":
                st.badge(delimiter_name(info.delimiter), color="gray")
            if info.sheet:
                st.badge(plain(info.sheet), icon=":material/tab:", color="gray")
            st.caption(
                t(
                    f"{chosen.rows:,} rows · {columns:,} columns · every cell as text",
                    f"{chosen.rows:,} 行 · {columns:,} 列 · 所有单元格按文本读取",
                )
            )


def encoding_name(encoding: str) -> str:
    """An encoding as an analyst calls it."""
    names = {"utf-8-sig": "UTF-8 BOM", "utf-8": "UTF-8", "gb18030": "GB18030 (GBK)"}
    codec, _, errors = encoding.partition(":")
    return names.get(codec, codec.upper()) + (" �" if errors else "")


def delimiter_name(delimiter: str) -> str:
    """A delimiter in words."""
    return t(DELIMITERS.get(delimiter, delimiter), DELIMITERS_ZH.get(delimiter, delimiter))


def _reading(path: Path, name: str, chosen: Chosen | None) -> None:
    """The reading options; "found" is what the file itself says."""
    info = chosen.info if chosen else None
    is_text = info is None or bool(info.encoding)
    if is_text:
        choices = [None, *tables.ENCODINGS, "utf-8:replace"]
        auto = encoding_name(info.encoding) if info and info.options.encoding is None else ""
        _option("encoding", t("Encoding", "编码"), choices, lambda one: encoding_name(str(one)), auto)
    if info is None or info.format == "csv":
        auto = delimiter_name(info.delimiter) if info and info.options.delimiter is None else ""
        _option("delimiter", t("Delimiter", "分隔符"), [None, *DELIMITERS], delimiter_name, auto)
    if names := _sheets(str(path), _stamp(path), name):
        auto = info.sheet if info and info.options.sheet is None else ""
        _option("sheet", t("Sheet", "工作表"), [None, *names], str, auto)
    if info is None or info.format in ("csv", "xlsx", "xls"):
        words = {True: t("the column names", "列名"), False: t("data already", "数据")}
        _option("header", t("The first row holds", "第一行是"), [True, False], words.__getitem__)
    if is_text:
        words = {
            "stop": t("stop and name them", "停止并指出"),
            "skip": t("leave them out", "跳过"),
            "join": t("join surplus cells into the last", "多余单元格并入最后一列"),
        }
        _option("on_bad_rows", t("Rows that do not fit", "不合规的行"), list(words), words.__getitem__)
    if info is None or info.format == "json":
        st.text_input(
            t("Key of the records (JSON)", "记录所在的键（JSON）"),
            value=state.session("table.options", {}).get("records_key") or "",
            key=f"read_records_key_{state.session('table.of')}",
            on_change=_set_option,
            args=("records_key",),
            placeholder="data",
        )


def _option(field: str, label: str, choices: list[Any], words: Any, found: str = "") -> None:
    default = getattr(ReadOptions(), field)
    now = state.session("table.options", {}).get(field, default)
    automatic = t("found", "自动") + (f": {found}" if found else "")
    st.selectbox(
        label,
        choices,
        index=choices.index(now) if now in choices else 0,
        format_func=lambda one: automatic if one is None else words(one),
        key=f"read_{field}_{state.session('table.of')}",
        on_change=_set_option,
        args=(field,),
    )


def _set_option(field: str) -> None:
    value = state.session(f"read_{field}_{state.session('table.of')}")
    if field == "records_key":
        value = value.strip() or None
    state.session_set("table.options", {**state.session("table.options", {}), field: value})


def _first_rows(chosen: Chosen) -> None:
    shown = chosen.first[:SHOWN_ROWS]
    st.dataframe(
        frame(chosen.info.columns, shown), height=min(36 * (len(shown) + 1) + 2, 222), key="first_rows"
    )
    if chosen.rows > len(shown):
        st.caption(t(f"The first {len(shown)} rows.", f"前 {len(shown)} 行。"))
    for warning in chosen.warnings:
        st.caption(f":orange[:material/warning:] {plain(said(warning))}")
