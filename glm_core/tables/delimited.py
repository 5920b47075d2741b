"""Rows of a delimited text file, streamed; every bad row is counted with its line number."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from glm_core.errors import TableError
from glm_core.tables.options import LISTED_LINES, Source, column_names, excerpt, listed, plural
from glm_core.tables.sniffing import FIELD_LIMIT, NO_DELIMITER, Dialect, open_text

if TYPE_CHECKING:
    from _csv import Reader

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
FAULTY_QUOTES = -1  # instead of a cell count, in a list of bad rows


@dataclass
class RowLog:
    """What was noticed while rows went by: how many, and on which lines the first of them stand."""

    lines: dict[str, list[int]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, line: int) -> None:
        """Count one row; `what` has {rows} and {lines} for the number and the line numbers."""
        self.totals[what] = self.totals.get(what, 0) + 1
        places = self.lines.setdefault(what, [])
        if len(places) < LISTED_LINES:
            places.append(line)

    def sentences(self) -> tuple[str, ...]:
        """Return one sentence per kind of row."""
        return tuple(
            what.format(rows=plural(total, "row"), lines=listed(self.lines[what], total))
            for what, total in self.totals.items()
        )


SHORT = "{rows} with fewer cells than the header got empty cells at the end (line {lines})."
SKIPPED = "Left out: {rows} with too many cells or faulty quotes (line {lines})."
JOINED = "Joined into the last column: the surplus cells of {rows} (line {lines})."
REPAIRED = "{rows} with faulty quotes read as well as possible (line {lines})."


class DelimitedRows:
    """A CSV, TSV or similar file: its columns now, its rows on request."""

    def __init__(self, source: Source, encoding: str, dialect: Dialect) -> None:
        """Read the header; TableError when there is none."""
        self.source = source
        self.encoding = encoding
        self.dialect = dialect
        self._header_records = 0  # records up to and including the header
        first: list[str] | None = None
        with open_text(source.path, encoding) as stream:
            lines = islice(stream, dialect.first_line - 1, None)
            reader = dialect.reader(lines)
            records = 0
            while first is None:
                line = reader.line_num
                try:
                    row = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    raise self._faulty(error, line, reader.line_num) from error
                records += 1
                row = self._whole(row)
                if records == 1 and row:
                    row[0] = row[0].removeprefix("\ufeff")
                if any(cell.strip() for cell in row):
                    first = row
        if first is None:
            raise TableError(f"{source.name} is empty.", "Choose a file with a header row and rows.")
        self._header_records = records if source.options.header else records - 1
        self.columns, self.warnings = column_names(first if source.options.header else [], len(first))
        if not source.options.header:
            self.warnings = []
        if dialect.note:
            self.warnings.append(dialect.note)

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]:
        """Yield the rows in file order; TableError on bad rows unless they are to be skipped or joined."""
        width = len(self.columns)
        offset = self.dialect.first_line - 1
        policy = self.source.options.on_bad_rows
        with open_text(self.source.path, self.encoding) as stream:
            kept: list[str] = []
            lines: Iterator[str] = islice(stream, offset, None)
            if policy == "join":  # keeps the lines of the record at hand, to read them again leniently
                lines = _keeping(lines, kept)
            reader = self.dialect.reader(lines)
            for _ in range(self._header_records):
                next(reader)
            last = reader.line_num
            while True:
                kept.clear()
                try:
                    for row in reader:
                        if len(row) == width:
                            yield tuple(row)
                        else:
                            fixed = self._fit(row, width, reader.line_num + offset, log)
                            if fixed is not None:
                                yield fixed
                            elif policy == "stop" and self._bad(row, width):
                                raise self._bad_rows(reader, row, offset)
                        last = reader.line_num
                        kept.clear()
                    return
                except csv.Error as error:
                    if "',' expected" not in str(error) and "expected after" not in str(error):
                        raise self._faulty(error, last, reader.line_num) from error
                    if policy == "stop":
                        raise self._bad_rows(reader, None, offset, last) from error
                    if policy == "skip":
                        log.add(SKIPPED, last + 1 + offset)
                    else:
                        log.add(REPAIRED, last + 1 + offset)
                        for row in self.dialect.reader(iter(list(kept)), strict=False):
                            fixed = self._fit(row, width, reader.line_num + offset, log)
                            if fixed is not None:
                                yield fixed
                    last = reader.line_num

    def _fit(self, row: list[str], width: int, line: int, log: RowLog) -> tuple[str, ...] | None:
        """Return a row of the right width, None for one to leave out."""
        row = self._whole(row)
        if not row or (width > 1 and len(row) == 1 and not row[0].strip()):
            return None  # a blank line
        if len(row) == width:
            return tuple(row)
        start = line - sum(len(_LINE_BREAK.findall(cell)) for cell in row)
        if len(row) < width:
            log.add(SHORT, start)
            return (*row, *[""] * (width - len(row)))
        if not any(row[width:]):
            return tuple(row[:width])
        if self.source.options.on_bad_rows == "join":
            log.add(JOINED, start)
            return (*row[: width - 1], self.dialect.delimiter.join(row[width - 1 :]))
        if self.source.options.on_bad_rows == "skip":
            log.add(SKIPPED, start)
        return None

    def _bad(self, row: list[str], width: int) -> bool:
        return any(self._whole(row)[width:])

    def _whole(self, row: list[str]) -> list[str]:
        """Return the row as it is; in a one-column file, put a cell together that holds our own delimiter."""
        if not self.dialect.delimiter and len(row) > 1:
            return [NO_DELIMITER.join(row)]
        return row

    def _bad_rows(
        self, reader: Reader, row: list[str] | None, offset: int, last: int | None = None
    ) -> TableError:
        """Return the error that names this bad row and the next ones."""
        width = len(self.columns)
        found: list[tuple[int, int]] = []
        total = 0
        if row is None:
            found.append(((last or 0) + 1 + offset, FAULTY_QUOTES))
        else:
            breaks = sum(len(_LINE_BREAK.findall(cell)) for cell in row)
            found.append((reader.line_num - breaks + offset, len(row)))
        total = 1
        while True:
            before = reader.line_num
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if "expected after" not in str(error):
                    break
                total += 1
                found.append((before + 1 + offset, FAULTY_QUOTES))
                continue
            if self._bad(row, width):
                total += 1
                found.append((before + 1 + offset, len(row)))
            del found[LISTED_LINES:]
        places = [
            f"line {line:,} has text after a closing quote"
            if cells == FAULTY_QUOTES
            else f"line {line:,} has {plural(cells, 'cell')}"
            for line, cells in found
        ]
        more = f", and {total - len(found):,} more" if total > len(found) else ""
        return TableError(
            f"{self.source.name} has {plural(total, 'row')} that {'does' if total == 1 else 'do'} not fit the"
            f" {plural(width, 'column')} of the header: {', '.join(places)}{more}.",
            "Correct them in the spreadsheet, choose another delimiter, or choose to skip such rows or to"
            " join the surplus cells.",
        )

    def _faulty(self, error: csv.Error, last: int, now: int) -> TableError:
        """Return the error for a quote that never closes or a cell beyond the limit."""
        offset = self.dialect.first_line - 1
        opened, text = self._open_quote(last + offset, now + offset)
        if "field larger" in str(error):
            message = (
                f"{self.source.name} has a cell of more than {FIELD_LIMIT:,} characters on line {opened:,};"
                " most likely a quotation mark is never closed."
            )
        elif "unexpected end" in str(error):
            message = (
                f"{self.source.name} ends inside a quoted cell: the quotation mark opened on line {opened:,}"
                f" is never closed (…{text})."
            )
        else:
            message = f"{self.source.name} cannot be read at line {last + 1 + offset:,}: {error}."
        return TableError(
            message, 'Close the quotation mark on that line, or write it twice ("") in the text.'
        )

    def _open_quote(self, skip: int, until: int) -> tuple[int, str]:
        """Return the line where the last quote that is still open at line `until` opened, and its text."""
        delimiter = self.dialect.delimiter
        number, text = skip + 1, ""
        state = "start"
        with open_text(self.source.path, self.encoding) as stream:
            for at, line in enumerate(islice(stream, skip, until), start=skip + 1):
                for index, character in enumerate(line):
                    if state == "quoted":
                        if character == '"':
                            state = "closed"
                    elif character == '"' and state == "closed":
                        state = "quoted"
                    elif character == '"' and state == "start":
                        state = "quoted"
                        number, text = at, excerpt(line[index : index + 200], 40)
                    elif character == delimiter:
                        state = "start"
                    elif not (state == "start" and character == " " and self.dialect.skip_spaces):
                        state = "plain"
                if state != "quoted":
                    state = "start"
        return number, text


def _keeping(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line
