"""Log-probabilities of labels from a server, in the best way it offers.

classify   POST /v1/classify of this program's server: exact, many texts per request
echo       POST /tokenize with the conversation, then /v1/completions with `echo`: exact, as vLLM offers it
first      the likeliest first tokens of an answer: right where no two labels begin with the same token
greedy     the answer alone: a label, and no probability
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal

from ..scoring import Scores
from ..tokenizers.base import Message
from .client import CHECK_ADDRESS, TRY_LATER, Refused
from .engine import END, FIRST_MARK, NOT_A_CHAT, RemoteEngine, as_sent, messages_of

Way = Literal["classify", "echo", "first", "greedy"]
WAYS: tuple[Way, ...] = ("classify", "echo", "first", "greedy")
TEXTS = 32  # per request to /v1/classify
TOP = 20
FIRST_TOKENS = 4  # asked for, in case an answer begins with white space
LEAST = -100.0  # nats; stands for what is less likely than every token the server shows
POLL_S = 0.2
TEXTS_BYTES = 1 << 20
TELLS_NOTHING_APART = (
    "The first tokens of the labels cannot be told apart on this server, and it shows no others."
)


class RemoteScorer:
    """Scores the same answers for any number of conversations; the counterpart of `scoring.Scorer`."""

    def __init__(self, engine: RemoteEngine, answers: Sequence[Sequence[int]]) -> None:
        """GLMError where the server gives no numbers for these answers.

        answers   as `Characters.answer_ids` gives them; one without its end is scored without it
        """
        self.engine = engine
        self.texts = ["".join(chr(one) for one in answer if one < FIRST_MARK) for answer in answers]
        self.whole = all(answer[-1] == END for answer in answers)
        self.seconds = 0.0
        self._ends: dict[str, list[int]] = {}  # tokens of each answer on this server
        self.way = way_for(engine, self.whole, self.texts)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Scores]:
        """The scores of every conversation, in their order. GLMError for one the server refuses."""
        found = dict(self.each(prompts))
        for one in found.values():
            if one.error:
                raise Refused(one.error)
        return [found[place] for place in range(len(prompts))]

    def each(
        self, prompts: Sequence[Sequence[int]], stop: threading.Event | None = None
    ) -> Iterator[tuple[int, Scores]]:
        """(number of the conversation, its scores) as they come; fewer once `stop` is set."""
        size = TEXTS if self.way == "classify" else 1
        groups = [list(range(at, min(len(prompts), at + size))) for at in range(0, len(prompts), size)]
        groups.reverse()
        running: dict[Future[list[Scores]], list[int]] = {}
        try:
            while groups or running:
                while groups and len(running) < self.engine.max_rows and not _set(stop):
                    group = groups.pop()
                    work = self._group([messages_of(prompts[place]) for place in group])
                    running[self.engine.run(work)] = group
                if not running or _set(stop):
                    return
                done, _ = wait(running, POLL_S, FIRST_COMPLETED)
                for future in done:
                    group = running.pop(future)
                    yield from zip(group, future.result(), strict=True)
        finally:
            for future in running:
                future.cancel()

    async def _group(self, conversations: list[list[Message]]) -> list[Scores]:
        """The scores of some conversations; one that the server refuses has its reason, the others theirs."""
        begun = time.monotonic()
        try:
            found = await self._scored(conversations)
        except Refused as error:
            if len(conversations) > 1:  # which of them it was, shows itself when they are asked apart
                middle = len(conversations) // 2
                return [
                    *await self._group(conversations[:middle]),
                    *await self._group(conversations[middle:]),
                ]
            return [Scores((math.nan,) * len(self.texts), 1.0, None, error=str(error))]
        seconds = time.monotonic() - begun
        self.seconds += seconds
        return [
            Scores(one.values, one.outside, one.greedy, seconds / len(found), one.error, one.shortened)
            for one in found
        ]

    def _scored(self, conversations: list[list[Message]]) -> Coroutine[Any, Any, list[Scores]]:
        if self.way == "classify":
            return self._classified(conversations)
        if self.way == "echo":
            return self._echoed(conversations[0])
        return self._first(conversations[0]) if self.way == "first" else self._greedy(conversations[0])

    # ---- the ways

    async def _classified(self, conversations: list[list[Message]]) -> list[Scores]:
        system = [one.content for one in conversations[0] if one.role == "system"]
        rounds = [one.content for one in conversations[0] if one.role != "system"][:-1]
        body: dict[str, Any] = {
            "texts": [one[-1].content for one in conversations],
            "labels": [{"name": str(i), "verbaliser": text} for i, text in enumerate(self.texts)],
            "template": "{text}",
            "instruction": "",
            "system": system[0] if system else "",
        }
        if rounds:
            places = {text: str(i) for i, text in enumerate(self.texts)}
            told = [places.get(text) for text in rounds[1::2]]
            if None in told or not shots_taken(self.engine):
                raise Refused("This server's /v1/classify takes no examples.", "Leave the examples out.")
            body["shots"] = [[asked, name] for asked, name in zip(rounds[::2], told, strict=True)]
        if len(conversations) > 1 and sum(len(one) for one in body["texts"]) * 3 > TEXTS_BYTES:
            raise Refused("These texts are too long for one request.")
        found = await self.engine.client.ask("/classify", body)
        data = found.get("data")
        if not isinstance(data, list) or len(data) != len(conversations):
            raise Refused("The answer of /v1/classify is incomplete.", TRY_LATER)
        return [self._of_classify(one) for one in data]

    def _of_classify(self, one: Mapping[str, Any]) -> Scores:
        try:
            values = tuple(float(one["logprobs"][str(i)]) for i in range(len(self.texts)))
            greedy = one.get("greedy")
            return Scores(
                values,
                float(one["outside"]),
                None if greedy is None else int(greedy),
                shortened=bool(one.get("truncated")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("The answer of /v1/classify cannot be read.", TRY_LATER) from error

    async def _echoed(self, messages: list[Message]) -> list[Scores]:
        prompt = await tokenized(self.engine, messages, "")
        wholes = []
        for text in self.texts:
            if text not in self._ends:
                self._ends[text] = await self._tokens_of(messages, prompt, text)
            wholes.append([*prompt, *self._ends[text]])
        numbers = await echoed(self.engine, wholes)
        values = tuple(
            math.fsum(one[-len(self._ends[text]) :]) for text, one in zip(self.texts, numbers, strict=True)
        )
        inside = math.fsum(map(math.exp, values))
        # What free generation would give is not asked: it would take a request more for every row.
        return [Scores(values, min(1.0, max(0.0, 1.0 - inside)), None)]

    async def _tokens_of(self, messages: list[Message], prompt: list[int], text: str) -> list[int]:
        """The tokens of an answer behind a prompt, its end token included where it counts."""
        told = await tokenized(self.engine, messages, text)
        if told[: len(prompt)] != prompt or len(told) <= len(prompt):
            raise Refused(
                f"The server's template puts {text!r} together with the text before it.",
                "Classify by generation, or choose other words.",
            )
        if not self.whole:
            return told[len(prompt) :]
        closed = await tokenized(self.engine, messages, text, closed=True)
        if closed[: len(told)] != told or len(closed) <= len(told):
            return told[len(prompt) :]
        return closed[len(prompt) : len(told) + 1]

    async def _first(self, messages: list[Message]) -> list[Scores]:
        body = {
            "model": self.engine.remote.model, "messages": as_sent(messages), "temperature": 0,
            "max_tokens": FIRST_TOKENS, "logprobs": True, "top_logprobs": TOP,
        }  # fmt: skip
        found = await self.engine.client.ask("/chat/completions", body)
        return [self.of_first(found)]

    def of_first(self, found: Mapping[str, Any]) -> Scores:
        """Scores from the likeliest first tokens: a label has the probability of the tokens only it begins with."""
        try:
            content = found["choices"][0]["logprobs"]["content"]
            places = [one for one in content if _bytes(one).strip()]
            shown = [(_bytes(one).lstrip(), float(one["logprob"])) for one in places[0]["top_logprobs"]]
            said = _bytes(places[0]).lstrip()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise Refused("The server gave no probabilities of tokens.", "Retry the row later.") from None
        shares = [0.0] * len(self.texts)
        least, total = 0.0, 0.0
        for token, value in shown:
            share = math.exp(value)
            least, total = min(least, value), total + share
            begun = self._begun(token)
            if len(begun) > 1:
                raise Refused(TELLS_NOTHING_APART, "Choose labels that begin with different words.")
            if begun:
                shares[begun[0]] += share
        # A label none of whose tokens is shown is at most as likely as the least of them, and as what is left.
        hidden = min(least, math.log(max(1.0 - total, math.exp(LEAST))))
        values = tuple(math.log(one) if one > 0 else hidden for one in shares)
        greedy = self._begun(said)
        outside = min(1.0, max(0.0, 1.0 - math.fsum(shares)))
        return Scores(values, outside, greedy[0] if len(greedy) == 1 else None)

    def _begun(self, token: bytes) -> list[int]:
        """Which answers begin with a token, or are the beginning of it."""
        if not token:
            return []
        found = []
        for place, text in enumerate(self.texts):
            whole = text.encode()
            if whole.startswith(token) or (token.startswith(whole) and not token[len(whole) :].strip()):
                found.append(place)
        return found

    async def _greedy(self, messages: list[Message]) -> list[Scores]:
        longest = max(len(text.encode()) for text in self.texts)
        body = {
            "model": self.engine.remote.model, "messages": as_sent(messages), "temperature": 0,
            "max_tokens": 8 + longest,
        }  # fmt: skip
        found = await self.engine.client.ask("/chat/completions", body)
        try:
            said = str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise Refused(NOT_A_CHAT, CHECK_ADDRESS) from None
        place = said_label(said, self.texts)
        if place is None:
            short = " ".join(said.split())
            short = short if len(short) <= 60 else f"{short[:59]}…"
            raise Refused(
                f"The model wrote {short!r}, which is none of the labels.",
                "Say in the question which answers are allowed.",
            )
        return [Scores((), 0.0, place)]


def _set(stop: threading.Event | None) -> bool:
    return stop is not None and stop.is_set()


def _bytes(token: Mapping[str, Any]) -> bytes:
    """What a token stands for; the text of a part of a character says nothing."""
    given = token.get("bytes")
    if isinstance(given, list):
        return bytes(given)
    return str(token["token"]).replace("\u2581", " ").encode()


def said_label(said: str, texts: Sequence[str]) -> int | None:
    """Which label an answer is: the same but for case and marks around it, else the only one that it names."""
    plain = said.strip(" \t\r\n\u3000.。,，;；:：!！?？'\"“”‘’「」『』()（）[]【】<>《》*`_").casefold()
    for place, text in enumerate(texts):
        if plain == text.casefold():
            return place
    named = [place for place, text in enumerate(texts) if text.casefold() in plain]
    # "abnormal" names "normal" too: of labels within each other the longest is meant.
    named = [
        one
        for one in named
        if not any(other != one and texts[one].casefold() in texts[other].casefold() for other in named)
    ]
    return named[0] if len(named) == 1 else None


# ---- which way


def way_for(engine: RemoteEngine, whole: bool, texts: Sequence[str] = ()) -> Way:
    """The way of a job that has begun, else the best one this server offers.

    whole   whether the end of an answer counts; /v1/classify always counts it
    """
    if engine.label_way in WAYS:
        return engine.label_way  # type: ignore[return-value]
    found = engine.abilities()
    if found.classify and whole:
        return "classify"
    if found.echo:
        return "echo"
    if found.logprobs and (not texts or _apart(texts)):
        return "first"
    return "greedy"


def _apart(texts: Sequence[str]) -> bool:
    """Whether the answers can begin with different tokens at all: no one is the beginning of another."""
    return not any(one != other and other.startswith(one) for one in texts for other in texts) and len(
        {text[:1] for text in texts}
    ) == len(texts)


def gives_probabilities(way: str) -> bool:
    """Whether labels come with probabilities."""
    return way != "greedy"


def shots_taken(engine: RemoteEngine) -> bool:
    """Whether the server's /v1/classify takes solved examples."""
    return engine.served.takes_examples


# ---- tokens of the server


async def tokenized(
    engine: RemoteEngine, messages: list[Message], told: str, closed: bool = False
) -> list[int]:
    """The tokens of a conversation on the server, up to where its answer begins, or with `told` as its beginning.

    closed   with what ends the answer behind it
    """
    body: dict[str, Any] = {"model": engine.remote.model, "messages": as_sent(messages)}
    if told:
        body["messages"] = [*body["messages"], {"role": "assistant", "content": told}]
        body |= {"add_generation_prompt": False, "continue_final_message": not closed}
    else:
        body["add_generation_prompt"] = True
    found = await engine.client.ask(f"{engine.remote.url.removesuffix('/v1')}/tokenize", body)
    ids = found.get("tokens")
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        raise Refused("The server does not tell the tokens of a text.", "Choose another way.")
    return ids


async def echoed(engine: RemoteEngine, prompts: list[list[int]]) -> list[list[float]]:
    """The log-probability of every token of some prompts; that of a first one, which has none, is 0."""
    body = {
        "model": engine.remote.model, "prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1,
        "temperature": 0,
    }  # fmt: skip
    found = await engine.client.ask("/completions", body)
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise Refused("The server's answer has no log-probabilities of the prompt.", "Choose another way.")
    numbers: list[list[float]] = []
    choices = sorted(choices, key=lambda one: int(one.get("index", 0)))
    for ids, choice in zip(prompts, choices, strict=True):
        given = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(given) < len(ids) + 1 or any(one is None for one in given[1 : len(ids)]):
            raise Refused(
                "The server's answer has no log-probabilities of the prompt.", "Choose another way."
            )
        numbers.append([0.0, *(float(one) for one in given[1 : len(ids)])])
    return numbers
