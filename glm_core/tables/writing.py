"""Write tables: streamed, atomic, and safe to open in a spreadsheet program."""

from __future__ import annotations

import csv
import json
import marshal
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from glm_core.errors import TableError
from glm_core.tables.options import plural

Cell = str | int | float | None
WriteFormat = Literal["csv", "xlsx", "jsonl", "parquet"]

EXCEL_ROWS = 1_048_575  # below the header
EXCEL_COLUMNS = 16_384
EXCEL_CELL = 32_767  # UTF-16 units
EXCEL_DIGITS = 10**15
BATCH_ROWS = 8192
WIDTH_ROWS = 100  # rows that decide the column widths
INT64 = 1 << 63
EXACT_FLOAT = 1 << 53

_FORMULA = re.compile(r"[ \u00a0\u3000]*[=+\-@\t\r\n＝＋－＠]")
_PLAIN_NUMBER = re.compile(r" *[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_XML_NONCHARACTER = re.compile("[\ufffe\uffff]")
_XML_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")
_XML_LITERAL_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4}_)")


@dataclass(frozen=True)
class WriteReport:
    """How many rows were written, and what had to be changed in them."""

    rows: int
    notes: tuple[str, ...]


class _Notes:
    """Counts of what was changed, by sentence."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def sentences(self) -> tuple[str, ...]:
        return tuple(what.format(cells=plural(count, "cell")) for what, count in self.counts.items())


GUARDED = "{cells} that Excel would take for a formula got a leading apostrophe."
REPLACED = "{cells} held half a character (a lone surrogate or noncharacter), shown as \ufffd."
CONTROLS = "{cells} held control characters, escaped the way Excel does it (_x0000_)."
CUT = "{cells} longer than the 32,767 characters Excel holds were cut; JSONL and Parquet hold the full text."
LONG_NUMBERS = "{cells} with numbers of more than 15 digits were written as text, as Excel would round them."
NOT_NUMBERS = "{cells} with NaN or infinity were written as null, which is all JSON has."


def write(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    format: WriteFormat,
    guard: bool = True,
) -> WriteReport:
    """Write a table so that the file is either complete or not there, and say what had to be changed.

    guard     CSV only: put an apostrophe before text that a spreadsheet would run as a formula
    Raises TableError when the table does not fit the format or the disk; a file already there stays then.
    """
    writers: dict[str, Callable[[Path, Sequence[str], Iterator[Sequence[Cell]], _Notes], int]] = {
        "csv": _write_csv if guard else _write_csv_unguarded,
        "xlsx": _write_xlsx,
        "jsonl": _write_jsonl,
        "parquet": _write_parquet,
    }
    path = Path(path)
    if format not in writers:
        raise TableError(f"Tables cannot be written as {format!r}.", f"Choose one of {', '.join(writers)}.")
    if not columns:
        raise TableError(f"{path.name} would have no columns.", "Choose at least one column.")
    if format in ("jsonl", "parquet") and len(set(columns)) < len(columns):
        raise TableError(f"{path.name} would have two columns of one name.", "Rename one of them.")
    notes = _Notes()
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        count = writers[format](partial, columns, _checked(columns, rows), notes)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise TableError(
            f"{path.name} could not be written: {error.strerror or error}.",
            "Free some disk space or choose another folder.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return WriteReport(count, notes.sentences())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _checked(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Iterator[Sequence[Cell]]:
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise TableError(
                f"Row {number:,} has {plural(len(row), 'cell')} for {plural(len(columns), 'column')}."
            )
        yield row


# ---- CSV -----------------------------------------------------------------------------------------------


def guarded(text: str) -> str:
    """Return the text with an apostrophe in front if a spreadsheet would run it; plain numbers stay."""
    if _FORMULA.match(text) and not _PLAIN_NUMBER.fullmatch(text):
        return "'" + text
    return text


def _whole(text: str, notes: _Notes) -> str:
    if not text.isascii() and _SURROGATE.search(text):
        notes.add(REPLACED)
        return _SURROGATE.sub("\ufffd", text)
    return text


def _text(value: Cell, notes: _Notes) -> str:
    if isinstance(value, str):
        return _whole(value, notes)
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    return "" if value is None else str(value)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], notes: _Notes) -> int:
    def cell(value: Cell) -> str:
        text = _text(value, notes)
        if not isinstance(value, str):
            return text
        safe = guarded(text)
        if safe is not text:
            notes.add(GUARDED)
        return safe

    return _csv_lines(path, columns, rows, cell)


def _write_csv_unguarded(
    path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], notes: _Notes
) -> int:
    return _csv_lines(path, columns, rows, lambda value: _text(value, notes))


def _csv_lines(
    path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], cell: Callable[[Cell], str]
) -> int:
    count = 0
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow([cell(name) for name in columns])
        for row in rows:
            writer.writerow([cell(value) for value in row])
            count += 1
    return count


# ---- JSONL ---------------------------------------------------------------------------------------------


def _write_jsonl(path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], notes: _Notes) -> int:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    count = 0
    # backslashreplace turns a lone surrogate into \udXXX, which is what JSON calls it
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        for row in rows:
            count += 1
            record = dict(zip(columns, row, strict=True))
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[key] = None
                    notes.add(NOT_NUMBERS)
            file.write(encode(record) + "\n")
    return count


# ---- XLSX ----------------------------------------------------------------------------------------------


def excel_escaped(text: str) -> str:
    """Return the text as Excel stores it: control characters and what looks like their escape as _xHHHH_.

    xlsxwriter 3.3's own version misses overlapping escapes (_x005F_x0041_) and passes <r>…</r> as markup.
    """
    if "_x" in text:
        text = _XML_LITERAL_ESCAPE.sub("_x005F_", text)
    text = _XML_CONTROL.sub(lambda match: f"_x{ord(match[0]):04X}_", text)
    return "_x003C_" + text[1:] if text.startswith("<r>") else text


def _excel_text(text: str, notes: _Notes) -> str:
    text = _whole(text, notes)
    if _XML_NONCHARACTER.search(text):
        notes.add(REPLACED)
        text = _XML_NONCHARACTER.sub("\ufffd", text)
    if len(text) * 2 > EXCEL_CELL:
        units = text.encode("utf-16-le")
        if len(units) > 2 * EXCEL_CELL:
            notes.add(CUT)
            text = units[: 2 * EXCEL_CELL].decode(
                "utf-16-le", errors="ignore"
            )  # drops half a pair at the cut
    if _XML_CONTROL.search(text):
        notes.add(CONTROLS)
    return text


def _write_xlsx(path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], notes: _Notes) -> int:
    import xlsxwriter  # type: ignore[import-untyped]

    if len(columns) > EXCEL_COLUMNS:
        raise TableError(
            f"{len(columns):,} columns are more than the {EXCEL_COLUMNS:,} of an Excel sheet.",
            "Write CSV or Parquet instead.",
        )
    folder = tempfile.mkdtemp(prefix=".xlsx-", dir=path.parent)
    book = xlsxwriter.Workbook(
        str(path),
        {
            "constant_memory": True,
            "tmpdir": folder,
            "strings_to_numbers": False,
            "strings_to_formulas": False,
            "strings_to_urls": False,
        },
    )
    count = 0
    try:
        sheet = book.add_worksheet("Sheet1")
        sheet._escape_control_characters = excel_escaped
        bold = book.add_format({"bold": True})
        widths = [0] * len(columns)

        def put(row: int, column: int, value: Cell, style: Any = None) -> None:
            if isinstance(value, bool):
                sheet.write_boolean(row, column, value)
                return
            if value is None or value == "":
                return
            if isinstance(value, int) and abs(value) >= EXCEL_DIGITS:
                notes.add(LONG_NUMBERS)
                value = str(value)
            if isinstance(value, float) and not math.isfinite(value):
                value = str(value)
            if isinstance(value, int | float):
                sheet.write_number(row, column, value)
            else:
                sheet.write_string(row, column, _excel_text(value, notes), style)
            if row <= WIDTH_ROWS:
                widths[column] = max(widths[column], _shown_width(str(value)))

        for column, name in enumerate(columns):
            put(0, column, name, bold)
        for count, cells in enumerate(rows, start=1):
            if count > EXCEL_ROWS:
                raise TableError(
                    f"The table has more than the {EXCEL_ROWS:,} rows an Excel sheet can hold.",
                    "Write CSV or Parquet instead.",
                )
            for column, value in enumerate(cells):
                put(count, column, value)
        sheet.freeze_panes(1, 0)
        for column, width in enumerate(widths):
            sheet.set_column(column, column, min(60, max(8, width + 2)))
        try:
            book.close()
        except xlsxwriter.exceptions.FileCreateError as error:
            raise OSError(str(error)) from error
    except BaseException:
        _abandon(book)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return count


def _abandon(book: Any) -> None:
    """Close what an unfinished workbook holds open, so that it does not write itself when collected."""
    book.fileclosed = 1
    for sheet in book.worksheets():
        with suppress(Exception):
            sheet.row_data_fh.close()


def _shown_width(text: str) -> int:
    """Return the width of the longest line in characters; Chinese ones count two."""
    return max(len(line) + sum(1 for c in line if c > "\u2e7f") for line in text[:200].split("\n"))


# ---- Parquet -------------------------------------------------------------------------------------------


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterator[Sequence[Cell]], notes: _Notes) -> int:
    """Spool the rows first: a column's type is known only when its last cell has been seen."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    kinds: list[set[str]] = [set() for _ in columns]
    count = 0
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        while batch := list(islice(rows, BATCH_ROWS)):
            count += len(batch)
            data = [list(column) for column in zip(*batch, strict=True)]
            for kind, column in zip(kinds, data, strict=True):
                for value in column:
                    kind.add(_kind(value))
            marshal.dump(data, spool)
        types = [_parquet_type(kind, pa) for kind in kinds]
        names = [_whole(name, notes) for name in columns]
        schema = pa.schema(list(zip(names, types, strict=True)))
        spool.seek(0)
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for _ in range(0, count, BATCH_ROWS):
                arrays = []
                for column, type_ in zip(marshal.load(spool), types, strict=True):
                    if type_ == pa.string():
                        column = [None if value is None else _text(value, notes) for value in column]
                    arrays.append(pa.array(column, type_))
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    return count


def _kind(value: Cell) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool | str):
        return "text"
    if isinstance(value, float):
        return "float"
    if abs(value) <= EXACT_FLOAT:
        return "int"
    return "long" if -INT64 <= value < INT64 else "text"


def _parquet_type(kinds: set[str], pa: Any) -> Any:
    if kinds <= {"empty"} or "text" in kinds or {"float", "long"} <= kinds:
        return pa.string()
    return pa.float64() if "float" in kinds else pa.int64()
