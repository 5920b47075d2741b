"""Rows of JSON and JSON Lines: numbers as they are written, nested objects as a.b, lists as JSON text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from glm_core.errors import TableError
from glm_core.tables.delimited import RowLog
from glm_core.tables.options import LISTED_LINES, Source, column_names, excerpt, listed, plural, printable
from glm_core.tables.sniffing import open_text

JSON_LIMIT = 1 << 30  # bytes; a JSON document is held in memory whole
RECORD_KEYS = ("data", "records", "rows", "items")
SCALAR_COLUMN = "value"
NOT_JSON = "Left out: {rows} not valid as JSON (line {lines})."

_WHITESPACE = " \t\r\n\ufeff"


class _Number(str):
    """A number as it stands in the file: 1.50 stays 1.50 and 19 digits stay 19 digits."""


class _Wrong(Exception):
    """What is wrong inside a value that is valid JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    record = {}
    for key, value in pairs:
        _put(record, key, value)
    return record


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_Number, parse_int=_Number, parse_constant=_Number
)


def _put(record: dict[str, Any], key: str, value: Any) -> None:
    """Set a key that is there already under another name, so that nothing is lost."""
    name, count = key, 2
    while name in record:
        name = f"{key} ({count})"
        count += 1
    record[name] = value


def _json_text(value: Any) -> str:
    """Return compact JSON text; numbers as they were written."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_json_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json_text(k)}:{_json_text(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    return "" if value is None else _json_text(value)


def _flatten(record: dict[str, Any]) -> dict[str, str]:
    """Return the record with nested objects as dotted keys and every value as text."""
    flat: dict[str, str] = {}
    nested = False
    for key, value in record.items():
        if isinstance(value, dict) and value:
            nested = True
            for inner, cell in _flatten(value).items():
                _put(flat, f"{key}.{inner}", cell)
        elif nested:
            _put(flat, key, _cell(value))
        else:
            flat[key] = _cell(value)
    return flat


def _record(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return _flatten(value)
    if isinstance(value, list):
        return {f"column_{index}": _cell(item) for index, item in enumerate(value, start=1)}
    return {SCALAR_COLUMN: _cell(value)}


def _syntax_error(source: Source, error: json.JSONDecodeError, first_line: int = 1) -> TableError:
    """Return the error with line, column and the text around the place."""
    before = printable(error.doc[max(0, error.pos - 30) : error.pos])
    after = printable(error.doc[error.pos : error.pos + 30]) or "the end"
    line = first_line - 1 + error.lineno
    return TableError(
        f"{source.name} is not valid JSON at line {line:,}, column {error.colno:,}: {error.msg}"
        f" (after …{before} comes {after}).",
        "Correct that place; a comma or quotation mark before it is the usual cause.",
    )


def _too_deep(source: Source) -> TableError:
    return TableError(f"{source.name} is nested too deeply for a table.", "Flatten it first.")


class LineRows:
    """A JSON Lines file, streamed twice: once for its keys, once for its rows."""

    def __init__(self, source: Source, encoding: str) -> None:
        """Read all keys; TableError with line and column for a line that is not JSON."""
        self.source = source
        self.encoding = encoding
        self.warnings: list[str] = []
        keys: dict[str, None] = {}
        self._first_error: TableError | None = None
        bad: list[int] = []
        bad_total = 0
        for number, value in self._values():
            if isinstance(value, TableError):
                bad_total += 1
                if len(bad) < LISTED_LINES:
                    bad.append(number)
                self._first_error = self._first_error or value
            else:
                keys.update(dict.fromkeys(value))
        if self._first_error and source.options.on_bad_rows != "skip":
            if bad_total > 1:
                raise TableError(
                    f"{self._first_error.message} {plural(bad_total, 'line')} of it are not valid JSON"
                    f" (line {listed(bad, bad_total)}).",
                    "Correct them, or choose to skip such rows.",
                )
            raise TableError(
                self._first_error.message, f"{self._first_error.todo} Or choose to skip such rows."
            )
        if not keys:
            raise TableError(f"{source.name} is empty: it has no records.", "Choose a file with records.")
        self._keys = tuple(keys)
        self.columns, self.warnings = column_names(self._keys, len(self._keys))

    def _values(self) -> Iterator[tuple[int, dict[str, str] | TableError]]:
        with open_text(self.source.path, self.encoding) as stream:
            for number, line in enumerate(stream, start=1):
                text = line.strip(_WHITESPACE)
                if not text:
                    continue
                try:
                    yield number, _record(_DECODER.decode(text))
                except json.JSONDecodeError as error:
                    yield number, _syntax_error(self.source, error, number)
                except RecursionError:
                    yield number, _too_deep(self.source)

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]:
        """Yield one row per line; lines that are not JSON are counted when they are to be skipped."""
        keys = self._keys
        for number, record in self._values():
            if isinstance(record, TableError):
                if self.source.options.on_bad_rows != "skip":
                    raise record
                log.add(NOT_JSON, number)
            else:
                yield tuple([record.get(key, "") for key in keys])


class DocumentRows:
    """A JSON document, held in memory: records, scalars, columns, or several values after each other."""

    def __init__(self, source: Source, encoding: str) -> None:
        """Read everything; TableError for bad JSON, for no records and for more than one set of records."""
        self.source = source
        self.warnings: list[str] = []
        size = source.path.stat().st_size
        if size > JSON_LIMIT:
            raise TableError(
                f"{source.name} is one JSON document of {size / 1e9:.1f} GB; more than 1 GB does not fit.",
                "Save it as JSONL (one object per line), which is read line by line.",
            )
        with open_text(source.path, encoding) as stream:
            text = stream.read()
        try:
            values = _decode_all(text)
            if len(values) == 1:
                records, names = self._records(values[0])
            else:
                records, names = [_record(value) for value in values], None
        except json.JSONDecodeError as error:
            raise _syntax_error(source, error) from error
        except RecursionError as error:
            raise _too_deep(source) from error
        except _Wrong as error:
            raise TableError(
                f"{source.name} {error}.", "Give the key of the records, or reshape it."
            ) from error
        if not records:
            raise TableError(f"{source.name} is empty: it has no records.", "Choose a file with records.")
        keys = dict.fromkeys(key for record in records for key in record)
        if not keys:
            raise TableError(f"{source.name} has records, but none has a field.", "Choose another file.")
        self._keys = tuple(keys)
        self._rows = records
        self.columns, self.warnings = column_names(names or self._keys, len(self._keys))

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]:
        """Yield one row per record."""
        for record in self._rows:
            yield tuple([record.get(key, "") for key in self._keys])

    def _records(self, document: Any) -> tuple[list[dict[str, str]], tuple[str, ...] | None]:
        """Return the records of one document, and column names where they do not come from the keys."""
        key = self.source.options.records_key
        if key is not None:
            if not isinstance(document, dict) or key not in document:
                have = ", ".join(map(excerpt, document)) if isinstance(document, dict) else "a list"
                raise _Wrong(f"has no key {key!r}; it has {have}")
            found = document[key]
            if not isinstance(found, list):
                raise _Wrong(f"has no list of records under {key!r}")
            return self._list(found)
        if isinstance(document, list):
            return self._list(document)
        if not isinstance(document, dict):
            return [_record(document)], None
        names, data = document.get("columns"), document.get("data")
        if isinstance(names, list) and isinstance(data, list) and data and isinstance(data[0], list):
            rows, _ = self._list([[str(name) for name in names], *data])  # pandas orient="split"
            return rows, tuple(str(name) for name in names)
        lists = [
            k
            for k, v in document.items()
            if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)
        ]
        preferred = [k for k in RECORD_KEYS if k in lists] or lists
        if len(lists) == 1 or (preferred and preferred[0] in RECORD_KEYS):
            left = [k for k in document if k != preferred[0]]
            if left:
                self.warnings.append(f"Only the records under {preferred[0]!r} were read.")
            return self._list(document[preferred[0]])
        if len(lists) > 1:
            raise _Wrong(f"has records under several keys: {', '.join(map(excerpt, lists))}")
        return _columns(document), None

    def _list(self, values: list[Any]) -> tuple[list[dict[str, str]], tuple[str, ...] | None]:
        if not values or not all(isinstance(value, list) for value in values):
            return [_record(value) for value in values], None
        rows = [_record(value) for value in values]
        if self.source.options.header and all(type(cell) is str for cell in values[0]):
            return rows[1:], tuple(rows[0].values())
        return rows, None


def _columns(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return {"a": [..], "b": [..]}, or pandas' {"a": {"0": ..}}, as records; else one record."""
    columns = list(document.values())
    if columns and all(isinstance(column, list) for column in columns):
        lengths = {key: len(column) for key, column in document.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{excerpt(key)} has {count:,}" for key, count in lengths.items())
            raise _Wrong(f"has columns of different lengths ({counts})")
        return [
            {key: _cell(value) for key, value in zip(document, row, strict=True)}
            for row in zip(*columns, strict=True)
        ]
    if columns and all(isinstance(column, dict) and column for column in columns):
        index = list(columns[0])
        if all(key.isdecimal() for key in index) and all(list(column) == index for column in columns):
            return [{key: _cell(column[row]) for key, column in document.items()} for row in index]
    return [_record(document)] if document else []


def _decode_all(text: str) -> list[Any]:
    """Return the values that stand one after the other in a text."""
    values: list[Any] = []
    at = 0
    while True:
        while at < len(text) and text[at] in _WHITESPACE:
            at += 1
        if at == len(text):
            return values
        value, at = _DECODER.raw_decode(text, at)
        values.append(value)
