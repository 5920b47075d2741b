"""Examples as token ids and labels, as the released training scripts make them; kept on disk for a second run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from ..errors import GLMError
from ..tables.options import listed, plural
from ..tokenizers.base import REPLACEMENT, Message, Tokenizer
from ..tokenizers.chatglm import ChatGLMTokenizer
from ..tokenizers.chatglm2 import ChatGLM2Tokenizer
from ..tokenizers.glm4 import GLM4Tokenizer
from .examples import Example
from .methods import IGNORED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Progress = Callable[[int, int], None]  # (rows encoded, of all)

FORMAT = 1  # of the cache; a change of the encoding is a change of this number
CHUNK_ROWS = 4096
LONGEST_CHARACTER = 8  # tokens that may make up one character
FEW = 32  # texts
STALE_S = 86_400  # after which a half-written file is nobody's
PROBE_ROWS = 256  # encoded for the name of the cache, next to the vocabulary
PROBE = (Message("user", "你好 hello\n12"), Message("assistant", " 好的。"), Message("user", "？"))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example, not padded. The model shifts the labels itself.

    labels             as long as `ids` and equal to them; -100 where a token does not count in the loss
    truncated_source   ids of the prompt that the limit took away, whole earlier rounds included
    truncated_target   ids of the answer that the limit took away
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated_source: int = 0
    truncated_target: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of an encoded example as text; `counted` in the loss or not. A character may take several tokens."""

    text: str
    counted: bool
    tokens: int = 1


class Cancelled(GLMError):
    """Encoding was asked to stop."""


def encode(
    example: Example,
    tokenizer: Tokenizer,
    max_source: int,
    max_target: int,
    *,
    source_prefix: str = "",
    history_column: bool = False,
) -> Encoded:
    """Ids and labels of one example.

    max_source, max_target   longest prompt and answer in tokens, counted as the released script of the generation
                             does: with [gMASK] in ChatGLM-6B's prompt, with <sop> and <eop> in its answer, without
                             the end token elsewhere
    source_prefix    text put before the prompt
    history_column   the data has a column of earlier rounds: ChatGLM-6B's script then numbers a first question too,
                     which its chat does not; no other generation differs
    ChatGLM-6B and ChatGLM2-6B: as preprocess_function_train of their ptuning scripts, but for the padding. The
    others: the chat prompt, of which the oldest rounds go first where it is too long, then the question's end.
    GLMError for limits that leave no room, and for a prompt or a response that is empty.
    """
    check_limits(tokenizer, max_source, max_target)
    _refuse_empty([example])
    row = next(_rows([example], tokenizer, max_source, max_target, source_prefix, history_column))
    return _encoded(row.ids, row.start, row.cut_source, row.cut_target, _hole(tokenizer))


def encode_prompt(
    example: Example, tokenizer: Tokenizer, max_source: int, *, source_prefix: str = ""
) -> list[int]:
    """Ids that an answer is generated from, as preprocess_function_eval of the released scripts; not padded."""
    check_limits(tokenizer, max_source)
    return _sources([example], tokenizer, max_source, source_prefix, False, generating=True)[0][0]


def check_limits(tokenizer: Tokenizer, max_source: int, max_target: int | None = None) -> None:
    """GLMError unless the limits leave room for a token of a question and one of an answer."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        frame, ends = 2, 2
    else:
        blank = tokenizer.chat_ids([Message("user", "")])
        frame = 2 if tokenizer.generation == "chatglm2" else len(blank)
        ends = len(tokenizer.answer_ids("")) - 1
    if max_source <= frame:
        raise GLMError(
            f"A longest prompt of {max_source} tokens leaves no room for a question: its frame takes {frame}.",
            f"Raise the longest prompt to {frame + 1} tokens or more.",
        )
    if max_target is not None and max_target <= ends:
        raise GLMError(
            f"A longest answer of {max_target} tokens leaves no room for its text.",
            f"Raise the longest answer to {ends + 1} tokens or more.",
        )


# --- one chunk of rows ------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    ids: list[int]
    start: int  # first position that counts in the loss
    cut_source: int
    cut_target: int


def _rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_source: int,
    max_target: int,
    source_prefix: str,
    history_column: bool,
) -> Iterator[_Row]:
    sources = _sources(examples, tokenizer, max_source, source_prefix, history_column)
    targets = _targets([example.response for example in examples], tokenizer, max_target)
    for (source, cut_source), (target, cut_target) in zip(sources, targets, strict=True):
        yield _Row(source + target, len(source), cut_source, cut_target)


def _encode_many(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of many texts; a few are not worth the threads that are started for a list."""
    return [tokenizer.encode(text) for text in texts] if len(texts) < FEW else tokenizer.encode_many(texts)


def _sources(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_source: int,
    source_prefix: str,
    history_column: bool,
    generating: bool = False,
) -> list[tuple[list[int], int]]:
    """(ids before the first token that counts, ids cut) of every example."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        texts = [
            source_prefix
            + tokenizer.prompt_text(one.prompt, one.history if one.history or history_column else None)
            for one in examples
        ]
        # The script leaves one place beside the text when it trains and two when it generates; <sop> counts in the
        # loss, so it belongs to the answer.
        room = max_source - (2 if generating else 1)
        tail = list(tokenizer.prefix_ids[: 2 if generating else 1])
        return [(ids[:room] + tail, max(0, len(ids) - room)) for ids in _encode_many(tokenizer, texts)]
    if isinstance(tokenizer, ChatGLM2Tokenizer) and tokenizer.generation == "chatglm2":
        texts = [source_prefix + tokenizer.prompt_text(one.prompt, one.history) for one in examples]
        head, room = list(tokenizer.prefix_ids), max_source - 2
        return [(head + ids[:room], max(0, len(ids) - room)) for ids in _encode_many(tokenizer, texts)]
    if isinstance(tokenizer, ChatGLM2Tokenizer | GLM4Tokenizer):
        return _role_sources(examples, tokenizer, max_source, source_prefix)
    return [_template_source(example, tokenizer, max_source, source_prefix) for example in examples]


def _role_sources(
    examples: Sequence[Example],
    tokenizer: ChatGLM2Tokenizer | GLM4Tokenizer,
    max_source: int,
    source_prefix: str,
) -> list[tuple[list[int], int]]:
    """Chat prompts of ChatGLM3 and GLM-4, put together from texts that are encoded all at once."""
    texts: list[str] = []
    for example in examples:
        for asked, told in example.history:
            texts += (asked, told)
        texts.append(source_prefix + example.prompt)
    encoded = iter(_encode_many(tokenizer, texts))
    asks, tells = (tokenizer.message_ids(Message(role, "")) for role in ("user", "assistant"))
    head, tail = list(tokenizer.prefix_ids), [tokenizer.special["<|assistant|>"]]
    found = []
    for example in examples:
        rounds = [asks + next(encoded) + tells + next(encoded) for _ in example.history]
        question = next(encoded)
        frame = len(head) + len(asks) + len(tail)
        length = whole = frame + len(question) + sum(map(len, rounds))
        kept = 0
        while length > max_source and kept < len(rounds):
            length -= len(rounds[kept])
            kept += 1
        question = question[: max_source - length + len(question)] if length > max_source else question
        ids = [*head, *(i for one in rounds[kept:] for i in one), *asks, *question, *tail]
        found.append((ids, whole - len(ids)))
    return found


def _template_source(
    example: Example, tokenizer: Tokenizer, max_source: int, source_prefix: str
) -> tuple[list[int], int]:
    """A chat prompt of a model with a template, which shows only the whole; a long question is cut as text."""
    rounds = [[Message("user", asked), Message("assistant", told)] for asked, told in example.history]
    question = source_prefix + example.prompt

    def prompt(first: int, text: str) -> list[int]:
        return tokenizer.chat_ids([*(turn for one in rounds[first:] for turn in one), Message("user", text)])

    ids = prompt(0, question)
    whole = len(ids)
    first = 0
    while len(ids) > max_source and first < len(rounds):
        first += 1
        ids = prompt(first, question)
    if len(ids) > max_source:
        pieces = tokenizer.encode(question)
        room = len(pieces)
        while len(ids) > max_source and room:
            room = max(0, room - (len(ids) - max_source))
            ids = prompt(first, tokenizer.decode(pieces[:room]).rstrip(REPLACEMENT))
    return ids, whole - len(ids)


def _targets(responses: Sequence[str], tokenizer: Tokenizer, max_target: int) -> list[tuple[list[int], int]]:
    """(ids that count in the loss, ids cut) of every answer."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        head, tail, room = [tokenizer.prefix_ids[1]], [tokenizer.eos_id], max_target - 2
    else:
        *head, end = tokenizer.answer_ids("")
        tail, room = [end], max_target - len(head)
    return [(head + ids[:room] + tail, max(0, len(ids) - room)) for ids in _encode_many(tokenizer, responses)]


def _hole(tokenizer: Tokenizer) -> int | None:
    """An id whose label is -100 within an answer too: the released scripts take every padding id out, also theirs."""
    return tokenizer.pad_id if tokenizer.generation in ("chatglm", "chatglm2") else None


def _encoded(ids: Sequence[int], start: int, cut_source: int, cut_target: int, hole: int | None) -> Encoded:
    ids = tuple(ids)
    answer = ids[start:]
    if hole is not None and hole in answer:
        answer = tuple(IGNORED if i == hole else i for i in answer)
    return Encoded(ids, (IGNORED,) * start + answer, cut_source, cut_target)


def _refuse_empty(examples: Sequence[Example]) -> None:
    empty = [i for i, one in enumerate(examples) if not one.prompt.strip() or not one.response.strip()]
    if empty:
        lines = [examples[i].line or i + 1 for i in empty]
        raise GLMError(
            f"Without a prompt or a response: {plural(len(empty), 'row')} (line {listed(lines)}).",
            "Leave such rows out, or choose other columns.",
        )


# --- all rows ---------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Up to CHUNK_ROWS rows; row i has ids[offsets[i]:offsets[i + 1]]."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    start: npt.NDArray[np.int32]
    cut_source: npt.NDArray[np.int32]
    cut_target: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Limits:
    """The longest prompt and answer that rows were encoded with, and how many tokens an answer has beside them."""

    max_source: int
    max_target: int
    beside: int  # end tokens that `max_target` does not count: 0 in ChatGLM-6B, else 1


@dataclass(frozen=True)
class EncodedRows(Sequence[Encoded]):
    """Encoded examples, 4 bytes an id; read from the cache's file as they are asked for, where there is one.

    order   which rows, where these are not all of them (`take`)
    """

    limits: Limits
    hole: int | None
    chunks: tuple[_Chunk, ...] = field(repr=False)
    order: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        if self.order is not None:
            return len(self.order)
        return (len(self.chunks) - 1) * CHUNK_ROWS + len(self.chunks[-1].start) if self.chunks else 0

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedRows:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        at, i = divmod(int(self.order[index]) if self.order is not None else index, CHUNK_ROWS)
        chunk = self.chunks[at]
        ids = chunk.ids[chunk.offsets[i] : chunk.offsets[i + 1]].tolist()
        return _encoded(
            ids, int(chunk.start[i]), int(chunk.cut_source[i]), int(chunk.cut_target[i]), self.hole
        )

    def take(self, rows: Iterable[int]) -> EncodedRows:
        """These rows in this order, without a copy."""
        import numpy as np

        chosen = np.fromiter(rows, dtype=np.int64)
        return EncodedRows(
            self.limits, self.hole, self.chunks, chosen if self.order is None else self.order[chosen]
        )

    def _column(self, get: Callable[[_Chunk], npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        import numpy as np

        whole = (
            np.concatenate([get(chunk) for chunk in self.chunks]) if self.chunks else np.zeros(0, np.int32)
        )
        return whole if self.order is None else whole[self.order]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every row."""
        import numpy as np

        return self._column(lambda chunk: np.diff(chunk.offsets))

    @property
    def truncated_source(self) -> npt.NDArray[np.int32]:
        """`Encoded.truncated_source` of every row."""
        return self._column(lambda chunk: chunk.cut_source)

    @property
    def truncated_target(self) -> npt.NDArray[np.int32]:
        """`Encoded.truncated_target` of every row."""
        return self._column(lambda chunk: chunk.cut_target)

    @property
    def source_needed(self) -> npt.NDArray[np.int32]:
        """The smallest `max_source` that cuts nothing, of every row."""
        return self._column(lambda chunk: chunk.start + chunk.cut_source)

    @property
    def target_needed(self) -> npt.NDArray[np.int32]:
        """The smallest `max_target` that cuts nothing, of every row."""
        answers = self.lengths - self._column(lambda chunk: chunk.start)
        return answers - self.limits.beside + self.truncated_target


def encode_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_source: int,
    max_target: int,
    *,
    source_prefix: str = "",
    history_column: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> EncodedRows:
    """`encode` of all examples, in their order.

    cache      folder for an Arrow file, named after the examples, the tokenizer and the limits; found again by
               the same call and then mapped into memory. A damaged file is written again. None: kept in memory
    progress   called with the rows encoded so far and all rows
    stop       asked before every few thousand rows; Cancelled where it is true
    """
    check_limits(tokenizer, max_source, max_target)
    _refuse_empty(examples)
    limits = Limits(max_source, max_target, 0 if tokenizer.generation == "chatglm" else 1)
    hole = _hole(tokenizer)

    def chunks() -> Iterator[_Chunk]:
        for start in range(0, len(examples), CHUNK_ROWS):
            if stop is not None and stop():
                raise Cancelled("The encoding of the examples was stopped.", "Start it again.")
            some = examples[start : start + CHUNK_ROWS]
            yield _chunk(list(_rows(some, tokenizer, max_source, max_target, source_prefix, history_column)))
            if progress is not None:
                progress(start + len(some), len(examples))

    if cache is None or not examples:
        return EncodedRows(limits, hole, tuple(chunks()))
    settings = [FORMAT, max_source, max_target, source_prefix, history_column]
    name = _key(examples, tokenizer, settings)
    file = Path(cache) / f"encoded-{name[:32]}.arrow"
    found = _read_cache(file, name, len(examples))
    if found is None:
        _write_cache(file, name, len(examples), chunks())
        found = _read_cache(file, name, len(examples))
        if found is None:
            raise GLMError(f"{file} could not be read again after it was written.", "Choose another folder.")
    elif progress is not None:
        progress(len(examples), len(examples))
    return EncodedRows(limits, hole, found)


def _chunk(rows: Sequence[_Row]) -> _Chunk:
    import numpy as np

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
    ids = np.fromiter((i for row in rows for i in row.ids), dtype=np.int32, count=int(offsets[-1]))
    columns = [np.array([row[at] for row in rows], dtype=np.int32) for at in (1, 2, 3)]
    return _Chunk(ids, offsets, *columns)


def _key(examples: Sequence[Example], tokenizer: Tokenizer, settings: list[Any]) -> str:
    """A hash of everything that the encoded rows depend on, but not of the lines, which they do not hold."""
    digest = hashlib.sha256(tokenizer_hash(tokenizer).encode())
    digest.update(json.dumps(settings).encode())
    texts = [text for example in examples[:PROBE_ROWS] for text in (example.prompt, example.response)]
    digest.update(repr(tokenizer.encode_many(texts)).encode())
    for example in examples:
        digest.update(repr((example.prompt, example.response, example.history)).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer makes of ids, of its control tokens and of a short conversation.

    Two vocabularies with the same pieces and other scores can have the same.
    """
    size = tokenizer.vocab_size
    digest = hashlib.sha256(f"{tokenizer.generation} {size} {sorted(tokenizer.special.items())}".encode())
    digest.update(repr([*tokenizer.chat_ids(PROBE), *tokenizer.answer_ids(PROBE[1].content)]).encode())
    for start in range(0, size, 64):
        digest.update(tokenizer.decode(range(start, min(size, start + 64))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# --- the cache --------------------------------------------------------------------------------------------------


def _datasets() -> Any:
    """The `datasets` library, which is not to look anything up in the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets

    return datasets


def _write_cache(file: Path, name: str, rows: int, chunks: Iterator[_Chunk]) -> None:
    """Write beside and rename when whole; the note with size and checksum comes last and makes it valid."""
    import pyarrow as pa

    datasets = _datasets()
    whole = datasets.Sequence(datasets.Value("int32"))
    number = datasets.Value("int32")
    features = datasets.Features(
        {"ids": whole, "start": number, "truncated_source": number, "truncated_target": number}
    )
    schema = features.arrow_schema
    beside = file.with_name(f"{file.stem}-{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob("encoded-*.part"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink(missing_ok=True)
        from datasets.arrow_writer import ArrowWriter

        with ArrowWriter(path=str(beside), features=features) as writer:
            for chunk in chunks:
                ids = pa.ListArray.from_arrays(pa.array(chunk.offsets), pa.array(chunk.ids))
                columns = [ids, *(pa.array(column) for column in chunk[2:])]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), CHUNK_ROWS)
            writer.finalize()
        note = {"key": name, "rows": rows, "bytes": beside.stat().st_size, "sha256": _sha256(beside)}
        beside.replace(file)
        _note(file).write_text(json.dumps(note), encoding="utf-8")
    except OSError as error:
        raise GLMError(
            f"The encoded examples could not be written to {file.parent}: {error}.",
            "Free some disk space, or choose another folder.",
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _read_cache(file: Path, name: str, rows: int) -> tuple[_Chunk, ...] | None:
    """The chunks of a whole and unchanged file, mapped into memory; None where there is none."""
    try:
        note = json.loads(_note(file).read_text(encoding="utf-8"))
        if note["key"] != name or note["rows"] != rows or note["bytes"] != file.stat().st_size:
            return None
        if note["sha256"] != _sha256(file):
            return None
        table = _datasets().Dataset.from_file(str(file)).data.table
        if table.num_rows != rows:
            return None
        chunks = []
        for batch in table.to_batches():
            ids = batch.column("ids")
            columns = [
                batch.column(of).to_numpy(zero_copy_only=True)
                for of in ("start", "truncated_source", "truncated_target")
            ]
            chunks.append(
                _Chunk(
                    ids.values.to_numpy(zero_copy_only=True),
                    ids.offsets.to_numpy(zero_copy_only=True),
                    *columns,
                )
            )
        sizes = {len(chunk.start) for chunk in chunks[:-1]}
        return tuple(chunks) if sizes <= {CHUNK_ROWS} else None
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are ValueErrors and OSErrors
        return None


def _note(file: Path) -> Path:
    return file.with_suffix(".json")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- what counts ------------------------------------------------------------------------------------------------


def preview(encoded: Encoded, tokenizer: Tokenizer) -> list[Piece]:
    """The tokens of an example as text, one piece each, and whether they count in the loss.

    Control tokens show their names. Tokens that hold parts of one character are one piece, and so is one that
    shows nothing with the next. The texts together are the decoded example.
    """
    names = {i: name for name, i in tokenizer.special.items()}
    names.setdefault(tokenizer.eos_id, "</s>")
    pieces: list[Piece] = []
    before: list[
        int
    ] = []  # what stands before in the same run of ordinary tokens; a first space depends on it
    group: list[int] = []

    def flush(counted: bool) -> None:
        if group:
            pieces.append(Piece(_behind(before, group, tokenizer), counted, len(group)))
            before.extend(group)
            del before[: -2 * LONGEST_CHARACTER]
            group.clear()

    for at, (i, label) in enumerate(zip(encoded.ids, encoded.labels, strict=True)):
        counted = label != IGNORED
        if group and counted != (encoded.labels[at - 1] != IGNORED):
            flush(not counted)
        if i in names:
            flush(counted)
            before.clear()
            pieces.append(Piece(names[i], counted))
            continue
        group.append(i)
        text = _behind(before, group, tokenizer)
        if (text and not text.endswith(REPLACEMENT)) or len(group) == LONGEST_CHARACTER:
            flush(counted)
    if encoded.ids:
        flush(encoded.labels[-1] != IGNORED)
    return pieces


def _behind(before: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text that ids add behind others."""
    start = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids)
