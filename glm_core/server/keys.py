"""API keys: made once, shown once, kept as hashes in a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

from ..access.users import file_state
from ..errors import GLMError

log = logging.getLogger(__name__)

PREFIX = "glm-"
LOOK_SECONDS = 1.0  # how long a changed file may go unnoticed
LONGEST = 512  # characters of a key that is worth hashing
HEAD = "# One key per line: SHA-256 of the key, day it was made, name. Remove a line to withdraw its key.\n"
_LINE = re.compile(r"([0-9a-f]{64})(?:\s+(\S+)(?:\s+(.*))?)?")


def new_key(path: Path, name: str = "") -> str:
    """A new random key, whose hash is added to the file; GLMError where that cannot be written."""
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{_hash(key).hex()} {datetime.now(UTC):%Y-%m-%d} {' '.join(name.split())}".rstrip()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        begun = path.is_file() and path.stat().st_size > 0
        if begun:
            read_hashes(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            ended = not begun or path.read_text(encoding="utf-8").endswith("\n")
            file.write(("" if begun else HEAD) + ("" if ended else "\n") + line + "\n")
    except OSError as error:
        raise GLMError(
            f"The key file {path} cannot be written: {error.strerror or error}.",
            "Name a file in a folder you may write to.",
        ) from error
    return key


def read_hashes(path: Path) -> tuple[bytes, ...]:
    """The hashes in a key file. GLMError where it cannot be read, or a line is none; the line is not shown."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise GLMError(
            f"The key file {path} cannot be read: {reason}.",
            "Check its path, or make one with `python -m glm_core serve --new-key`.",
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:  # perhaps somebody wrote a key itself into it
            raise GLMError(
                f"Line {number} of the key file {path} does not begin with a SHA-256 hash.",
                "Remove it, and make a key with `python -m glm_core serve --new-key`.",
            )
        found.append(bytes.fromhex(match[1]))
    return tuple(found)


class Keys:
    """The keys of a file; a line added or removed counts a second later, a file that is gone admits nobody."""

    def __init__(self, path: Path) -> None:
        """GLMError where the file cannot be read or holds no key."""
        self.path = path
        self._hashes = read_hashes(path)
        self._state, self._looked = file_state(self.path), time.monotonic()
        if not self._hashes:
            raise GLMError(
                f"There is no key in {path}.", "Make one with `python -m glm_core serve --new-key`."
            )

    def admits(self, given: str) -> bool:
        """Whether a key is one of the file's; takes as long for a wrong one as for a right one."""
        self._look()
        mine = _hash(given[:LONGEST])
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(known, mine)
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (state := file_state(self.path)) == self._state:
            return
        self._state = state
        try:
            self._hashes = read_hashes(self.path)
        except GLMError as error:
            self._hashes = ()
            log.error("no key is accepted: %s", error)


def _hash(key: str) -> bytes:
    # A key has 256 random bits: nothing is won by hashing it slowly, as one does with words people choose.
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
