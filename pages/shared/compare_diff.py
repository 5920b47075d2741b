"""Two texts side by side, with the words marked that the other one does not have."""

from __future__ import annotations

import html
import threading
from functools import lru_cache

import streamlit as st

from glm_core import metrics
from glm_core.evaluate import views
from pages.shared.text import t

LONGEST = 4000  # characters of a text that are compared and shown
PATIENCE_S = 3.0  # for the dictionary of words, which takes seconds to read the first time on a busy machine

_lock = threading.Lock()
_dictionary: threading.Event | None = None  # set once words can be told apart without a wait

STYLE = """<style>
.compare-text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; font-size: 0.95rem;}
.compare-text mark {color: inherit; border-radius: 3px; padding: 0 1px;}
.compare-text mark.good {background: rgba(16, 150, 100, 0.26);}
.compare-text mark.bad {background: rgba(225, 29, 72, 0.20);}
.compare-text mark.other {background: rgba(99, 102, 241, 0.26);}
.compare-text .none {opacity: 0.65; font-style: italic;}
</style>"""


def style() -> None:
    """The colours of the marks; once a page, before the first text."""
    st.html(STYLE)
    warm()


def warm() -> threading.Event:
    """Read the dictionary of words beside the page; the event says when it is there."""
    global _dictionary
    with _lock:
        if _dictionary is None:
            _dictionary = threading.Event()
            threading.Thread(target=_read, args=(_dictionary,), name="glm-words", daemon=True).start()
        return _dictionary


def _read(ready: threading.Event) -> None:
    try:
        metrics.segment("词")
    finally:
        ready.set()


def text(body: str, other: str | None = None, kind: str = "other") -> None:
    """A text as it is, whatever Markdown or HTML it holds; the words that `other` lacks are marked.

    kind  "good" marks in green, "bad" in red, "other" in the colour of the page
    """
    st.html(f'<div class="compare-text">{marked(body, other, kind)}</div>')


def marked(body: str, other: str | None, kind: str) -> str:
    """The HTML of a text."""
    if not body.strip():
        return f'<span class="none">{t("(empty)", "（空）")}</span>'
    cut, rest = body[:LONGEST], len(body) - LONGEST
    if other is None or other == body or not warm().wait(PATIENCE_S):
        found = html.escape(cut)
    else:
        found = _marked(cut, other[:LONGEST], kind)
    if rest > 0:
        found += f' <span class="none">{t(f"… {rest:,} more characters", f"……还有 {rest:,} 个字符")}</span>'
    return found


@lru_cache(maxsize=512)
def _marked(body: str, other: str, kind: str) -> str:
    parts = []
    for piece, lacking in views.marked(body, other)[0]:
        shown = html.escape(piece)
        parts.append(f'<mark class="{kind}">{shown}</mark>' if lacking and shown.strip() else shown)
    return "".join(parts)
