"""What every tokenizer of the GLM family offers, and the parts that several generations share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Role = Literal["system", "user", "assistant", "observation"]

REPLACEMENT = "\ufffd"
# What the models write for the date of their training, and what is shown for it.
DATE_MARK = ("[[训练时间]]", "2023年")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    metadata   first line of a ChatGLM3 or GLM-4 message: the name of a tool, else empty
    tools      descriptions of callable tools, for a system message of ChatGLM3 or GLM-4
    """

    role: Role
    content: str
    metadata: str = ""
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)


@dataclass(frozen=True)
class Padded:
    """Left-padded rows as the reference tokenizers return them.

    input_ids        int64 (rows, columns)
    attention_mask   ChatGLM-6B: bool (rows, 1, columns, columns), True = hidden; else int64 (rows, columns), 1 = a token
    position_ids     ChatGLM-6B: int64 (rows, 2, columns); else int64 (rows, columns)
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[Any]
    position_ids: npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What the engine and the pages need of a tokenizer; no text a user writes becomes a control token."""

    generation: str  # which prompt format: "chatglm", "chatglm2", "chatglm3", "glm4", ...
    n_pieces: int  # ids of the vocabulary file
    special: dict[str, int]  # control tokens by name
    stop_ids: frozenset[int]  # any of these ends an answer
    eos_id: int
    pad_id: int

    @property
    def vocab_size(self) -> int:
        """Number of ids with a meaning; the model's padded vocabulary is larger."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""

    @abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; ids without a meaning vanish, control tokens too unless their names are asked for."""

    @abstractmethod
    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn."""

    @abstractmethod
    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""

    @abstractmethod
    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids.

        While it is `finished=False`, an end that the next token may still change is held back.
        """


class GLMTokenizer(Tokenizer, ABC):
    """A tokenizer of the GLM family, which works on two levels.

    `encode`, `decode`, `chat_ids` and `answer_text` are the program's own. `reference_ids` and `reference_text` are
    the released tokenizer's `encode` and `decode` to the letter, including what those make of control tokens that a
    text spells out; they are for comparing and converting, never for prompts.
    """

    prefix_ids: tuple[int, int]  # [gMASK] <sop>: behind a prompt in ChatGLM-6B, before it in the others

    @abstractmethod
    def reference_ids(
        self, text: str, add_special: bool = True, *, pair: str | None = None, max_length: int | None = None
    ) -> list[int]:
        """`encode` of the released tokenizer.

        pair         a second text behind the first
        max_length   longest result for the first text; its end is cut, never the special tokens
        """

    @abstractmethod
    def reference_text(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """`decode` of the released tokenizer; IndexError for the ids it fails on."""

    def pad(
        self, rows: Sequence[Sequence[int]], max_length: int | None = None, multiple_of: int | None = None
    ) -> Padded:
        """Rows of one length, padded on the left with `pad_id`; positions count the tokens only.

        max_length    this many columns instead of the longest row's; ValueError if a row is longer
        multiple_of   rounds the number of columns up
        """
        import numpy as np

        columns = padded_length(rows, max_length, multiple_of)
        ids = np.full((len(rows), columns), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), columns), dtype=np.int64)
        positions = np.zeros((len(rows), columns), dtype=np.int64)
        for i, row in enumerate(rows):
            start = columns - len(row)
            ids[i, start:] = row
            mask[i, start:] = 1
            positions[i, start:] = np.arange(len(row))
        return Padded(ids, mask, positions)

    def _without_stops(self, ids: Sequence[int]) -> Sequence[int]:
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        return ids[:end]


def padded_length(rows: Sequence[Sequence[int]], max_length: int | None, multiple_of: int | None) -> int:
    """Columns of a padded batch; ValueError where `max_length` is shorter than a row."""
    longest = max(map(len, rows), default=0)
    columns = longest if max_length is None else max_length
    if columns < longest:
        raise ValueError(f"a row of {longest} ids does not fit into {max_length} columns")
    return -(-columns // multiple_of) * multiple_of if multiple_of else columns


def settled(text: str, changing: Sequence[str] = DATE_MARK[:1]) -> str:
    """Text without the end that further tokens may still change.

    changing   strings that are replaced once they are complete
    """
    text = text.rstrip(REPLACEMENT)  # a character of which some bytes are still to come
    for size in range(min(len(text), max(map(len, changing)) - 1), 0, -1):
        tail = text[-size:]
        if any(len(one) > size and one.startswith(tail) for one in changing):
            return text[:-size]
    return text


def split_turn(text: str) -> tuple[str, str]:
    """(metadata, content) of a generated turn; its metadata is what stands before the first line break."""
    metadata, newline, content = text.partition("\n")
    return (metadata, content) if newline else ("", text)


def shown(text: str, finished: bool) -> str:
    """A generated turn as a user sees it: a call of a tool as it was written, else the plain answer."""
    metadata, _ = split_turn(text)
    if not metadata.strip():
        text = text.replace(*DATE_MARK)
    return text.strip() if finished else text.lstrip()


def parse_turns(
    text: str, history: Sequence[Mapping[str, Any]], arguments: Callable[[str, str], dict[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """What a model that speaks in roles generated, as (content, history with the new turns).

    text        decoded answer, turns separated by <|assistant|>
    history     {"role", "content", ...} of every earlier message; it is not changed
    arguments   reads the arguments of a call from (name, content)
    The content is the last turn's: a text, {"name", "parameters"} for a call where history starts with a system
    message that lists tools, or {"name", "content"} for one where it does not.
    """
    content: str | dict[str, Any] = ""
    turns = [copy.deepcopy(dict(message)) for message in history]
    for turn in text.split("<|assistant|>"):
        metadata, written = split_turn(turn)
        called = bool(metadata.strip())
        written = written if called else written.strip()
        turns.append({"role": "assistant", "metadata": metadata, "content": written})
        if not called:
            content = written.replace(*DATE_MARK)
        elif turns[0]["role"] == "system" and "tools" in turns[0]:
            content = {"name": metadata.strip(), "parameters": arguments(metadata.strip(), written)}
        else:
            content = {"name": metadata.strip(), "content": written}
    return content, turns
