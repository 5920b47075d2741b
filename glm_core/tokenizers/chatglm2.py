"""The sentencepiece tokenizer of ChatGLM2-6B and ChatGLM3-6B, and the prompts of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import GLMError

Generation = Literal["chatglm2", "chatglm3"]
Role = Literal["system", "user", "assistant", "observation"]

MASK_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `metadata` is the first line of a ChatGLM3 message (a tool's name)."""

    role: Role
    content: str
    metadata: str = ""


class ChatGLM2Tokenizer:
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
        self.n_pieces: int = self._pieces.vocab_size()
        names = MASK_TOKENS if generation == "chatglm2" else MASK_TOKENS + ROLE_TOKENS
        self.special: dict[str, int] = {name: self.n_pieces + i for i, name in enumerate(names)}
        self._names = {i: name for name, i in self.special.items()}
        self.prefix_ids: tuple[int, int] = (self.special["[gMASK]"], self.special["sop"])
        stops = {self.eos_id}
        if generation == "chatglm3":
            stops |= {self.special["<|user|>"], self.special["<|observation|>"]}
        self.stop_ids: frozenset[int] = frozenset(stops)

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens; the model's padded vocabulary is larger."""
        return self.n_pieces + len(self.special)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""
        return list(self._pieces.encode(text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        return [list(ids) for ids in self._pieces.encode(list(texts))]

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

    def message_ids(self, message: Message) -> list[int]:
        """ChatGLM3 message: the role id, then the metadata line and the content, encoded apart."""
        return [
            self.special[f"<|{message.role}|>"],
            *self.encode(message.metadata + "\n"),
            *self.encode(message.content),
        ]

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

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""
        head = self.encode("\n") if self.generation == "chatglm3" else []
        return [*head, *self.encode(text), self.eos_id]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids; while it is `finished=False` a cut character is held back."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        text = self.decode(ids[:end])
        if not finished:
            text = text.rstrip(REPLACEMENT)
        if self.generation == "chatglm3" and not text[:1].strip():
            text = text.lstrip(" ")
            text = text.removeprefix("\n")
        return text.strip() if finished else text.lstrip()

    @staticmethod
    def system_with_tools(content: str, tools: list[dict[str, Any]]) -> str:
        """System text that announces tools to ChatGLM3, in the layout it was trained with."""
        return f"{content}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"
