"""What a server can do: asked, not believed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import GLMError
from ..tokenizers.base import Message
from .client import CHECK_ADDRESS, KeyRefused, Refused
from .engine import NOT_A_CHAT, RemoteEngine, as_sent, connect
from .remotes import Remote

TOP = 20  # likeliest tokens asked for; the most that is usual
QUESTION = "Answer with one word: yes or no?"
FEW_TOKENS = 8


@dataclass(frozen=True)
class Report:
    """What came out of a test.

    logprobs   likeliest tokens the server shows beside an answer's; 0 is none
    classify   POST /v1/classify as this program's own server has it
    echo       log-probabilities of a given text, by which labels are scored exactly
    latency_s  of the shortest request; first_token_s until a streamed answer begins
    problems   why something does not work, by what it is
    """

    url: str
    model: str
    reported: str
    server: str
    context: int
    listed: tuple[str, ...]
    latency_s: float
    chat: bool = False
    answer: str = ""
    stream: bool = False
    first_token_s: float | None = None
    usage: bool = False
    logprobs: int = 0
    classify: bool = False
    echo: bool = False
    problems: dict[str, str] | None = None

    @property
    def labels(self) -> str:
        """How labels get their probabilities: "classify", "echo", "first", or "greedy", which gives none."""
        if self.classify:
            return "classify"
        if self.echo:
            return "echo"
        return "first" if self.logprobs else "greedy"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"labels": self.labels}


def test(remote: Remote) -> Report:
    """Ask a server for a little of everything. GLMError where it does not answer, or refuses the key."""
    engine = connect(remote)
    try:
        return tested(engine)
    finally:
        engine.close()


def tested(engine: RemoteEngine) -> Report:
    """`test` with a connection there is."""
    remote, client, served = engine.remote, engine.client, engine.served
    problems: dict[str, str] = {}
    timed = []
    for _ in range(3):
        begun = time.monotonic()
        attempt(problems, "models", lambda: engine.run(client.models()).result())
        timed.append(time.monotonic() - begun)
    found: dict[str, Any] = {"latency_s": min(timed)}

    chat = attempt(problems, "chat", lambda: _chat(engine, {}))
    if chat is not None:
        found |= {"chat": True, "answer": chat["text"][:200], "usage": bool(chat["usage"])}
        found |= attempt(problems, "stream", lambda: _stream(engine)) or {}
        scored = attempt(problems, "logprobs", lambda: _chat(engine, {"logprobs": True, "top_logprobs": TOP}))
        if scored is None:
            scored = attempt(
                problems, "logprobs", lambda: _chat(engine, {"logprobs": True, "top_logprobs": 5})
            )
        found["logprobs"] = _shown(scored["logprobs"]) if scored else 0
        if scored and not found["logprobs"]:
            problems.setdefault("logprobs", "The answer came without them.")
        elif found["logprobs"]:
            problems.pop("logprobs", None)
    found["classify"] = bool(attempt(problems, "classify", lambda: can_classify(engine)))
    found["echo"] = bool(attempt(problems, "echo", lambda: can_echo(engine)))
    return Report(
        remote.url, remote.model, served.reported, served.kind, served.context, served.listed,
        problems=problems, **found,
    )  # fmt: skip


def attempt(problems: dict[str, str], what: str, ask: Callable[[], Any]) -> Any:
    """The answer, or None with the reason noted. KeyRefused passes, but for addresses the server does not have."""
    try:
        return ask()
    except KeyRefused as error:
        if error.status != 404 or what == "chat":
            raise
        problems[what] = "The server has no such address."
    except GLMError as error:
        problems[what] = error.message
    return None


def _body(engine: RemoteEngine) -> dict[str, Any]:
    return {
        "model": engine.remote.model, "messages": as_sent([Message("user", QUESTION)]), "temperature": 0,
        "max_tokens": FEW_TOKENS,
    }  # fmt: skip


def _chat(engine: RemoteEngine, more: dict[str, Any]) -> dict[str, Any]:
    url = f"{engine.remote.url}/chat/completions"
    body = _body(engine) | more
    try:
        found = engine.run(engine.client.once("POST", url, body)).result()
    except Refused as error:
        if "max_completion_tokens" not in error.message:
            raise
        body["max_completion_tokens"] = body.pop("max_tokens")
        found = engine.run(engine.client.once("POST", url, body)).result()
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Refused(NOT_A_CHAT, CHECK_ADDRESS)
    choice = choices[0]
    text = (choice.get("message") or {}).get("content")
    return {"text": str(text or ""), "usage": found.get("usage"), "logprobs": choice.get("logprobs")}


def _shown(logprobs: Any) -> int:
    """How many of the likeliest tokens stand beside the first one of an answer."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return 0
    return len(content[0].get("top_logprobs") or ())


def _stream(engine: RemoteEngine) -> dict[str, Any]:
    from ..engine import GenerationSettings, Request

    begun = time.monotonic()
    ids = tuple(engine.tokenizer.chat_ids([Message("user", QUESTION)]))
    handle = engine.submit(Request(ids, GenerationSettings(max_new_tokens=FEW_TOKENS), "chat"))
    handle.wait(engine.remote.timeout_s)
    if handle.error is not None:
        raise handle.error
    first = handle.first_token
    return {"stream": handle.state == "done", "first_token_s": None if first is None else first - begun}


def can_classify(engine: RemoteEngine) -> bool:
    """Whether POST /v1/classify scores labels that a request brings."""
    body = {"texts": ["a"], "labels": [{"name": "0", "verbaliser": "yes"}, {"name": "1", "verbaliser": "no"}],
            "template": "{text}", "instruction": ""}  # fmt: skip
    found = engine.run(engine.client.once("POST", f"{engine.remote.url}/classify", body)).result()
    data = found.get("data") if isinstance(found, dict) else None
    one = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    return isinstance(one.get("logprobs"), dict) and set(one["logprobs"]) == {"0", "1"}


def can_echo(engine: RemoteEngine) -> bool:
    """Whether the server tells the tokens of a conversation and the log-probability of each."""
    from .labels import echoed, tokenized

    messages = [Message("user", QUESTION)]
    ids = engine.run(tokenized(engine, messages, "")).result()
    if len(ids) < 2:
        return False
    # llama.cpp has taken `echo` and given the numbers of the generated token alone.
    return len(engine.run(echoed(engine, [ids])).result()[0]) == len(ids)
