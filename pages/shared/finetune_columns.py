"""Which columns of a file hold the prompt, the response and the rounds before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from pages.shared import finetune_form as form
from pages.shared import table_input
from pages.shared.text import plain, t

if TYPE_CHECKING:
    from glm_core.finetune.examples import Columns
    from pages.shared.finetune_data import Head

# What a data set of this shape is called, by the columns `guess_columns` finds.
KINDS = {
    ("content", "summary"): "ADGEN",
    ("content", "label"): "SpamClassify",
    ("instruction", "output"): "Alpaca",
    ("context", "target"): "ChatGLM-Tuning",
    ("messages", "messages"): "OpenAI messages",
    ("conversations", "conversations"): "ShareGPT",
}


def choose(key: str, found: Head) -> Columns | None:
    """Prompt, response and history, as found by their names or as chosen; None while one of the two is missing."""
    from glm_core.finetune.examples import Columns, guess_columns

    have = list(found.info.columns)
    guess = guess_columns(have)
    scope = f"{key}:{hash(tuple(have))}"
    choices = ["", *have]  # a choice of None would be drawn as none made
    words = {
        "prompt": t("choose a column", "请选择列"),
        "response": t("choose a column", "请选择列"),
        "history": t("none", "无"),
    }
    labels = {
        "prompt": t("Prompt column", "提示列"),
        "response": t("Response column", "回答列"),
        "history": t("Earlier rounds", "历史对话列"),
    }
    helps = {
        "prompt": t("What the model is asked.", "输入给模型的内容。"),
        "response": t(
            "The answer to learn. The same column as the prompt where each cell holds a whole conversation.",
            "要学习的回答。若每个单元格含整段对话，请选择与提示相同的列。",
        ),
        "history": t(
            'A column with the rounds before, as [["question", "answer"], …].',
            "此前各轮对话所在的列，形如 [[“问”, “答”], …]。",
        ),
    }
    picked: dict[str, str] = {}
    with st.grid(3, min_column_width=180):
        for name, label in labels.items():
            found_out = (getattr(guess, name) if guess else None) or ""
            picked[name] = st.selectbox(
                label,
                choices,
                format_func=lambda one, name=name: one or words[name],
                help=helps[name],
                **form.held(f"{name}:{scope}", found_out, choices, "index"),
            )
    prompt, response, history = picked["prompt"], picked["response"], picked["history"] or None
    if not prompt or not response:
        st.warning(
            t(
                "The names of the columns do not say which is the prompt and which the response: choose both.",
                "无法从列名判断哪一列是提示、哪一列是回答：请选择这两列。",
            ),
            icon=":material/help:",
        )
        return None
    if guess and (guess.prompt, guess.response, guess.history) == (prompt, response, history):
        kind = KINDS.get((prompt.casefold(), response.casefold()))
        if kind:
            extra = f" + {plain(guess.input)}" if guess.input else ""
            st.caption(
                f":material/auto_awesome: {t('Recognised format', '识别出的格式')}: **{kind}** "
                f"({plain(prompt)}{extra} → {plain(response)})"
            )
        return guess
    return Columns(prompt, response, history)


def first_rows(found: Head, columns: Columns | None) -> None:
    """The first rows, with what is learned in front."""
    if not found.rows:
        return
    names = found.info.columns
    order = (
        [one for one in (columns.prompt, columns.input, columns.response, columns.history) if one]
        if columns
        else []
    )
    at = [names.index(one) for one in dict.fromkeys([*order, *names])][:6]
    rows = [tuple(row[i] for i in at) for row in found.rows]
    shown = tuple(names[i] for i in at)
    st.dataframe(
        table_input.frame(shown, rows),
        height=36 * (len(rows) + 1) + 2,
        column_config=table_input.widths(shown, rows, 420),
        key="finetune_first_rows",
    )
