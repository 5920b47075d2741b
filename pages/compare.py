"""Comparison: which of several checkpoints is better and whether that is certain, on a file or on prompts by eye."""

from __future__ import annotations

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import (
    compare_diff,
    compare_rows,
    compare_runs,
    compare_setup,
    compare_trial,
    compare_verdict,
    page,
    panels,
    state,
)
from pages.shared.text import t

MODES = {
    "files": (("Runs on a file", "文件上的评测"), "rule"),
    "prompts": (("Prompts by eye", "提示词并排对比"), "forum"),
}


def main() -> None:
    """Draw the page: the comparison of the address, of runs or of prompts."""
    page.frame(
        "compare",
        ("Comparison", "对比"),
        ":material/compare:",
        (
            "Which checkpoint is better, and is the difference real?",
            "哪个检查点更好？差异是否真实？",
        ),
    )
    compare_diff.style()
    if mode() == "files":
        files()
    else:
        compare_trial.section()


def mode() -> str:
    """What is compared: as the address says, else as chosen last."""
    asked = "prompts" if state.query("trial") else state.query("mode")
    key = "compare_mode"
    if state.query("runs"):
        asked = "files"
    if state.session(key) not in MODES:
        state.session_set(key, asked if asked in MODES else "files")

    def chosen() -> None:
        now = str(state.session(key))
        state.query_set("mode", now if now == "prompts" else None)
        if now == "prompts":
            for name in ("runs", "metric", "delta"):
                state.query_set(name, None)
        else:
            state.query_set("trial", None)

    return str(
        st.segmented_control(
            t("What is compared", "对比什么"),
            list(MODES),
            format_func=lambda one: f":material/{MODES[one][1]}: {t(*MODES[one][0])}",
            required=True,
            key=key,
            on_change=chosen,
            label_visibility="collapsed",
        )
    )


def files() -> None:
    """The verdict on top, then why: chart, metrics, rows, settings."""
    top = st.container()
    chosen = compare_runs.choose()
    if chosen is None:
        return
    runs, metric, delta = chosen
    with top:
        try:
            this = compare_runs.found(runs, metric, delta)
        except GLMError as error:
            compare_setup.problem(error, runs)
            return
        if this is None:
            return
        compare_verdict.verdict(this)
        with st.container(border=True, key="compare_chart"):
            compare_verdict.chart(this)
    one = compare_runs.pair_of(this)
    with st.container(border=True, key="compare_table"):
        panels.section(t("All metrics", "全部指标"), "table_chart")
        compare_verdict.table(this, one)
    with st.container(border=True, key="compare_by_row"):
        compare_rows.section(this, one)
    with st.container(border=True, key="compare_differences_of_settings"):
        compare_setup.differences(this)
    compare_setup.curves(this)
    with st.container(border=True, key="compare_share"):
        compare_setup.downloads(this)


main()
