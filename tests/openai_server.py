"""A server that speaks as much of the OpenAI protocol as a test wants, and fails when it is told to."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake-7b"
KEY = "sk-S3cret-zebra-4711"


class Fake:
    """What the server does; every part of it can be replaced by a test.

    asked    (path, body) of every request that came
    fault    given the number of a chat request, what happens to it: None, a status, "drop", "late" or "cut"
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str] = []
        self.owner, self.model, self.key = "fake", MODEL, ""
        self.classify = self.echo = self.logprobs = False
        self.fault: Callable[[int, dict[str, Any]], Any] = lambda number, body: None
        self.retry_after: str | None = None
        self.answer: Callable[[str], str] = lambda text: text[::-1]
        self.likeliest: list[tuple[str, float]] = []
        self.pause_s = 0.0
        self.piece_s = 0.0
        self.alive = True
        self.at_once = self.most_at_once = 0
        self.chats = 0
        self.broken = threading.Event()  # a client went away within a stream
        self.lock = threading.Lock()
        self.url = ""

    # ---- tokens: one per character, a mark for every role

    def tokens(self, body: dict[str, Any]) -> list[int]:
        ids: list[int] = []
        for message in body["messages"]:
            ids += [
                {"system": 1, "user": 2, "assistant": 3}[message["role"]],
                *map(ord, message["content"]),
                4,
            ]
        if body.get("continue_final_message"):
            return ids[:-1]
        return [*ids, 3] if body.get("add_generation_prompt", True) else ids

    @staticmethod
    def logprob(before: list[int], token: int) -> float:
        """Of a token behind others: any number that depends on all of them."""
        return -((sum(before[-5:]) * 31 + token * 7 + len(before)) % 97) / 20 - 0.01


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def fake(self) -> Fake:
        return self.server.fake

    def do_GET(self) -> None:
        fake = self.fake
        if not fake.alive:
            return self.gone()
        if self.refused():
            return
        one = {"id": fake.model, "object": "model", "owned_by": fake.owner, "max_model_len": 4096}
        self.send({"object": "list", "data": [one]})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not fake.alive:
            return self.gone()
        if self.refused():
            return
        with fake.lock:
            fake.asked.append((self.path, body))
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            {
                "/v1/chat/completions": self.chat,
                "/v1/classify": self.classified,
                "/v1/completions": self.completed,
                "/tokenize": self.tokenized,
            }.get(self.path, self.unknown)(body)
        except OSError:
            fake.broken.set()
        finally:
            with fake.lock:
                fake.at_once -= 1

    def refused(self) -> bool:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.fake.keys.append(given)
        if self.fake.key and given != self.fake.key:
            self.send(
                {"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}}, 401
            )
            return True
        return False

    def gone(self) -> None:
        self.close_connection = True
        self.connection.close()

    def unknown(self, body: dict[str, Any]) -> None:
        self.send({"detail": "Not Found"}, 404)

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def chat(self, body: dict[str, Any]) -> None:
        fake = self.fake
        with fake.lock:
            fake.chats += 1
            number = fake.chats
        fault = fake.fault(number, body)
        if fault == "drop":
            return self.gone()
        if fault == "late":
            time.sleep(1.5)
            return self.gone()
        if isinstance(fault, int):
            more = {"Retry_After": fake.retry_after} if fake.retry_after and fault == 429 else {}
            return self.send({"error": {"message": f"fault {fault}", "code": None}}, fault, **more)
        if isinstance(fault, tuple):
            return self.send({"error": {"message": fault[1], "code": None}}, fault[0])
        time.sleep(fake.pause_s)
        text = fake.answer(body["messages"][-1]["content"])
        usage = {"prompt_tokens": len(fake.tokens(body)), "completion_tokens": len(text) + 1}
        if body.get("stream"):
            return self.streamed(text, usage, fault)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if body.get("logprobs") and fake.logprobs:
            shown = [
                {"token": one, "logprob": value, "bytes": list(one.encode())} for one, value in fake.likeliest
            ]
            first = (
                shown[0] if shown else {"token": text[:1], "logprob": -0.1, "bytes": list(text[:1].encode())}
            )
            choice["logprobs"] = {"content": [{**first, "top_logprobs": shown or [first]}]}
        data = json.dumps({"choices": [choice], "usage": usage}, ensure_ascii=False).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self.gone()
        self.send(data)

    def streamed(self, text: str, usage: dict[str, Any], fault: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def event(value: Any) -> None:
            data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        self.wfile.write(b": still there\n\n")
        for place, letter in enumerate(text):
            event({"choices": [{"delta": {"content": letter}, "finish_reason": None}]})
            time.sleep(self.fake.piece_s)
            if fault == "cut" and place == 2:
                return
            if fault == "error" and place == 2:
                return event({"error": {"message": "out of memory"}})
        event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        event({"choices": [], "usage": usage})
        event("[DONE]")

    def tokenized(self, body: dict[str, Any]) -> None:
        if not self.fake.echo:
            return self.unknown(body)
        ids = self.fake.tokens(body)
        self.send({"tokens": ids, "count": len(ids), "max_model_len": 4096})

    def completed(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if not fake.echo:
            return self.send({"error": {"message": "Only no echo is supported", "code": 400}}, 400)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            numbers = [None, *(fake.logprob(ids[:i], ids[i]) for i in range(1, len(ids))), -0.5]
            choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": numbers}})
        self.send({"choices": choices[::-1], "usage": {}})

    def classified(self, body: dict[str, Any]) -> None:
        fake = self.fake
        if not fake.classify:
            return self.unknown(body)
        data = []
        for text in body["texts"]:
            if "too long" in text:
                message = "The model takes 4,096 tokens with the answer; texts has 9,000."
                return self.send({"error": {"message": message, "code": "context_length_exceeded"}}, 400)
            values = {
                one["name"]: fake.logprob([*map(ord, text)], ord(one["verbaliser"][0]))
                for one in body["labels"]
            }
            inside = math.fsum(map(math.exp, values.values()))
            values = {name: value - math.log(inside) - 0.1 for name, value in values.items()}
            best = max(values, key=values.__getitem__)
            data.append(
                {"logprobs": values, "outside": 1 - math.exp(-0.1), "greedy": best, "truncated": False}
            )
        self.send({"data": data, "model": fake.model})


@contextlib.contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The server at `fake.url` for as long as it is needed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.fake = fake  # type: ignore[attr-defined]
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
