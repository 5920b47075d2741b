"""The byte-pair tokenizer of GLM-4-9B-chat, and its prompts."""

from __future__ import annotations

import base64
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import GLMError
from .base import GLMTokenizer, Message, parse_turns, settled, shown

# In the order of their ids, which follow the ranks: 151329 to 151342 in the released file.
CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip

# How a text is cut before its bytes are merged: contractions, words with the mark or space before them, up to three
# digits, runs of other marks, line breaks, spaces. Published with the checkpoint.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The system message of a chat with tools, as the published chat template has it; earlier revisions say "GLM-4" for
# the name.
TOOLS_HEAD = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOLS_TAIL = "在调用上述函数时，请使用 Json 格式表示调用的参数。"

REMEMBERED_BYTES = 64  # longer stretches of text hardly ever come twice


def json_arguments(name: str, content: str) -> dict[str, Any]:
    """Arguments of a call that GLM-4 wrote as a JSON object; GLMError for anything else."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (ValueError, RecursionError) as error:
        raise GLMError(
            f"The call of {name!r} that the model wrote cannot be read ({error}).",
            "Ask again, or describe the tool's parameters more plainly.",
        ) from error


def parse_response(
    text: str, history: Sequence[Mapping[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """(content, history with the new turns) of an answer of GLM-4; see `base.parse_turns`.

    GLMError where the arguments of a tool are no JSON object.
    """
    return parse_turns(text, history, json_arguments)


def read_ranks(model_file: Path) -> dict[bytes, int]:
    """Byte strings and their ranks from lines of `base64 rank`; GLMError unless every byte and rank is there."""
    try:
        ranks: dict[bytes, int] = {}
        for line in model_file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the ranks do not count from 0")
        missing = sum(bytes([byte]) not in ranks for byte in range(256))
        if missing:
            raise ValueError(f"{missing} of 256 bytes have no rank")
    except (OSError, ValueError) as error:
        raise GLMError(
            f"{model_file} is not a readable file of token ranks ({error}).",
            "Copy tokenizer.model again from the place the checkpoint came from.",
        ) from error
    return ranks


class GLM4Tokenizer(GLMTokenizer):
    """Text to ids and back for GLM-4-9B-chat: byte-pair merges in the order of their ranks, as tiktoken makes them.

    The merging is done here, because tiktoken is not among the requirements and its converter in transformers needs
    it to read the file; the `tokenizers` library orders merges by pair instead of by what they make, so that ties
    between two ways to the same token can come out otherwise. Equal to tiktoken but for letters that are newer than
    its Unicode tables, beside which a text may be cut elsewhere. Source: tokenization_chatglm.py and
    tokenizer_config.json of THUDM/glm-4-9b-chat; tiktoken for the file, the expression and the order of merges.
    """

    generation = "glm4"

    def __init__(self, model_file: Path) -> None:
        """Read `tokenizer.model`; GLMError if it is missing or no file of ranks."""
        import regex  # type: ignore[import-untyped]

        self._ranks = read_ranks(model_file)
        self._bytes = {rank: token for token, rank in self._ranks.items()}
        self._pattern = regex.compile(PATTERN)
        self._spelled = regex.compile("(" + "|".join(map(regex.escape, CONTROL_TOKENS)) + ")")
        self._remembered = lru_cache(maxsize=1 << 16)(self._merged)
        self.n_pieces = len(self._ranks)
        self.special = {name: self.n_pieces + i for i, name in enumerate(CONTROL_TOKENS)}
        self._names = {i: name for name, i in self.special.items()}
        self.prefix_ids = (self.special["[gMASK]"], self.special["<sop>"])
        self.eos_id = self.pad_id = self.special["<|endoftext|>"]
        self.stop_ids = frozenset(
            self.special[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")
        )

    @property
    def vocab_size(self) -> int:
        """Ranks and control tokens; the model's padded vocabulary is larger."""
        return self.n_pieces + len(self.special)

    # --- text to ids ----------------------------------------------------------------------------------------

    def _merged(self, piece: bytes) -> tuple[int, ...]:
        """Ids of one stretch of text: the pair of the lowest rank is merged, of equal ones the leftmost.

        The parts are a linked list over their first bytes and the pairs wait in a heap, so that a stretch without
        any space takes n log n steps. An entry of the heap whose parts have changed since is skipped.
        """
        ranks = self._ranks
        whole = ranks.get(piece)
        if whole is not None:
            return (whole,)
        n = len(piece)
        after = list(range(1, n + 1))  # where the part that begins here ends; -1 once it is part of another
        before = list(range(-1, n - 1))
        heap = [
            (rank, i, i + 1, i + 2) for i in range(n - 1) if (rank := ranks.get(piece[i : i + 2])) is not None
        ]
        heapq.heapify(heap)
        while heap:
            _, start, middle, end = heapq.heappop(heap)
            if after[start] != middle or after[middle] != end:
                continue
            after[start], after[middle] = end, -1
            if end < n:
                before[end] = start
                rank = ranks.get(piece[start : after[end]])
                if rank is not None:
                    heapq.heappush(heap, (rank, start, end, after[end]))
            left = before[start]
            if left >= 0:
                rank = ranks.get(piece[left:end])
                if rank is not None:
                    heapq.heappush(heap, (rank, left, start, end))
        ids, at = [], 0
        while at < n:
            ids.append(ranks[piece[at : after[at]]])
            at = after[at]
        return tuple(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens; half a surrogate pair counts as U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for piece in self._pattern.findall(text):
            data = piece.encode()
            ids += self._remembered(data) if len(data) <= REMEMBERED_BYTES else self._merged(data)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        return [self.encode(text) for text in texts]

    def reference_ids(
        self, text: str, add_special: bool = True, *, pair: str | None = None, max_length: int | None = None
    ) -> list[int]:
        """`encode` of the released tokenizer: [gMASK] <sop>, then the text, in which control tokens count as such.

        transformers takes every token of tokenizer_config.json out of a text before the tokenizer sees it; not
        verified against the released files, and the end of a second text is a guess (the release names a token
        that it does not have).
        """
        ids: list[int] = []
        for part in filter(None, self._spelled.split(text)):
            ids += [self.special[part]] if part in self.special else self.encode(part)
        if max_length is not None:
            ids = ids[: max(0, max_length - 2 if add_special else max_length)]
        if add_special:
            ids = [*self.prefix_ids, *ids]
        if pair is None:
            return ids
        return ids + self.reference_ids(pair, False) + ([self.eos_id] if add_special else [])

    # --- ids to text ----------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; out-of-range ids vanish, control tokens too unless their names are asked for.

        Bytes that are no UTF-8 become U+FFFD.
        """
        text, run = "", bytearray()
        for i in ids:
            if i in self._bytes:
                run += self._bytes[i]
            elif i in self._names and not skip_special:
                text += run.decode("utf-8", "replace") + self._names[i]
                run.clear()
        return text + run.decode("utf-8", "replace")

    def reference_text(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """`decode` of the released tokenizer; not verified against the released files."""
        return self.decode(ids, skip_special)

    # --- chat -----------------------------------------------------------------------------------------------

    @staticmethod
    def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
        """System text that announces functions to GLM-4, each given bare or as {"type": "function", "function"}."""
        text = TOOLS_HEAD
        for tool in tools:
            kind = tool.get("type", "function")
            function = tool.get("function", tool)
            if kind != "function" or not isinstance(function, Mapping) or "name" not in function:
                raise GLMError(
                    f"A tool of type {kind!r} cannot be announced.",
                    "Describe it as a function with a name and parameters.",
                )
            text += f"\n\n## {function['name']}\n\n{json.dumps(function, ensure_ascii=False, indent=4)}\n{TOOLS_TAIL}"
        return text

    def message_ids(self, message: Message) -> list[int]:
        """The role id, then the metadata line and the content, encoded apart.

        Tools of a system message come in one of their own before it; the message itself follows if it says
        anything.
        """
        ids: list[int] = []
        if message.role == "system" and message.tools:
            ids = self.message_ids(Message("system", self.tools_text(message.tools)))
            if not message.content:
                return ids
        return [
            *ids,
            self.special[f"<|{message.role}|>"],
            *self.encode(message.metadata + "\n"),
            *self.encode(message.content),
        ]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn: [gMASK] <sop>, every message, then the assistant's role id."""
        ids = list(self.prefix_ids)
        for message in messages:
            ids += self.message_ids(message)
        return [*ids, self.special["<|assistant|>"]]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`.

        It ends with <|user|>, as in the published fine-tuning script, not with <|endoftext|>.
        """
        return [*self.encode("\n"), *self.encode(text), self.special["<|user|>"]]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids; of several turns, the last one.

        While it is `finished=False`, a cut character and a beginning mark for the date are held back.
        """
        ids = self._without_stops(ids)
        assistant = self.special["<|assistant|>"]
        if assistant in ids:
            ids = ids[len(ids) - list(reversed(ids)).index(assistant) :]
        text = self.decode(ids)
        return shown(text if finished else settled(text), finished)
