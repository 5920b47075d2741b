"""What keeps a browser logged in: random tokens, of which the workspace has the hashes, and delays after wrong ones."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from ..errors import GLMError
from ..settings import Settings

DAYS = 7  # after which everybody logs in again
LOOK_S = 1.0  # how long a login ended elsewhere may go unnoticed
CODE_S = 60.0  # how long a browser has to fetch its cookie
FREE, SLOWEST_S = 3, 60.0  # wrong passwords of a name before it has to wait, and the longest wait
ALL_FREE, ALL_SLOWEST_S = 20, 10.0  # the same for all names together
FORGET_S = 900.0
MOST_NAMES = 10_000
Kind = Literal["password", "provider"]

SCHEMA = """CREATE TABLE IF NOT EXISTS login(
    hash TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, mark TEXT NOT NULL, made REAL NOT NULL,
    seen REAL NOT NULL)"""


class Logins:
    """The logins of a workspace; any thread and any process may use them."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.workspace / "logins.db"
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, tuple[str, Kind, str] | None]] = {}
        self._codes: dict[str, tuple[float, str]] = {}

    def begin(self, name: str, kind: Kind = "password", mark: str = "") -> str:
        """A token for somebody who just proved to be `name`; it is nowhere kept, only its hash.

        mark   what ends the login when it changes, such as the salt of the password
        """
        token, now = secrets.token_urlsafe(32), time.time()
        with self._db() as db:
            db.execute("DELETE FROM login WHERE made < ?", (now - DAYS * 86400,))
            db.execute(
                "INSERT INTO login VALUES (?,?,?,?,?,?)", (_hash(token), name, kind, _short(mark), now, now)
            )
        return token

    def who(self, token: str, mark_of: Callable[[str], str], kind: Kind = "password") -> str:
        """Whose token this is; "" for one that is unknown, too old, ended, of another kind or with another mark."""
        if not token or len(token) > 200:
            return ""
        hashed, now = _hash(token), time.monotonic()
        with self._lock:
            looked, found = self._known.get(hashed, (float("-inf"), None))
        if now - looked > LOOK_S:
            found = self._look(hashed)
            with self._lock:
                if len(self._known) > MOST_NAMES:
                    self._known.clear()
                self._known[hashed] = (now, found)
        if found is None or found[1] != kind:
            return ""
        return found[0] if hmac.compare_digest(found[2], _short(mark_of(found[0]))) else ""

    def end(self, token: str) -> None:
        """Log out."""
        hashed = _hash(token)
        with self._db() as db:
            db.execute("DELETE FROM login WHERE hash = ?", (hashed,))
        with self._lock:  # after the row, which another thread may be looking at
            self._known[hashed] = (time.monotonic(), None)

    def end_all(self, name: str) -> int:
        """Log somebody out everywhere; how many logins that were."""
        with self._db() as db:
            ended = db.execute("DELETE FROM login WHERE name = ?", (name,)).rowcount
        with self._lock:
            self._known.clear()
        return ended

    def seen(self) -> dict[str, float]:
        """When each person was last seen, in seconds since the epoch."""
        with self._db() as db:
            return {row[0]: row[1] for row in db.execute("SELECT name, MAX(seen) FROM login GROUP BY name")}

    # -- the way a token takes into a cookie that no script can read

    def code(self, token: str) -> str:
        """A word that `redeem` takes once, within a minute, for the token."""
        made, now = secrets.token_urlsafe(24), time.monotonic()
        with self._lock:
            self._codes = {key: one for key, one in self._codes.items() if now - one[0] < CODE_S}
            self._codes[made] = (now, token)
        return made

    def waiting(self, code: str) -> bool:
        """Whether a code can still be redeemed."""
        with self._lock:
            made, _ = self._codes.get(code, (float("-inf"), ""))
        return time.monotonic() - made < CODE_S

    def redeem(self, code: str) -> str:
        """The token of a code, once; "" for any other."""
        with self._lock:
            made, token = self._codes.pop(code, (float("-inf"), ""))
        return token if time.monotonic() - made < CODE_S else ""

    def _look(self, hashed: str) -> tuple[str, Kind, str] | None:
        if not self.path.is_file():
            return None
        now = time.time()
        with self._db() as db:
            row = db.execute(
                "SELECT name, kind, mark, made, seen FROM login WHERE hash = ?", (hashed,)
            ).fetchone()
            if row is None or now - row[3] > DAYS * 86400:
                return None
            if now - row[4] > 60:
                db.execute("UPDATE login SET seen = ? WHERE hash = ?", (now, hashed))
        return row[0], row[1], row[2]

    @contextmanager
    def _db(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = not self.path.exists()
            if new:
                self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path, timeout=10)) as db, db:
                db.execute(SCHEMA)
                yield db
        except (sqlite3.Error, OSError) as error:
            raise GLMError(
                f"The logins in {self.path} cannot be read or written: {error}.",
                "Check that the disk has room and that the workspace folder may be written.",
            ) from error


class Attempts:
    """Wrong passwords of late: each name waits longer after each of its own, and everybody after very many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Hash of the name ("" for all together) -> (how many, when the last). Hashed, since somebody may have
        # typed a password into the field of the name.
        self._wrong: dict[str, tuple[int, float]] = {}

    def admit(self, name: str) -> float:
        """Seconds until this name may be tried, or 0: then the try counts as wrong until `right` is called.

        Counted before the password is looked at, so that a hundred tries at once are not one.
        """
        now = self._clock()
        with self._lock:
            count, last = self._of(_hash(name), now)
            own = min(SLOWEST_S, 2.0 ** min(count - FREE, 10)) - (now - last) if count >= FREE else 0.0
            count, last = self._of("", now)
            every = (
                min(ALL_SLOWEST_S, (count - ALL_FREE + 1) * 0.5) - (now - last) if count >= ALL_FREE else 0.0
            )
            if (wait := max(own, every)) > 0:
                return wait
            if len(self._wrong) >= MOST_NAMES:
                self._wrong = {
                    key: one for key, one in self._wrong.items() if now - one[1] < SLOWEST_S or not key
                }
            for key in (_hash(name), ""):
                self._wrong[key] = (self._of(key, now)[0] + 1, now)
        return 0.0

    def right(self, name: str) -> None:
        """The right password was given: the name starts anew."""
        with self._lock:
            self._wrong.pop(_hash(name), None)
            count, last = self._wrong.get("", (0, 0.0))
            self._wrong[""] = (max(0, count - 1), last)

    def _of(self, key: str, now: float) -> tuple[int, float]:
        count, last = self._wrong.get(key, (0, now))
        return (0, now) if now - last > FORGET_S else (count, last)


def _hash(text: str) -> str:
    # A token has 256 random bits: nothing is won by hashing it slowly, as one does with words people choose.
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _short(mark: str) -> str:
    return _hash(mark)[:16]


_logins: dict[Path, Logins] = {}


def logins_of(settings: Settings) -> Logins:
    """The logins of a workspace, one object per process."""
    path = settings.workspace
    if path not in _logins:
        _logins[path] = Logins(settings)
    return _logins[path]
