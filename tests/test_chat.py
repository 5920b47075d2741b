"""Claims about conversations: what is sent, what is kept, and what is never fetched."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest

from glm_core import chat
from glm_core.chat import Budget, ConversationStore, budget, strip_remote_images
from glm_core.engine import EngineBusy, GenerationSettings
from glm_core.errors import GLMError
from glm_core.tokenizers.chatglm2 import Message

USER, ASSISTANT, SYSTEM = 1001, 1002, 1003


class FakeTokenizer:
    """A character is a token; roles are ids no character can have."""

    def chat_ids(self, messages):
        ids = []
        for message in messages:
            ids.append({"user": USER, "assistant": ASSISTANT, "system": SYSTEM}[message.role])
            ids += [ord(c) % 1000 for c in message.content]
        return [*ids, ASSISTANT]


class FakeHandle:
    """An answer that the test writes word by word."""

    def __init__(self, request, number):
        self.request, self.id = request, f"h{number}"
        self.state, self.finish_reason, self.text, self.place = "queued", "", "", 1
        self.error, self.notes, self.n_tokens, self.n_prompt = None, (), 0, len(request.prompt_ids)
        self.tokens_per_second, self.time_to_first_token, self.seconds = 12.5, 0.25, 2.0
        self.obeys = True
        self.cancelled = ""
        self._ended = threading.Event()

    @property
    def done(self):
        return self.state in ("done", "cancelled", "failed")

    def say(self, text):
        self.state, self.place = "running", 0
        self.text += text
        self.n_tokens = len(self.text)

    def end(self, state="done", reason="stop", error=None):
        self.error, self.finish_reason, self.state = error, reason, state
        self._ended.set()

    def cancel(self, reason="user"):
        self.cancelled = reason
        if self.obeys and not self.done:
            self.end("cancelled", "cancelled")

    def wait(self, timeout=None):
        return self._ended.wait(timeout)


class FakeEngine:
    def __init__(self, context=400, name="glm-test"):
        self.context, self.tokenizer = context, FakeTokenizer()
        defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 50, "max_new_tokens": 50}
        self.loaded = SimpleNamespace(info=SimpleNamespace(name=name), defaults=defaults)
        self.handles, self.refuse = [], None

    def submit(self, request):
        if self.refuse:
            raise self.refuse
        self.handles.append(FakeHandle(request, len(self.handles)))
        self.handles[-1].id += f"-{id(self)}"
        return self.handles[-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat, "FLUSH_S", 0.02)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def store(tmp_path, engine):
    store = ConversationStore(tmp_path / "workbench.db", SimpleNamespace(current=engine))
    yield store
    for handle in engine.handles:
        handle.end()
    eventually(lambda: not chat._LIVE)


def eventually(claim, seconds=3.0):
    end = time.monotonic() + seconds
    while not (found := claim()) and time.monotonic() < end:
        time.sleep(0.01)
    assert found
    return found


def answered(store, engine, conversation_id, question, answer):
    store.ask(conversation_id, question)
    engine.handles[-1].say(answer)
    engine.handles[-1].end()
    return store.get(conversation_id)


def texts(conversation):
    return [(turn.role, turn.text, turn.state) for turn in conversation.turns]


# --- the budget


def plan(turns, system="", context=100, new=20) -> Budget:
    return budget(FakeTokenizer(), system, turns, context, new)


def talk(*contents):
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)]


def test_everything_is_sent_while_it_fits():
    found = plan(talk("hello", "hi", "and now?"), system="be kind")
    assert [m.content for m in found.prompt] == ["be kind", "hello", "hi", "and now?"]
    assert found.dropped_turns == 0
    assert found.used == len(found.prompt_ids) == len("be kindhellohiand now?") + 5
    assert (found.limit, found.reserved) == (100, 20)


def test_the_oldest_whole_rounds_go_first():
    found = plan(talk("a" * 30, "b" * 30, "c" * 10, "d" * 10, "question"))
    assert [m.content[:1] for m in found.prompt] == ["c", "d", "q"]
    assert found.dropped_turns == 2


@pytest.mark.parametrize("seed", range(40))
def test_prompt_and_answer_stay_within_the_context_and_as_much_as_possible_is_kept(seed):
    chance = random.Random(seed)
    turns = talk(*("x" * chance.randint(0, 60) for _ in range(2 * chance.randint(0, 40) + 1)))
    system = "s" * chance.choice([0, 10])
    context, new = chance.randint(150, 2000), chance.randint(1, 60)
    found = plan(turns, system, context, new)
    assert found.used + new <= context
    assert found.prompt[-1] == turns[-1]
    assert (found.prompt[0].role == "system") == bool(system)
    if found.dropped_turns:
        more = [*turns[found.dropped_turns - 2 :]]
        head = [Message("system", system)] if system else []
        assert len(FakeTokenizer().chat_ids([*head, *more])) + new > context


def test_a_question_too_long_is_refused_with_both_numbers():
    with pytest.raises(GLMError, match="take 123 tokens; there is room for 80") as error:
        plan(talk("q" * 115), system="12345")
    assert error.value.todo


def test_the_work_does_not_grow_with_the_length_of_the_conversation():
    class Counting(FakeTokenizer):
        characters = 0

        def chat_ids(self, messages):
            Counting.characters += sum(len(m.content) for m in messages)
            return super().chat_ids(messages)

    budget(Counting(), "", talk(*["word " * 4] * 20_001), 1000, 100)
    assert Counting.characters < 20_000


# --- asking


def test_an_answer_is_stored_with_how_it_came_about(store, engine):
    found = store.create(system="be kind")
    handle = store.ask(found.id, "  你好吗？ ")
    assert texts(store.get(found.id)) == [("user", "你好吗？", "done"), ("assistant", "", "running")]
    engine.handles[0].say("很好")
    engine.handles[0].end()
    turn = store.get(found.id).turns[-1]
    assert (turn.text, turn.state, turn.tokens, turn.ttft, turn.tokens_per_second) == (
        "很好",
        "done",
        2,
        0.25,
        12.5,
    )
    assert (turn.model, turn.finish_reason, turn.handle_id) == ("glm-test", "stop", handle.id)
    assert store.get(found.id).title == "你好吗？"


def test_the_settings_of_the_model_hold_until_others_are_chosen(store, engine):
    found = store.create()
    answered(store, engine, found.id, "a", "b")
    assert engine.handles[0].request.settings == GenerationSettings(50, 0.7, 0.8, 50)
    mine = GenerationSettings(max_new_tokens=9, seed=4, stop=("END",))
    store.set_settings(found.id, mine)
    answered(store, engine, found.id, "c", "d")
    assert engine.handles[1].request.settings == mine
    store.set_settings(found.id, None)
    assert store.get(found.id).settings is None


def test_the_history_is_sent_and_a_round_without_an_answer_is_not(store, engine):
    found = store.create()
    answered(store, engine, found.id, "one", "two")
    store.ask(found.id, "lost")
    engine.handles[-1].end("failed", "error", GLMError("Out of memory.", "Unload."))
    assert store.get(found.id).turns[-1].error == "Out of memory. Unload."
    store.ask(found.id, "three")
    ids = FakeTokenizer().chat_ids(
        [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    )
    assert list(engine.handles[-1].request.prompt_ids) == ids
    assert engine.handles[-1].request.priority == "chat"


def test_the_answer_says_how_many_turns_did_not_fit(store, engine):
    found = store.create()
    for _ in range(4):
        answered(store, engine, found.id, "q" * 60, "a" * 60)
    assert [turn.dropped_turns for turn in store.get(found.id).turns if not turn.is_user] == [0, 0, 0, 2]
    assert store.usage(found.id, engine).dropped_turns == 4 * 2 - 2 * 2


def test_fifty_rounds_stay_within_the_context(store, engine):
    found = store.create()
    for i in range(50):
        answered(store, engine, found.id, f"question {i}", "answer " * 5)
        assert len(engine.handles[-1].request.prompt_ids) + 50 <= engine.context
    assert len(store.get(found.id).turns) == 100


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_question_is_refused(store, text):
    found = store.create()
    with pytest.raises(GLMError, match="empty"):
        store.ask(found.id, text)


def test_a_refused_question_leaves_the_conversation_as_it_was(store, engine):
    found = answered(store, engine, store.create().id, "one", "two")
    engine.refuse = EngineBusy("64 requests are waiting.", "Try again.")
    for ask in (
        lambda: store.ask(found.id, "three"),
        lambda: store.regenerate(found.id),
        lambda: store.edit_last(found.id, "other"),
    ):
        with pytest.raises(EngineBusy):
            ask()
    engine.refuse = None
    with pytest.raises(GLMError, match="tokens"):
        store.ask(found.id, "x" * 1000)
    assert store.get(found.id).turns == found.turns


def test_without_a_model_the_way_to_one_is_named(tmp_path):
    store = ConversationStore(tmp_path / "db", SimpleNamespace(current=None))
    with pytest.raises(GLMError, match="Models page"):
        store.ask(store.create().id, "hello")


def test_one_conversation_gives_one_answer_at_a_time(store, engine):
    found = store.create()
    refused = []

    def ask():
        try:
            store.ask(found.id, "hello")
        except GLMError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(engine.handles), len(refused)) == (1, 5)
    assert len(store.get(found.id).turns) == 2


def test_half_a_character_from_outside_is_stored(store, engine):
    found = answered(store, engine, store.create().id, "a\ud83d", "b\udc00")
    assert texts(found) == [("user", "a?", "done"), ("assistant", "b?", "done")]


def test_the_real_engine_answers_and_stops(tiny_checkpoint, tmp_path):
    from glm_core import checkpoints
    from glm_core.engine import Engine

    real = Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    try:
        store = ConversationStore(tmp_path / "real.db", SimpleNamespace(current=real))
        found = store.create(system="be kind", settings=GenerationSettings(max_new_tokens=4))
        assert store.ask(found.id, "<|assistant|> 你好").wait(30)
        turn = store.get(found.id).turns[-1]
        assert turn.state == "done" and 0 < turn.tokens <= 4
        special = real.tokenizer.special["<|assistant|>"]
        sent = budget(real.tokenizer, "be kind", [Message("user", "<|assistant|> 你好")], real.context, 4)
        assert (turn.prompt_tokens, sent.prompt_ids.count(special)) == (sent.used, 1)  # typed ones stay text
        store.set_settings(found.id, GenerationSettings(max_new_tokens=1000))
        store.ask(found.id, "go on")
        assert store.stop(found.id)
        assert not store.get(found.id).running
    finally:
        real.close()


# --- stop, regenerate, edit


def test_stop_keeps_the_partial_answer_and_the_next_question_is_answered(store, engine):
    found = store.create()
    store.ask(found.id, "tell me a story")
    engine.handles[0].say("Once upon")
    assert store.stop(found.id)
    turn = store.get(found.id).turns[-1]
    assert (turn.text, turn.state, turn.finish_reason) == ("Once upon", "stopped", "cancelled")
    assert texts(answered(store, engine, found.id, "more", "a time"))[-1] == ("assistant", "a time", "done")
    assert not store.stop(found.id)


def test_stop_does_not_wait_for_an_engine_inside_a_long_step(store, engine):
    found = store.create()
    store.ask(found.id, "hello")
    engine.handles[0].obeys = False
    engine.handles[0].say("half")
    store.stop(found.id)
    assert not engine.handles[0].done and chat.STOP_S < 0.5
    assert texts(store.get(found.id))[-1] == ("assistant", "half", "stopped")
    engine.handles[0].say(" and more")
    engine.handles[0].end()
    eventually(lambda: not chat._LIVE)
    assert texts(store.get(found.id))[-1] == ("assistant", "half", "stopped")


def test_regenerate_replaces_the_answer_and_asks_the_same(store, engine):
    found = answered(store, engine, store.create().id, "one", "two")
    store.regenerate(found.id)
    assert engine.handles[1].request.prompt_ids == engine.handles[0].request.prompt_ids
    engine.handles[1].say("better")
    engine.handles[1].end()
    assert texts(store.get(found.id)) == [("user", "one", "done"), ("assistant", "better", "done")]


def test_edit_last_replaces_the_question_only_where_it_was_asked_last(store, engine):
    found = store.create()
    answered(store, engine, found.id, "one", "two")
    answered(store, engine, found.id, "three", "four")
    store.edit_last(found.id, "THREE")
    engine.handles[-1].say("FOUR")
    engine.handles[-1].end()
    assert [turn.text for turn in store.get(found.id).turns] == ["one", "two", "THREE", "FOUR"]
    assert [turn.n for turn in store.get(found.id).turns] == [0, 1, 2, 3]


def test_editing_the_only_question_renames_an_unnamed_conversation(store, engine):
    found = answered(store, engine, store.create().id, "whta?", "?")
    store.edit_last(found.id, "what?")
    assert store.get(found.id).title == "what?"
    engine.handles[-1].end()
    store.rename(found.id, "Mine")
    eventually(lambda: not store.get(found.id).running)
    store.edit_last(found.id, "why?")
    assert store.get(found.id).title == "Mine"


def test_nothing_changes_while_an_answer_is_written(store, engine):
    found = store.create()
    store.ask(found.id, "one")
    for ask in (lambda: store.ask(found.id, "x"), lambda: store.regenerate(found.id)):
        with pytest.raises(GLMError, match="still being written"):
            ask()


def test_there_must_be_a_question_to_answer_again(store):
    with pytest.raises(GLMError, match="no question"):
        store.regenerate(store.create().id)


@pytest.mark.parametrize("operation", ["clear", "delete"])
def test_clear_and_delete_end_a_running_answer(store, engine, operation):
    found = store.create(system="be kind")
    store.ask(found.id, "hello")
    getattr(store, operation)(found.id)
    assert engine.handles[0].cancelled
    eventually(lambda: not chat._LIVE)
    if operation == "clear":
        assert (store.get(found.id).turns, store.get(found.id).system) == ((), "be kind")
    else:
        store.delete(found.id)
        with pytest.raises(GLMError, match="no conversation"):
            store.get(found.id)


# --- nothing is lost


def test_the_text_so_far_is_on_disk_while_the_answer_runs(store, engine):
    found = store.create()
    store.ask(found.id, "hello")
    engine.handles[0].say("so far")

    def on_disk():
        with sqlite3.connect(store.path) as db:
            return db.execute("SELECT text FROM turn WHERE role = 'assistant'").fetchone()[0]

    eventually(lambda: on_disk() == "so far")


def test_an_answer_ends_in_the_store_without_anybody_looking(store, engine):
    found = store.create()
    store.ask(found.id, "hello")
    engine.handles[0].say("hi")
    engine.handles[0].end()
    with sqlite3.connect(store.path) as db:
        sql = "SELECT text, state FROM turn WHERE conversation_id = ? AND role = 'assistant'"
        eventually(lambda: db.execute(sql, (found.id,)).fetchone() == ("hi", "done"))


def test_another_screen_finds_the_running_answer(store, engine, tmp_path):
    found = store.create()
    store.ask(found.id, "hello")
    other = ConversationStore(store.path, SimpleNamespace(current=engine))
    turn = other.get(found.id).running
    assert turn is not None and other.live(turn) is engine.handles[0]
    assert other.stop(found.id)


def test_after_a_crash_the_partial_answer_is_kept_and_marked(store, engine):
    found = store.create()
    store.ask(found.id, "hello")
    engine.handles[0].say("half an ans")
    with sqlite3.connect(store.path, timeout=10) as db:
        eventually(
            lambda: db.execute("SELECT max(text) FROM turn WHERE n = 1").fetchone()[0] == "half an ans"
        )
        chat._LIVE.clear()
        db.execute("UPDATE turn SET owner = 'elsewhere' WHERE n = 1")  # a process that is gone
    again = ConversationStore(store.path, SimpleNamespace(current=engine))
    assert texts(again.get(found.id))[-1] == ("assistant", "half an ans", "interrupted")
    assert texts(answered(again, engine, found.id, "go on", "swer"))[-1][1] == "swer"


def test_an_answer_of_another_living_process_is_left_alone_but_can_be_stopped(store, engine, monkeypatch):
    found = store.create()
    store.ask(found.id, "hello")
    handle = chat._LIVE.pop(engine.handles[0].id)
    real = chat._owner()
    monkeypatch.setattr(chat, "_owner", lambda: "this process")
    assert chat._alive(real)
    assert store.recover() == 0
    assert store.get(found.id).running
    assert store.stop(found.id)
    eventually(lambda: handle.cancelled)  # the writer saw it at its next flush
    assert store.get(found.id).turns[-1].state == "stopped"


def test_an_unusable_file_is_a_sentence(tmp_path):
    (tmp_path / "db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(GLMError, match="cannot be read or written"):
        ConversationStore(tmp_path / "db")


# --- the list


def test_conversations_are_listed_newest_first_and_renamed(store, engine):
    first, second = store.create(), store.create("Second")
    answered(store, engine, first.id, "hello", "hi")
    assert [one.id for one in store.list()] == [first.id, second.id]
    assert [one.n_turns for one in store.list()] == [2, 0]
    store.rename(second.id, "  Another \n name ")
    assert store.get(second.id).title == "Another name"
    with pytest.raises(GLMError, match="empty"):
        store.rename(second.id, " ")
    with pytest.raises(GLMError, match="no conversation"):
        store.rename("nobody", "x")


def test_search_reads_titles_questions_and_answers_literally(store, engine):
    first = answered(store, engine, store.create("Fruit").id, "哪个水果最甜？", "荔枝 100% 最甜")
    second = answered(store, engine, store.create("Other").id, "Hello World", "hi")
    assert [one.id for one in store.search("fruit")] == [first.id]
    assert [(one.id, one.snippet) for one in store.search("荔枝")] == [(first.id, "荔枝 100% 最甜")]
    assert [one.id for one in store.search("hello w")] == [second.id]
    assert [one.id for one in store.search("0%")] == [first.id]
    assert store.search("_") == []
    assert len(store.search(" ")) == 2


# --- export


def test_json_export_holds_every_turn_and_no_machine(store, engine):
    store.set_settings((found := store.create(system="be kind")).id, GenerationSettings(20, seed=3))
    found = answered(store, engine, found.id, "你好", "![x](http://a/b.png)")
    data = json.loads(store.export(found.id, "json"))
    assert [(turn["role"], turn["content"]) for turn in data["turns"]] == [
        ("user", "你好"),
        ("assistant", "![x](http://a/b.png)"),
    ]
    assert (data["system"], data["settings"]["seed"], data["turns"][1]["tokens"]) == ("be kind", 3, 20)
    assert "owner" not in data["turns"][1]


def test_markdown_export_reads_as_a_conversation(store, engine):
    found = store.create(system="be\nkind")
    store.ask(found.id, "你好")
    engine.handles[0].say("see ![x](http://a/b.png)")
    store.stop(found.id)
    text = store.export(found.id, "md")
    assert text.startswith("# 你好\n")
    for part in ("> be\n> kind", "## User\n\n你好", "## glm-test\n\nsee x (http://a/b.png)", "*(stopped)*"):
        assert part in text
    with pytest.raises(GLMError, match="md or json"):
        store.export(found.id, "pdf")


# --- nothing is fetched


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("look ![a cat](http://x.com/c.png) here", "look a cat (http://x.com/c.png) here"),
        ("![](https://x.com/c.png)", "https://x.com/c.png"),
        ("![a](//x.com/c.png)", "a (//x.com/c.png)"),
        ('![a](<http://x.com/c d.png> "title")', "a (http://x.com/c d.png)"),
        ("![a](http://x.com/c_(1).png)", "a (http://x.com/c_(1).png)"),
        ("[![a](http://x/i.png)](http://y)", "[a (http://x/i.png)](http://y)"),
        ("![a\nb](http://x)", "a\nb (http://x)"),
        ("![a](&#104;ttp://x)", "a (&#104;ttp://x)"),
        ("![a](/\\x.com/c.png)", "a (/\\x.com/c.png)"),
        ('<img alt="a cat" src="http://x/c.png">', "a cat (http://x/c.png)"),
        ("<IMG src=//x/c.png />", "//x/c.png"),
        ('<img alt="a>b" src="http://x">', "a>b (http://x)"),
    ],
)
def test_a_remote_image_becomes_its_words(text, shown):
    assert strip_remote_images(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "![a [nested] one](http://x)",
        "![![a](http://x)](http://y)",
        '![a](http://x "b\\"c")',
        "![a\\]](http://x)",
        "![a]( http://x 'one\ntwo' )",
        "![a](http://x((())))",
        "![unfinished](http://x",
        "> ![a\n> b [c] d](http://x)",
        "```\n![a [b] c](http://x)\n```",
    ],
)
def test_an_exotic_image_is_taken_apart_too(text):
    assert "![" not in strip_remote_images(text)


@pytest.mark.parametrize("image", ["![a][b]", "![b]", "![b][]"])
@pytest.mark.parametrize(
    "definition", ["[b]: http://x/c.png", "> [b]: <http://x>", "[B]:\nhttp://x", "[b\\\n]: //x"]
)
def test_an_image_by_reference_loses_its_address(image, definition):
    assert "]:" not in strip_remote_images(f"{image}\n\n{definition}\n")


@pytest.mark.parametrize(
    "text",
    [
        "no image, a [link](http://x) and a < b",
        "`let v = vec![1, 2];` and `x[1]`",
        "#![feature(test)]\nfn main() {}",
        "![dot](data:image/png;base64,iVBORw0KGgo=)",
        "![unfinished",
        "wow![",
        "use the <video element with //",
        "<b>bold</b>",
    ],
)
def test_what_fetches_nothing_stays_as_it_is(text):
    assert strip_remote_images(text) == text


@pytest.mark.timeout(30)  # seconds; a pattern that goes back and forth would take hours
def test_a_hostile_text_is_taken_apart_in_one_go():
    for text in (
        "![" * 20_000,
        "![a](" * 10_000,
        "<img " * 20_000,
        "[a" * 20_000 + "![",
        "![a](b" + "()" * 20_000,
    ):
        strip_remote_images(text)
