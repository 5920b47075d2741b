"""Claims about models on servers: what is sent, what is sent again, what stops a job, and that no key is kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_core import batch, chat, cli, jobs, remote
from glm_core import classify as labelling
from glm_core import engine as engines
from glm_core.batch import BatchTask
from glm_core.classify import Label, LabelTask
from glm_core.engine import EngineHost, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.jobs import JobStore, Supervisor
from glm_core.remote import Remote, RemoteEngine, client, labels
from glm_core.remote.engine import Characters, messages_of
from glm_core.settings import Settings
from glm_core.tokenizers.base import Message
from tests.openai_server import KEY, MODEL, Fake, serving

VARIABLE = "GLM_TEST_SERVER_KEY"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(remote.DEFAULT_KEY, raising=False)
    with serving(Fake()) as found:
        yield found


def remote_of(fake: Fake, **values: Any) -> Remote:
    return Remote("", fake.url, fake.model, **{"timeout_s": 1.0, "patience_s": 0.5} | values)


@contextlib.contextmanager
def connected(fake: Fake, **values: Any) -> Iterator[RemoteEngine]:
    engine = remote.connect(remote_of(fake, **values))
    yield engine
    engine.close()


def ids_of(engine: RemoteEngine, *texts: str) -> tuple[int, ...]:
    """A conversation that begins with the user."""
    roles = ("user", "assistant")
    return tuple(engine.tokenizer.chat_ids([Message(roles[i % 2], text) for i, text in enumerate(texts)]))


class Table:
    """Rows as a table has them."""

    warnings = ()

    def __init__(self, rows: list[tuple[str, ...]]) -> None:
        self._rows = rows

    def rows(self) -> Iterator[tuple[str, ...]]:
        return iter(self._rows)


@pytest.fixture
def store() -> JobStore:
    settings = Settings.read()
    settings.make_folders()
    return jobs.store(settings)


def task_of(engine: RemoteEngine, **values: Any) -> BatchTask:
    return BatchTask(
        checkpoint=engine.remote.spec, checkpoint_fingerprint=engine.remote.fingerprint, precision="remote",
        device=engine.remote.host, input_name="rows.csv", input_path="", input_sha256="", columns=("text",),
        output_column="answer", system="", generation="remote", versions={}, remote=engine.record(),
        **{"template": "{text}", "settings": GenerationSettings(max_new_tokens=16)} | values,
    )  # fmt: skip


def ran(store: JobStore, job: Any, kind: str = "batch") -> Any:
    """The job after a stretch of running, in this thread."""
    worker = Supervisor(store, {kind: batch.run if kind == "batch" else labelling.run})
    worker.run(store.claim((kind,), worker.owner, job.id))
    return store.get(job.id)


def predictions(store: JobStore, job_id: str) -> list[str]:
    return [result.prediction for _, _, result in store.iter_results(job_id) if result is not None]


# ---- names, addresses, keys


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/v1/", "http://host:8000/v1"),
        (" https://host/api/v1/chat/completions ", "https://host/api/v1"),
        ("http://[::1]:8000/v1/models", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_has_one_form(given, address):
    assert remote.remotes.address(given) == address


@pytest.mark.parametrize(
    "given", ["host:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://host/v1?key=secret", "http://h:x/v1"],
)  # fmt: skip
def test_an_address_with_a_password_or_none_is_refused_and_not_repeated(given):
    with pytest.raises(GLMError) as error:
        remote.remotes.address(given)
    assert "secret" not in str(error.value)


def test_a_key_in_place_of_its_name_is_refused_and_neither_stored_nor_repeated(workspace):
    with pytest.raises(GLMError, match="Never the key itself") as error:
        remote.add(Remote("a", "http://host/v1", "m", key_env=KEY))
    assert KEY not in str(error.value)
    assert not (workspace / "remotes.json").exists()


def test_servers_are_kept_by_name_until_removed(workspace):
    kept = remote.add(Remote(" b ", "http://host:1", "m/1"))
    remote.add(Remote("A", "http://host:2/v1", "m", concurrency=3))
    assert [one.name for one in remote.known()] == ["A", "b"]
    assert remote.find("remote:b") == kept == Remote("b", "http://host:1/v1", "m/1")
    with pytest.raises(GLMError, match="already"):
        remote.add(Remote("b", "http://other/v1", "m"))
    remote.remove("b")
    with pytest.raises(GLMError, match="there are: A"):
        remote.find("remote:b")


def test_a_key_comes_from_the_environment_or_a_secret_and_one_that_is_named_must_be_there(
    tmp_path, monkeypatch
):
    one = Remote("", "http://host/v1", "m", key_env=VARIABLE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GLMError, match=VARIABLE):
        remote.remotes.key_of(one)
    assert remote.remotes.key_of(replace(one, key_env=remote.DEFAULT_KEY)) == ""
    (tmp_path / ".streamlit").mkdir()
    (tmp_path / ".streamlit" / "secrets.toml").write_text(f'{VARIABLE} = "of-the-file"\n')
    assert remote.remotes.key_of(one) == "of-the-file"
    monkeypatch.setenv(VARIABLE, "of-the-environment")
    assert remote.remotes.key_of(one) == "of-the-environment"
    monkeypatch.setenv(VARIABLE, "two\nlines")
    with pytest.raises(GLMError) as error:
        remote.remotes.key_of(one)
    assert "lines" not in str(error.value)


# ---- conversations


def test_a_conversation_survives_its_way_through_ids():
    tokenizer = Characters()
    conversation = [
        Message("system", "简短 <|user|>"), Message("user", "a\n\U0001f600"), Message("assistant", ""), Message("user", "?"),
    ]  # fmt: skip
    assert messages_of(tokenizer.chat_ids(conversation)) == conversation
    with pytest.raises(UnicodeError):
        tokenizer.chat_ids([Message("user", "half \ud83d")])


def test_settings_are_sent_in_the_words_of_the_server(fake):
    sampled = GenerationSettings(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=5, stop=("。", "\n")
    )
    with connected(fake) as engine:
        request = Request(ids_of(engine, "hi"), sampled)
        body = engine.body(request)
        assert body == {
            "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "max_tokens": 7,
            "top_p": 0.9, "seed": 5, "stop": ["。", "\n"], "top_k": 3,
        }  # fmt: skip
        greedy = replace(request, settings=GenerationSettings(max_new_tokens=7, top_k=3, seed=5))
        assert engine.body(greedy).keys() == {"model", "messages", "temperature", "max_tokens"}
    fake.owner = "vllm"
    with connected(fake) as engine:  # which would fill in the model's own defaults
        more = engine.body(Request(ids_of(engine, "hi")))
        assert (more["top_k"], more["repetition_penalty"]) == (-1, 1.0)
    fake.owner = "llamacpp"
    with connected(fake) as engine:
        assert engine.body(Request(ids_of(engine, "hi")))["repeat_penalty"] == 1.0


def test_a_server_that_wants_other_names_for_a_limit_gets_them(fake):
    fake.fault = lambda _, body: (
        (400, "Unsupported parameter: use 'max_completion_tokens' instead.") if "max_tokens" in body else None
    )
    with connected(fake) as engine:
        handle = engine.submit(Request(ids_of(engine, "abc"), priority="batch"))
        assert handle.wait(10)
        assert handle.text == "cba"


def test_a_chat_answer_streams_with_the_tokens_the_server_counts(fake):
    fake.piece_s = 0.02
    with connected(fake) as engine:
        handle = engine.submit(Request(ids_of(engine, "one", "eno", "abcdefgh")))
        seen = set()
        while not handle.wait(0.01):
            seen.add(handle.text)
        assert handle.state == "done" and handle.text == "hgfedcba"
        assert len(seen) > 3
        assert (handle.n_prompt, handle.n_tokens) == (21, 9)
        assert handle.time_to_first_token is not None and handle.tokens_per_second > 0
        assert [one["role"] for one in fake.asked[-1][1]["messages"]] == ["user", "assistant", "user"]


def test_stopping_an_answer_closes_its_connection_and_keeps_what_has_come(fake):
    fake.piece_s, fake.answer = 0.02, lambda text: "x" * 2000
    with connected(fake) as engine:
        handle = engine.submit(Request(ids_of(engine, "long")))
        while len(handle.text) < 3:
            time.sleep(0.01)
        handle.cancel()
        assert handle.wait(2)
        assert handle.state == "cancelled" and 3 <= len(handle.text) < 2000
        assert fake.broken.wait(5), "the server went on writing"


@pytest.mark.parametrize(("fault", "said"), [("cut", "whole|connection"), ("error", "out of memory")])
def test_an_answer_that_breaks_off_fails_with_its_beginning_kept(fake, fault, said):
    fake.fault = lambda number, body: fault
    with connected(fake) as engine:
        handle = engine.submit(Request(ids_of(engine, "abcdefgh")))
        assert handle.wait(10)
        assert handle.state == "failed" and handle.text == "hgf"
        assert re.search(said, str(handle.error))


def test_a_conversation_is_kept_with_a_server_as_with_a_model(fake, workspace):
    host = EngineHost()
    engine = host.use(remote_of(fake).spec)
    try:
        assert host.use(remote_of(fake).spec) is engine and host.state == "ready"
        talks = chat.ConversationStore(workspace / "chat.db", host)
        talk = talks.create()
        for question in ("abc", "again"):
            talks.ask(talk.id, question).wait(10)
            until(lambda: talks.get(talk.id).running is None)
        talks.regenerate(talk.id).wait(10)
        until(lambda: talks.get(talk.id).running is None)
        turns = talks.get(talk.id).turns
        assert [one.text for one in turns] == ["abc", "cba", "again", "niaga"]
        assert turns[-1].prompt_tokens > 0 and turns[-1].tokens == 6 and turns[-1].model.startswith(MODEL)
        talks.close()
    finally:
        host.unload()
    assert not any(one.name == "glm-remote" for one in threading.enumerate())


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_is_not_there_leaves_the_model_where_it_is(fake):
    host = EngineHost()
    before = host.use(remote_of(fake).spec)
    with pytest.raises(GLMError, match="no connection"):
        host.use("http://127.0.0.1:9/v1#m")
    assert host.current is before
    host.unload()


def test_what_needs_weights_is_refused_with_the_reason(fake):
    with connected(fake) as engine:
        for ask in (engine.self_test, engine.forward_tokens, lambda: engine.later(lambda: None)):
            with pytest.raises(GLMError, match="on a server"):
                ask()


# ---- batches


def unlucky(seed: int = 3) -> Any:
    """A fault for every tenth request, of every kind there is."""
    chance = random.Random(seed)
    kinds = (429, 500, 503, "drop", "cut")
    return lambda number, body: chance.choice(kinds) if chance.random() < 0.1 else None


def test_every_row_of_a_batch_is_answered_once_whatever_a_tenth_of_the_requests_meet(fake, store):
    fake.retry_after = "0.02"
    faults = unlucky()
    late = iter([True])
    fake.fault = lambda number, body: ("late" if next(late, False) else None) or faults(number, body)
    rows = [(f"row {i:03d}",) for i in range(300)]
    with connected(fake) as engine:
        task = task_of(engine)
    job = ran(store, batch.start(store, task, Table(rows)))
    assert (job.state, job.done, job.failed) == ("done", 300, 0), job.message
    assert predictions(store, job.id) == [text[::-1] for (text,) in rows]
    answered = Counter(body["messages"][-1]["content"] for path, body in fake.asked)
    assert set(answered) == {text for (text,) in rows} and sum(answered.values()) > 300
    assert 1 < fake.most_at_once <= 16 + 1  # a request that timed out here may still run there
    assert any("sent again" in note for note in job.warnings)


def test_the_bound_on_requests_at_a_time_holds(fake, store):
    fake.pause_s = 0.02
    with connected(fake, concurrency=3) as engine:
        handles = engine.submit_many([Request(ids_of(engine, str(i)), priority="batch") for i in range(24)])
        assert all(handle.wait(20) for handle in handles)
    assert fake.most_at_once == 3


def test_everybody_waits_as_long_as_the_server_asks(fake):
    fake.retry_after, fake.fault = "0.3", lambda number, body: 429 if number == 1 else None
    with connected(fake) as engine:
        begun = time.monotonic()
        handle = engine.submit(Request(ids_of(engine, "ab"), priority="batch"))
        assert handle.wait(10) and handle.text == "ba"
        assert time.monotonic() - begun >= 0.3
        assert any("sent again" in note for note in handle.notes)


def test_a_server_that_cannot_keep_up_is_asked_less_at_a_time_and_then_more_again(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    room = client.Room(9)
    for _ in range(3):
        room.overwhelmed()
    assert room.limit == 6  # requests that failed together count once
    for _ in range(20):
        now[0] += 2
        room.overwhelmed()
    assert room.limit == 1
    for _ in range(60):
        room.answered()
    assert room.limit == 9


@pytest.mark.parametrize("text", ["7", "Wed, 21 Oct 2026 07:28:00 GMT", "soon", ""])
def test_a_pause_is_read_in_seconds_or_as_a_date(text):
    found = client._seconds(text)
    assert found == {"7": 7.0, "soon": None, "": None}.get(text, found)
    assert found is None or found >= 0


def test_a_row_the_server_refuses_fails_at_once_with_the_reason_and_can_be_retried(fake, store):
    long = "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens."
    fake.fault = lambda number, body: (
        (400, long) if "too long" in body["messages"][-1]["content"] else
        (422, "bad") if "bad" in body["messages"][-1]["content"] else None
    )  # fmt: skip
    with connected(fake) as engine:
        job = batch.start(store, task_of(engine), Table([("fine",), ("too long",), ("bad",), ("fine too",)]))
    job = ran(store, job)
    assert (job.state, job.done, job.failed) == ("done", 2, 2)
    errors = [result.error for _, _, result in store.iter_results(job.id) if result.status == "failed"]
    assert "too long for the model of the server" in errors[0] and "4096" in errors[0]
    assert "(422): bad" in errors[1]
    assert len(fake.asked) == 4  # none was sent again
    fake.fault = lambda number, body: None
    job = ran(store, store.retry_failed(job.id))
    assert (job.done, job.failed) == (4, 0)


def test_a_row_that_always_fails_ends_after_its_tries_and_the_others_go_on(fake, store):
    fake.fault = lambda number, body: 500 if body["messages"][-1]["content"] == "poison" else None
    remote.add(replace(remote_of(fake, tries=3), name="three"))
    with connected(fake) as engine:
        task = replace(task_of(engine), checkpoint="remote:three")
    job = ran(store, batch.start(store, task, Table([("poison",), ("a",), ("b",)])))
    assert (job.state, job.done, job.failed) == ("done", 2, 1)
    assert "sent 3 times" in next(one.error for _, _, one in store.iter_results(job.id) if one.error)
    assert sum(body["messages"][-1]["content"] == "poison" for _, body in fake.asked) == 3


def test_a_server_that_goes_away_pauses_the_job_and_the_job_goes_on_when_it_is_back(fake, store):
    remote.add(replace(remote_of(fake, tries=2, patience_s=0.4), name="away"))
    with connected(fake) as engine:
        task = replace(task_of(engine), checkpoint="remote:away")
    rows = [(f"row {i}",) for i in range(200)]

    def ends(number: int, body: dict[str, Any]) -> None:
        fake.alive = fake.alive and number < 50

    fake.fault = ends
    job = ran(store, batch.start(store, task, Table(rows)))
    assert job.state == "paused" and "gone for" in job.message and job.failed == 0
    assert 0 < job.done < 200
    fake.alive, fake.fault = True, lambda number, body: None
    job = ran(store, store.resume(job.id))
    assert (job.state, job.done, job.failed) == ("done", 200, 0)
    assert predictions(store, job.id) == [text[::-1] for (text,) in rows]


def test_a_server_that_is_only_away_for_a_moment_costs_no_row(fake):
    with connected(fake, tries=2, patience_s=20) as engine:
        fake.alive = False
        handle = engine.submit(Request(ids_of(engine, "ab"), priority="batch"))
        time.sleep(0.5)
        assert not handle.done
        fake.alive = True
        assert handle.wait(10) and handle.text == "ba"


def test_a_job_goes_on_after_a_pause_without_a_row_twice(fake, store):
    fake.pause_s = 0.01
    with connected(fake, concurrency=4) as engine:
        job = batch.start(store, task_of(engine), Table([(str(i),) for i in range(120)]))
    worker = Supervisor(store, {"batch": batch.run})
    thread = threading.Thread(target=worker.run, args=(store.claim(("batch",), worker.owner, job.id),))
    thread.start()
    until(lambda: store.get(job.id).done >= 10)
    store.request_pause(job.id)
    thread.join(20)
    stopped = store.get(job.id)
    assert stopped.state == "paused" and 10 <= stopped.done < 120
    job = ran(store, store.resume(job.id))
    assert (job.state, job.done) == ("done", 120)
    assert predictions(store, job.id) == [str(i)[::-1] for i in range(120)]
    asked = Counter(body["messages"][-1]["content"] for _, body in fake.asked)
    assert sum(asked.values()) <= 120 + 4 * batch.ROWS_AHEAD  # only rows on their way were asked again


def test_a_changed_address_or_model_is_refused_as_a_changed_checkpoint(fake, store):
    remote.add(Remote("box", fake.url, MODEL))
    with connected(fake) as engine:
        task = replace(task_of(engine), checkpoint="remote:box")
    job = batch.start(store, task, Table([("a",)]))
    remote.add(Remote("box", fake.url, "another"), replace_it=True)
    job = ran(store, job)
    assert job.state == "failed" and "is not the one this job was started with" in job.message
    remote.add(Remote("box", fake.url, MODEL, concurrency=2), replace_it=True)  # how it is asked may change
    assert ran(store, store.resume(job.id)).state == "done"


def test_the_job_keeps_address_model_time_and_concurrency(fake, store):
    with connected(fake, concurrency=5) as engine:
        job = batch.start(store, task_of(engine), Table([("a",)]))
    kept = batch.manifest(store, job.id)["task"]
    assert kept["remote"] | {"asked_at": ""} == {
        "name": "", "url": fake.url, "model": MODEL, "reported_model": MODEL, "server": "other", "context": 4096,
        "asked_at": "", "key_env": remote.DEFAULT_KEY, "concurrency": 5, "tries": 6, "timeout_s": 1.0,
    }  # fmt: skip
    assert kept["remote"]["asked_at"][:2] == "20"
    assert kept["checkpoint"] == f"{MODEL} ({engine.remote.host})"


# ---- labels

TEXTS = ("加我微信", "谢谢你", "so good", "")


def label_task(engine: RemoteEngine, way: str, **values: Any) -> LabelTask:
    given = {
        "labels": (Label("0", "正常"), Label("1", "垃圾")), "template": "评论：{text}", "columns": ("text",),
        "instruction": "判断", "input_name": "rows.csv",
    }  # fmt: skip
    return LabelTask(
        checkpoint=engine.remote.spec, checkpoint_fingerprint=engine.remote.fingerprint, precision="remote",
        device="", generation="remote", remote=engine.record() | {"labels": way}, **given | values,
    )  # fmt: skip


def test_the_best_way_to_probabilities_is_found_out(fake):
    found = []
    for kind in ("nothing", "logprobs", "echo", "classify"):
        setattr(fake, kind, True)
        with connected(fake) as engine:
            found.append(labels.way_for(engine, True, ["正常", "垃圾"]))
            if kind == "logprobs":
                assert labels.way_for(engine, True, ["a", "ab"]) == "greedy"
            if kind == "classify":
                assert labels.way_for(engine, False) == "echo"  # which can leave out the end of an answer
    assert found == ["greedy", "first", "echo", "classify"]


def test_labels_by_classify_are_read_as_the_server_gives_them_many_texts_at_a_time(fake, store):
    fake.classify = True
    rows = [(f"text {i}",) for i in range(70)] + [("one that is too long",)]
    with connected(fake) as engine:
        task = label_task(engine, "classify")
    job = ran(store, labelling.start(store, task, Table(rows)), "classify")
    assert (job.state, job.done, job.failed) == ("done", 70, 1), job.message
    first = next(iter(store.iter_results(job.id)))[2]
    given = [fake.logprob([*map(ord, "判断\n评论：text 0")], ord(one)) for one in "正垃"]
    total = math.fsum(map(math.exp, given))
    scored = labelling.from_result(first)
    assert scored.probabilities == pytest.approx([math.exp(one) / total for one in given], abs=1e-6)
    assert scored.outside == pytest.approx(1 - math.exp(-0.1), abs=1e-6)
    failed = [one.error for _, _, one in store.iter_results(job.id) if one.status == "failed"]
    assert "too long for the model of the server" in failed[0]
    assert sum(path == "/v1/classify" for path, _ in fake.asked) < 20


def test_labels_by_echo_are_the_sums_over_their_tokens_and_the_end(fake):
    fake.echo = True
    with connected(fake) as engine:
        engine.label_way = "echo"
        found = labelling.classify(engine, label_task(engine, "echo"), TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        prompt = [2, *map(ord, f"判断\n评论：{text}"), 4, 3]
        for label, score in zip(("正常", "垃圾"), one.scores, strict=True):
            whole = [*prompt, *map(ord, label), 4]
            told = [fake.logprob(whole[:i], whole[i]) for i in range(len(prompt), len(whole))]
            assert score == pytest.approx(math.fsum(told))


def test_labels_by_first_tokens_count_what_lies_outside(fake):
    fake.logprobs, fake.likeliest = (
        True,
        [("垃圾", math.log(0.6)), (" 正", math.log(0.2)), ("好", math.log(0.1))],
    )
    with connected(fake) as engine:
        engine.label_way = "first"
        (found,) = labelling.classify(engine, label_task(engine, "first"), ["加我"])
        assert found.label == "1" and found.greedy == "1"
        assert found.probabilities == pytest.approx([0.25, 0.75])
        assert found.outside == pytest.approx(0.2)
        scorer = engine.scorer([engine.tokenizer.answer_ids(one) for one in ("正常", "正好")])
        fake.likeliest = [("正", -0.1)]
        with pytest.raises(GLMError, match="cannot be told apart"):
            scorer.score([ids_of(engine, "x")])


def test_a_server_without_numbers_gives_the_label_it_writes_and_no_probability(fake, store, tmp_path):
    fake.answer = lambda text: "我觉得是：垃圾。" if "微信" in text else "不知道" if "so" in text else "正常"
    rows = [(text,) for text in TEXTS]
    with connected(fake) as engine:
        task = label_task(engine, "greedy")
        engine.label_way = "greedy"
        for more in ({"threshold": 0.5, "positive": "1"}, {"content_free": True}, {"temperature": 2.0}):
            with pytest.raises(GLMError, match="no probabilities"):
                labelling.classify(engine, replace(task, **more), ["a"])
    job = ran(store, labelling.start(store, task, Table(rows)), "classify")
    assert (job.done, job.failed) == (3, 1)
    out = tmp_path / "out.jsonl"
    labelling.export(store, job.id, out, "jsonl")
    first, _, unclear, _ = map(json.loads, out.read_text().splitlines())
    assert (first["label"], first["0"], first["1"], first["margin"], first["outside"]) == (
        "1",
        "",
        "",
        "",
        "",
    )
    assert "none of the labels" in unclear["reason"]


def test_what_an_answer_says_is_one_label_or_none():
    assert labels.said_label("**Normal**", ["normal", "abnormal"]) == 0
    assert labels.said_label("It is abnormal.", ["normal", "abnormal"]) == 1
    assert labels.said_label("spam or normal", ["spam", "normal"]) is None


# ---- keys


def test_a_refused_key_stops_the_job_and_no_row_fails(fake, store, monkeypatch):
    with connected(fake) as engine:
        job = batch.start(store, task_of(engine), Table([(str(i),) for i in range(50)]))
    fake.key = KEY
    job = ran(store, job)
    assert job.state in ("paused", "failed") and "refuses the key (401)" in job.message
    assert (job.done, job.failed) == (0, 0)
    monkeypatch.setenv(remote.DEFAULT_KEY, KEY)
    assert ran(store, store.resume(job.id)).done == 50


def test_a_key_is_in_no_log_record_export_or_error(
    fake, store, workspace, tmp_path, monkeypatch, caplog, capsys
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv(VARIABLE, KEY)
    fake.key = KEY
    remote.add(Remote("safe", fake.url, MODEL, key_env=VARIABLE))
    fake.fault = lambda number, body: (400, f"you sent {KEY}") if number == 2 else None
    table = tmp_path / "rows.csv"
    table.write_text("text\na\nb\nc\n")
    out = tmp_path / "out.csv"
    status = cli.main(["batch", str(table), "--column", "text", "--model", "remote:safe", "--out", str(out)])
    assert status == 3
    monkeypatch.setenv(VARIABLE, f"{KEY}x")  # a wrong one, which the server repeats in its refusal
    assert cli.main(["remotes", "test", "safe"]) == 1
    printed = capsys.readouterr()
    seen = [printed.out, printed.err, caplog.text]
    folders = (workspace, tmp_path)
    seen += [
        path.read_bytes().decode("utf-8", "replace")
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert KEY in fake.keys and f"{KEY}x" in fake.keys  # they were sent
    assert not any(KEY in text for text in seen)
    assert "***" in printed.err


# ---- the shell


def test_commands_take_a_server_by_name_or_address(fake, tmp_path, capsys):
    assert cli.main(["remotes", "add", "box", "--url", fake.url.removesuffix("/v1")]) == 0
    told = capsys.readouterr()
    assert "stream         yes" in told.out and "remote:box" in told.err
    assert cli.main(["remotes"]) == 0
    assert MODEL in capsys.readouterr().out
    assert cli.main(["chat", "--model", "remote:box", "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == "cba\n"
    fake.answer = lambda text: "正常"
    table, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    table.write_text("text,label\na,正常\nb,垃圾\n", encoding="utf-8")
    given = ["--column", "text", "--model", f"{fake.url}#{MODEL}", "--out", str(out)]
    assert cli.main(["classify", str(table), *given, "--gold", "label", "--json"]) == 0
    told = capsys.readouterr()
    assert "Probabilities: none" in told.err
    scores = json.loads(told.out)["scores"]
    assert scores["accuracy"]["estimate"] == 0.5 and "roc-auc" not in scores
    evaluated = [
        "--kind",
        "label",
        "--prompt-column",
        "text",
        "--response-column",
        "label",
        "--model",
        "remote:box",
    ]
    assert cli.main(["evaluate", str(table), *evaluated, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["scores"]["values"]["accuracy"]["estimate"] == 0.5
    assert cli.main(["evaluate", str(table), *evaluated, "--method", "likelihood"]) == 1
    assert "no likeliest answer" in capsys.readouterr().err
    assert cli.main(["serve", "--model", "remote:box"]) == 1
    assert "weights on this machine" in capsys.readouterr().err
    assert cli.main(["remotes", "remove", "box"]) == 0


# ---- another workbench


def test_another_workbench_gives_the_answers_and_probabilities_of_its_model(tiny_checkpoint):
    import torch

    from glm_core import checkpoints
    from tests.test_server import served

    torch.set_num_threads(1)
    local = engines.Engine(checkpoints.load(tiny_checkpoint, "fp32", "cpu"))
    try:
        with served(local) as found:
            name = local.loaded.info.name
            engine = remote.connect(Remote("", str(found.base_url).rstrip("/") + "/v1", name))
            try:
                assert engine.served.kind == "workbench" and engine.served.takes_examples
                settings = GenerationSettings(max_new_tokens=12)
                here, there = [], []
                for one, answers in ((local, here), (engine, there)):
                    prompts = [tuple(one.tokenizer.chat_ids([Message("user", text)])) for text in TEXTS[:3]]
                    handles = [one.submit(Request(ids, settings, "batch")) for ids in prompts]
                    answers += [(handle.wait(30), handle.text) for handle in handles]
                assert here == there and all(text for _, text in here)
                task = label_task(engine, "", shots=(("谢谢", "0"), ("加我", "1")), content_free=True)
                both = [labelling.classify(one, task, TEXTS) for one in (local, engine)]
                for a, b in zip(*both, strict=True):
                    assert (a.label, a.greedy) == (b.label, b.greedy)
                    assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
                    assert a.outside == pytest.approx(b.outside, abs=1e-4)
            finally:
                engine.close()
    finally:
        local.close()


def test_no_thread_stays_behind():
    assert not any(one.name == "glm-remote" for one in threading.enumerate())
    assert Path(os.getcwd()).is_dir()
