"""Tokenizers of chat models that transformers knows: their own chat template, or the formats of Alpaca and Vicuna."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import GLMError
from .base import REPLACEMENT, Message

STYLES = ("template", "alpaca", "vicuna")
ALPACA_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class TemplateTokenizer:
    """A tokenizer of transformers behind the interface of the GLM ones.

    style   "template": the chat template stored with the tokenizer; "alpaca" or "vicuna": the prompt formats those
            models were trained with (stanford_alpaca/train.py, FastChat conversation.py "vicuna_v1.1"), for
            checkpoints that store none
    User text never becomes a control token: where it spells one, the prompt is encoded piece by piece.
    """

    def __init__(self, folder: Path, style: str = "template") -> None:
        """Read the tokenizer of a folder; GLMError if there is none, or it has no chat template and `style` asks for it."""
        from transformers import AutoTokenizer

        try:
            self._pieces: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # damaged files surface as many types
            raise GLMError(
                f"The tokenizer in {folder} cannot be read: {type(error).__name__}: {str(error)[:200]}.",
                "Copy the tokenizer's files again from the place the checkpoint came from.",
            ) from error
        if style not in STYLES:
            raise GLMError(f"The prompt format {style!r} is unknown.", f"Choose one of {', '.join(STYLES)}.")
        if style == "template" and not self._pieces.chat_template:
            style = "alpaca" if "alpaca" in str(folder).lower() else "vicuna"
        self.generation = style
        self.n_pieces = int(self._pieces.vocab_size)
        self.special: dict[str, int] = {
            str(token): int(i) for i, token in self._pieces.added_tokens_decoder.items() if token.special
        }
        stops = self._stops(folder)
        self.eos_id = (
            self._pieces.eos_token_id if self._pieces.eos_token_id is not None else min(stops, default=0)
        )
        self.pad_id = self._pieces.pad_token_id if self._pieces.pad_token_id is not None else self.eos_id
        self.stop_ids: frozenset[int] = frozenset({self.eos_id, *stops})

    def _stops(self, folder: Path) -> set[int]:
        """The ids that end an answer: those of generation_config.json and config.json, and the tokenizer's own."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            if path.is_file():
                try:
                    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                except ValueError:
                    continue
                found |= {int(i) for i in (value if isinstance(value, list) else [value]) if i is not None}
        return found

    @property
    def vocab_size(self) -> int:
        """Pieces and added tokens."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""
        return list(self._pieces.encode(text, add_special_tokens=False, split_special_tokens=True))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        if not texts:
            return []
        return list(
            self._pieces(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids, control tokens left out unless asked for."""
        return str(
            self._pieces.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn. GLMError where the template refuses the messages."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        whole = self._render(turns)
        ids = self._with_control(whole)
        if not any(name in message.content for message in messages for name in self.special):
            return ids
        # Some text spells a control token: render with marks in its place, and encode the texts apart.
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        framed = self._render([turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)])
        ids = []
        for turn, mark in zip(turns, marks, strict=True):
            frame, found, framed = framed.partition(mark)
            if not found:  # a template may drop or move a message; then its text is not there either
                framed = frame
                continue
            ids += self._with_control(frame) + self.encode(turn["content"])
        return ids + self._with_control(framed)

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""
        return [*self.encode(text), self.eos_id]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids; while it is `finished=False` a cut character is held back."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        text = self.decode(ids[:end])
        return text.strip() if finished else text.rstrip(REPLACEMENT).lstrip()

    def _with_control(self, text: str) -> list[int]:
        return list(self._pieces.encode(text, add_special_tokens=False)) if text else []

    def _render(self, turns: Sequence[dict[str, str]]) -> str:
        if self.generation == "template":
            try:
                return str(
                    self._pieces.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
                )
            except Exception as error:  # jinja: a template raises what it likes
                raise GLMError(
                    f"The model's chat template refuses this conversation: {str(error)[:200]}.",
                    "Leave the system prompt empty, or put the instruction into the first question.",
                ) from error
        begin = str(self._pieces.bos_token or "")
        system = " ".join(turn["content"] for turn in turns if turn["role"] == "system")
        end = str(self._pieces.eos_token or "")
        if self.generation == "vicuna":
            text = begin + (system or VICUNA_HEAD)
            for turn in turns:
                if turn["role"] == "user":
                    text += f" USER: {turn['content']}"
                elif turn["role"] == "assistant":
                    text += f" ASSISTANT: {turn['content']}{end}"
            return text + " ASSISTANT:"
        text = begin + (system or ALPACA_HEAD)
        for turn in turns:
            if turn["role"] == "user":
                text += f"\n\n### Instruction:\n{turn['content']}"
            elif turn["role"] == "assistant":
                text += f"\n\n### Response:{turn['content']}{end}"
        return text + "\n\n### Response:"
