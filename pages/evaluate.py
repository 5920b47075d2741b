"""Evaluation: a labelled file asked of checkpoints, or predictions made elsewhere; scores with their certainty."""

from __future__ import annotations

from typing import Any

import streamlit as st

from pages.shared import (
    evaluate_file,
    evaluate_import,
    evaluate_new,
    evaluate_registry,
    evaluate_run,
    job_panel,
    page,
    state,
)
from pages.shared.text import t

WAYS = {
    "ask": (("Ask a checkpoint", "评测检查点"), "smart_toy"),
    "import": (("Import predictions", "导入预测"), "move_to_inbox"),
}


def main() -> None:
    """Draw the page: the run in the address, else the form for a new one and all runs so far."""
    corner = page.frame(
        "evaluate",
        ("Evaluation", "评估"),
        ":material/analytics:",
        (
            "A labelled file in, scores with their certainty out. The formula stands beside each number.",
            "输入带参考答案的文件，得到带置信区间的分数；每个数字旁都有其公式。",
        ),
    )
    draft: dict[str, Any] = state.session("evaluate.draft") or {"run": "", "number": 0}
    state.session_set("evaluate.draft", draft)
    if draft["run"]:  # also where a second click ended the run of the page that started it
        state.query_set("run", draft["run"])
        draft["run"] = ""
    if job_id := state.query("job"):  # as the list of jobs links here
        state.query_set("run", job_id)
        state.query_set("job", None)
    if run_id := state.query("run"):
        with corner:
            if st.button(t("All runs", "全部评测"), icon=":material/arrow_back:", key="evaluate_all"):
                for name in ("run", "view"):
                    state.query_set(name, None)
                st.rerun()
        evaluate_file.leave_address()
        job_panel.steady()
        evaluate_run.show(run_id)
        return
    evaluate_new.told()
    way = st.segmented_control(
        t("What is evaluated", "评测对象"),
        list(WAYS),
        format_func=lambda one: f":material/{WAYS[one][1]}: {t(*WAYS[one][0])}",
        default="ask",
        required=True,
        key="evaluate_way",
        persist_state="session",
        label_visibility="collapsed",
    )
    if way == "import":
        evaluate_import.form(draft)
    else:
        evaluate_new.form(draft)
    evaluate_registry.show()


main()
