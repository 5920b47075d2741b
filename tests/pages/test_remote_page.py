"""Models on servers as the pages show them: added, tested, used everywhere, and never with their key."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from glm_core import engine, jobs, remote
from glm_core.jobs import Job
from glm_core.remote import Remote, client
from pages.shared import state
from tests.openai_server import KEY, MODEL, Fake, serving
from tests.pages.test_models import click, wait_until_loaded


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(remote.DEFAULT_KEY, KEY)
    with serving(Fake()) as found:
        yield found


@pytest.fixture
def used(fake: Fake) -> Fake:
    """A server that is in use as after a click on Use."""
    remote.add(Remote("box", fake.url, MODEL, timeout_s=5))
    engine.host().use("remote:box")
    return fake


def done(kind: str) -> Job:
    """The newest job of a kind once it has ended."""
    store = state.job_store()
    job = store.list(1, kind)[0]
    end = time.monotonic() + 30
    while store.get(job.id).state in ("preparing", "queued", "running"):
        assert time.monotonic() < end
        time.sleep(0.02)
    return store.get(job.id)


def test_a_server_is_listed_tested_added_used_and_removed(open_page, words, fake, workspace):
    app = open_page("models")
    app.text_input(key="remote_name_0").set_value("box")
    app.text_input(key="remote_url_0").set_value(fake.url.removesuffix("/v1")).run()
    click(app, "remote_look")
    assert app.selectbox(key="remote_model_0_1").options == [MODEL]
    click(app, "remote_add")
    shown = words(app)
    assert "box" in shown and "latency" in shown and "gives no probabilities" in shown
    assert KEY in fake.keys and KEY not in (workspace / "remotes.json").read_text()
    app = wait_until_loaded(click(app, "remote_use_box"))
    assert engine.host().current.remote.name == "box"
    shown = words(app)
    assert "Its weights are on the server" in shown and "batched" not in shown
    assert [one.key for one in app.button if one.key in ("self_test", "unload")] == ["unload"]
    click(app, "unload")
    assert engine.host().current is None
    click(app, "remote_remove_box")
    assert remote.known() == []
    assert not app.exception


@pytest.mark.parametrize(
    ("name", "url", "variable", "said"),
    [
        ("box", "http://me:pass-4711@host/v1", remote.DEFAULT_KEY, "a password"),
        ("box", "http://127.0.0.1:9/v1", remote.DEFAULT_KEY, "no connection"),
        ("box", "http://127.0.0.1:9/v1", "sk-not-a-name-4711", "Never the key itself"),
    ],
)
def test_what_cannot_be_added_is_refused_in_a_sentence(open_page, words, name, url, variable, said):
    app = open_page("models")
    app.text_input(key="remote_name_0").set_value(name)
    app.text_input(key="remote_url_0").set_value(url)
    app.text_input(key="remote_key_0").set_value(variable).run()
    click(app, "remote_look")
    shown = words(app)
    assert said in shown.replace("\\", "") and "4711" not in shown
    assert not app.exception and remote.known() == []


def test_chat_says_where_the_words_go_and_what_the_server_counted(open_page, words, used):
    app = open_page("chat")
    assert "are sent there" in words(app)
    app.chat_input[0].set_value("abc").run()
    talks = state.conversations()
    talk = talks.list()[0]
    while talks.get(talk.id).running:
        time.sleep(0.02)
    shown = words(open_page("chat", c=talk.id))
    assert "counted 6 + 4 tokens at the last answer" in shown
    assert "context" not in shown


def test_a_batch_is_tried_and_run_on_the_server_with_its_address_in_the_record(open_page, words, used):
    app = open_page("batch", sample="comments")
    shown = words(app)
    assert "Only the server knows how many tokens" in shown and "the rows are sent to" in shown
    click(app, "run_0")
    job = done("batch")
    assert job.state == "done" and job.failed == 0
    assert job.task["remote"]["url"] == used.url and KEY not in json.dumps(job.task)
    assert KEY not in words(open_page("batch", job=job.id))


def test_labels_without_probabilities_say_so_and_offer_no_threshold(open_page, words, used):
    used.answer = lambda text: "垃圾"
    app = open_page("classify", sample="comments")
    assert "gives no probabilities" in words(app)
    click(app, "classify_start_0")
    job = done("classify")
    assert job.task["remote"]["labels"] == "greedy" and job.failed == 0
    app = open_page("classify", job=job.id)
    assert not app.exception
    assert "there is no threshold, no calibration and no auto-accept" in words(app)
    assert "threshold" not in str(app.get("button_group"))


def test_a_server_is_one_more_checkpoint_to_evaluate_and_compare_but_not_to_train(open_page, words, used):
    app = open_page("evaluate", data="comments")
    picker = next(one for one in app.multiselect if one.key == "evaluate_checkpoints")
    assert "box (remote)" in picker.options
    app = open_page("compare", mode="prompts")
    sides = [one for one in app.selectbox if "box (remote)" in one.options]
    assert len(sides) == 2 and not app.exception
    for page in ("memory", "finetune"):
        app = open_page(page)
        assert not any("box (remote)" in one.options for one in app.selectbox)
    assert jobs.store(state.settings()) is not None
