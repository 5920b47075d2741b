"""Language-model training on the analyst's own unlabelled texts, before the labelled step: which texts, as which rows.

Texts that dev or test examples ask are left out, or the dev figures would be those of rows the model has read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..tables.options import plural
from .encoding import Encoded
from .methods import IGNORED
from .split import normalised, text_hash

if TYPE_CHECKING:
    from ..tables import ReadOptions
    from ..tokenizers.base import Tokenizer
    from .examples import Example

FOLDER = "adapt"  # within the folder of a training
HELD_SHARE, MOST_HELD = 0.05, 500  # texts kept back to measure with
ENCODED_AT_ONCE = 4096


@dataclass(frozen=True)
class Adapt:
    """Which texts to read before the labelled step, and how long.

    file, column    a table and the column with the texts; the only column where none is named
    epochs          passes over the texts
    learning_rate   None takes that of the labelled step
    length          tokens of a row; longer texts become several
    exclude         labelled files to be judged on: the texts they ask are not read
    compare         also train without this step, to see what it changed
    """

    file: str
    column: str = ""
    epochs: float = 1.0
    learning_rate: float | None = None
    length: int = 128
    exclude: tuple[str, ...] = ()
    compare: bool = False

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types."""
        return asdict(self) | {"exclude": list(self.exclude)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Adapt:
        """What `to_json` gave; unknown keys are ignored."""
        values = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        return cls(**values | {"exclude": tuple(values.get("exclude", ()))})

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, each with what to do."""
        found = []
        if not 0 < self.epochs <= 100:
            found.append(
                (f"The texts are to be read {self.epochs:g} times.", "Choose more than 0 and at most 100.")
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            found.append((f"learning_rate is {self.learning_rate}.", "Choose more than 0 and less than 1."))
        if self.length < 16:
            found.append(
                (f"Rows of {self.length} tokens are too short to learn from.", "Choose at least 16.")
            )
        return found

    def steps(self, rows: int, batch: int) -> int:
        """Steps of `batch` rows that make the epochs."""
        return max(1, math.ceil(self.epochs * rows / batch))


@dataclass(frozen=True)
class Texts:
    """The texts of a file: those to learn, those held back to measure with, and how many were left out and why."""

    train: tuple[str, ...]
    held: tuple[str, ...]
    rows: int
    empty: int
    copies: int
    excluded: int  # asked in dev or test examples


def texts(
    path: str | Path,
    column: str,
    exclude: Sequence[Example],
    options: ReadOptions | None = None,
    seed: int = 42,
) -> Texts:
    """The different texts of a column, without those of `exclude`; every twentieth, at most 500, is held back.

    Texts are compared after `split.normalised`. GLMError for a file that cannot be read, a column that is not there
    or not named, and for fewer than 20 texts.
    """
    from ..tables import ReadOptions, open_table

    table = open_table(Path(path), options or ReadOptions())
    names = table.info.columns
    shown = ", ".join(map(repr, names))
    if not column and len(names) == 1:
        column = names[0]
    if column not in names:
        raise GLMError(
            f"{table.info.name} has no column {column!r} of texts; it has {shown}."
            if column
            else f"{table.info.name} has several columns: {shown}.",
            "Choose the column that holds the texts.",
        )
    at = names.index(column)
    left_out = {text_hash(normalised(one.prompt)) for one in exclude}
    seen: set[int] = set()
    kept: list[str] = []
    rows = empty = copies = excluded = 0
    for row in table.rows():
        rows += 1
        text = row[at].encode("utf-8", "replace").decode("utf-8").strip()
        key = text_hash(normalised(text))
        if not text:
            empty += 1
        elif key in left_out:
            excluded += 1
        elif key in seen:
            copies += 1
        else:
            seen.add(key)
            kept.append(text)
    if len(kept) < 20:
        raise GLMError(
            f"{table.info.name} has {plural(len(kept), 'text')} to learn from, of {plural(rows, 'row')}: "
            f"{empty:,} empty, {copies:,} copies, {excluded:,} that dev or test rows ask.",
            "Choose a file with at least 20 different texts that are not in the dev or test rows.",
        )
    random.Random(f"{seed}-adapt").shuffle(kept)
    held = min(MOST_HELD, max(1, int(len(kept) * HELD_SHARE)))
    return Texts(tuple(kept[held:]), tuple(kept[:held]), rows, empty, copies, excluded)


def encode_texts(given: Sequence[str], tokenizer: Tokenizer, length: int) -> list[Encoded]:
    """Rows of at most `length` tokens in which every token of a text counts, its end too.

    The GLM generations read a text after [gMASK] <sop>, as in their pre-training (Du et al. 2022, GLM).
    """
    head = tuple(getattr(tokenizer, "prefix_ids", ()))
    room = length - len(head)
    found = []
    for ids in _encoded(given, tokenizer):
        whole = (*ids, tokenizer.eos_id)
        for start in range(0, len(whole), room):
            part = whole[start : start + room]
            # Without a token before it, the only token of a row would have nothing to be told from.
            if len(head) + len(part) > 1:
                found.append(Encoded(head + part, (IGNORED,) * len(head) + part))
    return found


def _encoded(given: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for start in range(0, len(given), ENCODED_AT_ONCE):
        yield from tokenizer.encode_many(given[start : start + ENCODED_AT_ONCE])
