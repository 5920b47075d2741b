"""Read and write csv, tsv, xlsx, xls, json, jsonl and parquet; names the bad row and column.

Every cell is text exactly as it stands in the file; importing this loads the standard library only.
"""

from glm_core.errors import TableError
from glm_core.tables.options import ReadOptions, TableInfo, client_name
from glm_core.tables.reading import Table, open_table, sheets
from glm_core.tables.sniffing import ENCODINGS, detect_encoding
from glm_core.tables.uploads import save_upload
from glm_core.tables.writing import WriteReport, write

__all__ = [
    "ENCODINGS",
    "ReadOptions",
    "Table",
    "TableError",
    "TableInfo",
    "WriteReport",
    "client_name",
    "detect_encoding",
    "open_table",
    "save_upload",
    "sheets",
    "write",
]
