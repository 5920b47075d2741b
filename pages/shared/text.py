"""English or Chinese: every text on a screen goes through `t`."""

from __future__ import annotations

from pages.shared import state
from pages.shared.chinese import translated

LANGUAGES = {"en": "EN", "zh": "中文"}


def language() -> str:
    """ "en" or "zh": what ?lang= asks for, what was chosen last, or what the browser speaks."""
    asked = state.query("lang")
    if asked in LANGUAGES and state.remember("language", "") != asked:
        state.remember_set("language", asked)
    chosen = state.remember("language", "")
    if chosen in LANGUAGES:
        return str(chosen)
    return "zh" if state.browser_locale().lower().startswith("zh") else "en"


def t(en: str, zh: str) -> str:
    """The text in the language of this session."""
    return zh if language() == "zh" else en


def said(text: str) -> str:
    """A sentence of glm_core (an error, a warning, a note) in the language of this session."""
    return translated(text) if text and language() == "zh" else text


def plain(text: str) -> str:
    """Text that a user or a file brought, escaped so that Markdown shows it as it is and fetches nothing."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~:$&" else c for c in text)
