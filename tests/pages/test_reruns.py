"""Parts that draw themselves anew: what is taken back of one leaves a place for all that follows it."""

from __future__ import annotations

import pytest
from streamlit.runtime.forward_msg_queue import ForwardMsgQueue
from streamlit.testing.v1 import AppTest

PAGE = """
import streamlit as st
from pages.shared.reruns import live

@{decorator}
def part():
    st.write("again and again")

st.write("before")
part()
st.write("after")
"""


def sent(script, monkeypatch):
    """The messages of a run of the page, as its queue holds them before the browser gets them."""
    queues = []
    enqueue = ForwardMsgQueue.enqueue

    def seen(queue, message):
        if queue not in queues:
            queues.append(queue)
        enqueue(queue, message)

    monkeypatch.setattr(ForwardMsgQueue, "enqueue", seen)
    AppTest.from_string(script).run()
    return queues[-1]


def gap(queue):
    """The first path that has no place in a page built from these messages in order, or None."""
    children = {(0,): 0}
    for message in queue._queue:
        if message.WhichOneof("type") == "delta":
            *parent, index = message.metadata.delta_path
            if index > children.setdefault(tuple(parent), 0):
                return (*parent, index)
            children[tuple(parent)] = max(children[tuple(parent)], index + 1)
    return None


@pytest.mark.parametrize(
    ("decorator", "broken"), [("live(run_every=1)", False), ("st.fragment(run_every=1)", True)]
)
def test_a_part_that_starts_anew_before_it_was_sent_breaks_no_page(decorator, broken, monkeypatch):
    queue = sent(PAGE.format(decorator=decorator), monkeypatch)
    own = {
        m.delta.fragment_id for m in queue._queue if m.WhichOneof("type") == "delta" and m.delta.fragment_id
    }
    assert gap(queue) is None and len(own) == 1
    queue.clear(retain_lifecycle_msgs=True, fragment_ids_this_run=list(own))  # as a run of the part begins
    assert (gap(queue) is not None) is broken


def places(queue):
    """Where the elements of a page are, in order."""
    return [
        tuple(m.metadata.delta_path)
        for m in queue._queue
        if m.WhichOneof("type") == "delta" and m.delta.WhichOneof("type") == "new_element"
    ]


def test_a_part_drawn_once_is_where_it_was_drawn_again_and_again(monkeypatch):
    page = PAGE.format(decorator="live(run_every=1)")
    again, once = sent(page, monkeypatch), sent(page.replace("part()\nst", "part.once()\nst"), monkeypatch)
    assert places(once) == places(again) and len(places(once)) == 3
    assert not any(m.delta.fragment_id for m in once._queue if m.WhichOneof("type") == "delta")
