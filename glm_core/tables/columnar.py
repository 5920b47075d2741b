"""Rows of Parquet files, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from glm_core.errors import TableError
from glm_core.tables.delimited import RowLog
from glm_core.tables.options import Source, column_names, excerpt

BATCH_ROWS = 8192


class ParquetRows:
    """A Parquet file: its columns now, its rows on request."""

    encoding = ""

    def __init__(self, source: Source) -> None:
        """Read the schema; TableError when the file is damaged or has no columns."""
        self.source = source
        with self._open() as file:
            names = file.schema_arrow.names
        if not names:
            raise TableError(f"{source.name} is empty: it has no columns.", "Choose another file.")
        self.columns, self.warnings = column_names(names, len(names))

    def rows(self, log: RowLog) -> Iterator[tuple[str, ...]]:
        """Yield the rows with null as an empty cell."""
        with self._open() as file:
            try:
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    columns = [[_cell(value) for value in column.to_pylist()] for column in batch.columns]
                    yield from zip(*columns, strict=True)
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are among these
                raise self._damaged(error) from error

    def _open(self) -> Any:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        try:
            return parquet.ParquetFile(self.source.path)
        except (OSError, ValueError, NotImplementedError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> TableError:
        return TableError(
            f"{self.source.name} cannot be read as Parquet ({excerpt(str(error), 80)}).",
            "Write it again, or give it as CSV.",
        )


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    return str(value)
