"""How a table is to be read, what was found in it, and how names and excerpts are shown."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from glm_core.errors import TableError

BadRows = Literal["stop", "skip", "join"]
Format = Literal["csv", "json", "jsonl", "xlsx", "xls", "parquet"]

LISTED_LINES = 10  # line numbers named in one message
DISPLAY_NAME_LENGTH = 120


@dataclass(frozen=True)
class ReadOptions:
    """What the analyst chose for reading; None means "find out".

    encoding       a Python codec name; "utf-8:replace" shows damaged characters as U+FFFD
    delimiter      one character, or "" for one column
    on_bad_rows    rows longer than the header or with faulty quotes: stop, skip them, or join the surplus
                   cells into the last column
    records_key    the key of a JSON object under which the records are
    """

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | None = None
    header: bool = True
    on_bad_rows: BadRows = "stop"
    records_key: str | None = None

    def __post_init__(self) -> None:
        """Raise TableError for a value that no reader could follow."""
        if self.on_bad_rows not in ("stop", "skip", "join"):
            raise TableError(f"on_bad_rows is {self.on_bad_rows!r}.", "Choose stop, skip or join.")
        if self.delimiter is not None and (len(self.delimiter) > 1 or self.delimiter in '"\r\n\0 '):
            if self.delimiter != "":
                raise TableError(
                    f"The delimiter is {self.delimiter!r}.",
                    "Choose a single character such as a comma, or nothing for one column.",
                )
        if self.encoding is not None:
            codec, _, errors = self.encoding.partition(":")
            try:
                is_text = codecs.lookup(codec)._is_text_encoding
            except (LookupError, ValueError):
                is_text = False
            if not is_text or errors not in ("", "replace"):
                raise TableError(
                    f"There is no text encoding {self.encoding!r}.",
                    "Choose one such as utf-8, gb18030, big5, utf-16 or cp1252.",
                )

    def to_json(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReadOptions:
        """Return the options `to_json` gave; unknown keys are ignored; TableError for bad values."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


@dataclass(frozen=True)
class TableInfo:
    """What was found when the table was opened; encoding, delimiter and sheet are "" where there is none."""

    name: str
    format: Format
    encoding: str
    delimiter: str
    sheet: str
    sheets: tuple[str, ...]
    columns: tuple[str, ...]
    warnings: tuple[str, ...]
    options: ReadOptions


@dataclass(frozen=True)
class Source:
    """A file to read: where it is, how it is called on screen, and what was chosen for it."""

    path: Path
    name: str
    options: ReadOptions


def printable(text: str) -> str:
    """Return the text without control, bidirectional and other invisible characters, on one line."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))


def client_name(name: str) -> str:
    """Return the last component of a client's file name, safe to show; never to be used as a path."""
    last = printable(name.replace("\\", "/").rstrip("/ ").rpartition("/")[2]).strip()
    if len(last) > DISPLAY_NAME_LENGTH:
        stem, dot, suffix = last.rpartition(".")
        tail = dot + suffix if stem and len(suffix) <= 10 else ""
        last = last[: DISPLAY_NAME_LENGTH - 1 - len(tail)] + "…" + tail
    return "unnamed" if last.strip(". ") == "" else last


def excerpt(text: str, length: int = 60) -> str:
    """Return the start of a cell for a message."""
    shown = printable(text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def listed(numbers: Sequence[int], total: int | None = None) -> str:
    """Return the first line numbers as text: "3, 7, 9 and 12 more"."""
    total = len(numbers) if total is None else total
    shown = ", ".join(str(number) for number in numbers[:LISTED_LINES])
    more = total - min(len(numbers), LISTED_LINES)
    return f"{shown} and {more} more" if more else shown


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def column_names(header: Sequence[str], width: int) -> tuple[tuple[str, ...], list[str]]:
    """Return one distinct, non-empty name per column, and what had to be changed for that."""
    names: list[str] = []
    seen = set(header)
    used: set[str] = set()
    empty: list[str] = []
    repeated: list[str] = []
    for index in range(width):
        given = header[index] if index < len(header) else ""
        name = given
        if not given.strip():
            given = name = f"column_{index + 1}"
            empty.append(str(index + 1))
        count = 2
        while name in used or (name != given and name in seen):
            name = f"{given} ({count})"
            count += 1
        if name != given and name.startswith(given):
            repeated.append(name)
        used.add(name)
        names.append(name)
    warnings = []
    if empty:
        unnamed = plural(len(empty), "column")
        warnings.append(f"{unnamed} without a name ({_some(empty)}) got one such as column_{empty[0]}.")
    if repeated:
        warnings.append(f"Repeated column names were numbered: {_some(repeated)}.")
    return tuple(names), warnings


def _some(words: Sequence[str]) -> str:
    shown = ", ".join(excerpt(word, 30) for word in words[:LISTED_LINES])
    return f"{shown}, …" if len(words) > LISTED_LINES else shown
