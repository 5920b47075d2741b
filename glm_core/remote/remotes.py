"""Which servers are known by name, how one is written in a command, and where its key is."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import GLMError
from ..settings import REPOSITORY, Settings

PREFIX = "remote:"
DEFAULT_KEY = "GLM_REMOTE_KEY"
FILE = "remotes.json"
MOST_AT_ONCE = 256
_NAME = re.compile(r"[\w][\w .-]{0,59}")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")  # capitals alone: a key pasted by mistake is not one
_REMOTE = re.compile(r"remote:|https?:/")
_lock = threading.Lock()


@dataclass(frozen=True)
class Remote:
    """A model on a server, and how it is asked; the key itself is never part of it.

    name    in the workspace; empty where the address was given in a command
    url     where the protocol begins: http://host:8000/v1
    """

    name: str
    url: str
    model: str
    key_env: str = field(
        default=DEFAULT_KEY, metadata={"help": "Environment variable or Streamlit secret with the key"}
    )
    concurrency: int = field(default=16, metadata={"help": "Requests on their way at a time"})
    tries: int = field(default=6, metadata={"help": "Times a request is sent before its row fails"})
    timeout_s: float = field(default=300.0, metadata={"help": "Longest wait for an answer"})
    patience_s: float = field(default=300.0, metadata={"help": "Longest wait for a server that is gone"})

    @property
    def spec(self) -> str:
        """How a task and a command name it."""
        return f"{PREFIX}{self.name}" if self.name else f"{self.url}#{self.model}"

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def label(self) -> str:
        """How it is called on screen."""
        if self.name:
            return f"{self.name} (remote)"
        return f"{self.model} ({self.host})" if self.model else self.host

    @property
    def fingerprint(self) -> str:
        """What makes two servers the same model to a job."""
        return f"{self.url}#{self.model}"

    def check(self) -> None:
        """Raise a GLMError naming the first value that cannot be."""
        if self.name and not _NAME.fullmatch(self.name):
            raise GLMError(
                f"The name {self.name!r} cannot be used.",
                "Use letters, digits, spaces, dots, dashes and underscores, at most 60.",
            )
        address(self.url)
        if not self.model.strip():
            raise GLMError("The model has no name.", "Choose one of those the server lists.")
        variable(self.key_env)
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("concurrency", self.concurrency, 1, MOST_AT_ONCE),
            ("tries", self.tries, 1, 100),
            ("timeout_s", self.timeout_s, 1, 86_400),
            ("patience_s", self.patience_s, 0, 86_400),
        )
        for what, value, low, high in ranges:
            if not low <= value <= high:
                raise GLMError(f"{what} is {value}.", f"Choose a value from {low:g} to {high:g}.")


def is_remote(checkpoint: object) -> bool:
    """Whether what a command or a task names is on a server, not in a folder."""
    return _REMOTE.match(str(checkpoint)) is not None


def shown(checkpoint: object) -> str:
    """What a task's checkpoint is called on screen: the name of its folder or of its server."""
    text = str(checkpoint)
    if text.startswith(PREFIX):
        return f"{text.removeprefix(PREFIX)} (remote)"
    if is_remote(text):
        url, _, model = text.partition("#")
        return f"{model or 'model'} ({urlsplit(url).netloc})"
    return Path(text).name


def address(text: str) -> str:
    """The base address in one form, with /v1 where nothing follows the host.

    GLMError for what is none, and for one that carries a password or a key, which is not repeated.
    """
    try:
        parts = urlsplit(text.strip())
        usable = parts.port is None or parts.port > 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https") or not parts.hostname:
        raise GLMError("The address is none of a server.", "Write it as http://host:8000/v1, or with https.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise GLMError(
            "The address holds a name, a password or a query.",
            "Leave them out; a key belongs into an environment variable, whose name is given instead.",
        )
    path = re.sub(r"/+(chat/completions|completions|models)?/*$", "", parts.path)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def variable(name: str) -> str:
    """The name of the variable of a key, checked; what was given is not repeated, for it may be the key."""
    if not _VARIABLE.fullmatch(name):
        raise GLMError(
            "The key is given by the name of an environment variable or of a Streamlit secret.",
            f"Write such a name, in capital letters, digits and underscores: {DEFAULT_KEY}. Never the key itself.",
        )
    return name


# ---- those known by name


def known() -> list[Remote]:
    """The servers of this workspace by name; GLMError where their file cannot be read."""
    path = Settings.read().workspace / FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise GLMError(f"{path} cannot be read: {error}.", "Repair the file, or delete it.") from error
    listed = stored.get("remotes", []) if isinstance(stored, dict) else []
    found = [_read(one) for one in listed if isinstance(one, dict)]
    return sorted((one for one in found if one is not None), key=lambda one: one.name.lower())


def _read(stored: dict[str, Any]) -> Remote | None:
    names = {one.name for one in fields(Remote)}
    try:
        found = Remote(**{key: value for key, value in stored.items() if key in names})
        found.check()
        return found
    except (TypeError, AttributeError, GLMError):
        return None


def named(name: str) -> Remote:
    """A server by its name; GLMError if there is none."""
    found = known()
    for one in found:
        if one.name == name:
            return one
    listed = ", ".join(one.name for one in found) or "none"
    raise GLMError(f"There is no remote engine {name!r}; there are: {listed}.", "Add it on the Models page.")


def add(remote: Remote, replace_it: bool = False) -> Remote:
    """Keep a server under its name; GLMError for a name in use, unless it is to be replaced."""
    remote = replace(remote, name=remote.name.strip(), url=address(remote.url), model=remote.model.strip())
    if not remote.name:
        raise GLMError("The remote engine has no name.", "Give it one.")
    remote.check()
    with _lock:
        found = known()
        if any(one.name == remote.name for one in found) and not replace_it:
            raise GLMError(
                f"There is a remote engine {remote.name!r} already.", "Choose another name, or remove it."
            )
        _write([*(one for one in found if one.name != remote.name), remote])
    return remote


def remove(name: str) -> None:
    """Forget a server; GLMError if there is none of that name. Its jobs keep what they have."""
    with _lock:
        gone = named(name)
        _write([one for one in known() if one.name != gone.name])


def _write(remotes: list[Remote]) -> None:
    folder = Settings.read().workspace
    text = json.dumps({"remotes": [asdict(one) for one in remotes]}, ensure_ascii=False, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(name, folder / FILE)
    except OSError as error:
        raise GLMError(
            f"{folder / FILE} cannot be written: {error.strerror or error}.", "Free some disk space."
        ) from error


def find(spec: str, key_env: str = "", concurrency: int | None = None) -> Remote:
    """What `remote:NAME` or `http://host:8000/v1#model` means; GLMError if there is none of that name.

    The model of an address may be left out; it is then empty, and `connect` takes the only one there is.
    """
    if spec.startswith(PREFIX):
        found = named(spec.removeprefix(PREFIX))
        if key_env:
            found = replace(found, key_env=variable(key_env))
    else:
        url, _, model = spec.partition("#")
        found = Remote("", address(re.sub(r"^(https?):/+", r"\1://", url)), model.strip())
        found = replace(found, key_env=variable(key_env or DEFAULT_KEY))
    if concurrency is not None:
        found = replace(found, concurrency=concurrency)
    replace(found, model=found.model or "any").check()
    return found


# ---- keys


def key_of(remote: Remote) -> str:
    """The key to send, or nothing where none is set under the usual name. GLMError where another name has none."""
    found = (os.environ.get(remote.key_env) or _secret(remote.key_env)).strip()
    if not found and remote.key_env != DEFAULT_KEY:
        raise GLMError(
            f"There is neither an environment variable nor a Streamlit secret {remote.key_env}.",
            "Set it to the key of the server and start again.",
        )
    if not all(33 <= ord(letter) < 127 for letter in found):
        raise GLMError(
            f"What {remote.key_env} holds is no key: it has characters that cannot be sent.", "Set it again."
        )
    return found


def _secret(name: str) -> str:
    """A Streamlit secret, from the files Streamlit reads, so that jobs and commands find it as pages do."""
    for folder in (Path.cwd(), REPOSITORY, Path.home()):
        try:
            with (folder / ".streamlit" / "secrets.toml").open("rb") as file:
                value = tomllib.load(file).get(name)
        except (OSError, ValueError, RuntimeError):
            continue
        if isinstance(value, str) and value:
            return value
    return ""
