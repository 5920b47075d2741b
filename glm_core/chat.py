"""Conversations: turns kept in the workspace, a token budget, and answers that go on without a screen."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .access.people import DEMO_ANSWER, OPERATOR, Person
from .errors import GLMError

if TYPE_CHECKING:
    from .engine import Engine, EngineHost, GenerationSettings, Handle
    from .tokenizers.base import Message, Tokenizer

TurnState = Literal["done", "running", "stopped", "failed", "interrupted"]
ExportFormat = Literal["md", "json"]

FLUSH_S = 0.5  # how often the text of a running answer is written down; a crash loses no more than this
STOP_S = 0.3  # how long `stop` waits for the engine before it writes the partial answer itself
TITLE_LENGTH = 48

# Answers on their way in this process, by handle id. Here and not in a store, so that every store of the
# process and every screen finds them.
_LIVE: dict[str, Handle] = {}

SCHEMA = """
CREATE TABLE IF NOT EXISTS conversation (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
    system TEXT NOT NULL, settings TEXT NOT NULL, model TEXT NOT NULL, user TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS turn (
    conversation_id TEXT NOT NULL, n INTEGER NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL,
    state TEXT NOT NULL, handle_id TEXT NOT NULL, owner TEXT NOT NULL, model TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL, seconds REAL NOT NULL, ttft REAL,
    tokens_per_second REAL NOT NULL, finish_reason TEXT NOT NULL, error TEXT NOT NULL,
    notes TEXT NOT NULL, dropped_turns INTEGER NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (conversation_id, n)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS conversation_updated ON conversation (updated);
CREATE INDEX IF NOT EXISTS turn_running ON turn (state) WHERE state = 'running';
"""
STILL_RUNNING = "WHERE conversation_id = ? AND n = ? AND handle_id = ? AND state = 'running'"


@dataclass(frozen=True)
class Turn:
    """One question or one answer, with how the answer came about."""

    conversation_id: str
    n: int
    role: Literal["user", "assistant"]
    text: str
    state: TurnState = "done"
    handle_id: str = ""
    owner: str = ""
    model: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ttft: float | None = None  # seconds to the first token
    tokens_per_second: float = 0.0
    finish_reason: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()
    dropped_turns: int = 0  # earlier turns that did not fit into the context
    created: float = 0.0

    @property
    def is_user(self) -> bool:
        return self.role == "user"

    @property
    def running(self) -> bool:
        return self.state == "running"


_TURN_COLUMNS = tuple(f.name for f in fields(Turn))


@dataclass(frozen=True)
class Conversation:
    """A conversation; `turns` is filled by `ConversationStore.get`, lists carry `n_turns` only."""

    id: str
    title: str
    created: float
    updated: float
    system: str = ""
    settings: GenerationSettings | None = None  # None: the defaults of whichever model answers
    model: str = ""
    n_turns: int = 0
    snippet: str = ""  # where a search found its text
    user: str = ""  # whose it is; "" for one made without a login
    turns: tuple[Turn, ...] = ()

    @property
    def running(self) -> Turn | None:
        """The answer that is being written, or None."""
        return self.turns[-1] if self.turns and self.turns[-1].running else None


Conversations: TypeAlias = list[Conversation]  # the store has a method of the name `list`


@dataclass(frozen=True)
class Budget:
    """What is sent for the next answer: prompt and answer together stay within the context."""

    prompt_ids: tuple[int, ...]
    used: int  # tokens of the prompt
    limit: int  # the model's context
    reserved: int  # tokens kept free for the answer
    dropped_turns: int
    prompt: tuple[Message, ...]  # the messages that are sent


# --- the budget ---------------------------------------------------------------------------------------------


def budget(
    tokenizer: Tokenizer,
    system: str,
    turns: Sequence[Message],
    context: int,
    max_new_tokens: int,
) -> Budget:
    """Fit a conversation into the context: the answer's room first, then the newest whole rounds.

    turns   questions and answers, oldest first; the last one is the current question
    The system prompt and the current question are never shortened; GLMError with both numbers where these two
    alone do not fit beside `max_new_tokens`.
    """
    from .tokenizers.base import Message

    if not turns or turns[-1].role != "user":
        raise GLMError("There is no question to answer.", "Write a question.")
    head = [Message("system", system)] if system.strip() else []
    question = turns[-1]
    rounds: list[list[Message]] = []
    for message in turns[:-1]:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)

    def messages(keep: int) -> list[Message]:
        kept = rounds[len(rounds) - keep :]
        return [*head, *(message for one in kept for message in one), question]

    room = context - max_new_tokens
    best = tokenizer.chat_ids(messages(0))
    if len(best) > room:
        what = "The system prompt and the question take" if head else "The question takes"
        raise GLMError(
            f"{what} {len(best):,} tokens; there is room for {max(room, 0):,} "
            f"({context:,} of context less {max_new_tokens:,} kept for the answer).",
            "Shorten the question or the system prompt, or lower the longest answer.",
        )
    # Doubling, then halving: the work depends on the context, not on how long the conversation has become.
    low, high, step, doubling = 0, len(rounds), 1, True
    while low < high:
        probe = min(low + step, high)
        ids = tokenizer.chat_ids(messages(probe))
        if len(ids) <= room:
            low, best = probe, ids
        else:
            high, doubling = probe - 1, False
        step = step * 2 if doubling else max(1, (high - low + 1) // 2)
    return Budget(
        prompt_ids=tuple(best),
        used=len(best),
        limit=context,
        reserved=max_new_tokens,
        dropped_turns=sum(len(one) for one in rounds[: len(rounds) - low]),
        prompt=tuple(messages(low)),
    )


def history(turns: Sequence[Turn]) -> list[Message]:
    """The rounds a model is shown again; one whose answer never got a word is left out, question included."""
    from .tokenizers.base import Message

    found: list[Message] = []
    for question, answer in zip(turns, turns[1:], strict=False):
        if question.is_user and not answer.is_user and answer.text.strip():
            found += [Message("user", question.text), Message("assistant", answer.text)]
    return found


def default_settings(engine: Engine) -> GenerationSettings:
    """The loaded checkpoint's own sampling settings."""
    from .engine import GenerationSettings

    return GenerationSettings.from_json(dict(engine.loaded.defaults))


# --- conversations ------------------------------------------------------------------------------------------


class ConversationStore:
    """Every conversation of a workspace, and the answers being written into it.

    Safe from several threads and processes. An answer is written down while it is generated, by a thread of
    this process: closing the page, a refresh or another page change nothing about it.
    """

    def __init__(self, path: str | Path, host: EngineHost | None = None) -> None:
        """Open or create the tables; GLMError where the file cannot be used. `host` owns the model."""
        self.path = Path(path)
        self.person = OPERATOR
        self._given_host = host
        self._local = threading.local()
        with _readable_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db().executescript(SCHEMA)
            self._add_user_column()
        self.recover()

    def seen_by(self, person: Person) -> ConversationStore:
        """The same store as a person sees it: the conversations of others are not there.

        An administrator sees those without an owner besides, and never what another person talked about.
        """
        if person == self.person:
            return self
        view = copy.copy(self)
        view.person = person
        return view

    def _add_user_column(self) -> None:
        with self._writing() as db:
            if "user" not in {row[1] for row in db.execute("PRAGMA table_info(conversation)")}:
                db.execute("ALTER TABLE conversation ADD COLUMN user TEXT NOT NULL DEFAULT ''")

    # -- conversations

    def create(
        self, title: str = "", system: str = "", settings: GenerationSettings | None = None
    ) -> Conversation:
        """A new, empty conversation; an empty title becomes the first question."""
        now = time.time()
        made = f"{datetime.fromtimestamp(now):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with self._writing() as db:
            db.execute(
                "INSERT INTO conversation(id, title, created, updated, system, settings, model, user) "
                "VALUES (?, ?, ?, ?, ?, ?, '', ?)",
                (made, _title(title), now, now, _clean(system), _settings_json(settings), self.person.name),
            )
        return self.get(made)

    def list(self, limit: int = 200) -> Conversations:
        """The newest conversations, without their turns."""
        return self._listed("", (), limit)

    def search(self, text: str, limit: int = 100) -> Conversations:
        """Conversations whose title or turns hold a text, newest first, each with the place it was found."""
        wanted = _clean(text).strip()
        if not wanted:
            return self.list(limit)
        like = "%" + re.sub(r"([\\%_])", r"\\\1", wanted) + "%"
        match = "text LIKE ? ESCAPE '\\'"
        found = self._listed(
            f"title LIKE ? ESCAPE '\\' OR id IN (SELECT conversation_id FROM turn WHERE {match})",
            (like, like),
            limit,
        )
        first = f"SELECT text FROM turn WHERE conversation_id = ? AND {match} ORDER BY n LIMIT 1"
        with _readable_errors(self.path):
            hits = [self._db().execute(first, (one.id, like)).fetchone() for one in found]
        return [
            Conversation(**_shallow(one) | {"snippet": _snippet(hit[0], wanted) if hit else ""})
            for one, hit in zip(found, hits, strict=True)
        ]

    def get(self, conversation_id: str) -> Conversation:
        """A conversation with its turns; GLMError if unknown. Answers without a writer end."""
        found = self._load(conversation_id)
        if found.running:
            self._settle(found.running)
            found = self._load(conversation_id)  # also where the saving thread was quicker
        return found

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation another title; GLMError if it is empty."""
        if not title.strip():
            raise GLMError("The title is empty.", "Write a title.")
        self._change(conversation_id, "title = ?", _title(title, 200))

    def set_system(self, conversation_id: str, system: str) -> None:
        """Change the system prompt; it holds from the next answer on."""
        self._change(conversation_id, "system = ?", _clean(system))

    def set_settings(self, conversation_id: str, settings: GenerationSettings | None) -> None:
        """Change the sampling settings from the next answer on; None follows the model's own defaults."""
        if settings is not None:
            settings.check()
        self._change(conversation_id, "settings = ?", _settings_json(settings))

    def clear(self, conversation_id: str) -> None:
        """Remove all turns and end a running answer; title, system prompt and settings stay."""
        self._cancel(self._load(conversation_id).running)
        with self._writing() as db:
            db.execute("DELETE FROM turn WHERE conversation_id = ?", (conversation_id,))
            db.execute("UPDATE conversation SET updated = ? WHERE id = ?", (time.time(), conversation_id))

    def delete(self, conversation_id: str) -> None:
        """Remove a conversation and end a running answer; nothing happens if it is gone already."""
        try:
            self._cancel(self._load(conversation_id).running)
        except GLMError:
            return
        with self._writing() as db:
            db.execute("DELETE FROM turn WHERE conversation_id = ?", (conversation_id,))
            db.execute("DELETE FROM conversation WHERE id = ?", (conversation_id,))

    # -- questions and answers

    def ask(self, conversation_id: str, text: str) -> Handle:
        """Store a question and begin its answer. GLMError if empty, too long, busy, or without model."""
        return self._answer(conversation_id, text, again=False)

    def regenerate(self, conversation_id: str) -> Handle:
        """Answer the last question anew, replacing the answer. GLMError as `ask`; then nothing changed."""
        return self._answer(conversation_id, None, again=True)

    def edit_last(self, conversation_id: str, text: str) -> Handle:
        """Replace the last question and answer the new one. GLMError as `ask`; then nothing has changed."""
        return self._answer(conversation_id, text, again=True)

    def stop(self, conversation_id: str) -> bool:
        """End the running answer and keep what there is of it; False if none was running."""
        turn = self._load(conversation_id).running
        if turn is None:
            return False
        handle = _LIVE.get(turn.handle_id)
        if handle is not None:
            handle.cancel("user")
            handle.wait(STOP_S)
        # Where the engine is inside a long step the partial answer is kept now; where another program writes
        # this answer, it sees the changed state at its next flush and cancels.
        self._write(turn, handle, state="stopped")
        return True

    def live(self, turn: Turn) -> Handle | None:
        """The handle of an answer this process is generating, or None; touches no disk."""
        return _LIVE.get(turn.handle_id)

    def usage(self, conversation_id: str, engine: Engine) -> Budget:
        """What the next question sends beside its own words. GLMError where the system prompt is too long."""
        from .tokenizers.base import Message

        found = self._load(conversation_id)
        settings = found.settings or default_settings(engine)
        turns = [*history(found.turns), Message("user", "")]
        return budget(engine.tokenizer, found.system, turns, engine.context, settings.max_new_tokens)

    def recover(self) -> int:
        """Mark answers whose process is gone as interrupted, with the text they had; returns how many."""
        with _readable_errors(self.path):
            rows = (
                self._db()
                .execute(f"SELECT {', '.join(_TURN_COLUMNS)} FROM turn WHERE state = 'running'")
                .fetchall()
            )
        return sum(self._settle(_turn(row)) for row in rows)

    def export(self, conversation_id: str, format: ExportFormat) -> str:
        """A conversation as Markdown to read or JSON to process; remote images are links in the Markdown."""
        found = self.get(conversation_id)
        if format == "json":
            return json.dumps(_as_json(found), ensure_ascii=False, indent=2) + "\n"
        if format == "md":
            return _as_markdown(found)
        raise GLMError(f"The format {format!r} is unknown.", "Choose md or json.")

    def close(self) -> None:
        """Close this thread's connection; running answers go on."""
        db = self._local.__dict__.pop("db", None)
        if db is not None:
            db.close()

    # -- inside

    def _host(self) -> EngineHost:
        if self._given_host is not None:
            return self._given_host
        from .engine import host

        return host()

    def _answer(self, conversation_id: str, question: str | None, again: bool) -> Handle:
        from .engine import Request
        from .tokenizers.base import Message

        if question is not None:
            question = _clean(question).strip()
            if not question:
                raise GLMError("The question is empty.", "Write a question.")
        engine = self._host().current
        if engine is None:
            raise GLMError("No model is loaded.", "Load one on the Models page.")
        model = engine.loaded.info.name
        self.get(conversation_id)  # settles an answer whose writer is gone
        handle: Handle | None = None
        try:
            # One transaction around reading, submitting and storing: two tabs cannot ask at the same time,
            # and a refused request leaves the conversation as it was.
            with self._writing() as db:
                found = self._load(conversation_id)
                if found.running:
                    raise GLMError("The last answer is still being written.", "Wait for its end, or stop it.")
                kept, title = [*found.turns], found.title
                if again:
                    while kept and not kept[-1].is_user:
                        kept.pop()
                    if not kept:
                        raise GLMError("There is no question to answer again.", "Ask one.")
                    last = kept.pop()
                    question = question or last.text
                    if title == _title(last.text):
                        title = _title(question)
                question = question or ""
                settings = found.settings or default_settings(engine)
                if self.person.is_visitor:
                    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, DEMO_ANSWER))
                settings.check()
                plan = budget(
                    engine.tokenizer,
                    found.system,
                    [*history(kept), Message("user", question)],
                    engine.context,
                    settings.max_new_tokens,
                )
                handle = engine.submit(Request(plan.prompt_ids, settings, priority="chat"))
                _LIVE[handle.id] = handle
                n, now = kept[-1].n + 1 if kept else 0, time.time()
                answer = Turn(
                    conversation_id,
                    n + 1,
                    "assistant",
                    "",
                    "running",
                    handle_id=handle.id,
                    owner=_owner(),
                    model=model,
                    prompt_tokens=handle.n_prompt,
                    dropped_turns=plan.dropped_turns,
                    created=now,
                )
                db.execute("DELETE FROM turn WHERE conversation_id = ? AND n >= ?", (conversation_id, n))
                for turn in (Turn(conversation_id, n, "user", question, created=now), answer):
                    db.execute(f"INSERT INTO turn VALUES ({', '.join('?' * len(_TURN_COLUMNS))})", _row(turn))
                db.execute(
                    "UPDATE conversation SET updated = ?, model = ?, title = ? WHERE id = ?",
                    (now, model, title or _title(question), conversation_id),
                )
        except BaseException:
            if handle is not None:
                _LIVE.pop(handle.id, None)
                handle.cancel("not stored")
            raise
        threading.Thread(target=self._save, args=(answer, handle), name="glm-chat-save", daemon=True).start()
        return handle

    def _save(self, turn: Turn, handle: Handle) -> None:
        """Write an answer down until it has ended; runs in its own thread."""
        written = ""
        try:
            while not handle.wait(FLUSH_S):
                text = handle.text
                try:
                    if not self._flush(turn, text, changed=text != written):
                        handle.cancel(
                            "stopped elsewhere"
                        )  # by another program, or the conversation was cleared
                        return
                    written = text
                except GLMError:
                    continue  # a busy or full disk: the text is still in memory, the next flush tries again
            for _ in range(60):
                try:
                    self._write(turn, handle)
                    return
                except GLMError:
                    time.sleep(1)
        finally:
            _LIVE.pop(handle.id, None)
            self.close()

    def _flush(self, turn: Turn, text: str, changed: bool) -> bool:
        """Store the text so far; False if this answer is not wanted any more."""
        key = (turn.conversation_id, turn.n, turn.handle_id)
        if not changed:
            with _readable_errors(self.path):
                return self._db().execute(f"SELECT 1 FROM turn {STILL_RUNNING}", key).fetchone() is not None
        with self._writing() as db:
            return db.execute(f"UPDATE turn SET text = ? {STILL_RUNNING}", (_clean(text), *key)).rowcount > 0

    def _settle(self, turn: Turn) -> bool:
        """End a running turn whose answer has ended or whose writer is gone; True if it changed."""
        handle = _LIVE.get(turn.handle_id)
        if handle is not None:
            return handle.done and self._write(turn, handle)
        if turn.owner != _owner() and _alive(turn.owner):
            return False
        return self._write(turn, None, state="interrupted")

    def _cancel(self, turn: Turn | None) -> None:
        handle = _LIVE.get(turn.handle_id) if turn else None
        if handle is not None:
            handle.cancel("user")

    def _write(self, turn: Turn, handle: Handle | None, state: TurnState | None = None) -> bool:
        """Store how an answer ended, once: whoever comes second changes nothing and gets False."""
        values: dict[str, Any] = {"state": state or "done"}
        if handle is not None:
            ends: dict[str, TurnState] = {"cancelled": "stopped", "failed": "failed"}
            values = {
                "state": ends.get(handle.state, "done") if handle.done else state or "stopped",
                "text": _clean(handle.text),
                "tokens": handle.n_tokens,
                "prompt_tokens": handle.n_prompt,  # of a server known at the end alone
                "seconds": handle.seconds,
                "ttft": handle.time_to_first_token,
                "tokens_per_second": handle.tokens_per_second,
                "finish_reason": handle.finish_reason or "cancelled",
                "error": str(handle.error) if handle.error else "",
                "notes": json.dumps(list(handle.notes), ensure_ascii=False),
            }
        names = ", ".join(f"{name} = ?" for name in values)
        with self._writing() as db:
            changed = db.execute(
                f"UPDATE turn SET {names} {STILL_RUNNING}",
                (*values.values(), turn.conversation_id, turn.n, turn.handle_id),
            )
            return changed.rowcount > 0

    def _load(self, conversation_id: str) -> Conversation:
        with _readable_errors(self.path):
            rows = (
                self._db()
                .execute(
                    f"SELECT {', '.join(_TURN_COLUMNS)} FROM turn WHERE conversation_id = ? ORDER BY n",
                    (conversation_id,),
                )
                .fetchall()
            )
        found = self._listed("id = ?", (conversation_id,), 1)
        if not found:
            raise GLMError(
                f"There is no conversation {conversation_id!r}.", "It was deleted; start a new one."
            )
        turns = tuple(_turn(row) for row in rows)
        return Conversation(**_shallow(found[0]) | {"turns": turns, "n_turns": len(turns)})

    def _listed(self, where: str, values: tuple[Any, ...], limit: int) -> Conversations:
        own, names = self._own()
        with _readable_errors(self.path):
            rows = self._db().execute(
                "SELECT id, title, created, updated, system, settings, model, "
                "(SELECT COUNT(*) FROM turn WHERE conversation_id = conversation.id), user "
                f"FROM conversation WHERE ({where or 1}) AND {own} ORDER BY updated DESC, id DESC LIMIT ?",
                (*values, *names, limit),
            )
            return [
                Conversation(
                    id=row[0],
                    title=row[1],
                    created=row[2],
                    updated=row[3],
                    system=row[4],
                    settings=_settings_from(row[5]),
                    model=row[6],
                    n_turns=row[7],
                    user=row[8],
                )
                for row in rows.fetchall()
            ]

    def _own(self) -> tuple[str, tuple[str, ...]]:
        """What this person may see, as SQL with its values."""
        mine = self.person.lists
        return ("1", ()) if mine is None else (f"user IN ({', '.join('?' * len(mine))})", mine)

    def _change(self, conversation_id: str, assignment: str, value: str) -> None:
        own, names = self._own()
        with self._writing() as db:
            if not db.execute(
                f"UPDATE conversation SET {assignment} WHERE id = ? AND {own}",
                (value, conversation_id, *names),
            ).rowcount:
                raise GLMError(
                    f"There is no conversation {conversation_id!r}.", "It was deleted; start a new one."
                )

    def _db(self) -> sqlite3.Connection:
        """This thread's connection: sqlite allows no sharing, and screens come and go in threads."""
        found: sqlite3.Connection | None = getattr(self._local, "db", None)
        if found is None:
            found = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")
            self._local.db = found
        return found

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _readable_errors(self.path):
            db = self._db()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise GLMError(
            f"The conversations in {path} cannot be read or written: {error}.",
            "Check that the disk has room and that the workspace folder may be written.",
        ) from error


def _owner() -> str:
    """This process, such that a later one with the same number is told apart."""
    import platform

    import psutil

    return f"{platform.node()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def _alive(owner: str) -> bool:
    """Whether a process still runs; one on another machine counts as running, since nobody here can tell."""
    import platform

    import psutil

    try:
        node, number, created = owner.rsplit(":", 2)
        if node != platform.node():
            return True
        return abs(psutil.Process(int(number)).create_time() - float(created)) < 0.1
    except (ValueError, psutil.Error):
        return False


def _row(turn: Turn) -> tuple[Any, ...]:
    return tuple(
        json.dumps(list(turn.notes)) if name == "notes" else getattr(turn, name) for name in _TURN_COLUMNS
    )


def _turn(row: Sequence[Any]) -> Turn:
    values = dict(zip(_TURN_COLUMNS, row, strict=True))
    return Turn(**values | {"notes": tuple(json.loads(values["notes"]))})


def _shallow(found: Conversation) -> dict[str, Any]:
    return {f.name: getattr(found, f.name) for f in fields(found)}


def _settings_json(settings: GenerationSettings | None) -> str:
    return "" if settings is None else json.dumps(settings.to_json(), ensure_ascii=False)


def _settings_from(text: str) -> GenerationSettings | None:
    if not text:
        return None
    from .engine import GenerationSettings

    return GenerationSettings.from_json(json.loads(text))


def _clean(text: str) -> str:
    """Text that sqlite and JSON accept: half of a surrogate pair cannot be stored."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _title(text: str, length: int = TITLE_LENGTH) -> str:
    line = " ".join(_clean(text).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _snippet(text: str, wanted: str, around: int = 30) -> str:
    at = max(text.lower().find(wanted.lower()), 0)
    start, end = max(at - around, 0), at + len(wanted) + around
    middle = " ".join(text[start:end].split())
    return ("…" if start else "") + middle + ("…" if end < len(text) else "")


# --- export -------------------------------------------------------------------------------------------------


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _as_json(found: Conversation) -> dict[str, Any]:
    hidden = ("conversation_id", "n", "handle_id", "owner", "created", "text")
    return {
        "format": "glm-workbench-conversation",
        "version": 1,
        "id": found.id,
        "title": found.title,
        "created": _when(found.created),
        "updated": _when(found.updated),
        "model": found.model,
        "system": found.system,
        "settings": found.settings.to_json() if found.settings else None,
        "turns": [
            {"role": turn.role, "content": turn.text, "created": _when(turn.created)}
            | (
                {}
                if turn.is_user
                else {
                    key: value for key, value in asdict(turn).items() if key not in hidden and key != "role"
                }
            )
            for turn in found.turns
        ],
    }


def _as_markdown(found: Conversation) -> str:
    parts = [f"# {found.title or found.id}", f"{_when(found.created)} · {found.model or '-'}"]
    if found.system.strip():
        parts.append("**System prompt**\n\n" + "\n".join(f"> {line}" for line in found.system.splitlines()))
    for turn in found.turns:
        parts.append("## User" if turn.is_user else f"## {turn.model or 'Assistant'}")
        parts.append(strip_remote_images(turn.text) or "*(no text)*")
        if not turn.is_user and turn.state != "done":
            parts.append(f"*({turn.state}{': ' + turn.error if turn.error else ''})*")
    return "\n\n".join(parts) + "\n"


# --- what a model writes is not fetched ------------------------------------------------------------------

_INLINE = re.compile(
    r"!\[(?P<alt>(?:[^\[\]\\]|\\.)*)\]"  # ![alt]
    r"\(\s*(?P<url><[^<>\n]*>|[^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)"  # (url, with one level of brackets
    r"(?:\s+(?:\"[^\"]*\"|'[^']*'|\([^()]*\)))?\s*\)",  # and a title)
    re.DOTALL,
)
_TAG = re.compile(
    r"<\s*(?:img|image|picture|source|video|audio|iframe|embed|object)\b(?:\"[^\"]*\"|'[^']*'|[^<>\"'])*>",
    re.IGNORECASE,
)
_ATTRIBUTE = r"\b{}\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+))"
_DEFINITION = re.compile(r"(\[(?:[^\[\]\\]|\\.)+\]):", re.DOTALL)  # [label]: url, which ![alt][label] fetches
_BLANK_LINE = re.compile(r"\n[ \t>]*\n")
_LOCAL = re.compile(r"\s*<?\s*data:image/(?:png|jpe?g|gif|webp);base64,", re.IGNORECASE)


def strip_remote_images(text: str) -> str:
    """A model's Markdown with every image that would be fetched turned into its words and its address.

    Images embedded as data stay; links stay, since nobody fetches a link but who clicks on it. Where the form
    is doubtful the image is taken apart: a changed line of odd text is better than a request to a stranger.
    """
    if "<" in text:
        text = _TAG.sub(_tag_words, text)
    if "![" not in text:
        return text
    text = _INLINE.sub(_image_words, text)
    # What is left of `![` is data, unfinished, exotic (brackets within brackets), or a reference.
    text = re.sub(r"!(?=\[)", lambda match: match[0] if _harmless(text, match.end()) else "! ", text)
    return text if "![" not in text else _DEFINITION.sub(r"\1 :", text)


def _image_words(match: re.Match[str]) -> str:
    if _LOCAL.match(match["url"]):
        return match[0]
    alt, url = match["alt"].strip(), match["url"].strip("<>").strip()
    return f"{alt} ({url})" if alt and url else alt or url


def _harmless(text: str, at: int) -> bool:
    """Whether the bracket at `at` starts no fetched image: it is data, or its paragraph has no `](`."""
    found = _INLINE.match(text, at - 1)
    if found:
        return _LOCAL.match(found["url"]) is not None
    end = _BLANK_LINE.search(text, at)
    return text.find("](", at, end.start() if end else len(text)) < 0


def _tag_words(match: re.Match[str]) -> str:
    def attribute(name: str) -> str:
        found = re.search(_ATTRIBUTE.format(name), match[0], re.IGNORECASE)
        return next((group for group in found.groups() if group is not None), "").strip() if found else ""

    source, alt = attribute("src"), attribute("alt")
    if _LOCAL.match(source) or (not source and "//" not in match[0]):
        return match[0]
    return f"{alt} ({source})" if alt and source else alt or source
