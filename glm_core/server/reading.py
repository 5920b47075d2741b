"""Answers read while they grow: pieces of text that stay, and tokens with their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tokenizers.base import REPLACEMENT

if TYPE_CHECKING:
    from ..engine import Handle, TokenScore
    from ..tokenizers.base import Tokenizer

LEAST = -9999.0  # stands for a log-probability that JSON cannot hold


class Spelling:
    """Text of single tokens, spaces in front of them included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")  # a decoder drops the space a text begins with
        self._head = tokenizer.decode(self._anchor)
        self._names = {number: name for name, number in tokenizer.special.items()}
        self._known: dict[int, str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids that follow others, as it stands there."""
        whole = self._tokenizer.decode([*self._anchor, *ids])
        return whole[len(self._head) :] if whole.startswith(self._head) else self._tokenizer.decode(ids)

    def token(self, number: int) -> str:
        """One token; a control token by its name, U+FFFD for a part of a character."""
        if number not in self._known:
            self._known[number] = self._names.get(number) or self.text([number])
        return self._known[number]

    def scored(self, number: int, logprob: float) -> dict[str, Any]:
        """A token as the OpenAI protocol shows it; `bytes` is null for a part of a character."""
        text = self.token(number)
        parts = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": parts}


class Reader:
    """One answer, read in pieces; `raw` texts are as generated, others as a chat shows them."""

    def __init__(self, handle: Handle, tokenizer: Tokenizer, spelling: Spelling, raw: bool = False) -> None:
        self.handle, self._tokenizer, self.spelling, self._raw = handle, tokenizer, spelling, raw
        self._stops = handle.request.settings.stop
        self._sent = ""
        self._ended = False  # as `more` saw it
        self._told = 0  # tokens whose log-probabilities were given, or left out

    @property
    def text(self) -> str:
        """All there is; once the answer has ended, the whole answer."""
        return self._read(self.handle.ids, self.handle.done)

    @property
    def finish_reason(self) -> str:
        """Of an answer that has ended, in the words of the OpenAI protocol."""
        if self._raw and self._cut(self._plain(self.handle.ids))[1]:
            return "stop"
        return "length" if self.handle.finish_reason == "length" else "stop"

    def more(self) -> str:
        """What has come since the last call and stays; with the last call after the end, all the rest."""
        done = self.handle.done
        text = self._read(list(self.handle.ids), done)
        if not done:
            text = _settled(text, self._stops)
        if text.startswith(self._sent):
            new = text[len(self._sent) :]
        elif done:  # several turns in one answer, of which the last counts
            new = "\n" + text
        else:
            return ""
        self._sent, self._ended = text, done
        return new

    def scores(self) -> list[tuple[int, TokenScore]]:
        """(token, its score) of what `more` has given and this has not; the end token is no part of an answer."""
        ids, done, end = list(self.handle.ids), self._ended, self._told
        if done:
            end = len(ids)
            while end > self._told and self._read(ids[: end - 1], True) == self._sent:
                end -= 1
        else:
            stops = self._tokenizer.stop_ids
            while end < len(ids) and ids[end] not in stops:
                if len(self._read(ids[: end + 1], False)) > len(self._sent):
                    break
                end += 1
        new = range(self._told, end)
        if self._told == 0:  # the line break between the frame and a chat answer
            while new and not self._raw and not self.spelling.token(ids[new[0]]).strip():
                new = new[1:]
            if not new and not done:
                return []
        self._told = max(self._told, end)
        return [(ids[place], self.handle.scores[place]) for place in new]

    def _read(self, ids: Sequence[int], done: bool) -> str:
        if not self._raw:
            if len(ids) == len(self.handle.ids) and done == self.handle.done:
                return self.handle.text
            text = self._tokenizer.answer_text(ids, done)
        else:
            text = self._plain(ids)
            text = text if done else text.rstrip(REPLACEMENT)
        return self._cut(text)[0]

    def _plain(self, ids: Sequence[int]) -> str:
        end = len(ids)
        while end and ids[end - 1] in self._tokenizer.stop_ids:
            end -= 1
        return self.spelling.text(ids[:end])

    def _cut(self, text: str) -> tuple[str, bool]:
        """Text up to the first stop text, and whether there was one."""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing answer that stays: no space at its end, and no beginning of a stop text."""
    text = text.rstrip()
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
