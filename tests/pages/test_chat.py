"""Claims about the chat screen, with an engine that says what the test tells it to."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from glm_core import chat, engine
from glm_core.engine import EngineBusy, GenerationSettings
from glm_core.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPONENT = "streamlit_chat.streamlit_chat"


class FakeTokenizer:
    generation = "chatglm3"

    def chat_ids(self, messages):
        return [0, *(ord(c) % 100 for m in messages for c in m.content)]


class FakeHandle:
    """An answer that the test writes."""

    def __init__(self, request, number):
        self.request, self.id = request, f"page-{number}-{id(self)}"
        self.state, self.finish_reason, self.text, self.place = "queued", "", "", 2
        self.error, self.notes, self.n_tokens, self.n_prompt = None, (), 0, len(request.prompt_ids)
        self.tokens_per_second, self.time_to_first_token, self.seconds = 12.5, 0.25, 2.0
        self._ended = threading.Event()

    @property
    def done(self):
        return self.state in ("done", "cancelled", "failed")

    def say(self, text):
        self.state, self.place, self.text, self.n_tokens = "running", 0, self.text + text, 7

    def end(self, state="done", reason="stop"):
        self.finish_reason, self.state = reason, state
        self._ended.set()

    def cancel(self, reason="user"):
        if not self.done:
            self.end("cancelled", "cancelled")

    def wait(self, timeout=None):
        return self._ended.wait(timeout)


class FakeEngine:
    remote = None

    def __init__(self, name="glm-test"):
        self.name, self.context, self.tokenizer = name, 400, FakeTokenizer()
        defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 50, "max_new_tokens": 50}
        self.loaded = SimpleNamespace(info=SimpleNamespace(name=name), defaults=defaults)
        self.handles, self.refuse = [], None

    def submit(self, request):
        if self.refuse:
            raise self.refuse
        self.handles.append(FakeHandle(request, len(self.handles)))
        return self.handles[-1]

    def status(self):
        return SimpleNamespace(
            name=self.name,
            model=self.name,
            precision="fp32",
            device="cpu",
            queued_chat=0,
            queued_batch=0,
            running_chat=0,
            running_batch=0,
            exact=True,
            exact_text="",
            notes=(),
        )


class FakeHost:
    state, error, loading_name = "ready", None, ""

    def __init__(self):
        self.current = FakeEngine()

    def use(self, *args, **kwargs):
        return self.current

    def unload(self):
        self.current = None

    def memory(self):
        return SimpleNamespace(
            process_bytes=1,
            system_used_bytes=1,
            system_total_bytes=2,
            device_used_bytes=None,
            device_total_bytes=None,
            before_load_bytes=None,
            after_load_bytes=None,
        )


@pytest.fixture
def host(monkeypatch, workspace):
    monkeypatch.setattr(chat, "FLUSH_S", 0.02)
    found = FakeHost()
    monkeypatch.setattr(engine, "host", lambda: found)
    yield found
    for handle in list(chat._LIVE.values()):
        handle.cancel()


@pytest.fixture
def open_page(host):
    def open_page(**query):
        page = AppTest.from_file(str(ROOT / "Home.py"), default_timeout=20)
        page.switch_page("pages/chat.py")
        for name, value in ({"lang": "en"} | query).items():
            page.query_params[name] = value
        return calm(page.run())

    return open_page


@pytest.fixture
def store(host):
    return chat.ConversationStore(Settings.read().database, host)


def calm(page):
    assert not page.exception, page.exception[0].value
    return page


def bubbles(page):
    """(is_user, text, logo) of every streamlit-chat bubble."""
    found = []
    for one in page.get("component_instance"):
        if one.proto.component_name == COMPONENT:
            args = json.loads(one.proto.json_args)
            assert args["allow_html"] is False and "avatarStyle" not in args
            assert args["logo"].startswith("data:image/svg+xml;base64,")
            found.append((args["isUser"], args["message"].strip()))
    return found


def answer(page, host, text):
    """End the running answer and look again."""
    host.current.handles[-1].say(text)
    host.current.handles[-1].end()
    return calm(page.run())


def captions(page):
    return " | ".join(one.value for one in page.caption).replace("\\", "")


def test_a_new_conversation_offers_samples_in_two_languages(open_page, host):
    page = open_page()
    samples = [b.label for b in page.button if (b.key or "").startswith("sample_")]
    assert len(samples) == 4 and sum(label.isascii() for label in samples) == 2
    calm(page.button(key="sample_2").click().run())
    assert bubbles(page)[0] == (True, "红楼梦的作者是谁？")
    assert len(host.current.handles) == 1


def test_the_embedded_model_is_called_a_demonstration(open_page, host):
    host.current = FakeEngine("glm-mini")
    assert "demonstration model" in open_page().info[0].value
    host.current = FakeEngine("chatglm3-6b")
    assert not open_page().info


def test_a_question_is_asked_streamed_and_settled(open_page, host):
    page = open_page()
    calm(page.chat_input[0].set_value("你好").run())
    assert bubbles(page) == [(True, "你好"), (False, "…")]
    assert "place 2 in line" in captions(page)
    assert page.chat_input[0].disabled
    host.current.handles[0].say("很")
    calm(page.run())
    assert bubbles(page)[-1] == (False, "很")
    assert "12.5 tokens/s" in captions(page) and "first after 0.25 s" in captions(page)
    answer(page, host, "好")
    assert bubbles(page) == [(True, "你好"), (False, "很好")]
    assert "glm-test" in captions(page)
    assert not page.chat_input[0].disabled


def test_stop_keeps_what_was_said(open_page, host):
    page = open_page()
    page.chat_input[0].set_value("a story").run()
    host.current.handles[0].say("Once upon")
    calm(page.button(key="chat_stop").click().run())
    assert bubbles(page)[-1] == (False, "Once upon")
    assert host.current.handles[0].state == "cancelled"
    calm(page.chat_input[0].set_value("go on").run())
    assert len(host.current.handles) == 2


def test_a_refresh_in_mid_answer_shows_the_rest(open_page, host):
    first = open_page()
    first.chat_input[0].set_value("a story").run()
    host.current.handles[0].say("Once")
    again = open_page(c=first.query_params["c"])
    assert bubbles(again) == [(True, "a story"), (False, "Once")]
    answer(again, host, " upon a time")
    assert bubbles(again)[-1] == (False, "Once upon a time")


def test_coming_back_from_another_page_shows_the_conversation(open_page, host):
    page = open_page()
    page.chat_input[0].set_value("hello").run()
    answer(page, host, "hi")
    page.switch_page("Home.py").run()
    page.switch_page("pages/chat.py").run()
    assert bubbles(page) == [(True, "hello"), (False, "hi")]


def test_regenerate_and_edit_replace_the_last_round(open_page, host):
    page = open_page()
    page.chat_input[0].set_value("hello").run()
    answer(page, host, "hi")
    page.button(key="chat_regenerate").click().run()
    answer(page, host, "hello to you")
    assert bubbles(page) == [(True, "hello"), (False, "hello to you")]
    page.button(key="chat_edit").click().run()
    page.text_area[-1].set_value("bye")
    calm(page.button(key="chat_edit_send").click().run())
    answer(page, host, "see you")
    assert bubbles(page) == [(True, "bye"), (False, "see you")]


def test_clear_asks_first_and_keeps_the_conversation(open_page, host, store):
    page = open_page()
    page.chat_input[0].set_value("hello").run()
    answer(page, host, "hi")
    page.button(key="chat_clear").click().run()
    assert store.list()[0].n_turns == 2
    calm(page.button(key="chat_clear_yes").click().run())
    assert (store.list()[0].n_turns, bubbles(page)) == (0, [])


def test_a_refused_question_is_shown_with_its_reason_and_not_lost(open_page, host, store):
    host.current.refuse = EngineBusy("64 requests are waiting.", "Try again in a minute.")
    page = open_page()
    calm(page.chat_input[0].set_value("hello").run())
    assert "64 requests are waiting" in page.error[0].value
    assert page.code[0].value == "hello"
    assert store.list() == []
    host.current.refuse = None
    calm(page.chat_input[0].set_value("x" * 1000).run())
    assert "room for 350" in page.error[0].value


def test_remote_images_are_not_fetched_in_either_view(open_page, host):
    page = open_page()
    page.chat_input[0].set_value("![me](http://x.com/me.png)").run()
    answer(page, host, "see ![a](http://x.com/a.png)")
    assert bubbles(page)[1] == (False, "see a (http://x.com/a.png)")
    assert "![" not in bubbles(page)[0][1]
    calm(page.segmented_control(key="widget.chat.view").set_value("native").run())
    assert bubbles(page) == []
    shown = [one.markdown[0].value for one in page.chat_message]
    assert len(shown) == 2 and not any("![" in text for text in shown)


def test_a_long_conversation_shows_twenty_bubbles_and_earlier_turns_on_request(open_page, host, store):
    found = store.create("long")
    with store._writing() as db:
        for n in range(100):
            role = "assistant" if n % 2 else "user"
            db.execute(
                f"INSERT INTO turn VALUES ({', '.join('?' * len(chat._TURN_COLUMNS))})",
                chat._row(chat.Turn(found.id, n, role, "same text")),
            )
    page = open_page(c=found.id)
    assert (len(bubbles(page)), len(page.chat_message)) == (20, 0)
    calm(page.button(key="chat_earlier").click().run())
    assert (len(bubbles(page)), len(page.chat_message)) == (20, 40)
    assert "oldest turns left out" in captions(page)


def test_settings_start_at_the_models_own_and_go_back_to_them(open_page, host, store):
    page = open_page()
    name = "chat.set.new.0"
    assert page.slider(key=f"{name}.temperature").value == 0.7
    assert "Own defaults of" in captions(page) and "the model's defaults" in captions(page)
    page.slider(key=f"{name}.temperature").set_value(0.0).run()
    page.text_area(key=f"{name}.system").set_value("be kind").run()
    assert "greedy" in captions(page)
    page.chat_input[0].set_value("hello").run()
    answer(page, host, "hi")
    assert host.current.handles[0].request.settings == GenerationSettings(50, 0.0, 0.8, 50)
    assert store.list()[0].system == "be kind"
    calm(page.button(key="chat_reset").click().run())
    assert store.list()[0].settings is None
    page.chat_input[0].set_value("more").run()
    assert host.current.handles[1].request.settings.temperature == 0.7


def test_settings_and_view_hold_after_a_restart(open_page, host):
    page = open_page()
    page.slider(key="chat.set.new.0.temperature").set_value(0.25).run()
    page.segmented_control(key="widget.chat.view").set_value("native").run()
    st.cache_resource.clear()
    later = open_page()
    assert later.slider(key="chat.set.new.0.temperature").value == 0.25
    assert later.segmented_control(key="widget.chat.view").value == "native"


def test_conversations_are_searched_opened_renamed_and_deleted(open_page, host, store):
    fruit, other = store.create("Fruit"), store.create("Other")
    page = open_page()
    page.text_input(key="chat_search").set_value("fru").run()
    assert [b.label for b in page.button if (b.key or "").startswith("open_")] == ["Fruit"]
    calm(page.button(key=f"open_{fruit.id}").click().run())
    assert page.query_params["c"] in (fruit.id, [fruit.id])
    page.button(key=f"rename_{fruit.id}").click().run()
    page.text_input(key=f"chat_title_{fruit.id}").set_value("水果")
    calm(page.button(key="chat_rename_save").click().run())
    assert store.get(fruit.id).title == "水果"
    page.text_input(key="chat_search").set_value("").run()
    page.button(key=f"delete_{other.id}").click().run()
    calm(page.button(key="chat_delete_yes").click().run())
    assert [one.id for one in store.list()] == [fruit.id]


def test_a_deleted_conversation_in_the_address_opens_a_new_one(open_page):
    page = open_page(c="20200101-000000-abcdef")
    assert not page.error and not bubbles(page)


def test_a_question_in_the_address_is_suggested_and_not_sent(open_page, host):
    page = open_page(q="Hello there")
    assert page.chat_input[0].proto.value == "Hello there"
    assert host.current.handles == []


def test_without_a_model_old_conversations_can_be_read(open_page, host, store):
    page = open_page()
    page.chat_input[0].set_value("hello").run()
    answer(page, host, "hi")
    host.current, host.state = None, "empty"
    page = open_page(c=store.list()[0].id)
    assert bubbles(page) == [(True, "hello"), (False, "hi")]
    assert page.chat_input[0].disabled


def test_the_page_speaks_chinese(open_page):
    page = open_page(lang="zh")
    assert page.chat_input[0].placeholder == "输入消息"


def test_text_is_shown_as_typed_and_money_is_no_formula(open_page, host):
    page = open_page()
    page.chat_input[0].set_value("# no *title*\n  indented").run()
    answer(page, host, "from $5 to $10, but $x^2$\nnext")
    typed, said = (text for _, text in bubbles(page))
    assert typed == "\\# no \\*title\\*\n\u00a0\u00a0indented"
    assert said == "from \\$5 to \\$10, but $x^2$\nnext"
    page.segmented_control(key="widget.chat.view").set_value("native").run()
    assert "$x^2$  \nnext" in page.chat_message[1].markdown[0].value
