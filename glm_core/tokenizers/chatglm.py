"""The sentencepiece tokenizer of ChatGLM-6B, its prompts, and what its answers are made into."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GLMError
from .base import (
    DATE_MARK,
    GLMTokenizer,
    Message,
    Padded,
    padded_length,
    settled,
)

CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
LONGEST_BLANK = 80  # spaces in the longest piece for a run of them
FIRST_IMAGE_TOKENS = 20_000  # ids kept for pictures in the release of March 2023
# Spaces that English does not write, taken out of a decoded text by transformers in this order.
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

_BLANKS = re.compile(r" {2,}")
_WIDE = str.maketrans(",!:;?", "，！：；？")
_MARK_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
_PENDING_MARK = re.compile(r"(?<![\u4e00-\u9fff])[,!:;?]\Z")


def process_response(text: str) -> str:
    """A decoded answer as ChatGLM-6B shows it: the date filled in, Chinese punctuation in full width again."""
    return _restored(text.strip())


def _restored(text: str) -> str:
    return _MARK_BESIDE_CHINESE.sub(lambda mark: mark[0].translate(_WIDE), text.replace(*DATE_MARK))


def clean_up(text: str) -> str:
    """Text without the spaces before punctuation and English contractions, as transformers cleans it."""
    for found in CLEANED:
        text = text.replace(found, found.strip())
    return text


def _named(token: Any) -> str:
    """A token of tokenizer_config.json, which holds a text or, saved again by transformers, an object."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""


def _message(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def _piece(name: str) -> bytes:
    """A piece's name as it stands in a serialised model."""
    return _message(1, name.encode())


def completed(model: bytes) -> bytes:
    """The ice_text.model of March 2023 with the pieces that its tokenizer added on every start.

    Eight control pieces, one for a tab, 79 for runs of spaces, 256 bytes, and the switch for byte fallback: later
    files hold them already, in this order. Appending to a serialised protocol buffer extends its repeated fields
    and overrides its single ones, so that no protobuf library is needed.
    """
    kinds = [(name, 3) for name in CONTROL_TOKENS]
    kinds += [("<|tab|>", 4), *((f"<|blank_{n}|>", 4) for n in range(2, LONGEST_BLANK + 1))]
    kinds += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces = (
        _message(1, _piece(name) + b"\x15" + struct.pack("<f", 0.0) + bytes([3 << 3, kind]))
        for name, kind in kinds
    )
    return model + b"".join(pieces) + _message(2, b"\x98\x02\x01")  # trainer_spec.byte_fallback = true


class ChatGLMTokenizer(GLMTokenizer):
    """Text to ids and back for the vocabulary of ChatGLM-6B, a unigram model with NFKC normalisation.

    Newlines, tabs and runs of spaces are pieces of their own. Control tokens are pieces of the file, which
    sentencepiece never makes from text; all ids are shifted by `num_image_tokens`. Full-width punctuation does not
    survive encoding; `answer_text` restores it beside Chinese. Source: tokenization_chatglm.py and
    modeling_chatglm.py of THUDM/chatglm-6b, v1.1.0, tag v0.1.0 and the release of March 2023.
    """

    generation = "chatglm"

    def __init__(self, model_file: Path, config: Mapping[str, Any] | None = None) -> None:
        """Read `ice_text.model`; GLMError if it is missing or no such file.

        config   content of tokenizer_config.json; None stands for the one of v1.1.0. Without `num_image_tokens` it
                 means 20,000 of them, as in the release of March 2023. In the files of one week of April 2023 the
                 key is absent although there are none: pass it as rows of the embedding less 130,528.
        """
        import sentencepiece

        config = {"num_image_tokens": 0} if config is None else config
        self.num_image_tokens = int(config.get("num_image_tokens", FIRST_IMAGE_TOKENS))
        # Until 11 April 2023 the end of a text was </s>, encode placed it by another rule and decode cleaned nothing.
        self.first_release = _named(config.get("eos_token")) == "</s>"
        try:
            model = model_file.read_bytes()
            if _piece("<n>") in model and _piece("[gMASK]") not in model:
                model = completed(model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise GLMError(
                f"{model_file} is not a readable sentencepiece file ({error}).",
                "Copy ice_text.model again from the place the checkpoint came from.",
            ) from error
        if not all(map(self._has, ("<n>", "<|tab|>", "<pad>", *CONTROL_TOKENS))):
            raise GLMError(
                f"{model_file} is not the vocabulary of ChatGLM-6B: it has no piece for line breaks or for [gMASK].",
                "Copy ice_text.model again from the place the checkpoint came from.",
            )
        self.n_pieces = int(self._pieces.vocab_size())
        self.special = {name: self._id(name) for name in CONTROL_TOKENS}
        self._names = {i: name for name, i in self.special.items()}
        self.prefix_ids = (self.special["[gMASK]"], self.special["<sop>"])
        self.eos_id = self.special["<eop>"]
        self.pad_id = self._id("<pad>")
        self.stop_ids = frozenset({self.eos_id})
        published = {"bos": "<sop>", "eos": "<eop>", "unk": "<unk>", "pad": "<pad>", "mask": "[MASK]"}
        self._declared = [_named(config.get(f"{role}_token")) or name for role, name in published.items()]
        self._spelled = re.compile("(" + "|".join(map(re.escape, self._declared)) + ")")

    def _has(self, piece: str) -> bool:
        return self._pieces.piece_to_id(piece) != self._pieces.unk_id()

    def _id(self, piece: str) -> int:
        return int(self._pieces.piece_to_id(piece)) + self.num_image_tokens

    @property
    def vocab_size(self) -> int:
        """Pieces and picture ids; the model's vocabulary has 184 rows more."""
        return self.num_image_tokens + self.n_pieces

    # --- text to ids ----------------------------------------------------------------------------------------

    def _prepared(self, text: str) -> str:
        """Whitespace spelled out as the pieces that stand for it."""

        def blank(run: re.Match[str]) -> str:
            whole, rest = divmod(len(run[0]), LONGEST_BLANK)
            tail = f"<|blank_{rest}|>" if rest > 1 else " " * rest
            return f"<|blank_{LONGEST_BLANK}|>" * whole + tail

        return _BLANKS.sub(blank, text.replace("\n", "<n>").replace("\t", "<|tab|>"))

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without control tokens."""
        return [i + self.num_image_tokens for i in self._pieces.encode(self._prepared(text))]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        found: list[list[int]] = self._pieces.encode([self._prepared(text) for text in texts])
        if not self.num_image_tokens:
            return found
        return [[i + self.num_image_tokens for i in ids] for ids in found]

    def reference_ids(
        self, text: str, add_special: bool = True, *, pair: str | None = None, max_length: int | None = None
    ) -> list[int]:
        """`encode` of the released tokenizer.

        The five tokens that tokenizer_config.json declares become control ids where the text spells them out, and
        take the whitespace around them away. The specials end a text: [gMASK] <sop>, a second text and <eop>. In
        the first release a text with a mask of its own gets none, and </s> where it does not end in it.
        """
        ids: list[int] = []
        parts = self._spelled.split(text)  # texts at even places, control tokens between them
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._id(part))
                continue
            part = part.lstrip() if i else part
            part = part.rstrip() if i + 1 < len(parts) else part
            ids += self.encode(part)
        if max_length is not None:
            ids = ids[: max(0, max_length - 2 if add_special else max_length)]
        second = None if pair is None else self.reference_ids(pair, False)
        if not add_special:
            return ids if second is None else ids + second
        masks = (self.special["[MASK]"], self.special["[gMASK]"])
        if not self.first_release:
            ids += self.prefix_ids
        else:
            if not any(mask in ids for mask in masks):
                ids.append(self.special["[gMASK]"])
            if ids[-1] not in masks:
                ids.append(self._id("</s>"))
            ids.append(self.special["<sop>"])
        if second is None:
            return ids
        ended = self.first_release and second[-1:] == [self.eos_id]
        return ids + second + ([] if ended else [self.eos_id])

    # --- ids to text ----------------------------------------------------------------------------------------

    @staticmethod
    def _spaced(text: str) -> str:
        """Pieces that stand for whitespace, as whitespace again."""
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(
            r"<\|blank_(\d{1,2})\|>", lambda m: " " * n if 2 <= (n := int(m[1])) <= 80 else m[0], text
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; unknown, padding, end, picture and out-of-range ids vanish, control tokens unless asked for."""
        parts: list[str] = []
        for i in ids:
            if i in self._names:
                if not skip_special:
                    parts.append(self._names[i])
            elif 3 < i - self.num_image_tokens < self.n_pieces:
                parts.append(self._pieces.id_to_piece(i - self.num_image_tokens))
        if skip_special:
            return self._spaced(str(self._pieces.decode_pieces(parts)))
        # decode_pieces drops the names of control pieces, so the text between them is decoded piece by piece.
        text, run = "", list[str]()
        for part in [*parts, ""]:
            if part in self.special or not part:
                text += str(self._pieces.decode_pieces(run)) + part
                run = []
            else:
                run.append(part)
        return self._spaced(text)

    def reference_text(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """`decode` of the released tokenizer; IndexError for an id behind the last piece.

        v1.1.0 cleans up spaces before punctuation; the first release does not, and knows no `skip_special`.
        """
        kept = [i for i in ids if i != self.pad_id]
        if self.first_release:
            kept = [i - self.num_image_tokens for i in kept if i >= self.num_image_tokens]
            return self._spaced(str(self._pieces.decode(kept)))
        pieces = [
            f"<image_{i}>"
            if 0 <= i < self.num_image_tokens
            else str(self._pieces.id_to_piece(i - self.num_image_tokens))
            for i in kept
        ]
        if skip_special:
            pieces = [piece for piece in pieces if piece not in self._declared]
        return clean_up(self._spaced(str(self._pieces.decode_pieces(pieces))))

    # --- chat -----------------------------------------------------------------------------------------------

    @staticmethod
    def prompt_text(question: str, history: Sequence[tuple[str, str]] | None) -> str:
        """The prompt as text: rounds numbered from zero; the bare question where `history` is None."""
        if history is None:
            return question
        rounds = [f"[Round {i}]\n问：{asked}\n答：{told}\n" for i, (asked, told) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{question}\n答："

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Prompt for the assistant's next turn, then [gMASK] <sop>.

        A first question stands alone, later ones in rounds numbered from zero. ChatGLM-6B was trained without
        roles, so a system message is refused with a GLMError.
        """
        if any(message.role not in ("user", "assistant") for message in messages):
            raise GLMError(
                "ChatGLM-6B knows no system prompt.",
                "Leave it empty, or put the instruction into the first question.",
            )
        if len(messages) == 1 and messages[0].role == "user":
            return [*self.encode(messages[0].content), *self.prefix_ids]
        text, rounds = "", 0
        for message in messages:
            if message.role == "user":
                text += f"[Round {rounds}]\n问：{message.content}\n答："
                rounds += 1
            else:
                text += f"{message.content}\n"
        return [*self.encode(text), *self.prefix_ids]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as the model is to produce it after `chat_ids`, the end token included."""
        return [*self.encode(text), self.eos_id]

    def answer_text(self, ids: Sequence[int], finished: bool = True) -> str:
        """The answer a user sees for generated ids: decoded, cleaned up, with Chinese punctuation.

        While it is `finished=False`, an end that the next token may still change is held back.
        """
        text = self.decode(self._without_stops(ids))
        if not finished:
            text = self._settled(text)
        if not self.first_release:
            text = clean_up(text)
        return _restored(text.strip() if finished else text.lstrip())

    def _settled(self, text: str) -> str:
        changing = DATE_MARK[:1] if self.first_release else (*CLEANED, DATE_MARK[0])
        while (shorter := _PENDING_MARK.sub("", settled(text, changing))) != text:
            text = shorter
        return text

    def pad(
        self, rows: Sequence[Sequence[int]], max_length: int | None = None, multiple_of: int | None = None
    ) -> Padded:
        """Rows padded on the left, with the prefix mask and the two rows of positions of GLM.

        Everything before a row's first <sop> sees itself whole, the rest is causal. Positions stay at the first
        [MASK], or [gMASK] where there is none, from <sop> on, while the second row starts to count. ValueError if a
        row is longer than `max_length`.
        """
        import numpy as np

        columns = padded_length(rows, max_length, multiple_of)
        ids = np.full((len(rows), columns), self.pad_id, dtype=np.int64)
        hidden = np.ones((len(rows), 1, columns, columns), dtype=np.bool_)
        positions = np.zeros((len(rows), 2, columns), dtype=np.int64)
        for i, row in enumerate(rows):
            row = list(row)
            start, length = columns - len(row), len(row)
            context = row.index(self.special["<sop>"]) if self.special["<sop>"] in row else length
            ids[i, start:] = row
            seen = np.tril(np.ones((length, length), dtype=np.bool_))
            seen[:, :context] = True
            hidden[i, 0, start:, start:] = ~seen
            first = np.arange(length)
            for mask in (self.special["[MASK]"], self.special["[gMASK]"]):
                if mask in row:
                    first[context:] = row.index(mask)
                    break
            positions[i, 0, start:] = first
            positions[i, 1, start + context :] = np.arange(1, length - context + 1)
        return Padded(ids, hidden, positions)
