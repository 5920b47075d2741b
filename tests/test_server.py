"""Claims about the HTTP server: the originals' answers, refusals with a reason, and nothing told to the wrong ears."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch

from glm_core import checkpoints, cli
from glm_core import classify as labelling
from glm_core.engine import Engine, EngineHost, GenerationSettings, Request
from glm_core.errors import GLMError
from glm_core.server import Options, Service, guard, service, uvicorn_server
from glm_core.server import keys as key_files
from glm_core.tokenizers.base import Message
from tests.conftest import REPOSITORY
from tests.test_generations import first_folder, glm4_folder  # noqa: F401

QUESTIONS = ("你好", "What is this?", "再见", "1+1", "谢谢")
MARK = "秘密-zebra-4711"  # in texts that must not be written down


@contextlib.contextmanager
def served(engine: Engine | None, **options: Any) -> Iterator[httpx2.Client]:
    """A client of a server around an engine; its `service` is what the server has."""
    made = Service(Options(**options), lambda: engine)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn_server(made)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = listening.getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.service = made
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def engine_of(folder: Any, generation: str | None = None, context: int = 0) -> Iterator[Engine]:
    loaded = checkpoints.load(folder, "fp32", "cpu", generation)
    info = dataclasses.replace(loaded.info, context=context or loaded.info.context)
    engine = Engine(dataclasses.replace(loaded, info=info))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> Iterator[Engine]:
    with engine_of(tiny_checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(tiny) -> Iterator[httpx2.Client]:
    with served(tiny) as client:
        yield client


@pytest.fixture(scope="module")
def short(tiny_checkpoint) -> Iterator[httpx2.Client]:
    """A client of a model whose context is 96 tokens, so that no answer takes long."""
    with engine_of(tiny_checkpoint, context=96) as engine, served(engine) as client:
        yield client


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's thread stands still, so that requests stay where they are."""
    gate, there = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        gate.wait(30)

    engine.later(wait, "chat")
    assert there.wait(10)
    try:
        yield
    finally:
        gate.set()


def until(claim, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def greedy(engine: Engine, ids, tokens: int) -> str:
    handle = engine.submit(Request(tuple(ids), GenerationSettings(max_new_tokens=tokens)))
    assert handle.wait(30)
    return handle.text


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


# ---- as the originals


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {}])
def test_the_curl_example_of_chatglm_6b_works_unchanged(first_folder, headers):  # noqa: F811
    with engine_of(first_folder, context=96) as engine, served(engine) as client:
        found = json.loads(by_curl(client, headers))
    assert list(found) == ["response", "history", "status", "time"]
    assert found["status"] == 200
    assert isinstance(found["response"], str)
    assert found["history"] == [["你好", found["response"]]]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found["time"])


def by_curl(client: httpx2.Client, headers: dict[str, str]) -> bytes:
    """What the example of its README gets, by curl where there is one."""
    if shutil.which("curl"):
        typed = [part for pair in headers.items() for part in ("-H", ": ".join(pair))]
        return subprocess.run(
            ["curl", "-s", "-X", "POST", str(client.base_url).rstrip("/"), *typed,
             "-d", '{"prompt": "你好", "history": []}'],
            capture_output=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    return client.post("/", content='{"prompt": "你好", "history": []}'.encode(), headers=headers).content


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_five_turns_go_round_as_the_generation_keeps_them(request, generation):
    """Each answer is the greedy one to the whole history, and the history is what the originals return."""
    folder = request.getfixturevalue(
        {"chatglm": "first_folder", "glm4": "glm4_folder"}.get(generation, "tiny_checkpoint")
    )
    with engine_of(folder, generation) as engine, served(engine) as client:
        history: list[Any] = []
        said: list[Message] = []
        for number, question in enumerate(QUESTIONS):
            said.append(Message("user", question))
            ids = engine.tokenizer.chat_ids(said)
            sent = {"prompt": question, "history": history, "max_length": len(ids) + 6, "temperature": 0}
            answer = client.post("/", json=sent).json()
            assert answer["response"] == greedy(engine, ids, 6)
            said.append(Message("assistant", answer["response"]))
            if generation in ("chatglm", "chatglm2"):
                assert answer["history"] == [*history, [question, answer["response"]]]
            else:
                assert answer["history"][:-1] == [*history, {"role": "user", "content": question}]
                last = answer["history"][-1]
                assert list(last) == ["role", "metadata", "content"]
                assert (last["role"], last["metadata"]) == ("assistant", "")
                said[-1] = Message("assistant", last["content"])
            history = answer["history"]
            assert len(history) == (number + 1) * (1 if generation in ("chatglm", "chatglm2") else 2)


def test_a_history_of_pairs_comes_back_as_pairs_from_a_model_that_keeps_roles(client):
    pairs = [["你好", "你好！"]]
    found = client.post("/", json={"prompt": "1", "history": pairs, "max_length": 40}).json()
    assert found["history"] == [*pairs, ["1", found["response"]]]


def test_system_message_and_tools_of_a_history_reach_the_model(client, tiny):
    tools = [{"name": "weather", "parameters": {"city": "北京"}}]
    history = [{"role": "system", "content": "Use tools.", "tools": tools}]
    ids = tiny.tokenizer.chat_ids(
        [Message("system", "Use tools.", tools=tuple(tools)), Message("user", "Rain?")]
    )
    sent = {"prompt": "Rain?", "history": history, "temperature": 0, "max_length": len(ids) + 8}
    found = client.post("/", json=sent).json()
    assert found["history"][:2] == [*history, {"role": "user", "content": "Rain?"}]
    assert found["response"] == greedy(tiny, ids, 8)


def test_temperature_zero_is_greedy_and_another_one_is_not(client, tiny):
    sent = {"prompt": "你好", "max_length": 60}
    answers = [client.post("/", json=sent | {"temperature": 0}).json()["response"] for _ in range(2)]
    ids = tiny.tokenizer.chat_ids([Message("user", "你好")])
    assert answers == [greedy(tiny, ids, 60 - len(ids))] * 2
    hot = sent | {"temperature": 3.0, "top_p": 1.0}
    # What looks like a call of a tool comes as an object, as from the original.
    said = {json.dumps(client.post("/", json=hot).json()["response"]) for _ in range(3)}
    assert len(said) > 1


def test_max_length_counts_prompt_and_answer(client, tiny):
    ids = tiny.tokenizer.chat_ids([Message("user", "你好")])
    before = tiny._handles.copy()
    client.post("/", json={"prompt": "你好", "max_length": len(ids) + 3, "temperature": 0})
    (handle,) = (one for key, one in tiny._handles.items() if key not in before)
    assert handle.request.settings.max_new_tokens == 3
    found = client.post("/", json={"prompt": "你好", "max_length": len(ids)})
    assert found.status_code == 400
    assert found.json()["error"]["message"] == (
        f"Prompt and history have {len(ids)} tokens; max_length is {len(ids)} with the answer."
    )


def test_a_stream_says_what_the_whole_answer_says(client):
    sent = {"prompt": "你好", "temperature": 0, "max_length": 60}
    whole = client.post("/", json=sent).json()
    found = client.post("/stream", json=sent)
    assert found.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(found.text)
    assert len(pieces) > 1
    assert "".join(piece["delta"] for piece in pieces) == whole["response"]
    assert not any(piece["finished"] for piece in pieces)
    assert last["finished"] and {"response", "history", "status", "time"} < set(last)
    assert (last["response"], last["history"]) == (whole["response"], whole["history"])


# ---- refusals


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/", {}, "prompt"),
        ("/", {"prompt": 5}, "prompt"),
        ("/", {"prompt": ""}, "prompt"),
        ("/", {"prompt": "a", "top_p": 2}, "top_p"),
        ("/", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("/", {"prompt": "a", "max_length": 0}, "max_length"),
        ("/", {"prompt": "a", "max_length": 1.5}, "max_length"),
        ("/", {"prompt": "a", "history": [["a", "b"], ["a"]]}, "history.1"),
        ("/", {"prompt": "a", "history": [{"role": "user"}]}, "history.0.content"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 0}, "n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stop": [""]}, "stop.0"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [1]}, "tools"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [10**9]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/classify", {"texts": ["a"], "labels": ["one"]}, "labels"),
        ("/v1/classify", {"texts": "a", "labels": ["one", "two"]}, "texts"),
    ],
)
def test_a_wrong_field_is_named(client, path, body, field):
    found = client.post(path, json=body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["param"] == field and error["type"] == "invalid_request_error"
    assert error["message"].startswith(field)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe{}", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}', b"9" * 5000]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/classify"])
def test_a_body_that_is_no_json_object_is_refused(client, path, body):
    found = client.post(path, content=body)
    assert found.status_code == 400
    assert found.json()["error"]["message"]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/", {"prompt": "好" * 3000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "好" * 3000}]}),
        ("/v1/completions", {"prompt": "好" * 3000}),
    ],
)
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(client, tiny, path, body):
    found = client.post(path, json=body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["code"] == "context_length_exceeded"
    used, context = sorted(map(int, re.findall(r"\d+", error["message"].replace(",", ""))), reverse=True)[:2]
    assert context == tiny.context == 2048 and used >= 3000


def test_a_longest_answer_that_does_not_fit_is_refused_with_all_numbers(client):
    sent = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 2048}
    error = client.post("/v1/chat/completions", json=sent).json()["error"]
    assert error["param"] == "max_tokens"
    used = client.post("/v1/chat/completions", json=sent | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert f"2,048 tokens; messages has {used}, and 2,048 were asked for" in error["message"]


def test_a_request_that_is_too_large_is_refused(tiny):
    with served(tiny, max_request_bytes=2000) as client:
        assert client.post("/", json={"prompt": "a" * 1500, "max_length": 5}).status_code == 400
        found = client.post("/", json={"prompt": "a" * 3000})
        assert found.status_code == 413 and "2,000 bytes" in found.json()["error"]["message"]
        chunks = (b"a" * 500 for _ in range(6))  # without a length in front
        assert client.post("/", content=chunks).status_code == 413


def test_while_the_model_is_loading_the_answer_is_503():
    with served(None) as client:
        for found in (client.post("/", json={"prompt": "a"}), client.get("/v1/models")):
            assert found.status_code == 503
            assert int(found.headers["retry-after"]) > 0
        found = client.get("/health")
        assert found.status_code == 503 and found.json() == {"status": "loading", "share": 0.0}
        assert "glm_model_loaded 0" in client.get("/metrics").text


def test_a_full_queue_refuses_with_the_time_to_wait(tiny):
    sent = {"prompt": "你好", "max_length": 30}
    with served(tiny, concurrency=2, queue=1) as client, contextlib.ExitStack() as stack:
        with held(tiny):
            found: list[int] = []

            def ask() -> None:
                found.append(client.post("/", json=sent).status_code)

            waiting = [threading.Thread(target=ask) for _ in range(3)]
            for thread in waiting:
                thread.start()
            until(lambda: client.service.in_flight == 3)
            refused = client.post("/", json=sent)
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["type"] == "rate_limit_error"
            # The server itself stands beside the engine's thread, and tells how it is.
            assert client.get("/health").json()["status"] == "ok"
        for thread in waiting:
            thread.join(30)
        assert found == [200, 200, 200]
        assert client.post("/", json=sent).status_code == 200
        many = {"messages": [{"role": "user", "content": "a"}], "n": 4}
        stack.enter_context(held(tiny))
        assert client.post("/v1/chat/completions", json=many).status_code == 400
        assert client.service.in_flight == 0


def test_a_failed_answer_is_a_sentence_and_in_a_stream_an_event(client, tiny, monkeypatch):
    def broken(*args):
        raise ValueError("wrong kernel")

    monkeypatch.setattr(tiny, "_forward", broken)
    found = client.post("/", json={"prompt": "你好"})
    assert found.status_code == 500
    assert "wrong kernel" in found.json()["error"]["message"] and "Traceback" not in found.text
    assert "event: error\ndata: {" in client.post("/stream", json={"prompt": "你好"}).text
    sent = {"messages": [{"role": "user", "content": "你好"}], "stream": True}
    *_, last = events(client.post("/v1/chat/completions", json=sent).text)
    assert last["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert client.post("/", json={"prompt": "你好", "max_length": 20}).status_code == 200


def test_a_stopping_server_ends_its_streams_with_an_error(tiny):
    with served(tiny) as client:
        with client.stream("POST", "/stream", json={"prompt": "你好", "temperature": 2}) as stream:
            lines = stream.iter_lines()
            next(lines)
            with held(tiny):
                client.service.close()
            rest = "\n".join(lines)
        assert "event: error" in rest and "stopping" in rest
        assert client.post("/", json={"prompt": "a"}).status_code == 503


@pytest.mark.parametrize("path", ["/stream", "/v1/chat/completions"])
def test_a_stream_in_the_queue_says_that_it_is_there(client, tiny, monkeypatch, path):
    monkeypatch.setattr(service, "QUIET_SECONDS", 0.02)
    sent = {"prompt": "你好", "max_length": 30, "stream": True}
    sent |= {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 5}
    with held(tiny), client.stream("POST", path, json=sent) as stream:
        assert stream.status_code == 200
        assert any(line == ": waiting" for line in stream.iter_lines())


# ---- clients that go away


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_ends_its_answer(client, tiny, streaming, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", frozenset({-1}))
    before = set(tiny._handles)
    port = client.base_url.port
    body = json.dumps({"prompt": "你好"}).encode()
    with socket.create_connection(("127.0.0.1", port)) as raw:
        path = "/stream" if streaming else "/"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        until(lambda: any(one.n_tokens > 2 for key, one in list(tiny._handles.items()) if key not in before))
    (handle,) = (one for key, one in tiny._handles.items() if key not in before)
    assert handle.wait(20)
    assert handle.state == "cancelled"
    assert handle.n_tokens < handle.request.settings.max_new_tokens
    until(lambda: client.service.in_flight == 0 and tiny.status().running_chat == 0)


def test_labelling_stops_when_its_client_goes_away(client, tiny):
    port = client.base_url.port
    body = json.dumps({"texts": ["你好"] * 500, "labels": ["a", "b"]}).encode()
    with held(tiny):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            head = (
                f"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            raw.sendall(head.encode() + body)
            until(lambda: client.service.in_flight == 1 and any(tiny._tasks.values()))
    before = client.service.meters.texts._values.copy()
    until(lambda: client.service.in_flight == 0)
    assert client.service.meters.texts._values == before


# ---- who may ask


@pytest.fixture
def keyed(tiny, tmp_path) -> Iterator[tuple[httpx2.Client, str, Any]]:
    file = tmp_path / "keys.txt"
    key = key_files.new_key(file, "alice")
    with served(tiny, api_keys=file) as client:
        yield client, key, file


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_a_key_of_the_file_is_admitted(keyed):
    client, key, _ = keyed
    sent = {"prompt": "你好", "max_length": 20}
    for headers in ({}, bearer("wrong"), bearer(key[:-1]), bearer(key + "a"), {"Authorization": key}):
        found = client.post("/", json=sent, headers=headers)
        assert found.status_code == 401
        assert found.headers["www-authenticate"] == "Bearer"
    assert client.post("/", json=sent, headers=bearer(key)).status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").status_code == 200
    assert client.get("/openapi.json").json()["components"]["securitySchemes"]


def test_a_withdrawn_key_is_refused_and_a_new_one_admitted_without_a_restart(keyed, monkeypatch):
    client, key, file = keyed
    monkeypatch.setattr(key_files, "LOOK_SECONDS", 0.0)
    assert client.get("/v1/models", headers=bearer(key)).status_code == 200
    second = key_files.new_key(file)
    assert client.get("/v1/models", headers=bearer(second)).status_code == 200
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if "alice" not in line) + "\n")
    assert client.get("/v1/models", headers=bearer(key)).status_code == 401
    assert client.get("/v1/models", headers=bearer(second)).status_code == 200
    file.unlink()
    assert client.get("/v1/models", headers=bearer(second)).status_code == 401


def test_a_key_file_holds_hashes_only_and_is_for_its_owner(tmp_path):
    file = tmp_path / "folder" / "keys.txt"
    made = [key_files.new_key(file, name) for name in ("alice", "bob\nmallory")]
    text = file.read_text()
    assert len(set(made)) == 2 and not any(key in text for key in made)
    assert [key_files.Keys(file).admits(key) for key in made] == [True, True]
    assert len(key_files.read_hashes(file)) == 2
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_written_into_the_file_by_hand_is_refused_and_not_shown(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# mine\nglm-my-own-key\n")
    with pytest.raises(GLMError, match="Line 2 of the key file") as caught:
        key_files.Keys(file)
    assert "my-own" not in str(caught.value)
    file.write_text("# nothing\n")
    with pytest.raises(GLMError, match="There is no key"):
        key_files.Keys(file)


def test_neither_keys_nor_texts_are_written_down(keyed, workspace, caplog, capfd, monkeypatch):
    """Wherever a key or a text is put, no log, no answer to somebody else and no file has it."""
    client, key, file = keyed
    caplog.set_level(logging.DEBUG)
    chat = {"messages": [{"role": "user", "content": MARK}], "max_tokens": 5}

    def broken(*args, **kwargs):
        raise RuntimeError(f"{MARK} {key}")

    answers = [
        client.post("/", json={"prompt": MARK, "max_length": 30}, headers=bearer(key)),
        client.post("/v1/chat/completions", json=chat, headers=bearer(key)),
        client.post("/v1/chat/completions", json=chat | {"stream": True}, headers=bearer(key)),
        client.post("/v1/classify", json={"texts": [MARK], "labels": ["a", "b"]}, headers=bearer(key)),
        client.get(f"/v1/models/{key}", headers=bearer(key)),
        client.get(f"/{key}?api_key={key}", headers=bearer(key)),
        client.post("/", json={"prompt": [MARK], key: key}, headers=bearer(key)),
        client.post("/", content=f"{MARK} {key}".encode(), headers=bearer(key)),
        client.get("/v1/models", headers={"Authorization": f"Basic {key}"}),
        client.get("/metrics", headers=bearer(key)),
        client.get("/openapi.json"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("glm_core.server.original._messages", broken)
        answers.append(client.post("/", json={"prompt": MARK}, headers=bearer(key)))
        assert answers[-1].status_code == 500
    mistakes = [record for record in caplog.records if "RuntimeError while answering" in record.getMessage()]
    assert mistakes and "glm_core" in mistakes[0].getMessage()  # where it happened, without what was said
    for answer in answers:
        assert key not in answer.text
    for answer in answers[4:]:
        assert MARK not in answer.text
    formatter = logging.Formatter("%(message)s")
    ours = [
        r for r in caplog.records if not r.name.startswith(("httpx2", "httpcore2"))
    ]  # those are the client's
    logged = "\n".join(map(formatter.format, ours)) + "".join(capfd.readouterr())
    assert "POST /v1/classify 200" in logged
    for folder in (workspace, file.parent):
        for path in folder.rglob("*"):
            logged += path.read_text(errors="replace") if path.is_file() else ""
    assert key not in logged and MARK not in logged


def test_pages_of_other_sites_may_not_ask_unless_allowed(tiny):
    sent = {"prompt": "你好", "max_length": 20}
    with served(tiny) as client:
        own = str(client.base_url).rstrip("/")  # which another name may lead to
        for origin in ("http://evil.example", "null", own):
            assert client.post("/", json=sent, headers={"Origin": origin}).status_code == 403
        found = client.post("/", json=sent)
        assert found.status_code == 200 and "access-control-allow-origin" not in found.headers
    with served(tiny, cors=("http://localhost:3000",)) as client:
        headers = {"Origin": "http://localhost:3000"}
        found = client.post("/", json=sent, headers=headers)
        assert found.headers["access-control-allow-origin"] == "http://localhost:3000"
        asked = headers | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        assert client.options("/v1/chat/completions", headers=asked).status_code == 200
        assert client.post("/", json=sent, headers={"Origin": "http://evil.example"}).status_code == 403


# ---- labels


def test_labels_are_those_of_the_core(client, tiny):
    texts = ["加微信领红包", "", "谢谢你 {x}"]
    found = client.post("/v1/classify", json={"texts": texts, "labels": ["正常", "垃圾"]}).json()
    task = labelling.LabelTask(
        checkpoint="", checkpoint_fingerprint="", precision="fp32", device="cpu", template="评论：{text}",
        columns=("text",), instruction=labelling.instruction_for(labelling.SPAM),
        labels=(labelling.Label("正常"), labelling.Label("垃圾")),
    )  # fmt: skip
    for row, expected in zip(found["data"], labelling.classify(tiny, task, texts), strict=True):
        assert row["label"] == expected.label
        assert list(row["probabilities"]) == ["正常", "垃圾"]
        assert list(row["probabilities"].values()) == pytest.approx(expected.probabilities, abs=1e-6)
        assert list(row["logprobs"].values()) == pytest.approx(expected.scores, abs=1e-4)
        assert row["outside"] == pytest.approx(expected.outside, abs=1e-6)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert found["data"][1]["reason"].startswith("The text is empty")


def test_a_label_may_be_written_otherwise_than_it_is_named(client):
    labels = [{"name": "0", "verbaliser": "正常"}, {"name": "1", "verbaliser": "垃圾"}]
    named = client.post("/v1/classify", json={"texts": ["你好"], "labels": labels}).json()["data"][0]
    plain = client.post("/v1/classify", json={"texts": ["你好"], "labels": ["正常", "垃圾"]}).json()["data"][
        0
    ]
    assert list(named["probabilities"].values()) == pytest.approx(list(plain["probabilities"].values()))
    assert named["label"] in ("0", "1")


def test_labels_that_cannot_be_told_apart_are_refused(client):
    found = client.post("/v1/classify", json={"texts": ["你好"], "labels": ["一", "一"]})
    assert found.status_code == 400 and "'一'" in found.json()["error"]["message"]


# ---- what it says of itself


def test_the_description_has_an_example_for_every_route_that_works(short):
    description = short.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/", "/stream", "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions",
        "/v1/classify", "/health", "/metrics",
    }  # fmt: skip
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if "requestBody" not in operation:
                continue
            name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
            (example,) = description["components"]["schemas"][name]["examples"]
            assert short.post(path, json=example).status_code == 200, path


def test_the_page_about_it_fetches_nothing(client):
    text = client.get("/docs").text
    assert "<script" not in text and "src=" not in text and "@import" not in text and "url(" not in text
    assert set(re.findall(r'href="([^"]*)"', text)) == {"openapi.json"}
    assert "POST /v1/chat/completions" in text.replace("<code>", "").replace("</code>", "")


def test_metrics_are_as_prometheus_reads_them(tiny):
    sent = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 5}
    with served(tiny) as client:
        usage = client.post("/v1/chat/completions", json=sent).json()["usage"]
        client.post("/v1/chat/completions", json={})
        text = client.get("/metrics").text
    sample = r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})? [0-9.e+-]+'
    for line in text.splitlines():
        assert re.fullmatch(rf"# HELP [a-z_]+ .+|# TYPE [a-z_]+ (counter|gauge|histogram)|{sample}", line), (
            line
        )
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    route = 'method="POST",path="/v1/chat/completions"'
    assert values[f'glm_requests_total{{{route},status="200"}}'] == "1"
    assert values[f'glm_requests_total{{{route},status="400"}}'] == "1"
    assert values["glm_generated_tokens_total"] == str(usage["completion_tokens"])
    assert values["glm_prompt_tokens_total"] == str(usage["prompt_tokens"])
    assert values['glm_request_seconds_bucket{path="/v1/chat/completions",le="+Inf"}'] == "2"
    assert values['glm_request_seconds_count{path="/v1/chat/completions"}'] == "2"
    assert values["glm_first_token_seconds_count"] == "1"


def test_health_names_model_and_load(client, tiny):
    assert client.get("/health").json() == {
        "status": "ok", "model": tiny.loaded.info.name, "precision": "fp32", "device": "cpu",
        "running": 0, "waiting": 0,
    }  # fmt: skip


def test_twenty_clients_at_once_get_the_answers_of_one_alone(client, tiny):
    """Mixed streams and whole answers, more than are computed together."""
    texts = [question * (1 + number % 3) for number, question in enumerate(QUESTIONS * 4)]
    expected = [greedy(tiny, tiny.tokenizer.chat_ids([Message("user", text)]), 12) for text in texts]
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        sent = {"messages": [{"role": "user", "content": texts[number]}], "temperature": 0, "max_tokens": 12}
        if number % 2:
            text = client.post("/v1/chat/completions", json=sent | {"stream": True}).text
            pieces = [event["choices"][0]["delta"].get("content", "") for event in events(text)]
            found[number] = "".join(pieces)
        else:
            answer = client.post("/v1/chat/completions", json=sent).json()
            found[number] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(len(texts))] == expected


# ---- anything at all


def test_no_request_that_can_be_made_up_breaks_it(short):
    """schemathesis; by hand it is run with GLM_SCHEMATHESIS_CASES=5000."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    wanted = int(os.environ.get("GLM_SCHEMATHESIS_CASES", "160"))
    schema = schemathesis.openapi.from_url(f"{short.base_url}/openapi.json")
    posts = [result.ok() for result in schema.get_all_operations() if result.ok().method == "post"]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    each = -(-wanted // (len(posts) * len(modes)))
    checks = [
        getattr(schemathesis.checks, name)
        for name in (
            "not_a_server_error", "status_code_conformance", "content_type_conformance",
            "response_schema_conformance", "allow_header_conformance",
        )
    ]  # fmt: skip
    seen: list[int] = []
    for operation in posts:
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=each, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def attempt(case):
                response = case.call(timeout=60)
                seen.append(response.status_code)
                assert response.status_code < 500, response.text
                assert "Traceback" not in response.text
                case.validate_response(response, checks=checks)

            attempt()
    counted = {status: seen.count(status) for status in sorted(set(seen))}
    print(f"{len(seen)} cases by status: {counted}")
    assert len(seen) >= wanted * 0.8 and counted[200] > 10 and counted[400] > 10
    assert short.get("/health").json()["running"] == 0


# ---- the command


def test_the_command_serves_until_it_is_told_to_stop(tiny_checkpoint, workspace):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLM_WORKSPACE": str(workspace)}
    command = [sys.executable, "-m", "glm_core", "serve", "--port", "0", "--model", str(tiny_checkpoint)]
    with subprocess.Popen(
        [*command, "--precision", "fp32"], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("Ready"):
                break
        address = re.search(r"http://\S+", lines[-1])[0]
        found = httpx2.post(address, json={"prompt": "你好", "max_length": 20}, timeout=60)
        assert found.status_code == 200
        running.send_signal(signal.SIGTERM)
        _, rest = running.communicate(timeout=60)
    assert running.returncode == 0
    assert rest.splitlines()[-1] == "Stopped."
    assert "POST / 200" in rest and "你好" not in rest


def test_a_model_that_does_not_load_ends_the_command_with_a_sentence(tmp_path, tiny_checkpoint, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert cli.main(["serve", "--model", str(broken), "--port", "0"]) == 1
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith("Error: ") and "Traceback" not in errors


def test_a_port_in_use_is_said_before_the_model_is_read(tiny_checkpoint, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "--model", str(tiny_checkpoint), "--port", port]) == 1
    assert f"Port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_a_new_key_is_printed_once_and_kept_as_a_hash(workspace, capsys):
    assert cli.main(["serve", "--new-key", "alice"]) == 0
    out, err = capsys.readouterr()
    key = out.strip()
    file = workspace / "api_keys.txt"
    assert key_files.Keys(file).admits(key)
    assert key not in err and key not in file.read_text() and str(file) in err


@pytest.mark.parametrize(
    "options, word",
    [
        (["--queue", "-1"], "queue is -1"),
        (["--max-request-bytes", "5"], "max_request_bytes is 5"),
        (["--cors", "localhost"], "'localhost' is not an origin"),
        (["--port", "99999"], "Port 99999"),
        (["--api-keys", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_an_option_that_cannot_be_is_a_sentence(tmp_path, monkeypatch, capsys, options, word):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", *options]) == 1
    assert word in capsys.readouterr().err


def test_an_adapter_is_loaded_on_the_model(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    asked = []

    def use(self, path, precision="auto", device="auto", generation=None, base=None):
        asked.append((path, precision, base))
        raise GLMError("Seen.")

    monkeypatch.setattr(EngineHost, "use", use)
    chosen = ["--model", str(tiny_checkpoint), "--adapter", str(tmp_path), "--precision", "bf16"]
    assert cli.main(["serve", "--port", "0", *chosen]) == 1
    assert asked == [(tmp_path, "bf16", tiny_checkpoint)]
    assert capsys.readouterr().err.endswith("Error: Seen.\n")


def test_every_option_is_checked(tiny):
    for field in dataclasses.fields(Options):
        assert field.metadata["help"]
    with pytest.raises(GLMError, match="concurrency is 0"):
        Options(concurrency=0).check()


def test_a_slow_body_is_not_waited_for(tiny, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    with served(tiny) as client, socket.create_connection(("127.0.0.1", client.base_url.port)) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
