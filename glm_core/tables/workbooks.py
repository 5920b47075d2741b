"""Rows of Excel workbooks (.xlsx, .xls) through calamine, checked for size before it opens them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from glm_core.errors import TableError
from glm_core.tables.delimited import RowLog
from glm_core.tables.options import Source, column_names, excerpt, plural, printable
from glm_core.tables.sniffing import SAVE_AS_XLSX

if TYPE_CHECKING:
    from python_calamine import CalamineWorkbook

UNPACKED_LIMIT = 1 << 30  # bytes
UNPACKED_RATIO = 200  # above it more than 200 MB is refused
UNPACKED_SUSPECT = 200 << 20
GRID_LIMIT = 50_000_000  # calamine holds the whole rectangle, 32 bytes a cell, and aborts when it cannot
EXACT_DIGITS = 10**15  # Excel keeps 15 digits

_ROW_NUMBER = re.compile(rb'<(?:\w+:)?row\b[^>]*?\sr="(\d+)"')
_FAR_CELL = re.compile(rb'\sr="([A-Z]{2,3})\d+"')
_ERROR_CELL = re.compile(rb'\st="e"')


class WorkbookRows:
    """One sheet of a workbook, held in memory."""

    encoding = ""

    def __init__(self, source: Source) -> None:
        """Read the sheet chosen, or the first that is not empty; TableError when there is none such."""
        self.source = source
        book, errors = open_workbook(source)
        self.sheets = tuple(book.sheet_names)
        hidden = [m.name for m in book.sheets_metadata if not str(m.visible).endswith(".Visible")]
        self.sheet, grid = self._grid(book, hidden)
        self.warnings: list[str] = []
        width = max(len(row) for row in grid)
        start = next(i for i, row in enumerate(grid) if row)
        header = grid[start] if source.options.header else []
        self.columns, names = column_names([cell_text(cell) for cell in header], width)
        if source.options.header:
            self.warnings += names
        self._grid_rows = grid[start + 1 if source.options.header else start :]
        if self.sheet in hidden:
            self.warnings.append(f"The sheet {excerpt(self.sheet)} is hidden in Excel.")
        if errors:
            self.warnings.append(
                f"{plural(errors, 'cell')} of the workbook with an Excel error such as #DIV/0! or #N/A"
                f" {'is' if errors == 1 else 'are'} read as empty."
            )
        if blank := sum(1 for row in self._grid_rows if not row):
            self.warnings.append(f"{plural(blank, 'blank row')} kept, so that rows line up with the sheet.")
        long = sum(
            1
            for row in self._grid_rows
            for cell in row
            if isinstance(cell, int | float) and abs(cell) >= EXACT_DIGITS
        )
        if long:
            self.warnings.append(
                f"{plural(long, 'number')} of more than 15 digits: Excel has rounded them; store ids as text."
            )

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]:
        """Yield the rows below the header down to the last one that is not blank."""
        width = len(self.columns)
        for row in self._grid_rows:
            yield (*map(cell_text, row), *[""] * (width - len(row)))

    def _grid(self, book: CalamineWorkbook, hidden: list[str]) -> tuple[str, list[list[Any]]]:
        chosen = self.source.options.sheet
        if chosen is not None and chosen not in self.sheets:
            raise TableError(
                f"{self.source.name} has no sheet {excerpt(chosen)!r}; it has"
                f" {', '.join(map(excerpt, self.sheets))}.",
                "Choose one of these sheets.",
            )
        visible_first = sorted(self.sheets, key=lambda name: name in hidden)
        for name in visible_first if chosen is None else [chosen]:
            try:
                sheet = book.get_sheet_by_name(name)
                grid = [_trimmed(row) for row in sheet.to_python(skip_empty_area=False)]
            except BaseException as error:
                _let_through(error)
                if chosen is None and "Worksheet" in type(error).__name__:
                    continue  # a chart sheet
                raise _damaged(self.source, error) from error
            while grid and not grid[-1]:
                grid.pop()
            if grid:
                return name, grid
        where = f"the sheet {excerpt(chosen)} of {self.source.name}" if chosen else self.source.name
        raise TableError(f"{where} is empty.", "Choose a sheet with a header row and rows.")


def open_workbook(source: Source) -> tuple[CalamineWorkbook, int]:
    """Return the open workbook and its number of error cells; TableError if encrypted, damaged or a bomb."""
    from python_calamine import CalamineWorkbook, PasswordError

    errors = _check_unpacked(source) if zipfile.is_zipfile(source.path) else 0
    try:
        return CalamineWorkbook.from_path(str(source.path)), errors
    except PasswordError as error:
        raise TableError(
            f"{source.name} is protected with a password.",
            "Open it in Excel, remove the password (File > Info > Protect Workbook) and save it again.",
        ) from error
    except BaseException as error:
        _let_through(error)
        raise _damaged(source, error) from error


def _let_through(error: BaseException) -> None:
    """Raise what is neither an error nor a panic of calamine, which damaged files cause."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _damaged(source: Source, error: BaseException) -> TableError:
    return TableError(
        f"{source.name} cannot be read as an Excel workbook ({excerpt(str(error), 80)}).", SAVE_AS_XLSX
    )


def _check_unpacked(source: Source) -> int:
    """Unpack once, counting, since sizes in an archive can lie; return the number of error cells."""
    packed = max(1, source.path.stat().st_size)
    total = errors = 0
    try:
        with zipfile.ZipFile(source.path) as archive:
            entries = archive.infolist()
            declared = sum(entry.file_size for entry in entries)
            _check_size(source, declared, packed)
            for entry in entries:
                entry.file_size = UNPACKED_LIMIT + 1  # read on to the real end
                is_sheet = entry.filename.startswith("xl/worksheets/")
                rows = columns = 1
                tail = b""
                with archive.open(entry) as file:
                    while chunk := file.read(1 << 20):
                        total += len(chunk)
                        _check_size(source, total, packed)
                        if not is_sheet:
                            continue
                        text = tail + chunk
                        errors += len(_ERROR_CELL.findall(text))
                        rows = max([rows, *map(int, _ROW_NUMBER.findall(text))])
                        columns = max([columns, *map(_column_number, set(_FAR_CELL.findall(text)))])
                        cut = max(text.rfind(b">"), len(text) - 200) + 1
                        tail = text[cut:]
                if rows * columns > GRID_LIMIT:
                    raise TableError(
                        f"{source.name} has a sheet of {rows:,} rows by {columns:,} columns, mostly empty.",
                        "Delete the stray cells far right or far down (Ctrl+End finds them), or save as CSV.",
                    )
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, RuntimeError, ValueError, EOFError) as error:
        raise _damaged(source, error) from error
    except Exception as error:
        if isinstance(error, TableError):
            raise
        raise _damaged(source, error) from error
    return errors


def _check_size(source: Source, unpacked: int, packed: int) -> None:
    if unpacked > UNPACKED_LIMIT or (unpacked > UNPACKED_SUSPECT and unpacked > UNPACKED_RATIO * packed):
        raise TableError(
            f"{source.name} unpacks to more than {unpacked / 1e6:,.0f} MB from {packed / 1e6:,.1f} MB,"
            " which is beyond what is safe to open.",
            "Save the sheet you need as CSV.",
        )


def _column_number(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + letter - 64
    return number


def _trimmed(row: list[Any]) -> list[Any]:
    """Return the row up to its last cell that is not empty."""
    end = len(row)
    while end and (row[end - 1] is None or row[end - 1] == ""):
        end -= 1
    return row[:end]


def cell_text(value: Any) -> str:
    """Return an Excel value as text: 7 not 7.0, dates in ISO form, TRUE and FALSE."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e21:
            return (
                str(int(value))
                if abs(value) < EXACT_DIGITS
                else format(Decimal(repr(value)), "f").split(".")[0]
            )
        return repr(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        seconds = int(value.total_seconds())
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return printable(str(value)) if not isinstance(value, int) else str(value)
