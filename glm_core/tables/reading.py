"""Open a file as a table of text: find out what it is, then stream its rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from glm_core.errors import TableError
from glm_core.tables.delimited import DelimitedRows, RowLog
from glm_core.tables.documents import DocumentRows, LineRows
from glm_core.tables.options import ReadOptions, Source, TableInfo, client_name, plural
from glm_core.tables.sniffing import (
    CHUNK_BYTES,
    detect_dialect,
    detect_format,
    detect_text_format,
    find_encoding,
)

_DEFAULT = ReadOptions()


class _Rows(Protocol):
    columns: tuple[str, ...]
    warnings: list[str]

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]: ...


class Table:
    """An open table; iterate over it for its rows, as often as needed.

    Each row is a tuple of as many texts as there are columns. CSV, JSONL and Parquet stream from the file.
    """

    def __init__(self, info: TableInfo, source: _Rows) -> None:
        """Take what `open_table` found."""
        self.info = info
        self._source = source
        self._log = RowLog()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows in file order."""
        return self.rows()

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows in file order; TableError at the first row that cannot be read."""
        self._log = log = RowLog()
        return self._source.rows(log)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed when opening and, so far, in the latest pass over the rows."""
        return self.info.warnings + self._log.sentences()

    def preview(self, n: int = 20) -> list[tuple[str, ...]]:
        """Return the first rows, leaving the warnings of a full pass as they are."""
        return list(islice(self._source.rows(RowLog()), n))


def open_table(path: Path, options: ReadOptions = _DEFAULT, name: str | None = None) -> Table:
    """Open a table of any format; TableError says why a file is none and what to do.

    path     the file to read
    name     how messages call it: the client's file name, shown but never used as a path
    """
    source = Source(Path(path), client_name(name if name is not None else Path(path).name), options)
    format = detect_format(source)
    delimiter = sheet = encoding = ""
    sheets: tuple[str, ...] = ()
    warnings: list[str] = []
    rows: _Rows
    if format in ("xlsx", "xls"):
        from glm_core.tables.workbooks import WorkbookRows

        rows = book = WorkbookRows(source)
        sheet, sheets = book.sheet, book.sheets
    elif format == "parquet":
        from glm_core.tables.columnar import ParquetRows

        rows = ParquetRows(source)
    else:
        found = find_encoding(source)
        encoding = found.label
        if found.note:
            warnings.append(found.note)
        if not found.codec.startswith(("utf-16", "utf-32", "utf_16", "utf_32")):
            if nuls := _count_nuls(source.path):
                warnings.append(f"The file has {plural(nuls, 'NUL character')} (code 0), kept in the cells.")
        format = detect_text_format(source, encoding)
        if format == "jsonl":
            rows = _line_rows(source, encoding)
            format = "jsonl" if isinstance(rows, LineRows) else "json"
        elif format == "json":
            rows = DocumentRows(source, encoding)
        else:
            dialect = detect_dialect(source, encoding)
            delimiter = dialect.delimiter
            rows = DelimitedRows(source, encoding, dialect)
    if _is_without_rows(rows):
        warnings.append("There are no rows below the header.")
    info = TableInfo(
        name=source.name,
        format=format,
        encoding=encoding,
        delimiter=delimiter,
        sheet=sheet,
        sheets=sheets,
        columns=rows.columns,
        warnings=(*warnings, *rows.warnings),
        options=options,
    )
    return Table(info, rows)


def sheets(path: Path, name: str | None = None) -> tuple[str, ...]:
    """Return the sheet names of a workbook, hidden ones too; () for other files; TableError if unreadable."""
    source = Source(Path(path), client_name(name if name is not None else Path(path).name), _DEFAULT)
    if detect_format(source) not in ("xlsx", "xls"):
        return ()
    from glm_core.tables.workbooks import open_workbook

    return tuple(open_workbook(source)[0].sheet_names)


def _line_rows(source: Source, encoding: str) -> LineRows | DocumentRows:
    """Read JSON Lines; objects spread over several lines are read as values one after the other."""
    try:
        return LineRows(source, encoding)
    except TableError as error:
        try:
            return DocumentRows(source, encoding)
        except TableError:
            raise error from None


def _is_without_rows(rows: _Rows) -> bool:
    try:
        return next(rows.rows(RowLog()), None) is None
    except TableError:
        return False  # said when the rows are read


def _count_nuls(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(0) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))
