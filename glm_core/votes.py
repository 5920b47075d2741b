"""Prompts answered by two to four checkpoints, and blind votes on the answers; both are kept in the workspace.

One model is in memory at a time, so the checkpoints answer one after the other; a base and an adapter of it share one
load, with the adapter switched off for the base. Every answer is stored when it is finished, every vote when it is given.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import statistics
from .errors import GLMError
from .statistics import Interval, Result

if TYPE_CHECKING:
    import torch

    from .checkpoints import CheckpointInfo
    from .engine import Engine, EngineHost, GenerationSettings, Handle
    from .jobs import JobStore
    from .tables import WriteReport

Choice = Literal["left", "right", "tie", "bad"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "bad")
Stage = Literal["waiting", "loading", "answering"]
Pair = tuple[int, int]

FEWEST, MOST = 2, 4  # checkpoints
MOST_PROMPTS = 20
LONGEST_PROMPT = 20_000  # characters
LONGEST_NAME = 60
POLL_S = 0.05
REST_S = 5.0
SELF_TESTED_BYTES = 500 << 20  # models below are tested when they are loaded, see EngineHost.use
DECIDABLE = 6  # prompts with a preference; with fewer no two-sided test reaches 5 %
FORMATS: tuple[Literal["csv", "jsonl", "xlsx", "parquet"], ...] = ("csv", "jsonl", "xlsx", "parquet")
COLUMNS = (
    "prompt_number", "prompt", "left", "right", "left_answer", "right_answer", "choice", "preferred", "voter", "voted",
    "trial",
)  # fmt: skip

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS trial(
        id TEXT PRIMARY KEY, created REAL NOT NULL, task TEXT NOT NULL, revealed INT NOT NULL DEFAULT 0,
        user TEXT NOT NULL DEFAULT '')""",
    """CREATE TABLE IF NOT EXISTS trial_answer(
        trial_id TEXT, prompt INT, side INT, text TEXT NOT NULL, tokens INT NOT NULL, seconds REAL NOT NULL,
        first REAL, rate REAL NOT NULL, finish TEXT NOT NULL, error TEXT NOT NULL,
        PRIMARY KEY(trial_id, prompt, side)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS trial_vote(
        seq INTEGER PRIMARY KEY AUTOINCREMENT, trial_id TEXT NOT NULL, prompt INT NOT NULL, "left" INT NOT NULL,
        "right" INT NOT NULL, choice TEXT NOT NULL, voter TEXT NOT NULL, time REAL NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS trial_vote_of ON trial_vote(trial_id, seq)",
)

_lock = threading.Lock()
_turn = threading.Lock()  # the model answers one trial at a time
_made: set[Path] = set()  # databases that have the tables
# Trials being answered in this process, by id: every screen finds them, also after a refresh.
_LIVE: dict[str, Live] = {}


# ---- what is asked of whom


@dataclass(frozen=True)
class Side:
    """A checkpoint as it answers.

    base      the checkpoint an adapter's folder is put on, else ""
    adapter   False: the folder carries an adapter, and answers without it
    """

    name: str
    checkpoint: str
    base: str
    precision: str
    device: str
    generation: str
    adapter: bool = True


@dataclass(frozen=True)
class Trial:
    """Prompts, the checkpoints that answer them, and how; `revealed` once names are shown without a vote."""

    id: str
    created: float
    sides: tuple[Side, ...]
    prompts: tuple[str, ...]
    settings: GenerationSettings
    system: str
    blind: bool
    seed: int
    revealed: bool = False
    user: str = ""  # whose it is; "" for one made without a login

    @property
    def title(self) -> str:
        """The checkpoints by name."""
        return " / ".join(side.name for side in self.sides)

    @property
    def hidden(self) -> bool:
        """Whether names are to be hidden until a vote."""
        return self.blind and not self.revealed


@dataclass(frozen=True)
class Answer:
    """One checkpoint's answer to one prompt; `error` says why there is none, or why it ended.

    seconds   of computing, waiting in line left out; first: until the first token
    rate      tokens per second after the first
    finish    "stop", "length", "cancelled" or "error"
    """

    text: str
    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    rate: float = 0.0
    finish: str = "stop"
    error: str = ""

    @property
    def usable(self) -> bool:
        """Whether it was written to its end, or as far as was allowed."""
        return self.finish in ("stop", "length")


@dataclass(frozen=True)
class Ballot:
    """Two answers to a prompt in the order they are shown; numbers of sides."""

    prompt: int
    left: int
    right: int

    @property
    def pair(self) -> Pair:
        return (min(self.left, self.right), max(self.left, self.right))


@dataclass(frozen=True)
class Vote:
    """What one person said of a ballot."""

    seq: int
    ballot: Ballot
    choice: Choice
    voter: str
    time: float

    @property
    def preferred(self) -> int | None:
        """The side that was preferred, None for a tie."""
        return {"left": self.ballot.left, "right": self.ballot.right}.get(self.choice)


@dataclass(frozen=True)
class Tally(Result):
    """The votes between two sides, a prompt counted once: for the side that more voters preferred.

    bad        ties where more voters called both answers bad than called them equally good
    identical  prompts that both answered with the same words; nobody is asked about them
    share      of the prompts with a preference, the share that preferred b: Clopper and Pearson's interval
    p_value    of no preference, by the sign test, raised by Holm where there are more pairs; None below 6 preferences
    """

    a: int
    b: int
    wins_a: int
    wins_b: int
    ties: int
    bad: int
    identical: int
    votes: int
    share: Interval
    p_value: float | None
    comparisons: int

    @property
    def decided(self) -> int | None:
        """The side that is preferred for certain, if any."""
        if self.p_value is None or self.p_value >= 1 - statistics.LEVEL:
            return None
        return self.a if self.wins_a > self.wins_b else self.b


def side(
    checkpoint: str | Path,
    base: str | Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    adapter: bool = True,
) -> Side:
    """A checkpoint as it will answer, looked at without loading a weight; GLMError where it cannot be loaded."""
    from . import checkpoints
    from .remote import find, is_remote

    if is_remote(checkpoint):
        found = find(str(checkpoint))
        return Side(found.label, found.spec, "", "remote", found.host, "remote")
    info = checkpoints.inspect(Path(checkpoint))
    if info.problems:
        raise GLMError(
            f"{info.path} cannot be loaded. {' '.join(info.problems)}", "Repair the folder or choose another."
        )
    under = checkpoints.base_of(info, base) if info.needs_base else info
    device = checkpoints.best_device() if device == "auto" else device
    if precision == "auto":
        precision = checkpoints.best_precision(under, device)
    return Side(
        _name(info, under, precision, adapter), str(info.path), str(under.path) if info.needs_base else "", precision,
        device, under.generation, adapter or info.adapter is None,
    )  # fmt: skip


def _name(info: CheckpointInfo, under: CheckpointInfo, precision: str, adapter: bool) -> str:
    name = f"{info.name} on {under.name}" if info.needs_base else info.name
    return f"{name}{'' if adapter or info.adapter is None else ' without adapter'} · {precision.upper()}"


def prompts_of(text: str, by_line: bool) -> tuple[str, ...]:
    """The prompts in a box of text: one, or one per line; blank ones are left out."""
    found = text.splitlines() if by_line else [text]
    return tuple(one.strip() for one in found if one.strip())


# ---- what is kept


class Trials:
    """Trials, their answers and their votes in the database of the jobs; any thread and any process may use it.

    Whose trials are there is for the person of the store.
    """

    def __init__(self, store: JobStore) -> None:
        self.store = store
        with _lock:
            if store.path not in _made:
                with store.writing() as db:
                    for statement in SCHEMA:
                        db.execute(statement)
                    if "user" not in {row["name"] for row in db.execute("PRAGMA table_info(trial)")}:
                        db.execute("ALTER TABLE trial ADD COLUMN user TEXT NOT NULL DEFAULT ''")
                _made.add(store.path)

    def create(
        self,
        sides: Sequence[Side],
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        system: str = "",
        blind: bool = True,
        seed: int = 0,
    ) -> Trial:
        """A new trial without answers; GLMError for too few or equal checkpoints, and for prompts that cannot be asked.

        seed   of the order in which answers are shown
        """
        from .engine import GenerationSettings

        self.store.person.require("load")  # the checkpoints take the place of the loaded model
        if not FEWEST <= len(sides) <= MOST:
            raise GLMError(
                f"{len(sides)} checkpoints cannot be compared.", f"Choose from {FEWEST} to {MOST}."
            )
        if len({replace(one, name="") for one in sides}) < len(sides):
            raise GLMError(
                "Two of the checkpoints are the same.", "Choose another checkpoint, or another precision."
            )
        if not prompts:
            raise GLMError("There is no prompt.", "Write a prompt.")
        if len(prompts) > MOST_PROMPTS:
            raise GLMError(
                f"There are {len(prompts):,} prompts.",
                f"Ask at most {MOST_PROMPTS}; compare runs of a file where there are more.",
            )
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) > LONGEST_PROMPT:
                raise GLMError(
                    f"Prompt {number} has {len(prompt):,} characters.", f"Use at most {LONGEST_PROMPT:,}."
                )
        settings = settings or GenerationSettings()
        settings.check()
        now = time.time()
        made = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        task = {
            "sides": [asdict(one) for one in sides], "prompts": [_clean(one) for one in prompts],
            "settings": settings.to_json(), "system": _clean(system), "blind": blind, "seed": seed,
        }  # fmt: skip
        with self.store.writing() as db:
            db.execute(
                "INSERT INTO trial(id, created, task, user) VALUES (?,?,?,?)",
                (made, now, json.dumps(task, ensure_ascii=False), self.store.person.name),
            )
        return self.get(made)

    def get(self, trial_id: str) -> Trial:
        """A trial by its id; GLMError if there is none."""
        row = self.store.connection().execute("SELECT * FROM trial WHERE id = ?", (trial_id,)).fetchone()
        person = self.store.person
        if row is None or not (person.sees_all or row["user"] == person.name):
            raise GLMError(
                f"There is no comparison of prompts {trial_id!r}.", "It was deleted; start a new one."
            )
        return _trial(row)

    def newest(self, limit: int = 100) -> list[Trial]:
        """The newest trials first."""
        query, values = "SELECT * FROM trial", []
        if (mine := self.store.person.lists) is not None:
            query, values = f"{query} WHERE user IN ({','.join('?' * len(mine))})", [*mine]
        rows = self.store.connection().execute(f"{query} ORDER BY id DESC LIMIT ?", (*values, limit))
        return [_trial(row) for row in rows]

    def delete(self, trial_id: str) -> None:
        """Delete a trial with its answers and votes, and end its answering; nothing happens if it is gone."""
        if not self._is_there(trial_id):
            return
        if (answering := _LIVE.get(trial_id)) is not None:
            answering.stop.set()
        with self.store.writing() as db:
            for table, key in (("trial_vote", "trial_id"), ("trial_answer", "trial_id"), ("trial", "id")):
                db.execute(f"DELETE FROM {table} WHERE {key} = ?", (trial_id,))

    def _is_there(self, trial_id: str) -> bool:
        if self.store.person.sees_all:
            return True
        try:
            self.get(trial_id)
        except GLMError:
            return False
        return True

    def reveal(self, trial_id: str) -> None:
        """Show the names of a blind trial from now on; what is not voted on by then is not asked any more."""
        if not self._is_there(trial_id):
            return
        with self.store.writing() as db:
            db.execute("UPDATE trial SET revealed = 1 WHERE id = ?", (trial_id,))

    # -- answers

    def answers(self, trial_id: str) -> dict[Pair, Answer]:
        """(prompt, side) -> answer, of those finished."""
        if not self._is_there(trial_id):
            return {}
        names = [one.name for one in fields(Answer)]
        rows = self.store.connection().execute("SELECT * FROM trial_answer WHERE trial_id = ?", (trial_id,))
        return {(row["prompt"], row["side"]): Answer(**{name: row[name] for name in names}) for row in rows}

    def save(self, trial_id: str, prompt: int, side_number: int, answer: Answer) -> bool:
        """Keep an answer; False where the trial was deleted meanwhile."""
        values = asdict(answer) | {"text": _clean(answer.text), "error": _clean(answer.error)}
        with self.store.writing() as db:
            if db.execute("SELECT 1 FROM trial WHERE id = ?", (trial_id,)).fetchone() is None:
                return False
            db.execute(
                f"INSERT OR REPLACE INTO trial_answer(trial_id, prompt, side, {', '.join(values)}) "
                f"VALUES (?,?,?{',?' * len(values)})",
                (trial_id, prompt, side_number, *values.values()),
            )
        return True

    def unanswered(self, trial: Trial) -> list[Pair]:
        """(prompt, side) without a whole answer, in the order of the prompts."""
        found = self.answers(trial.id)
        return [
            (prompt, number)
            for prompt in range(len(trial.prompts))
            for number in range(len(trial.sides))
            if (prompt, number) not in found or not found[prompt, number].usable
        ]

    # -- votes

    def ballots(self, trial: Trial, answers: Mapping[Pair, Answer] | None = None) -> list[Ballot]:
        """Every two answers to be voted on, in the order they are shown: both whole, and not the same words.

        The order of pairs and who stands on the left depend on the trial's seed alone.
        """
        found = self.answers(trial.id) if answers is None else answers
        return [
            ballot
            for ballot in _all_ballots(trial)
            if _comparable(found, ballot)
            and not _identical(found[ballot.prompt, ballot.left], found[ballot.prompt, ballot.right])
        ]

    def vote(self, trial_id: str, ballot: Ballot, choice: Choice, voter: str = "") -> Vote:
        """Keep what a person says of a ballot in place of what this person said before; GLMError for no such ballot."""
        trial = self.get(trial_id)
        if choice not in CHOICES:
            raise GLMError(f"{choice!r} is no vote.", f"Choose one of {', '.join(CHOICES)}.")
        if ballot not in self.ballots(trial):
            raise GLMError(
                "These two answers cannot be voted on.",
                "Wait until both are written, or load the page again.",
            )
        name, now = voter_name(voter), time.time()
        place = (trial_id, ballot.prompt, ballot.left, ballot.right)
        with self.store.writing() as db:
            db.execute(
                'DELETE FROM trial_vote WHERE trial_id = ? AND prompt = ? AND "left" = ? AND "right" = ? AND voter = ?',
                (*place, name),
            )
            added = db.execute(
                'INSERT INTO trial_vote(trial_id, prompt, "left", "right", choice, voter, time) VALUES (?,?,?,?,?,?,?)',
                (*place, choice, name, now),
            )
        return Vote(int(added.lastrowid or 0), ballot, choice, name, now)

    def votes(self, trial_id: str) -> list[Vote]:
        """Every vote, the oldest first."""
        if not self._is_there(trial_id):
            return []
        rows = self.store.connection().execute(
            "SELECT * FROM trial_vote WHERE trial_id = ? ORDER BY seq", (trial_id,)
        )
        return [
            Vote(
                row["seq"], Ballot(row["prompt"], row["left"], row["right"]), row["choice"], row["voter"], row["time"]
            )
            for row in rows
        ]  # fmt: skip

    def undo(self, trial_id: str, voter: str = "") -> Vote | None:
        """Take back a person's last vote and return it; None where there is none."""
        name = voter_name(voter)
        mine = [one for one in self.votes(trial_id) if one.voter == name]
        if not mine:
            return None
        with self.store.writing() as db:
            db.execute("DELETE FROM trial_vote WHERE seq = ?", (mine[-1].seq,))
        return mine[-1]

    def forget(self, trial_id: str) -> int:
        """Delete all votes of a trial for good; how many. Ask the person first."""
        with self.store.writing() as db:
            return db.execute("DELETE FROM trial_vote WHERE trial_id = ?", (trial_id,)).rowcount

    def tally(self, trial: Trial) -> list[Tally]:
        """The votes of every pair of sides, p values raised by Holm's method where there are several."""
        answers, votes = self.answers(trial.id), self.votes(trial.id)
        counted = [_counted(trial, pair, answers, votes) for pair in combinations(range(len(trial.sides)), 2)]
        tested = [place for place, one in enumerate(counted) if one.p_value is not None]
        raised = statistics.holm([counted[place].p_value or 0.0 for place in tested])
        for place, p in zip(tested, raised, strict=True):
            counted[place] = replace(counted[place], p_value=p, comparisons=len(tested))
        return counted

    # -- leaving

    def export(self, trial_id: str, path: str | Path) -> WriteReport:
        """Write every vote with its prompt, its answers and the names; the format is that of the file's ending.

        GLMError where nobody has voted yet.
        """
        from . import tables

        path, trial = Path(path), self.get(trial_id)
        format = next((one for one in FORMATS if path.suffix.lower() == f".{one}"), None)
        if format is None:
            raise GLMError(
                f"Votes are not written as {path.suffix or 'a file without an ending'}.",
                f"Choose one of: {', '.join(FORMATS)}.",
            )
        votes, answers = self.votes(trial_id), self.answers(trial_id)
        if not votes:
            raise GLMError("Nobody has voted yet.", "Vote on some answers first.")
        names = [one.name for one in trial.sides]

        def rows() -> Iterator[tuple[str | float | None, ...]]:
            for one in votes:
                at = one.ballot
                yield (
                    at.prompt + 1, trial.prompts[at.prompt], names[at.left], names[at.right],
                    *(answers[at.prompt, number].text if (at.prompt, number) in answers else ""
                      for number in (at.left, at.right)),
                    one.choice, names[one.preferred] if one.preferred is not None else "", one.voter,
                    time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(one.time)), trial_id,
                )  # fmt: skip

        return tables.write(path, COLUMNS, rows(), format)


def voter_name(name: str) -> str:
    """A voter's name as it is stored, which may be empty; GLMError for one that is too long."""
    found = " ".join(_clean(name).split())
    if len(found) > LONGEST_NAME:
        raise GLMError(f"The voter's name has {len(found)} characters.", f"Use at most {LONGEST_NAME}.")
    return found


def _trial(row: sqlite3.Row) -> Trial:
    from .engine import GenerationSettings

    task = json.loads(row["task"])
    return Trial(
        row["id"], row["created"], tuple(Side(**one) for one in task["sides"]), tuple(task["prompts"]),
        GenerationSettings.from_json(task["settings"]), task["system"], bool(task["blind"]), int(task["seed"]),
        bool(row["revealed"]), row["user"],
    )  # fmt: skip


def _all_ballots(trial: Trial) -> list[Ballot]:
    found = []
    for prompt in range(len(trial.prompts)):
        chance = random.Random(f"{trial.seed}-{prompt}")
        pairs = list(combinations(range(len(trial.sides)), 2))
        chance.shuffle(pairs)
        found += [Ballot(prompt, *(pair if chance.random() < 0.5 else pair[::-1])) for pair in pairs]
    return found


def _comparable(answers: Mapping[Pair, Answer], ballot: Ballot) -> bool:
    both = [answers.get((ballot.prompt, number)) for number in (ballot.left, ballot.right)]
    return all(one is not None and one.usable for one in both)


def _identical(a: Answer, b: Answer) -> bool:
    return a.text.strip() == b.text.strip()


def _counted(trial: Trial, pair: Pair, answers: Mapping[Pair, Answer], votes: Sequence[Vote]) -> Tally:
    """The tally of a pair with the p value of the sign test alone."""
    a, b = pair
    by_prompt: dict[int, list[Vote]] = {}
    for one in votes:
        if one.ballot.pair == pair:
            by_prompt.setdefault(one.ballot.prompt, []).append(one)
    wins, ties, bad = {a: 0, b: 0}, 0, 0
    for given in by_prompt.values():
        counts = Counter(one.preferred for one in given)
        if counts[a] != counts[b]:
            wins[a if counts[a] > counts[b] else b] += 1
        elif 2 * sum(one.choice == "bad" for one in given) > counts[None]:
            bad += 1
        else:
            ties += 1
    identical = sum(
        _comparable(answers, Ballot(prompt, a, b)) and _identical(answers[prompt, a], answers[prompt, b])
        for prompt in range(len(trial.prompts))
    )
    n = wins[a] + wins[b]
    # The sign test is McNemar's on the prompts with a preference.
    test = statistics.mcnemar([True] * wins[a] + [False] * wins[b], [False] * wins[a] + [True] * wins[b])
    return Tally(
        a, b, wins[a], wins[b], ties, bad, identical, sum(map(len, by_prompt.values())),
        share_interval(wins[b], n), test.p_value if n >= DECIDABLE else None, 1,
    )  # fmt: skip


def share_interval(successes: int, n: int, level: float = statistics.LEVEL) -> Interval:
    """A share with the two-sided interval of Clopper and Pearson (1934), which fits the exact sign test."""
    one_sided = 0.5 + level / 2
    low = statistics.share_at_least(successes, n, one_sided)
    high = statistics.share_at_least(n - successes, n, one_sided)
    if low is None or high is None:
        return Interval(None, None, None, 0, level, "clopper-pearson", "Nobody has preferred an answer yet.")
    return Interval(successes / n, low, 1 - high, n, level, "clopper-pearson")


def _clean(text: str) -> str:
    """Text that sqlite and JSON accept: half of a surrogate pair cannot be stored."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- answering


@dataclass(frozen=True)
class Load:
    """One model in memory and who answers with it: (number of the side, whether the adapter is on)."""

    path: str
    base: str
    precision: str
    device: str
    generation: str
    sides: tuple[tuple[int, bool], ...]


@dataclass
class Live:
    """What a trial is doing, for a screen that looks again and again.

    texts   (prompt, side) -> the answer so far, of those being written
    """

    stop: threading.Event = field(default_factory=threading.Event)
    stage: Stage = "waiting"
    name: str = ""
    texts: dict[Pair, Callable[[], tuple[str, int]]] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def text(self, prompt: int, side_number: int) -> tuple[str, int] | None:
        """(the answer so far, its tokens); None where it is not being written."""
        look = self.texts.get((prompt, side_number))
        return look() if look is not None else None


def loads(sides: Sequence[Side]) -> list[Load]:
    """The models to load and who answers with each; a base answers with the load of an adapter on it, switched off."""
    found: dict[tuple[str, str, str, str, str], list[tuple[int, bool]]] = {}
    own = [
        (one.checkpoint, one.base, one.precision, one.device, one.generation)
        for one in sides
    ]  # fmt: skip
    for number, one in enumerate(sides):
        shared = next(
            (
                own[place]
                for place, other in enumerate(sides)
                if other.base
                and not one.base
                and other.base == one.checkpoint
                and own[place][2:] == own[number][2:]
            ),
            None,
        )
        if shared is not None:
            found.setdefault(shared, []).append((number, False))
        else:
            found.setdefault(own[number], []).append((number, one.adapter))
    return [Load(*key, tuple(members)) for key, members in found.items()]


def live(trial_id: str) -> Live | None:
    """What a trial is doing in this process; None where it is not being answered."""
    return _LIVE.get(trial_id)


def begin(trials: Trials, trial_id: str, host: EngineHost | None = None) -> Live:
    """Answer in the background what has no whole answer yet; a trial that is being answered goes on as it is."""
    from . import engine

    trials.store.person.require("load")
    trial = trials.get(trial_id)
    with _lock:
        if (found := _LIVE.get(trial_id)) is not None and not found.ended.is_set():
            return found
        started = _LIVE[trial_id] = Live()
    threading.Thread(
        target=_work, args=(trials, trial, host or engine.host(), started), name="glm-votes", daemon=True
    ).start()
    return started


def _work(trials: Trials, trial: Trial, host: EngineHost, now: Live) -> None:
    try:
        with _turn:
            run(trials, trial, host, now)
    finally:
        now.ended.set()
        with _lock:
            if _LIVE.get(trial.id) is now:
                del _LIVE[trial.id]


def run(trials: Trials, trial: Trial, host: EngineHost, now: Live | None = None) -> None:
    """Answer here and now what has no whole answer yet; a checkpoint that does not load fails alone, with its reason."""
    now = now or Live()
    current = host.current
    left = loads(trial.sides)
    # What is in memory already answers first.
    left.sort(key=lambda one: current is None or str(current.loaded.info.path) != one.path)
    for one in left:
        open_ = trials.unanswered(trial)
        wanted = {number: [p for p, n in open_ if n == number] for number, _ in one.sides}
        if now.stop.is_set() or not any(wanted.values()):
            continue
        try:
            _with_load(trials, trial, host, now, one, wanted)
        except Exception as error:
            told = str(error) if isinstance(error, GLMError) else f"{type(error).__name__}: {error}"
            for prompt, number in trials.unanswered(trial):
                if number in wanted:
                    trials.save(trial.id, prompt, number, Answer("", finish="error", error=told))
            if not isinstance(error, GLMError):
                raise
        finally:
            now.texts.clear()


def _with_load(
    trials: Trials, trial: Trial, host: EngineHost, now: Live, one: Load, wanted: Mapping[int, Sequence[int]]
) -> None:
    """Answer by every side of a load.

    The model is not held: a job that needs another one takes its place, and what it cut off is asked once more, which
    is refused with the job's name as long as the job runs.
    """
    from .remote import shown

    for again in (False, True):
        now.stage, now.name = "loading", shown(one.path)
        engine = host.use(one.path, one.precision, one.device, one.generation, one.base or None)
        _rest(engine, now)
        try:
            for number, adapted in one.sides:
                if wanted[number] and not now.stop.is_set():
                    now.stage, now.name = "answering", trial.sides[number].name
                    _answer(trials, trial, engine, now, number, adapted, wanted[number])
        except GLMError:
            if host.current is engine or again:
                raise
        if host.current is engine or now.stop.is_set():
            return
        open_ = trials.unanswered(trial)
        wanted = {number: [p for p, n in open_ if n == number] for number, _ in one.sides}


def _rest(engine: Engine, now: Live) -> None:
    """Wait for the self-test of a small model that was just loaded: it would be counted into the speed of the first."""
    end = time.monotonic() + REST_S
    small = engine.remote is None and engine.loaded.weight_bytes < SELF_TESTED_BYTES
    while small and engine.exact is None and not now.stop.is_set() and time.monotonic() < end:
        time.sleep(POLL_S)


def _prompt_ids(trial: Trial, engine: Engine, prompt: int) -> tuple[int, ...]:
    from .tokenizers.base import Message

    head = [Message("system", trial.system)] if trial.system.strip() else []
    return tuple(engine.tokenizer.chat_ids([*head, Message("user", trial.prompts[prompt])]))


def _answer(
    trials: Trials,
    trial: Trial,
    engine: Engine,
    now: Live,
    number: int,
    adapted: bool,
    prompts: Sequence[int],
) -> None:
    """Answer prompts by one side and keep each answer as soon as it ends."""
    from . import effect
    from .engine import Request

    requests = {}
    for prompt in prompts:
        try:
            requests[prompt] = Request(_prompt_ids(trial, engine, prompt), trial.settings, priority="chat")
            engine.check(requests[prompt])
        except GLMError as error:  # too long: the others are answered
            requests.pop(prompt, None)
            trials.save(trial.id, prompt, number, Answer("", finish="error", error=str(error)))
    if adapted or not effect.has_adapter(engine):
        _stream(trials, trial, engine, now, number, requests)
    else:
        _Bare(trials, trial, engine, now, number, requests).run()


def _stream(
    trials: Trials, trial: Trial, engine: Engine, now: Live, number: int, requests: Mapping[int, Any]
) -> None:
    """Answers of the model as it is loaded, by the engine's own queue."""
    handles: dict[int, Handle] = {}
    for prompt, request in requests.items():
        try:
            handles[prompt] = engine.submit(request)
        except GLMError as error:
            trials.save(trial.id, prompt, number, Answer("", finish="error", error=str(error)))
    for prompt, handle in handles.items():
        now.texts[prompt, number] = partial(_so_far, handle)
    open_ = dict(handles)
    while open_:
        for prompt, handle in list(open_.items()):
            if now.stop.is_set():
                handle.cancel("user")
            if not handle.wait(POLL_S / len(open_)):
                continue
            del open_[prompt]
            if not trials.save(trial.id, prompt, number, _of_handle(handle)):
                now.stop.set()
            now.texts.pop((prompt, number), None)


def _so_far(handle: Handle) -> tuple[str, int]:
    return handle.text, handle.n_tokens


def _of_handle(handle: Handle) -> Answer:
    begun = handle.started or handle.submitted
    return Answer(
        handle.text, handle.n_tokens, (handle.ended or begun) - begun,
        None if handle.first_token is None else handle.first_token - begun, handle.tokens_per_second,
        handle.finish_reason or "cancelled", str(handle.error) if handle.error else "",
    )  # fmt: skip


def _lora_switch(engine: Engine) -> Callable[[], AbstractContextManager[None]]:
    """What has to be open around a forward without the LoRA.

    It sets the layers' flags alone, 0.1 ms for the embedded model; `adapters.use_lora` also goes through the layers'
    parameters, 3 ms of the 20 a token takes on 2 cores.
    """
    layers = [layer for layer in engine.model.modules() if hasattr(layer, "_disable_adapters")]

    @contextmanager
    def off() -> Iterator[None]:
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, flag in zip(layers, before, strict=True):
                layer._disable_adapters = flag

    return off


class _Row:
    """A prompt being answered without the adapter."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.ids: list[int] = []
        self.first: float | None = None
        self.finish = ""
        self.error = ""
        self.generator: torch.Generator | None = None


class _Bare:
    """Answers of a loaded model with its adapter switched off, forward by forward between the engine's own steps.

    Requests of others run meanwhile and never see the adapter switched off, as in `effect.measure`.
    """

    def __init__(
        self,
        trials: Trials,
        trial: Trial,
        engine: Engine,
        now: Live,
        number: int,
        requests: Mapping[int, Any],
    ) -> None:
        self.trials, self.trial, self.engine, self.now, self.number = trials, trial, engine, now, number
        self.rows = {prompt: _Row(request) for prompt, request in requests.items()}
        self.view, self.switch = (
            (engine.without_prefix(), nullcontext)
            if engine.loaded.prefix is not None
            else (engine, _lora_switch(engine))
        )

    def run(self) -> None:
        """Some rows at a time; fewer where memory runs out."""
        from .engine import out_of_memory

        size = max(1, min(len(self.rows), self.engine.max_rows))
        while (open_ := [p for p, row in self.rows.items() if not row.finish]) and not self.now.stop.is_set():
            group = open_[:size]
            try:
                self._together(group)
            except Exception as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size //= 2
                for prompt in group:
                    if not self.rows[prompt].finish:
                        self.rows[prompt] = _Row(self.rows[prompt].request)

    def _together(self, group: Sequence[int]) -> None:
        import torch.nn.functional as F

        view, engine = self.view, self.engine
        rows = [self.rows[prompt] for prompt in group]
        prompts = [list(row.request.prompt_ids) for row in rows]
        for prompt, row in zip(group, rows, strict=True):
            self.now.texts[prompt, self.number] = partial(self._so_far, row)
        begun = time.monotonic()
        cache = view.empty_cache(len(prompts))  # of its own: nothing goes into the engine's prefix cache
        ids, real, positions = view.left_padded(prompts, 0)
        layout = view.layouts(prompts)
        known = real.shape[1] - ids.shape[1]
        chunk = engine.forward_columns(len(prompts), ids.shape[1])
        found: list[Any] = []

        def forward(begin: int, end: int) -> None:
            with self.switch():
                found[:] = [
                    view.forward(
                        cache, ids[:, begin:end], positions[:, begin:end], real[:, : known + end], layout
                    )
                ]

        while not self.now.stop.is_set():
            width = ids.shape[1]
            for begin in range(0, width, chunk):
                engine.between_steps(partial(forward, begin, min(width, begin + chunk)))
            tokens = self._choose(rows, found[0])
            for prompt, row in zip(group, rows, strict=True):
                if row.finish and (prompt, self.number) in self.now.texts:
                    self._keep(prompt, row, begun)
            if all(row.finish for row in rows):
                return
            known = real.shape[1]
            ids, positions = ids.new_tensor(tokens)[:, None], positions[:, -1:] + 1
            real = F.pad(real, (0, 1), value=True)
        for prompt, row in zip(group, rows, strict=True):
            if not row.finish:
                row.finish = "cancelled"
                self._keep(prompt, row, begun)

    def _choose(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[int]:
        """The next token of every row, by the engine's own rule; rows that have ended get any."""
        from .engine import _generator, choose

        settings = self.trial.settings
        largest, likeliest = logits.max(-1)
        usable, tokens = largest.isfinite().tolist(), likeliest.tolist()
        for place, row in enumerate(rows):
            if row.finish:
                continue
            if not usable[place]:
                row.finish = "error"
                row.error = str(
                    GLMError(
                        f"The model's numbers left the range of {self.engine.loaded.precision} after {len(row.ids)}"
                        " tokens.",
                        "Load the model in bf16 or fp32, or shorten the text.",
                    )
                )
                continue
            if settings.temperature > 0 or settings.repetition_penalty != 1.0:
                if row.generator is None and settings.temperature > 0:
                    row.generator = _generator(settings.seed)
                seen = [*row.request.prompt_ids, *row.ids]
                tokens[place] = choose(logits[place], settings, seen, row.generator)
            row.ids.append(tokens[place])
            row.first = row.first or time.monotonic()
            row.finish = self._end(row)
        return [int(one) for one in tokens]

    def _end(self, row: _Row) -> str:
        settings, tokenizer = self.trial.settings, self.engine.tokenizer
        if row.ids[-1] in tokenizer.stop_ids:
            return "stop"
        if settings.stop and any(stop in tokenizer.answer_text(row.ids, False) for stop in settings.stop):
            return "stop"
        full = len(row.request.prompt_ids) + len(row.ids) >= self.engine.context
        return "length" if full or len(row.ids) >= settings.max_new_tokens else ""

    def _so_far(self, row: _Row) -> tuple[str, int]:
        ids = list(row.ids)
        text = self.engine.tokenizer.answer_text(ids, bool(row.finish))
        for stop in self.trial.settings.stop:
            text = text.split(stop, 1)[0]
        return text, len(ids)

    def _keep(self, prompt: int, row: _Row, begun: float) -> None:
        text, count = self._so_far(row)
        ended = time.monotonic()
        rate = (count - 1) / max(ended - row.first, 1e-6) if row.first is not None and count > 1 else 0.0
        first = None if row.first is None else row.first - begun
        answer = Answer(text, count, ended - begun, first, rate, row.finish, row.error)
        if not self.trials.save(self.trial.id, prompt, self.number, answer):
            self.now.stop.set()
        self.now.texts.pop((prompt, self.number), None)
