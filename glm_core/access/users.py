"""The file of users: names, roles and salted scrypt hashes; made and changed by `python -m glm_core users`."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import threading
import time
import unicodedata
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import GLMError
from ..settings import Settings
from .people import VISITOR, Person

SHORTEST, LONGEST = 8, 1000  # characters of a password
LONGEST_NAME = 60
# 32 MiB and about 0.1 s a try; a file keeps the numbers it was made with.
COST = {"n": 1 << 15, "r": 8, "p": 1}
MOST_MEMORY = 256 << 20
_NAME = re.compile(r"[\w][\w.@+ -]*")
_hashing = threading.Lock()  # one at a time: a flood of logins must not take the memory of the model
_seen: set[Path] = set()  # files that had users once in this process


@dataclass(frozen=True)
class User:
    """One line of the file; the hash says nothing about the password to who reads it."""

    name: str
    role: Literal["admin", "user"]
    salt: str
    hash: str
    n: int
    r: int
    p: int
    made: float

    def matches(self, password: str) -> bool:
        """Whether this is the password; takes as long for a wrong one as for the right one."""
        found = _scrypt(password, bytes.fromhex(self.salt), self.n, self.r, self.p)
        return hmac.compare_digest(found, bytes.fromhex(self.hash))


class Users:
    """The users of a workspace; every call reads the file anew where it has changed."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.workspace / "users.json"
        self._state: tuple[int, int, int] | None = None
        self._users: dict[str, User] = {}
        self._lock = threading.Lock()

    @property
    def on(self) -> bool:
        """Whether a login is asked for. Once it was, it stays so in this process even where the file is lost."""
        try:
            found = bool(self.all())
        except GLMError:  # damaged: nobody gets in, rather than everybody
            return True
        if found:
            _seen.add(self.path)
        return found or (self.path in _seen and not self.path.is_file())

    def all(self) -> dict[str, User]:
        """Every user by name; GLMError where the file cannot be read."""
        with self._lock:
            state = file_state(self.path)
            if state != self._state:
                self._users = self._read() if state else {}
                self._state = state
            return dict(self._users)

    def person(self, name: str, granted: Collection[str] = ()) -> Person | None:
        """A user as the stores see one; None where there is none of that name any more."""
        try:
            user = self.all().get(name)
        except GLMError:
            return None
        return None if user is None else Person(user.name, user.role, frozenset(granted))

    def check(self, name: str, password: str) -> User | None:
        """The user of this name and password, or None; an unknown name takes as long as a wrong password."""
        user = self.all().get(clean_name(name))
        if len(password) > LONGEST:
            return None
        if user is None:
            _scrypt(password, b"\0" * 16, **COST)
            return None
        return user if user.matches(password) else None

    def add(self, name: str, password: str, admin: bool = False) -> User:
        """A new user; GLMError for a name that is taken or no name, and for a short password."""
        name = checked_name(name)
        if name in self.all():
            raise GLMError(
                f"There is a user {name!r} already.", "Choose another name, or change the password."
            )
        return self._put(name, password, "admin" if admin else "user")

    def set_password(self, name: str, password: str) -> User:
        """Another password for a user; GLMError where there is none of that name."""
        return self._put(clean_name(name), password, self._known(name).role)

    def remove(self, name: str) -> None:
        """Take a user off the file; GLMError where there is none of that name."""
        users = self.all()
        del users[self._known(name).name]
        self._write(users)
        if not users:  # asked for by name: the pages are open again
            _seen.discard(self.path)

    def _known(self, name: str) -> User:
        users = self.all()
        if (user := users.get(clean_name(name))) is None:
            known = ", ".join(users) or "none"
            raise GLMError(f"There is no user {name!r}.", f"There are: {known}.")
        return user

    def _put(self, name: str, password: str, role: Literal["admin", "user"]) -> User:
        if len(password) < SHORTEST:
            raise GLMError(
                f"The password has {len(password)} characters.",
                f"Use at least {SHORTEST}; a sentence is best.",
            )
        if len(password) > LONGEST:
            raise GLMError(f"The password has {len(password):,} characters.", f"Use at most {LONGEST:,}.")
        users = self.all()
        salt = secrets.token_bytes(16)
        made = users[name].made if name in users else time.time()
        hashed = _scrypt(password, salt, **COST)
        users[name] = User(name, role, salt.hex(), hashed.hex(), **COST, made=made)
        self._write(users)
        return users[name]

    def _write(self, users: dict[str, User]) -> None:
        text = json.dumps(
            {"version": 1, "users": [asdict(one) for one in users.values()]}, indent=1, ensure_ascii=False
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(
                dir=self.path.parent, prefix=".users-"
            )  # readable by its owner only
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except OSError as error:
            with suppress(OSError, UnboundLocalError):
                os.unlink(name)
            raise GLMError(
                f"The file of users {self.path} cannot be written: {error.strerror or error}.",
                "Free some disk space, or check the rights of the folder.",
            ) from error

    def _read(self) -> dict[str, User]:
        try:
            listed = json.loads(self.path.read_text(encoding="utf-8"))["users"]
            users = [User(**one) for one in listed]
            for one in users:
                if one.role not in ("admin", "user") or len(bytes.fromhex(one.hash)) != 64:
                    raise ValueError(one.name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise GLMError(
                f"The file of users {self.path} cannot be read: {reason}.",
                "Restore it from a copy, or remove it and add the users again.",
            ) from None
        return {one.name: one for one in users}


def file_state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_files: dict[Path, Users] = {}


def users_of(settings: Settings) -> Users:
    """The users of a workspace, one object per process."""
    path = settings.workspace
    if path not in _files:
        _files[path] = Users(settings)
    return _files[path]


def is_on(settings: Settings) -> bool:
    """Whether the workspace has users, so that the pages ask for a name and a password."""
    return users_of(settings).on


def by_mail(
    mail: str, verified: bool, admins: Collection[str], people: Collection[str], granted: Collection[str] = ()
) -> Person | None:
    """The person an identity provider vouches for; None for an address that is on no list.

    people   addresses, or domains as in "example.org"; "*" lets in everybody the provider knows
    """
    mail = mail.strip().casefold()
    if not verified or mail.count("@") != 1 or mail.startswith(VISITOR) or len(mail) > 320:
        return None
    if mail in {one.strip().casefold() for one in admins}:
        return Person(mail, "admin")
    allowed = {one.strip().casefold().removeprefix("@") for one in people}
    if mail in allowed or mail.partition("@")[2] in allowed or "*" in allowed:
        return Person(mail, "user", frozenset(granted))
    return None


def clean_name(name: str) -> str:
    """A name as it is stored and looked for."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def checked_name(name: str) -> str:
    """A name a user may have; GLMError for any other."""
    found = clean_name(name)
    if not _NAME.fullmatch(found) or len(found) > LONGEST_NAME:
        raise GLMError(
            f"{name[:LONGEST_NAME]!r} is no name for a user.",
            f"Use letters, digits and . _ - @ +, at most {LONGEST_NAME} characters.",
        )
    return found


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # The same letters typed on two keyboards can be different code points.
    given = unicodedata.normalize("NFC", password).encode("utf-8", "replace")
    with _hashing:
        return hashlib.scrypt(given, salt=salt, n=n, r=r, p=p, maxmem=MOST_MEMORY, dklen=64)
