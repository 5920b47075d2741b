"""Store what a browser sends, under a name of our own."""

from __future__ import annotations

import io
import secrets
from pathlib import Path
from typing import BinaryIO

from glm_core.errors import TableError
from glm_core.tables.options import client_name

SAFE_SUFFIXES = frozenset(
    {".csv", ".tsv", ".psv", ".txt", ".json", ".jsonl", ".ndjson", ".xlsx", ".xls", ".parquet"}
)
UPLOAD_CHUNK = 1 << 20


def save_upload(data: bytes | BinaryIO, name: str, folder: Path, max_bytes: int) -> Path:
    """Copy an upload into the folder under a random name and return its path; TableError when too large."""
    shown = client_name(name)
    suffix = Path(shown).suffix.lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (secrets.token_hex(16) + (suffix if suffix in SAFE_SUFFIXES else ".bin"))
    stream: BinaryIO = io.BytesIO(data) if isinstance(data, bytes | bytearray | memoryview) else data
    size = 0
    try:
        with path.open("xb") as out:
            while chunk := stream.read(UPLOAD_CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise TableError(
                        f"{shown} is larger than the upload limit of {max_bytes / 1e6:,.0f} MB.",
                        "Open it by its path on this computer, or split it.",
                    )
                out.write(chunk)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise TableError(
            f"{shown} could not be stored: {error.strerror or error}.", "Free some disk space."
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path
