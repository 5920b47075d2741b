"""Parts of a screen that draw themselves anew, and no update lost when their timers fire while the page is drawn.

Two races of Streamlit 1.67 show on a busy machine. It hands a timer's request to a new runner as soon as the old one
has stopped, and from then on ignores what the old one sent and the server has not yet passed on: an answer stayed
"being written" until the page was loaded again. `install` lets such a request wait until the old runner is through.
And a timer's run takes back what was just sent for its part, its container included: what follows that container in
a page that has grown then has no place, and the browser shows an empty page. `live` gives each part a container that
is not its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import update_wrapper, wraps
from typing import Any, Generic, ParamSpec

import streamlit as st
from streamlit.runtime.app_session import AppSession
from streamlit.runtime.scriptrunner_utils.script_requests import ScriptRequestType

WAIT_S, LONGEST_S = 0.01, 2.0  # a browser that went away takes nothing any more
P = ParamSpec("P")


class Part(Generic[P]):
    """A part of a page. Called, it draws itself as `st.fragment` in a container of its own."""

    def __init__(self, part: Callable[P, None], run_every: float | None) -> None:
        update_wrapper(self, part)
        self.part = part

        @wraps(part)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            from pages.shared import state

            if state.person() is None:  # logged out in another tab, or taken off the users: draw the login
                st.rerun()
            part(*args, **kwargs)

        self.fragment = st.fragment(checked, run_every=run_every)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        with st.container():
            self.fragment(*args, **kwargs)

    def once(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Draw it without timer or fragment, in the same container: what follows it on the page stays in its place."""
        with st.container(), st.container():  # a fragment brings one, too
            self.part(*args, **kwargs)


def live(run_every: float | None = None) -> Callable[[Callable[P, None]], Part[P]]:
    """Make a function a `Part`; `run_every` in seconds."""
    return lambda part: Part(part, run_every)


def is_ending(session: Any) -> bool:
    """Whether the last run has ended, and its session has not yet heard of it or sent all of it to the browser."""
    runner = session._scriptrunner
    if runner is None:
        return not session._browser_queue.is_empty()
    return runner._requests._state is ScriptRequestType.STOP


def install() -> None:
    """Make every session of this process wait; calling it again changes nothing."""
    at_once = AppSession.request_rerun
    if hasattr(at_once, "waits"):
        return

    def request_rerun(self: AppSession, client_state: Any, waited: float = 0.0) -> None:
        if client_state is None or not client_state.fragment_id or not is_ending(self):
            at_once(self, client_state)
        elif waited < LONGEST_S:
            asyncio.get_running_loop().call_later(WAIT_S, request_rerun, self, client_state, waited + WAIT_S)
        elif not client_state.is_auto_rerun:  # a timer comes again, a click does not
            at_once(self, client_state)

    request_rerun.waits = True  # type: ignore[attr-defined]
    AppSession.request_rerun = request_rerun  # type: ignore[method-assign]
