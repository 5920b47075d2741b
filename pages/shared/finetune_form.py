"""What is filled in on the fine-tuning page: kept while other pages are shown, and for as long as the data is the same.

A widget gets its value as an argument in every run, not once through the session: a run that starts before the
browser has drawn the one before takes its messages back, and a value set once would be lost with them. The browser
would then show the lowest value of a field while the page computes with another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pages.shared import state

DRAFT = "finetune.draft"
Argument = Literal["value", "index", "default"]  # what a widget calls the value it begins with


def draft() -> dict[str, Any]:
    """The values of this session that an analyst set."""
    found = state.session(DRAFT)
    if found is None:
        found = {}
        state.session_set(DRAFT, found)
    return found


def value(name: str, default: Any, options: Sequence[Any] | None = None) -> Any:
    """A value as it was set, else the default; also where it is no longer among the options."""
    found = draft().get(name, default)
    return default if options is not None and found not in options else found


def put(name: str, new: Any) -> None:
    """Set a value; None takes the default again."""
    if new is None:
        draft().pop(name, None)
    else:
        draft()[name] = new


def held(
    name: str, default: Any, options: Sequence[Any] | None = None, argument: Argument = "value"
) -> dict[str, Any]:
    """Arguments that make a widget keep what was set in this session; the name says what the default depends on."""
    return _arguments(
        name, value(name, default, options), options, argument, lambda new: put(name, new)
    )  # fmt: skip


def kept(
    name: str,
    default: Any,
    options: Sequence[Any] | None = None,
    argument: Argument = "value",
    scope: Any = "",
) -> dict[str, Any]:
    """As `held`, but remembered over restarts too.

    scope   what the limits of the widget depend on: with another one it begins anew
    """
    found = state.remember(f"finetune.{name}", default)
    now = default if options is not None and found not in options else found
    return _arguments(
        f"{name}_{scope}", now, options, argument, lambda new: state.remember_set(f"finetune.{name}", new)
    )


def _arguments(
    name: str, now: Any, options: Sequence[Any] | None, argument: Argument, changed: Callable[[Any], None]
) -> dict[str, Any]:
    widget = f"finetune_{name}"
    if argument == "index":
        assert options is not None
        now = list(options).index(now)
    return {argument: now, "key": widget, "on_change": lambda: changed(state.session(widget))}
