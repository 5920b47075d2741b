"""Predictions made elsewhere: generated_predictions.txt, or a table with a column of answers beside the correct ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from glm_core import evaluate
from glm_core.errors import GLMError
from pages.shared import evaluate_file, evaluate_words, panels, state, table_input
from pages.shared.text import t

if TYPE_CHECKING:
    from pages.shared.table_input import Chosen

KEPT = "evaluate.import"


def form(draft: dict[str, Any]) -> None:
    """The file, its two columns, and the start."""
    with st.container(border=True, key="evaluate_import"):
        row = panels.section(t("Predictions made elsewhere", "外部生成的预测"), "move_to_inbox")
        kept = state.session(KEPT)
        chosen = None
        if kept:
            try:
                path, name = _resolve(kept)
                chosen = evaluate_file.read(f"import:{path}", path, name)
            except GLMError as error:
                state.session_set(KEPT, None)
                panels.problem(error)
        if chosen is None:
            _offer()
            return
        with row:
            st.space("stretch")
            st.button(
                t("Another file", "换一个文件"),
                icon=":material/swap_horiz:",
                key="evaluate_import_other",
                on_click=state.session_set,
                args=(KEPT, None),
            )
        evaluate_file.facts(chosen)
        evaluate_file.first_rows(chosen, "evaluate_import_rows")
        _columns(draft, chosen)


def _resolve(kept: dict[str, str]) -> tuple[Path, str]:
    if "path" in kept:
        path = evaluate_file.resolve(kept)
        return path, path.name
    path = state.uploads() / kept["table"]
    if not path.is_file():
        raise GLMError("The uploaded table is no longer in the workspace.", "Upload it again.")
    return path, kept["file"]


def _offer() -> None:
    st.caption(
        t(
            'generated_predictions.txt of the released scripts ({"labels", "predict"} lines), or JSONL, CSV and Excel '
            "with a column of predictions beside the correct answers. Every blank prediction counts as an answer: it scores 0.",
            '官方脚本的 generated_predictions.txt（每行 {"labels", "predict"}），或含预测列与参考答案列的 JSONL、CSV、Excel。'
            "空白预测也计入，得 0 分。",
        )
    )
    if stored := table_input.upload(
        "evaluate_import", t("TXT, JSONL, CSV or Excel", "TXT、JSONL、CSV 或 Excel")
    ):
        state.session_set(KEPT, stored)
        st.rerun()
    table_input.path_box(
        "evaluate_import_path",
        "~/output/generated_predictions.txt",
        evaluate_file.resolve,
        lambda asked: state.session_set(KEPT, asked),
    )


def _guess(columns: list[str]) -> tuple[str, str]:
    """(reference, prediction) by the names that programs write."""
    from glm_core.evaluate.task import IMPORTED

    by_name = {one.strip().casefold(): one for one in reversed(columns)}
    for a, b in IMPORTED:
        if a in by_name and b in by_name:
            return by_name[a], by_name[b]
    return "", ""


def _columns(draft: dict[str, Any], chosen: Chosen) -> None:
    have = list(chosen.info.columns)
    guessed = _guess(have)
    choices, picked = ["", *have], []
    words = (
        ("reference", t("Correct answer", "参考答案列")),
        ("prediction", t("Prediction", "预测列")),
    )
    with st.grid(3, min_column_width=180):
        for (name, label), guess in zip(words, guessed, strict=True):
            picked.append(
                st.selectbox(
                    label,
                    choices,
                    index=choices.index(guess) if guess else 0,
                    format_func=lambda one: one or t("choose a column", "请选择列"),
                    key=f"evaluate_import_{name}_{chosen.key}",
                )
            )
        kind = st.selectbox(
            t("Kind of task", "任务类型"),
            ["", *evaluate.KINDS],
            format_func=lambda one: evaluate_words.kind(one) if one else t("as the answers are", "自动识别"),
            key=f"evaluate_import_kind_{chosen.key}",
        )
    title = st.text_input(
        t("Name of the run", "名称"), placeholder=chosen.name, key=f"evaluate_import_title_{chosen.key}"
    )
    reference, prediction = map(str, picked)
    if not (reference and prediction):
        st.warning(
            t(
                "The names of the columns do not say which is the correct answer and which the prediction: choose both.",
                "无法从列名判断哪一列是参考答案、哪一列是预测：请选择这两列。",
            ),
            icon=":material/help:",
        )
    elif reference == prediction:
        st.warning(t("Both are the same column.", "两者是同一列。"), icon=":material/help:")
        reference = ""
    go = st.button(
        t(f"Score {chosen.rows:,} predictions", f"为 {chosen.rows:,} 条预测评分"),
        type="primary",
        icon=":material/play_arrow:",
        key=f"evaluate_import_{draft['number']}",
        disabled=not (reference and prediction and chosen.rows),
    )
    if not go:
        return
    try:
        with st.spinner(t("Copying the predictions …", "正在复制预测……")):
            run = evaluate.import_predictions(
                state.job_store(), chosen.path, name=chosen.name, kind=kind or None, reference=reference,
                prediction=prediction, title=str(title or ""), wait=False,
                background=chosen.rows > table_input.AT_ONCE_ROWS,
            )  # fmt: skip
    except GLMError as error:
        panels.problem(error)
        return
    state.session_set(KEPT, None)
    draft.update(run=run.id, number=draft["number"] + 1)
    state.supervisor()
    st.rerun()
