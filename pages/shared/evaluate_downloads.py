"""What can be taken away of a run: its rows, its scores, a report in one file, and how it was made."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from glm_core import evaluate, report_html
from pages.shared import evaluate_figures, panels, results_panel, state
from pages.shared.text import t

if TYPE_CHECKING:
    from glm_core.evaluate import Run, Scores


def show(run: Run, scores: Scores) -> None:
    """Rows, scores, report, figures and the manifest."""
    left, right = st.columns(2)
    with left.container(border=True, height="stretch", key="evaluate_download_rows"):
        results_panel.downloads(
            replace(run.job, title=run.title),
            evaluate.export,
            t(
                "The columns of your file unchanged and in their order, then the prediction, the answer read from it, "
                "whether it is right, the scores of the row, its status and a note.",
                "文件原有列及顺序不变，其后依次为预测、读出的答案、是否正确、该行各项分数、状态和备注。",
            ),
        )
    with right.container(border=True, height="stretch", key="evaluate_download_report"):
        panels.section(t("Report and scores", "报告与分数"), "description")
        name = re.sub(r"[^\w.-]+", "-", run.title).strip("-") or "run"
        st.download_button(
            t("Report, one HTML file", "报告（单个 HTML 文件）"),
            lambda: report_html.run_page(state.job_store(), run.id).encode("utf-8"),
            file_name=f"{name}-report.html",
            mime="text/html",
            icon=":material/description:",
            type="primary",
            key=f"evaluate_report_{run.id}",
            on_click="ignore",
            help=t(
                "Opens without a network, light and dark, and prints well: scores, intervals, formulas, worst rows, slices.",
                "无需网络即可打开，支持深浅色，便于打印：分数、区间、公式、最差的行、分组。",
            ),
        )
        st.download_button(
            t("Scores as JSON", "分数（JSON）"),
            lambda: json.dumps(scores.to_json(), ensure_ascii=False, indent=1).encode("utf-8"),
            file_name=f"{name}-scores.json",
            mime="application/json",
            icon=":material/data_object:",
            key=f"evaluate_scores_{run.id}",
            on_click="ignore",
        )
        evaluate_figures.format_choice()
    with st.container(border=True, key="evaluate_manifest"):
        panels.section(t("How it was made", "任务设置"), "receipt_long")
        if run.task.template:
            st.caption(t("Question put to the model", "提问模板"))
            st.code(run.task.template, language=None, wrap_lines=True)
        st.json(evaluate.manifest(state.job_store(), run.id), expanded=1)
