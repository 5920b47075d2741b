"""The rows to fine-tune on: where the file comes from, how it is read, which columns, and what to measure with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import tables
from glm_core.errors import GLMError
from glm_core.settings import DATA
from glm_core.tables import ReadOptions
from pages.shared import finetune_columns, panels, state, table_input
from pages.shared import finetune_form as form
from pages.shared.text import plain, said, t

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from glm_core.finetune.examples import Columns, Loaded

SAMPLES = {
    "comments": (
        "comments/train.csv",
        "spam comments.csv",
        ("19,723 comments to tell spam from normal ones", "19,723 条评论，区分垃圾与正常"),
    ),
    "adverts": (
        "adverts/train.jsonl",
        "adverts.jsonl",
        ("1,440 adverts to write from key words", "1,440 条广告，由关键词写文案"),
    ),
}
STORED = re.compile(r"[0-9a-f]{32}\.[a-z]{3,7}")
ADDRESS = ("sample", "table", "file", "path")
FIRST_ROWS = 5


@dataclass(frozen=True)
class File:
    """A file of rows: `key` tells it from others, `name` is what it is called on screen."""

    key: str
    path: Path
    name: str

    @property
    def stamp(self) -> int:
        return self.path.stat().st_mtime_ns


@dataclass(frozen=True)
class Chosen:
    """What to train on and to measure with, as chosen; not yet read.

    dev        a file of its own; None where a share of the rows is held back
    dev_share  0 to measure with nothing
    """

    file: File
    options: ReadOptions
    columns: Columns | None
    dev: File | None
    dev_share: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal rows: what else is computed from them can be kept under it."""
        columns = tuple(asdict(self.columns).values()) if self.columns else ()
        dev = (str(self.dev.path), self.dev.stamp) if self.dev else ()
        options = json.dumps(self.options.to_json())
        return (str(self.file.path), self.file.stamp, self.file.name, options, columns, dev, self.dev_share)


def choose() -> Chosen | None:
    """The first step: the file, its columns and the rows to measure with; None until a file can be read."""
    file = _source()
    if file is None:
        _offer()
        return None
    with st.container(border=True, key="finetune_data"):
        row = panels.section(t("1 · Data", "1 · 数据"), "dataset")
        try:
            options = ReadOptions.from_json(form.value(f"read:{file.key}", {}))
            found = head(str(file.path), file.stamp, file.name, json.dumps(options.to_json()))
        except GLMError as error:
            _bar(row, file, None)
            panels.problem(error)
            return None
        _bar(row, file, found)
        columns = finetune_columns.choose(file.key, found)
        finetune_columns.first_rows(found, columns)
        dev, share = _dev(file)
    return Chosen(file, options, columns, dev, share)


# --- where the file comes from: the address holds it, so that a reload finds it again -----------------------


def _source() -> File | None:
    asked = {name: state.query(name) for name in ADDRESS if state.query(name)}
    if not any(name in asked for name in ("sample", "table", "path")):
        asked = form.value("address", {})
    if not asked:
        return None
    try:
        found = resolve(asked)
    except GLMError as error:
        panels.problem(error)
        take({})
        return None
    take(asked)
    return found


def resolve(asked: dict[str, str]) -> File:
    """The file an address means; GLMError where it is not there or may not be read."""
    if name := asked.get("sample"):
        if name not in SAMPLES:
            raise GLMError(f"There is no sample {name!r}.", f"There are: {', '.join(SAMPLES)}.")
        return File(f"sample:{name}", DATA / SAMPLES[name][0], SAMPLES[name][1])
    if path := asked.get("path"):
        found = state.allowed_table(path)
        if not found.is_file():
            raise GLMError(f"{found} is a folder.", "Give the path of a file in it.")
        return File(f"path:{found}", found, found.name)
    stored = asked.get("table", "")
    path_ = state.uploads() / stored
    if not STORED.fullmatch(stored) or not path_.is_file():
        raise GLMError("The uploaded table is no longer in the workspace.", "Upload it again.")
    return File(f"upload:{stored}", path_, tables.client_name(asked.get("file", stored)))


def take(asked: dict[str, str]) -> None:
    """Make a file the one of this session and of the page's address; {} for none."""
    form.put("address", asked)
    for name in ADDRESS:
        state.query_set(name, asked.get(name))


def leave_address() -> None:
    """Take the file out of the page's address, as where a training is shown; the session still knows it."""
    for name in ADDRESS:
        state.query_set(name, None)


def _offer() -> None:
    with st.container(border=True, key="finetune_data"):
        panels.section(t("1 · Choose the rows to learn from", "1 · 选择训练数据"), "dataset")
        st.caption(
            t(
                "One row per example: a prompt and the answer you want. Columns are found by their names: "
                "content/summary (ADGEN), content/label (SpamClassify), text/label, prompt/response, "
                "question/answer, instruction/input/output (Alpaca), messages or conversations (several rounds), "
                "and a history column.",
                "每行一个样本：提示和期望的回答。按列名自动识别：content/summary（ADGEN）、content/label（SpamClassify）、"
                "text/label、prompt/response、question/answer、instruction/input/output（Alpaca）、"
                "messages 或 conversations（多轮），以及 history 列。",
            )
        )
        if stored := table_input.upload(
            "finetune_train", t("JSON, JSONL, CSV or Excel", "JSON、JSONL、CSV 或 Excel")
        ):
            take(stored)
            st.rerun()
        left, right = st.columns(2, gap="large")
        with left:
            st.markdown(f"**{t('Or learn how it goes with a sample', '或用示例试一试')}**")
            with st.container(gap="xxsmall"):
                for name, (_, shown, text) in SAMPLES.items():
                    label = f"{shown} · {t(*text)}"
                    if st.button(label, key=f"sample_{name}", icon=":material/draft:", type="tertiary"):
                        take({"sample": name})
                        st.rerun()
        with right:
            table_input.path_box("finetune_path", "~/tables/train.jsonl", resolve, take)


# --- how it is read -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What the first rows of a file show."""

    info: tables.TableInfo
    rows: list[tuple[str, ...]]


@st.cache_data(max_entries=6, show_spinner=False)
def head(path: str, stamp: int, name: str, options: str) -> Head:
    table = tables.open_table(Path(path), ReadOptions.from_json(json.loads(options)), name)
    rows = []
    for cells in table.rows():
        rows.append(cells)
        if len(rows) == FIRST_ROWS:
            break
    return Head(table.info, rows)


def _bar(row: DeltaGenerator, file: File, found: Head | None) -> None:
    """What the file is and how it is read, in a line, with the way to change either."""
    with row:
        st.space("stretch")
        with st.popover(t("How it is read", "读取方式"), icon=":material/tune:", key="finetune_reading"):
            _reading(file, found)
        if st.button(t("Other data", "换一份数据"), icon=":material/swap_horiz:", key="other_data"):
            take({})
            st.rerun()
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**{plain(file.name)}**", width="content")
        if found is not None:
            st.badge(found.info.format.upper(), color="violet")
            if found.info.encoding:
                st.badge(table_input.encoding_name(found.info.encoding), color="gray")
            if found.info.format == "csv":
                st.badge(table_input.delimiter_name(found.info.delimiter), color="gray")
            if found.info.sheet:
                st.badge(plain(found.info.sheet), icon=":material/tab:", color="gray")


def _reading(file: File, found: Head | None) -> None:
    info = found.info if found else None
    if info is None or info.encoding:
        choices = [None, *tables.ENCODINGS, "utf-8:replace"]
        _option(file, "encoding", t("Encoding", "编码"), choices, table_input.encoding_name)
    if info is None or info.format == "csv":
        choices = [None, *table_input.DELIMITERS]
        _option(file, "delimiter", t("Delimiter", "分隔符"), choices, table_input.delimiter_name)
    try:
        names = tables.sheets(file.path, file.name)
    except GLMError:
        names = ()  # the page says why the file cannot be read
    if names:
        _option(file, "sheet", t("Sheet", "工作表"), [None, *names], str)
    if info is None or info.format in ("csv", "xlsx", "xls"):
        words = {True: t("the column names", "列名"), False: t("data already", "数据")}
        _option(file, "header", t("The first row holds", "第一行是"), [True, False], words.__getitem__)
    rows = {
        "stop": t("stop and name them", "停止并指出"),
        "skip": t("leave them out", "跳过"),
        "join": t("join surplus cells into the last", "多余单元格并入最后一列"),
    }
    if info is None or info.encoding:
        _option(
            file, "on_bad_rows", t("Rows that do not fit", "不合规的行"), list(rows), rows.__getitem__
        )  # fmt: skip


def _option(file: File, field: str, label: str, choices: list[Any], words: Any) -> None:
    kept, widget = f"read:{file.key}", f"finetune_read_{field}_{file.key}"
    now = form.value(kept, {}).get(field, getattr(ReadOptions(), field))

    def changed() -> None:
        form.put(kept, form.value(kept, {}) | {field: state.session(widget)})

    st.selectbox(
        label,
        choices,
        index=choices.index(now) if now in choices else 0,
        format_func=lambda one: t("found out", "自动识别") if one is None else words(one),
        key=widget,
        on_change=changed,
    )


# --- what to measure with -----------------------------------------------------------------------------------


def _dev(file: File) -> tuple[File | None, float]:
    """(a file of its own, share of the rows): what the training is measured with and does not learn from."""
    words = {
        "share": t("A share of the rows", "留出一部分行"),
        "file": t("A file of its own", "单独的文件"),
        "none": t("Nothing", "不测量"),
    }
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        how = st.segmented_control(
            t("Measured with", "用于测量的数据"),
            list(words),
            format_func=words.__getitem__,
            required=True,
            help=t(
                "Rows that are not learned from: the dev loss shows whether the model learns the task or only "
                "the rows. Rows that ask the same, and rows of one conversation, stay on one side; classes keep "
                "their shares; the same rows are chosen every time.",
                "不参与训练的行：开发集损失能看出模型学会了任务，还是只记住了这些行。"
                "相同的问题和同一段对话会留在同一边，各类别比例不变，每次选出的行都相同。",
            ),
            **form.held("dev_how", "share", list(words), "default"),
        )
        if how == "share":
            percent = st.number_input(
                t("Share, %", "比例（%）"),
                min_value=1,
                max_value=50,
                width=130,
                **form.held("dev_percent", 10),
            )
            return None, percent / 100
    if how != "file":
        st.caption(
            ":orange[:material/warning:] "
            + t(
                "Without such rows there is no dev loss, no comparison with a baseline and no accuracy afterwards.",
                "没有这样的行，就没有开发集损失，事后也无法与基线比较或给出准确率。",
            )
        )
        return None, 0.0
    asked = form.value(f"dev:{file.key}", {})
    if asked:
        try:
            dev = resolve(asked)
        except GLMError as error:
            panels.problem(error)
        else:
            with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                st.markdown(f":material/rule: **{plain(dev.name)}**", width="content")
                if st.button(t("Remove", "移除"), key="remove_dev", type="tertiary", icon=":material/close:"):
                    form.put(f"dev:{file.key}", None)
                    st.rerun()
            return dev, 0.0
    if stored := table_input.upload(
        "finetune_dev", t("Dev file, with the same columns", "开发集文件（列名相同）")
    ):
        form.put(f"dev:{file.key}", stored)
        st.rerun()
    return None, 0.1


def read(chosen: Chosen) -> tuple[Loaded, Loaded | None]:
    """The rows of both files, with everything that is wrong with them; nothing is raised."""
    from glm_core.finetune import examples

    found = examples.read(chosen.file.path, chosen.columns, chosen.options, name=chosen.file.name)
    if chosen.dev is None:
        return found, None
    columns = chosen.columns or found.columns
    return found, examples.read(
        chosen.dev.path, columns, chosen.options, name=chosen.dev.name, training=False
    )


def problem_lines(problems: Any) -> None:
    """Everything found in the data, the worst first, each with what to do."""
    marks = {
        "stop": ":red[:material/block:]",
        "warn": ":orange[:material/warning:]",
        "note": ":material/info:",
    }
    for one in sorted(problems, key=lambda one: list(marks).index(one.severity)):
        todo = f" :gray[{plain(said(one.todo))}]" if one.todo else ""
        st.markdown(f"{marks[one.severity]} {plain(said(one.message))}{todo}")
