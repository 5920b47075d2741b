"""What commands print: one line at a time, fit for the terminal, the same everywhere."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import Any

PROGRAM = "python -m glm_core"
FAILED, INTERRUPTED, SOME_ROWS_FAILED = 1, 130, 3  # exit status; 0 is done, 2 wrong usage


def say(text: str) -> None:
    """Print one line about the run to standard error."""
    print(printable(" ".join(text.splitlines())), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text without control characters: a model's output must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


class Meter:
    """How much has been read or written, on one line of a terminal; silent elsewhere, and for small files."""

    LEAST = 100 << 20  # bytes worth a line

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown = -1

    def __call__(self, done: int, total: int) -> None:
        share = int(100 * done / max(1, total))
        if not self.live or total < self.LEAST or share == self.shown:
            return
        self.shown = share
        bar = f"[{'#' * (share * 30 // 100):30}] {share:3d} % of {total / 2**20:,.0f} MiB"
        print(f"\r{bar}", end="", file=sys.stderr, flush=True)
        if share == 100:
            self.end()

    def end(self) -> None:
        """Leave the line as it is and go to the next."""
        if self.shown >= 0:
            print(file=sys.stderr)
            self.shown = -1


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def short(count: int) -> str:
    """6,243,584,000 as "6.2B"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count or "?")


def width(text: str) -> int:
    """Columns a text takes on a terminal, where Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
