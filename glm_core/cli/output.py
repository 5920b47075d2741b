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
