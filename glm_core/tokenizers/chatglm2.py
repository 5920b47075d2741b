"""The sentencepiece tokenizer of ChatGLM2-6B and ChatGLM3-6B, and the prompts of both."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import GLMError
from .base import (
    DATE_MARK,
    REPLACEMENT,
    GLMTokenizer,
    Message,
    Role,
    parse_turns,
    settled,
    shown,
)

__all__ = [
    "MASK_TOKENS",
    "REPLACEMENT",
    "ROLE_TOKENS",
    "ChatGLM2Tokenizer",
    "Generation",
    "Message",
    "Role",
    "parse_response",
    "process_response",
    "tool_arguments",
]

Generation = Literal["chatglm2", "chatglm3"]

MASK_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

_ROLES = re.compile("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")")


def process_response(text: str) -> str:
    """A decoded answer as ChatGLM2-6B shows it: stripped, the date of its training filled in."""
    return text.strip().replace(*DATE_MARK)


def tool_arguments(name: str, content: str) -> dict[str, Any]:
    """Keyword arguments of a call that ChatGLM3-6B wrote: `tool_call(city="北京")` between two lines of a code fence.

    Only literals are read; nothing a model writes is ever run. GLMError for anything else.
    """
    code = "\n".join(content.split("\n")[1:-1])
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call of a function")
        if call.func.id != "tool_call" or call.args:
            raise ValueError("not a call of tool_call with named arguments")
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("arguments without a name")
            found[keyword.arg] = ast.literal_eval(keyword.value)
        return found
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise GLMError(
            f"The call of {name!r} that the model wrote cannot be read ({error}).",
            "Ask again, or describe the tool's parameters more plainly.",
        ) from error


def parse_response(
    text: str, history: Sequence[Mapping[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """(content, history with the new turns) of an answer of ChatGLM3-6B; see `base.parse_turns`.

    text      decoded answer with the names of role tokens in it
    history   {"role", "content", "metadata", "tools"} of every earlier message
    GLMError where a tool is called in another way than `tool_call` with literal keyword arguments.
    """
    return parse_turns(text, history, tool_arguments)


class ChatGLM2Tokenizer(GLMTokenizer):
    """Text to ids and back for the v2/v3 vocabulary, which is BPE with an identity normaliser.

    The file holds the ordinary pieces; the control tokens get the ids that follow them: [MASK], [gMASK],
    [sMASK], sop, eop and, from ChatGLM3 on, the four roles. `encode` never produces a control token, whatever
    the text says. Source: tokenization_chatglm.py of THUDM/chatglm2-6b and THUDM/chatglm3-6b.
    """

    unk_id = pad_id = 0
    eos_id = 2

    def __init__(self, model_file: Path, generation: Generation = "chatglm3") -> None:
        """Read `tokenizer.model`; GLMError if it is missing or no sentencepiece file."""
        import sentencepiece

        self.generation = generation
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise GLMError(
                f"{model_file} is not a readable sentencepiece file ({error}).",
                "Copy tokenizer.model again from the place the checkpoint came from.",
            ) from error
        self.n_pieces = int(self._pieces.vocab_size())
        names = MASK_TOKENS if generation == "chatglm2" else MASK_TOKENS + ROLE_TOKENS
        self.special = {name: self.n_pieces + i for i, name in enumerate(names)}
        self._names = {i: name for name, i in self.special.items()}
        self.prefix_ids = (self.special["[gMASK]"], self.special["sop"])
        stops = {self.eos_id}
        if generation == "chatglm3":
            stops |= {self.special["<|user|>"], self.special["<|observation|>"]}
        self.stop_ids = frozenset(stops)

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens; the model's padded vocabulary is larger."""
        return self.n_pieces + len(self.special)

    # --- text to ids ----------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""
        return list(self._pieces.encode(text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        found: list[list[int]] = self._pieces.encode(list(texts))
        return found

    def reference_ids(
        self,
        text: str,
        add_special: bool = True,
        *,
        pair: str | None = None,
        max_length: int | None = None,
        encode_special_tokens: bool = False,
    ) -> list[int]:
        """`encode` of the released tokenizer: [gMASK] sop before a text, </s> behind a second one.

        Control tokens in the text stay text, but for the four roles where ChatGLM3's tokenizer was made with
        `encode_special_tokens`; the texts between them are then encoded apart.
        """
        if encode_special_tokens and self.generation == "chatglm3":
            ids: list[int] = []
            for part in filter(None, _ROLES.split(text)):
                ids += [self.special[part]] if part in self.special else self.encode(part)
        else:
            ids = self.encode(text)
        if max_length is not None:
            ids = ids[: max(0, max_length - 2 if add_special else max_length)]
        if add_special:
            ids = [*self.prefix_ids, *ids]
        if pair is None:
            return ids
        return ids + self.encode(pair) + ([self.eos_id] if add_special else [])

    # --- ids to text ----------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; unknown, padding, end and out-of-range ids vanish, control tokens unless asked for."""
        parts: list[str] = []
        for i in ids:
            if i in self._names:
                if not skip_special:
                    parts.append(self._names[i])
            elif 2 < i < self.n_pieces:
                parts.append(self._pieces.id_to_piece(i))
        return str(self._pieces.decode_pieces(parts))

    def reference_text(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """`decode` of the released tokenizer, which has no use for `skip_special`.

        ChatGLM2 leaves control tokens out and raises IndexError for ids behind them; ChatGLM3 spells them out and
        leaves out what has no meaning.
        """
        if self.generation == "chatglm3":
            return self.decode(ids, skip_special=False)
        if any(i >= self.vocab_size for i in ids):
            raise IndexError(f"{max(ids)} is not among the {self.vocab_size} ids")
        return self.decode(ids)

    # --- chat -----------------------------------------------------------------------------------------------

    def message_ids(self, message: Message) -> list[int]:
        """ChatGLM3 message: the role id, then the metadata line and the content, encoded apart.

        Tools are announced at the end of a system message.
        """
        content = message.content
        if message.role == "system" and message.tools:
            content = self.system_with_tools(content, list(message.tools))
        return [
            self.special[f"<|{message.role}|>"],
            *self.encode(message.metadata + "\n"),
            *self.encode(content),
        ]

    @staticmethod
    def prompt_text(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """ChatGLM2's prompt as text: rounds numbered from one, the first question too."""
        rounds = [
            f"[Round {i}]\n\n问：{asked}\n\n答：{told}\n\n"
            for i, (asked, told) in enumerate(history, start=1)
        ]
        return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn.

        ChatGLM3: [gMASK] sop, every message, then the assistant's role id. ChatGLM2: numbered rounds from one;
        it was trained without roles, so a system message is refused with a GLMError.
        """
        if self.generation == "chatglm3":
            ids = list(self.prefix_ids)
            for message in messages:
                ids += self.message_ids(message)
            return [*ids, self.special["<|assistant|>"]]
        if any(message.role not in ("user", "assistant") for message in messages):
            raise GLMError(
                "ChatGLM2-6B knows no system prompt.",
                "Leave it empty, or put the instruction into the first question.",
            )
        text, rounds = "", 0
        for message in messages:
            if message.role == "user":
                rounds += 1
                text += f"[Round {rounds}]\n\n问：{message.content}\n\n答："
            else:
                text += f"{message.content}\n\n"
        return [*self.prefix_ids, *self.encode(text)]

    def next_turn_ids(self, number: int, question: str) -> list[int]:
        """What ChatGLM2 appends to the cache of a running chat for its `number`th question, counted from one.

        No control tokens, and no space before the first line break. The ids differ from those of one long prompt
        where the last answer would have merged with what follows.
        """
        return self.encode(f"\n\n[Round {number}]\n\n问：{question}\n\n答：")[1:]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""
        head = self.encode("\n") if self.generation == "chatglm3" else []
        return [*head, *self.encode(text), self.eos_id]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids; of several turns ChatGLM3 wrote, the last one.

        While it is `finished=False`, a cut character and a beginning mark for the date are held back.
        """
        ids = self._without_stops(ids)
        if self.generation == "chatglm3":
            assistant = self.special["<|assistant|>"]
            if assistant in ids:
                ids = ids[len(ids) - list(reversed(ids)).index(assistant) :]
        text = self.decode(ids)
        if not finished:
            text = settled(text)
        if self.generation == "chatglm3":
            return shown(text, finished)
        text = text.replace(*DATE_MARK)
        return text.strip() if finished else text.lstrip()

    @staticmethod
    def system_with_tools(content: str, tools: list[dict[str, Any]]) -> str:
        """System text that announces tools to ChatGLM3, in the layout it was trained with."""
        return f"{content}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"
