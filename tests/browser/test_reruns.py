"""Streamlit under load: what a run of a page sent reaches the browser although timers keep firing."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.browser.serving import REPOSITORY, Server

# The server's event loop is held up again and again, as by other sessions; two timers fire, one draws all anew.
SCRIPT = """
import sys, threading, time
import streamlit as st
from streamlit.runtime import get_instance

sys.path.insert(0, {repository!r})
from pages.shared import reruns
reruns.install()

@st.cache_resource
def busy():
    loop = get_instance()._get_async_objs().eventloop
    def hold():
        while True:
            loop.call_soon_threadsafe(time.sleep, 0.02)
            time.sleep(0.08)
    threading.Thread(target=hold, daemon=True).start()

busy()

@reruns.live(run_every=0.13)
def top():
    st.write("top")

@reruns.live(run_every=0.31)
def counted():
    st.session_state.n = st.session_state.get("n", 0) + 1
    st.write(f"count {{st.session_state.n}}")
    if st.session_state.n % 3 == 0:
        st.rerun()

top()
for line in range(st.session_state.get("n", 0)):
    st.write(line)
counted()
st.write("the end")
"""


def test_nothing_a_run_sent_is_dropped_because_a_timer_fired_at_its_end(page, tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    server = Server(tmp_path / "workspace", str(script), "--logger.level=debug")
    server.start()
    broken = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    try:
        page.goto(server.url)
        page.get_by_text(re.compile(r"^count [1-9]")).first.wait_for()
        end = time.monotonic() + 15
        while time.monotonic() < end and not broken:
            page.wait_for_timeout(500)
        counts = [int(n) for n in re.findall(r"count (\d+)", page.inner_text("body"))]
    finally:
        server.kill()
    assert counts and max(counts) > 6  # the timers did fire
    assert not broken
    dropped = re.findall(r"Ignoring event.*", Path(server.log).read_text())
    assert not dropped
