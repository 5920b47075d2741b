"""Tokenizers of chat models that transformers knows: their own chat template, or the formats of Alpaca and Vicuna."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import GLMError
from .base import REPLACEMENT, Message
from .glm4 import GLM4Tokenizer

STYLES = ("template", "alpaca", "vicuna")
ALPACA_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# What a vocabulary of GLM-4 and later has, whatever the files around it say.
GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# The prompt of GLM-4-9B-chat, for its vocabulary where no template is stored with it; tools are put into words before.
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>{{ message['metadata'] or '' }}\n"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARK = (
    "\ue000{}\ue001"  # stands for a text while a template is rendered; private characters, which no text has
)


class TemplateTokenizer:
    """A tokenizer of transformers behind the interface of the GLM ones.

    style   "template": the chat template stored with the tokenizer; "alpaca" or "vicuna": the prompt formats those
            models were trained with (stanford_alpaca/train.py, FastChat conversation.py "vicuna_v1.1"), for
            checkpoints that store none
    User text never becomes a control token: where it spells one, the prompt is encoded piece by piece. With a
    vocabulary of GLM-4 it always is, because that model was trained so: line break and content apart.
    """

    def __init__(self, folder: Path, style: str = "template") -> None:
        """Read the tokenizer of a folder; GLMError if there is none that can be read."""
        from transformers import AutoTokenizer

        if style not in STYLES:
            raise GLMError(f"The prompt format {style!r} is unknown.", f"Choose one of {', '.join(STYLES)}.")
        try:
            self._pieces: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # damaged files surface as many types
            raise GLMError(
                f"The tokenizer in {folder} cannot be read: {type(error).__name__}: {str(error)[:200]}.",
                "Copy the tokenizer's files again from the place the checkpoint came from.",
            ) from error
        # One switch inside the tokenizer says whether texts may spell control tokens, for all threads at once.
        self._lock = threading.Lock()
        self.special: dict[str, int] = {
            str(token): int(i) for i, token in self._pieces.added_tokens_decoder.items() if token.special
        }
        known = set(self.special) | set(self._pieces.get_added_vocab())
        self.glm = all(name in known for name in GLM_TOKENS)
        self._in_words = False
        if style == "template" and not self._pieces.chat_template:
            if self.glm:
                self._pieces.chat_template = GLM_TEMPLATE
                self._in_words = True
            else:
                style = "alpaca" if "alpaca" in str(folder).lower() else "vicuna"
        self.generation = style
        self.n_pieces = int(self._pieces.vocab_size)
        stops = self._stops(folder)
        if self.glm:
            names = ("<|endoftext|>", "<|user|>", "<|observation|>")
            stops |= {self.special[name] for name in names if name in self.special}
        own = self._pieces.eos_token_id
        self.eos_id = int(own) if own is not None else min(stops, default=0)
        self.pad_id = self._pieces.pad_token_id if self._pieces.pad_token_id is not None else self.eos_id
        end = self._answer_frame[1]
        self.stop_ids: frozenset[int] = frozenset({self.eos_id, *stops, *([] if end is None else [end])})

    def _stops(self, folder: Path) -> set[int]:
        """The ids that end an answer, as generation_config.json and config.json name them."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            if path.is_file():
                try:
                    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                except (ValueError, AttributeError):
                    continue
                found |= {int(i) for i in (value if isinstance(value, list) else [value]) if i is not None}
        return found

    @property
    def vocab_size(self) -> int:
        """Pieces and added tokens."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""
        with self._lock:
            return list(self._pieces.encode(text, add_special_tokens=False, split_special_tokens=True))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        if not texts:
            return []
        with self._lock:
            return list(
                self._pieces(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids, control tokens left out unless asked for; ids without a meaning vanish."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return str(
            self._pieces.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn. GLMError where the template refuses the messages."""
        turns = [turn for message in messages for turn in self._turns(message)]
        if not self.glm and not any(name in message.content for message in messages for name in self.special):
            return self._with_control(self._render(turns))
        # Render with marks in place of the texts, and encode those apart.
        marks = [MARK.format(i) if turn["content"] else "" for i, turn in enumerate(turns)]
        framed = self._render([turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)])
        ids: list[int] = []
        for turn, mark in zip(turns, marks, strict=True):
            if (
                not mark or mark not in framed
            ):  # a template may drop a message; then its text is not there either
                continue
            frame, _, framed = framed.partition(mark)
            content = turn["content"].strip() if self._strips else turn["content"]
            ids += self._with_control(frame) + self.encode(content)
        return ids + self._with_control(framed)

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""
        head, end = self._answer_frame
        return [*self._with_control(head), *self.encode(text), self.eos_id if end is None else end]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids; while it is `finished=False` a cut character is held back."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        text = self.decode(ids[:end])
        return text.strip() if finished else text.rstrip(REPLACEMENT).lstrip()

    @cached_property
    def _answer_frame(self) -> tuple[str, int | None]:
        """(what the template puts between its prompt and an answer, the control token behind an answer).

        A line break and <|user|> with GLM-4; nothing and the end of a turn with most others.
        """
        if self.generation != "template":
            return "", None
        asked, mark = {"role": "user", "content": "?"}, MARK.format(0)
        end = self.special["<|user|>"] if self.glm else None
        try:
            prompt = self._render([asked])
            whole = self._render([asked, {"role": "assistant", "content": mark}], open_turn=False)
        except GLMError:
            return "", end
        before, found, after = whole.partition(mark)
        if not found or not before.startswith(prompt):
            return "", end
        if end is None:
            control = set(self.special.values())
            end = next((i for i in self._with_control(after) if i in control), None)
        return before[len(prompt) :], end

    @cached_property
    def _strips(self) -> bool:
        """Whether the template takes the spaces around a question away."""
        if self.generation != "template":
            return False
        padded = f"  {MARK.format(0)}  "
        try:
            return padded not in self._render([{"role": "user", "content": padded}])
        except GLMError:
            return False

    def _turns(self, message: Message) -> list[dict[str, Any]]:
        """A message as chat templates expect it; names and descriptions of tools only where there are any."""
        if self._in_words and message.tools:
            told = Message(message.role, GLM4Tokenizer.tools_text(message.tools))
            rest = self._turns(Message(message.role, message.content)) if message.content else []
            return [*self._turns(told), *rest]
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.metadata:
            turn["metadata"] = message.metadata
        if message.tools:
            turn["tools"] = [
                dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
                for tool in message.tools
            ]
        return [turn]

    def _with_control(self, text: str) -> list[int]:
        if not text:
            return []
        with self._lock:
            return list(self._pieces.encode(text, add_special_tokens=False, split_special_tokens=False))

    def _render(self, turns: Sequence[dict[str, Any]], open_turn: bool = True) -> str:
        if self.generation == "template":
            tools = [tool for turn in turns for tool in turn.get("tools", ())]
            try:
                return str(
                    self._pieces.apply_chat_template(
                        list(turns), tools=tools or None, tokenize=False, add_generation_prompt=open_turn
                    )
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
