"""The prompt and the answer settings of a batch: typed once, kept over pages and restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import batch
from glm_core.engine import GenerationSettings
from pages.shared import panels, state, table_input
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from pages.shared.table_input import Chosen

MOST_BUTTONS = 30


@dataclass(frozen=True)
class Asked:
    """What to ask of every row, and how."""

    template: str
    system: str
    output_column: str
    limit: int | None
    settings: GenerationSettings


def prompt(chosen: Chosen) -> Asked:
    """Template, system prompt, output column, rows and decoding."""
    panels.section(t("2 · Prompt", "2 · 提示词"), "edit_note")
    template = _template(chosen)
    left, right = st.columns(2)
    with left:
        output = st.text_input(
            t("Output column", "输出列名"),
            help=t(
                "The name of the column with the answers. If the table has it already, a number is added.",
                "回答所在列的名称。若与已有列重名，会自动加编号。",
            ),
            **state.kept_widget("batch.output_column", "answer"),
        )
    with right:
        limit = st.number_input(
            t("First rows only", "仅前若干行"),
            min_value=1,
            value=None,
            placeholder=t(f"all {chosen.rows:,}", f"全部 {chosen.rows:,} 行"),
            key=f"limit_{chosen.key}",
            persist_state="session",
            help=t("Leave it empty for the whole table.", "留空则处理整张表格。"),
        )
    with st.expander(t("System prompt and decoding", "系统提示词与解码设置"), icon=":material/tune:"):
        system = _system()
        settings = _decoding()
    return Asked(
        str(template or ""), system, str(output or ""), None if limit is None else int(limit), settings
    )


def _template(chosen: Chosen) -> str:
    """The template: as typed, else one that suits the table."""
    scope = _scope(chosen)
    name, widget = f"batch.{scope}.template", f"widget.batch.{scope}.template"
    typed, table = state.remember(name, ""), (chosen.key, chosen.info.columns)
    if state.session(widget) is None or (not typed and state.session("batch.for") != table):
        state.session_set(widget, typed or table_input.suggested_template(chosen))
    state.session_set("batch.for", table)
    _column_buttons(chosen, scope)
    text = st.text_area(
        t("Template", "模板"),
        height=132,
        value=state.session(widget),  # see state.kept_widget
        key=widget,
        on_change=lambda: state.remember_set(name, state.session(widget)),
        help=t(
            "`{column}` is replaced by the cell of each row. `{{` and `}}` are braces that are text.",
            "`{列名}` 会替换为每行对应的单元格。`{{` 和 `}}` 表示普通的花括号。",
        ),
    )
    return str(text or "")


def _scope(chosen: Chosen) -> str:
    """Samples have a template of their own, so that trying one never touches the analyst's."""
    return chosen.key.replace(":", "_") if chosen.key.startswith("sample:") else "own"


def _column_buttons(chosen: Chosen, scope: str) -> None:
    columns = chosen.info.columns
    key = f"insert_{chosen.key}"

    def insert() -> None:
        if (column := state.session(key)) is None:
            return
        before = state.session(f"widget.batch.{scope}.template") or ""
        space = " " if before and not before[-1].isspace() and before[-1] not in "：:“(（「" else ""
        _set(scope, before + space + batch.reference(column, columns))
        state.session_set(key, None)

    st.pills(
        t("Insert a column", "插入列"),
        columns[:MOST_BUTTONS],
        format_func=lambda one: f":material/add: {plain(one)}",
        key=key,
        on_change=insert,
    )
    if len(columns) > MOST_BUTTONS:
        st.caption(
            t(
                f"{len(columns) - MOST_BUTTONS:,} more columns: type their names in braces.",
                f"另有 {len(columns) - MOST_BUTTONS:,} 列：请在花括号中输入列名。",
            )
        )


def _set(scope: str, template: str) -> None:
    state.session_set(f"widget.batch.{scope}.template", template)
    state.remember_set(f"batch.{scope}.template", template)


def use_button(chosen: Chosen, template: str) -> None:
    """A button that takes the suggested template."""
    st.button(
        t("Use a template that fits this table", "使用适合此表格的模板"),
        icon=":material/auto_fix:",
        key="use_suggested",
        on_click=_set,
        args=(_scope(chosen), template),
    )


def _system() -> str:
    engine = state.current_engine()
    refused = engine is not None and engine.tokenizer.generation == "chatglm2"
    text = st.text_area(
        t("System prompt (optional)", "系统提示词（可选）"),
        height=68,
        disabled=refused,
        help=t("ChatGLM2 knows no system prompt.", "ChatGLM2 不支持系统提示词。") if refused else None,
        **state.kept_widget("batch.system", ""),
    )
    return "" if refused else str(text or "")


def _decoding() -> GenerationSettings:
    left, right = st.columns(2)
    with left:
        new_tokens = st.number_input(
            t("Longest answer (tokens)", "回答最长（词元）"),
            min_value=1,
            max_value=32768,
            help=t("A longer answer is cut there, with a note.", "超出部分会被截断并注明。"),
            **state.kept_widget("batch.max_new_tokens", 64),
        )
    with right:
        temperature = st.number_input(
            t("Temperature", "温度"),
            min_value=0.0,
            max_value=2.0,
            step=0.1,
            help=t(
                "0 takes the likeliest token every time (greedy): the same row gets the same answer.",
                "0 表示每次取最可能的词元（贪心）：相同的行得到相同的回答。",
            ),
            **state.kept_widget("batch.temperature", 0.0),
        )
    greedy = temperature == 0
    why = t("Only where the temperature is above 0.", "仅在温度大于 0 时有效。")
    left, right = st.columns(2)
    with left:
        top_p = st.number_input(
            "Top-p",
            min_value=0.05,
            max_value=1.0,
            step=0.05,
            disabled=greedy,
            help=why if greedy else None,
            **state.kept_widget("batch.top_p", 0.8),
        )
    with right:
        seed = st.number_input(
            t("Seed", "随机种子"),
            min_value=0,
            max_value=2**31,
            disabled=greedy,
            help=why if greedy else t("Same seed, same answers.", "相同种子得到相同回答。"),
            **state.kept_widget("batch.seed", 0),
        )
    stop = st.text_area(
        t("Stop texts, one per line", "停止文本，每行一个"),
        height=68,
        help=t("An answer ends before the first of these.", "回答在首次出现这些文本之前结束。"),
        **state.kept_widget("batch.stop", ""),
    )
    texts = tuple(dict.fromkeys(line for line in str(stop or "").splitlines() if line.strip()))
    return GenerationSettings(
        max_new_tokens=int(new_tokens),
        temperature=float(temperature),
        top_p=1.0 if greedy else float(top_p),
        seed=None if greedy else int(seed),
        stop=texts,
    )
