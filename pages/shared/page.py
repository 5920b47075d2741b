"""The frame of every screen: title, menu, language and the strip that says what the machine is doing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from glm_core.errors import GLMError
from pages.shared import access, panels, remote_words, reruns, state
from pages.shared.reruns import live
from pages.shared.text import LANGUAGES, language, plain, t

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Entry:
    """A line of the menu."""

    key: str
    file: str
    title: tuple[str, str]
    icon: str


HOME = Entry("home", "Home.py", ("Home", "首页"), ":material/home:")
MENU: tuple[tuple[tuple[str, str], tuple[Entry, ...]], ...] = (
    (
        ("WORK", "工作区"),
        (
            Entry("chat", "pages/chat.py", ("Chat", "聊天"), ":material/chat:"),
            Entry("batch", "pages/batch.py", ("Batch prediction", "批量预测"), ":material/table_rows:"),
            Entry("classify", "pages/classify.py", ("Classification", "分类"), ":material/label:"),
            Entry("jobs", "pages/jobs.py", ("Jobs", "任务"), ":material/checklist:"),
        ),
    ),
    (
        ("MEASURE", "评测"),
        (
            Entry("evaluate", "pages/evaluate.py", ("Evaluation", "评估"), ":material/analytics:"),
            Entry("compare", "pages/compare.py", ("Comparison", "对比"), ":material/compare:"),
            Entry("memory", "pages/memory.py", ("Quantization & memory", "量化与显存"), ":material/memory:"),
        ),
    ),
    (
        ("MODEL", "模型"),
        (
            Entry("finetune", "pages/finetune.py", ("Fine-tuning", "微调"), ":material/tune:"),
            Entry("models", "pages/models.py", ("Models", "模型"), ":material/deployed_code:"),
        ),
    ),
)


def frame(key: str, title: tuple[str, str], icon: str, caption: tuple[str, str] = ("", "")) -> DeltaGenerator:
    """Draw what all screens share; the first call of every page.

    Returns the place at the right of the title, for a page's own badge or button. Where the workspace cannot
    be made, says so in a sentence and ends the run; so it does with a login screen for whoever has to log in.
    """
    # an emoji, never ":material/...:": as a page icon that one is fetched from the internet
    st.set_page_config(page_title=f"{t(*title)} · GLM Workbench", page_icon="🧠", layout="wide")
    _style()
    reruns.install()
    try:
        who = access.gate()
        state.startup()
        state.job_store()
    except GLMError as error:
        panels.problem(error)
        st.stop()
    with st.sidebar:
        _sidebar()
        access.account(who)
    access.banner(who)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header(f":primary[{icon}] {t(*title)}", anchor=False, width="content")
        st.space("stretch")
        corner = st.container(horizontal=True, vertical_alignment="center", width="content")
    if caption[0]:
        st.caption(t(*caption))
    return corner


def entry(key: str) -> Entry | None:
    """A line of the menu whose page is installed, by its key; else None."""
    entries = (HOME, *(one for _, group in MENU for one in group))
    return next((one for one in entries if one.key == key and (ROOT / one.file).is_file()), None)


def link(key: str, label: tuple[str, str] | None = None, icon: str | None = None, **query: str) -> bool:
    """A link to another screen, with its parameters; draws nothing and returns False where it is not installed.

    icon  None takes the menu's, "" none
    """
    found = entry(key)
    if found:
        st.page_link(
            found.file,
            label=t(*(label or found.title)),
            icon=found.icon if icon is None else icon or None,
            query_params=query or None,
        )
    return found is not None


def _style() -> None:
    # What the theme cannot say: a page no wider than reads well, and no empty band above the brand.
    st.html(
        """<style>
        .stMainBlockContainer {max-width: 78rem; margin: 0 auto;}
        [data-testid="stSidebarHeader"] {height: 2.25rem; margin-bottom: 0;}
        [data-testid="stSidebar"] [data-testid="stPageLink-NavLink"] {padding: 0.22rem 0.5rem;}
        [data-testid="stMetricLabel"] p {font-size: 0.875rem;}
        [data-testid="stMetricValue"] {font-size: 1.6rem; font-weight: 680;}
        [data-testid="stMetricValue"], [data-testid="stMetricValue"] * {
          white-space: normal !important; overflow-wrap: anywhere; line-height: 1.25; height: auto;
        }
        [class*="st-key-step_"] [data-testid="stPageLink-NavLink"],
        [class*="st-key-job_"] [data-testid="stPageLink-NavLink"],
        [class*="st-key-start_"] [data-testid="stPageLink-NavLink"] {position: relative; left: -0.5rem;}
        [class*="st-key-step_"] [data-testid="stCaptionContainer"] {padding-left: 1.45rem;}
        @media (max-width: 640px) {
          .stMainBlockContainer {padding: 4.6rem 1rem 3rem;}
          [data-testid="stMetricValue"] {font-size: 1.25rem;}
          .st-key-models_columns > div > .stHorizontalBlock {flex-wrap: wrap-reverse;}
        }
        </style>"""
    )


def _sidebar() -> None:
    st.markdown("#### :primary[:material/neurology:] GLM Workbench")
    with st.container(key="language"):
        _language_switch()
    with st.container(gap="xxsmall"):
        link("home")
    for title, entries in MENU:
        if any(entry(one.key) for one in entries):
            with st.container(gap="xxsmall"):
                st.caption(t(*title))
                for one in entries:
                    link(one.key)
    status_strip()


def _language_switch() -> None:
    state.session_set("language_choice", language())

    def chosen() -> None:
        state.query_set("lang", None)  # else the address would win over the click
        state.remember_set("language", state.session("language_choice"))

    st.segmented_control(
        t("Language", "语言"),
        list(LANGUAGES),
        format_func=lambda one: LANGUAGES[one],
        required=True,
        key="language_choice",
        on_change=chosen,
        label_visibility="collapsed",
        width="stretch",
    )


@live(run_every=2)
def status_strip() -> None:
    """Model, precision, device, memory, queue, jobs and exactness, looked at again every two seconds."""
    with st.container(border=True, gap="xsmall", key="status_strip"):
        kind, name = state.model_state()
        engine = state.current_engine()
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            panels.state_badge(kind)
            if name:
                st.markdown(f"**{plain(name)}**")
        if engine is not None and kind == "ready":
            status = engine.status()
            st.caption(remote_words.where(engine))
            if engine.remote is None:
                panels.exact_badge(status.exact, status.exact_text)
        used, total, where = panels.memory_in_use()
        st.progress(min(1.0, used / total) if total else 0.0)
        st.caption(f"{where} {panels.format_bytes(used)} / {panels.format_bytes(total)}")
        queued = engine.status().queued_chat + engine.status().queued_batch if engine is not None else 0
        running = state.job_store().running()  # of everybody: they share the model
        st.caption(t(f"queue {queued} · jobs running {running}", f"排队 {queued} · 运行中的任务 {running}"))
