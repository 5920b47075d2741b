"""A training as a job: checked and queued, run in a process of its own, followed by any number of screens.

The process (child.py) and this one share only the output folder: job.json says what to do, messages.jsonl and
events.jsonl tell how far it is, result.json how it ended, and training.lock is held while it runs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ..errors import GLMError
from ..jobs import Job, JobStore, StopSignal
from ..settings import REPOSITORY, Settings
from . import state
from .adapt import FOLDER as ADAPT
from .adapt import Adapt
from .work import AUDIT, EVENTS, MANIFEST, SAMPLES, WITHOUT, FinetuneTask, refuse_used

JOB, RESULT, MESSAGES, LOCK, LOG = (
    "job.json",
    "result.json",
    "messages.jsonl",
    "training.lock",
    "training.log",
)
REPORT = "report.json"
# What a training leaves that never saved a step: of no use to anybody.
REMAINS = frozenset((JOB, RESULT, MESSAGES, LOCK, LOG, AUDIT, EVENTS, SAMPLES, MANIFEST))
OPEN_STATES = ("preparing", "queued", "running", "paused")
STOP_S = 120.0  # for the step under way and its checkpoint; three steps, where they take longer
GRACE_S = 30.0  # after that, for the process to end by itself
POLL_S = 0.2
# Lines of Python's own report of a crash that say where, not what.
TRACE = ("  File ", "Current thread ", "Thread 0x", "Extension modules: ", "Python runtime state: ")
QUOTED_LINES, QUOTED_CHARACTERS = 3, 400
KEPT_MESSAGES = 200
KEPT_FOLLOWERS = 8


@dataclass(frozen=True)
class FinetuneJob:
    """A training as a job stores it.

    report     measure the result when it is trained, into report.json
    keep_chat  the loaded chat model is not unloaded, even where the training does not fit beside it
    adapt      Adapt as JSON types; `start` puts it into the task
    """

    task: FinetuneTask
    report: bool = True
    keep_chat: bool = False
    adapt: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The job as JSON types."""
        return {
            "task": self.task.to_json(),
            "report": self.report,
            "keep_chat": self.keep_chat,
            "adapt": self.adapt,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FinetuneJob:
        """What `to_json` gave; unknown keys are ignored. GLMError if a value is missing."""
        try:
            return cls(
                FinetuneTask.from_json(data["task"]),
                bool(data.get("report", True)),
                bool(data.get("keep_chat", False)),
                dict(data.get("adapt") or {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GLMError(
                f"The stored training is incomplete ({error}).", "Start the training again."
            ) from error


# ---- the start


def start(store: JobStore, what: FinetuneJob, title: str) -> Job:
    """Queue a training and reserve its folder; GLMError, with neither made, for what can be refused at once."""
    from .. import checkpoints

    task = what.task
    if what.adapt:
        task = replace(task, adapt=Adapt.from_json(what.adapt))
    if problems := task.problems():
        raise GLMError(
            " ".join(message for message, _ in problems),
            " ".join(dict.fromkeys(todo for _, todo in problems)),
        )
    task = _absolute(task)
    output = _allowed_output(Settings.read(), Path(task.output))
    files = [task.train_file, task.dev_file, task.general_file]
    if task.adapt is not None:
        files += [task.adapt.file, *task.adapt.exclude]
    for name in filter(None, files):
        _check_readable(Path(name))
    checkpoints.inspect(Path(task.checkpoint))
    if task.start_from and not Path(task.start_from).is_dir():
        raise GLMError(f"There is no folder {task.start_from}.", "Check the path of the checkpoint.")
    if not _clear(store, output):
        refuse_used(output, resume=False, overwrite=False)
    made = _reserve(output)
    try:
        what = replace(what, task=task, adapt={})
        job = store.create("finetune", title, what.to_json())
        write_json(output / JOB, {"job": job.id, "run": "", "what": what.to_json()})
        return store.mark_ready(job.id, 0)
    except BaseException:
        (output / JOB).unlink(missing_ok=True)
        _take_back(made)
        raise


def _absolute(task: FinetuneTask) -> FinetuneTask:
    """The task with paths that mean the same in any process."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path else ""

    names = ("checkpoint", "train_file", "dev_file", "general_file", "output", "start_from")
    adapt = task.adapt
    if adapt is not None:
        adapt = replace(adapt, file=whole(adapt.file), exclude=tuple(map(whole, adapt.exclude)))
    paths: dict[str, Any] = {name: whole(getattr(task, name)) for name in names}
    return replace(task, adapt=adapt, **paths)


def _allowed_output(settings: Settings, output: Path) -> Path:
    roots = [root for root in settings.model_roots if root != REPOSITORY and REPOSITORY not in root.parents]
    roots.append(Path.home().resolve())
    inside = any(root in output.parents for root in roots)
    if not inside or output == REPOSITORY or REPOSITORY in output.parents:
        raise GLMError(
            f"The output folder {output} is outside the folders this workbench may write "
            f"({', '.join(str(root) for root in roots)}).",
            "Choose a folder in one of them, or add its parent to GLM_MODELS and start again.",
        )
    return output


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise GLMError(
            f"{path.name} cannot be read: {error.strerror or error}.", "Choose the file again."
        ) from error


def _reserve(output: Path) -> list[Path]:
    """Create the folder with an empty job.json; the folders that had to be made, the innermost first."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / JOB).open("x").close()  # of two starts at the same moment one gets here
    except FileExistsError:
        refuse_used(output, resume=False, overwrite=False)
        raise
    except OSError as error:
        _take_back(made)
        raise GLMError(
            f"The output folder {output} cannot be written: {error.strerror or error}.",
            "Choose another folder.",
        ) from error
    return made


def _take_back(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # never made, or somebody else put something there
            folder.rmdir()


def _clear(store: JobStore, output: Path) -> bool:
    """Take away what a training left that is over and never saved a step; whether there was one."""
    if not (output / JOB).is_file() or {path.name for path in output.iterdir()} - REMAINS or held(output):
        return False
    with suppress(GLMError):  # deleted
        if store.get(str(read_json(output / JOB).get("job", ""))).state in OPEN_STATES:
            return False
    for name in REMAINS - {LOCK, LOG}:
        (output / name).unlink(missing_ok=True)
    return True


# ---- the run


def run(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Train in a process of its own until it ends or `stop` says so; GLMError with the reason where it fails."""
    what = FinetuneJob.from_json(job.task)
    folder, token = Path(what.task.output), secrets.token_hex(8)

    def waiting() -> None:
        store.update(job.id, "Waiting until an earlier process of this training has ended ...")

    try:
        _own(job, store, folder)
        write_json(folder / JOB, {"job": job.id, "run": token, "what": what.to_json()})
        with hold(folder, None, stop.event.is_set, waiting):  # whose memory would count as taken below
            pass
        try:
            _make_room(job, store, what)
        except GLMError as error:
            write_result(folder, token, "failed", error.message, error.todo)
            raise
        log = folder / LOG
        begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = _process(folder, output)
        try:
            _follow(process, job, store, stop, folder)
        finally:
            _end(process, folder)
        result = read_json(folder / RESULT)
        if result.get("run") == token:
            _take_over(result, job, store, stop, folder)
        elif not stop.event.is_set():
            problem = _died(process.returncode, folder, begin)
            write_result(folder, token, "failed", problem.message, problem.todo)
            raise problem
    except _Asked:
        pass
    except OSError as error:
        raise GLMError(
            f"The training in {folder} could not go on: {error.strerror or error}.",
            "Free some disk space or memory, then resume.",
        ) from error


def _process(folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "glm_core.finetune.child", str(folder)],
        stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
        # Threads that spin while they wait take the processor from each other: on two cores with other work a step of
        # glm-mini took 8.7 s instead of 0.9 s.
        env={
            "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(path),
        },
        # Ctrl-C in the terminal is for the server, which then asks for a checkpoint.
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )  # fmt: skip


def _take_over(result: Mapping[str, Any], job: Job, store: JobStore, stop: StopSignal, folder: Path) -> None:
    """Give the job what the process said at its end."""
    for warning in result.get("warnings", ()):
        store.warn(job.id, str(warning))
    if result["state"] == "failed":
        raise GLMError(str(result["message"]), str(result["todo"]))
    if result["state"] == "stopped" and not stop.event.is_set():
        raise GLMError("The training process was asked to end from outside.", _resume_from(folder))


def _own(job: Job, store: JobStore, folder: Path) -> None:
    """Make sure that the folder is this job's; one that was deleted is made again."""
    found = read_json(folder / JOB)
    if not found and (not folder.exists() or not any(folder.iterdir())):
        if job.attempt > 1:
            store.warn(job.id, f"The output folder {folder} was gone; the training began again.")
        _reserve(folder)
    elif found.get("job") != job.id:
        raise GLMError(
            f"The output folder {folder} belongs to another training by now.",
            "Start this training again in another folder.",
        )


def _follow(
    process: subprocess.Popen[bytes], job: Job, store: JobStore, stop: StopSignal, folder: Path
) -> None:
    """Say how far the process is until it ends; ask it to, once `stop` says so."""
    follower = Follower(folder)
    saved = follower.read().saved
    shown, told, asked, limit = "", 0.0, float("inf"), 0.0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return
        now = time.monotonic()
        if stop.event.is_set():
            if asked == float("inf"):
                asked, limit = now, patience(folder) + GRACE_S
                store.update(job.id, "Stopping after this step; its checkpoint is kept ...")
                _ask(process)
            elif now - asked > limit:
                process.kill()
        elif now - told >= 1:
            told, found = now, follower.read()
            if found.saved != saved:  # progress: a job that saves steps is not one that only crashes
                saved = found.saved
                store.save_results(job.id, [], job.owner)
            if (text := found.line) and text != shown:
                shown = text
                store.update(job.id, text)


def _ask(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it has ended
        process.stdin.write(b"stop\n")
        process.stdin.flush()


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """No process is left when a run ends, for whatever reason it does."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(patience(folder) + GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _died(code: int, folder: Path, begin: int) -> GLMError:
    """Why a process ended without a result, as far as can be told from outside."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        reason = f"The training process was ended by {name}{memory}."
    else:
        reason = f"The training process ended with code {code} and without a result."
    with (folder / LOG).open("rb") as file:
        file.seek(begin)
        lines = re.split(r"[\r\n]+", file.read()[-20_000:].decode("utf-8", "replace"))
    told = [line.strip() for line in lines if line.strip() and not line.startswith(TRACE)]
    last = " / ".join(told[-QUOTED_LINES:])
    quoted = f" Its log ends with: {last[-QUOTED_CHARACTERS:]}" if last else ""
    return GLMError(reason + quoted, _resume_from(folder))


def _resume_from(folder: Path) -> str:
    found = state.checkpoints(folder)
    if not found:
        return "Resume begins again, since no step was saved yet."
    return f"Resume goes on from {found[-1].name}."


# ---- memory


def _make_room(job: Job, store: JobStore, what: FinetuneJob) -> None:
    """Unload the chat model where the training does not fit beside it; GLMError where it does not fit at all."""
    from .. import devices, engine
    from .preflight import predict

    needs = predict(what.task).memory_bytes
    host, folder = engine.host(), Path(what.task.output)
    loaded = host.current
    names = devices.named(what.task.device)
    free = sum(devices.free_bytes(name) for name in names)
    on_gpu = names[0].startswith("cuda")
    if (
        needs > free
        and loaded is not None
        and not what.keep_chat
        and (loaded.device.type == "cuda") == on_gpu
    ):
        host.unload()
        text = "The chat model was unloaded to make room for the training."
        store.warn(job.id, text)
        write_message(folder, "starting", text)
        loaded, free = None, sum(devices.free_bytes(name) for name in names)
    where = ", ".join(names)
    if needs > free:
        kept = (
            "Let the chat model be unloaded, or choose" if loaded is not None and what.keep_chat else "Choose"
        )
        raise GLMError(
            f"The training needs about {_size(needs)} of memory on {where}, and {_size(free)} are free.",
            f"{kept} a smaller batch, lower token limits, gradient checkpointing or a lower precision; or close other "
            "programs and resume.",
        )
    if loaded is not None:
        write_message(
            folder, "starting",
            f"The chat model stays loaded: the training needs about {_size(needs)} on {where}, and {_size(free)} are "
            "free.",
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


# ---- one process per folder


class _Asked(Exception):
    """Told to stop while waiting for another process."""


@contextmanager
def hold(
    folder: Path, wait_s: float | None = None, stop: Callable[[], object] | None = None,
    waiting: Callable[[], None] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Have the folder to oneself; GLMError where another process has had it for `wait_s`.

    wait_s   None: as long as a process whose parent died may take to end
    stop     anything true ends the waiting, with an exception of its own
    waiting  called once, when it takes more than a second
    """
    with (folder / LOCK).open("a+b") as file:  # closing it lets go, and so does any end of this process
        began = time.monotonic()
        if wait_s is None:
            wait_s = patience(folder) + GRACE_S
        while not _locked(file):
            if stop is not None and stop():
                raise _Asked
            waited = time.monotonic() - began
            if waited > wait_s:
                raise GLMError(
                    f"Another process still trains in {folder}.", "Wait until it has ended, then resume."
                )
            if waited > 1 and waiting is not None:
                waiting()
                waiting = None
            time.sleep(0.1)
        yield


def held(folder: Path) -> bool:
    """Whether a process trains in the folder just now."""
    try:
        with (folder / LOCK).open("r+b") as file:
            return not _locked(file)
    except OSError:
        return False


def _locked(file: IO[bytes]) -> bool:
    """Take the lock of an open file, if nobody has it; GLMError where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise GLMError(
            f"{file.name} cannot be locked: {error.strerror or error}.",
            "Choose an output folder on a disk of this machine.",
        ) from error
    return True


def patience(folder: Path) -> float:
    """Seconds that a process may take to do its step and save it."""
    return max(STOP_S, 3 * Follower(folder).read().step_s)


# ---- what the processes tell each other


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is seen whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_result(
    folder: Path, token: str, state: str, message: str = "", todo: str = "", warnings: tuple[str, ...] = ()
) -> None:
    """Say how the run with this token ended: "done", "stopped" or "failed"."""
    values = {"run": token, "state": state, "message": message, "todo": todo, "warnings": list(warnings)}
    write_json(folder / RESULT, {**values, "time": round(time.time(), 3)})


def write_message(folder: Path, stage: str, text: str = "") -> None:
    """Say what the training does; stage: "starting", "running" or "measuring"."""
    line = json.dumps({"time": round(time.time(), 3), "stage": stage, "text": text}, ensure_ascii=False)
    with (folder / MESSAGES).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


# ---- following


@dataclass(frozen=True)
class TrainingStatus:
    """How far a training is, from the files of its folder.

    state     "waiting" (no process yet), "starting" (reading and loading), "running", "measuring" (the report),
              "stopped" (may be resumed), "done", "failed"
    step      the last one heard of; saved is that of the newest checkpoint told of
    loss      mean of the steps since the point of the curve before
    eta_s     seconds left for the steps; None unless they are under way
    rate      (step, learning rate)
    messages  the last 200 sentences the process said, the newest last
    report, manifest   what report.json and manifest.json hold, None where they are missing
    message   why it failed and what to do, empty otherwise
    line      what it does now
    step_s    seconds of a step, 0 where none is known
    adapt     curve of the unlabelled texts that were read first; without is that of the same training without them
    """

    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    dev_loss: float | None = None
    eta_s: float | None = None
    rows_per_s: float | None = None
    memory_bytes: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    dev: list[tuple[int, float]] = field(default_factory=list)
    rate: list[tuple[int, float]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    saved: int | None = None
    message: str = ""
    line: str = ""
    adapt: list[tuple[int, float]] = field(default_factory=list)
    without: list[tuple[int, float]] = field(default_factory=list)
    step_s: float = 0.0


class Follower:
    """Reads how far a training is, every time only what was written since the last time; for one thread."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._parts = {name: _Events(self.folder / name / EVENTS) for name in ("", ADAPT, WITHOUT)}
        self._said, self._sampled = _Lines(self.folder / MESSAGES), _Lines(self.folder / SAMPLES)
        self._files = {name: _File(self.folder / name) for name in (JOB, RESULT, REPORT, MANIFEST)}
        self._stage = ""
        self._messages: list[str] = []
        self._samples: list[dict[str, Any]] = []

    def read(self) -> TrainingStatus:
        """Where the training stands."""
        said, again = self._said.new()
        if again:
            self._messages, self._stage = [], ""
        for one in said:
            self._stage = str(one.get("stage", ""))
            if text := str(one.get("text", "")):
                self._messages = [*self._messages[1 - KEPT_MESSAGES :], text]
        for part in self._parts.values():
            part.read()
        samples, again = self._sampled.new()
        self._samples = [*([] if again else self._samples), *samples]
        job, result, report, manifest = (self._files[name].read() for name in (JOB, RESULT, REPORT, MANIFEST))
        state = self._state(job, result, manifest)
        own, adapt, without = self._parts.values()
        last = own.last
        message = ""
        if state == "failed":
            found = result or {"message": (manifest or {}).get("error", "")}
            message = f"{found.get('message', '')} {found.get('todo', '')}".strip()
        return TrainingStatus(
            state, last.get("step", 0), last.get("steps") or _steps(manifest, job), last.get("loss"),
            last.get("dev_loss"), last.get("eta_s") if state == "running" else None, last.get("rows_per_s"),
            last.get("memory_bytes"), list(own.curve), list(own.dev), list(own.rate), list(self._messages),
            list(self._samples), report, manifest, last.get("saved"), message, self._line(state), list(adapt.curve),
            list(without.curve), self._newest().step_s,
        )  # fmt: skip

    def _newest(self) -> _Events:
        return max(self._parts.values(), key=lambda part: float(part.last.get("time", 0)))

    def _line(self, state: str) -> str:
        newest = self._newest()
        if state == "running" and newest.curve:
            values = newest.last
            dev = f", dev loss {values['dev_loss']:.4f}" if "dev_loss" in values else ""
            return f"step {values['step']:,} of {values['steps']:,}, loss {newest.curve[-1][1]:.4f}{dev}"
        return self._messages[-1] if self._messages else ""

    def _state(
        self, job: dict[str, Any] | None, result: dict[str, Any] | None, manifest: dict[str, Any] | None
    ) -> str:
        if job is None:  # trained from the shell, without a job
            return str((manifest or {}).get("state", "waiting"))
        if result is not None:
            return str(result.get("state", "failed"))
        if not self._stage:
            return "waiting"
        return self._stage if held(self.folder) else "stopped"


class _Events:
    """The curves of an events.jsonl."""

    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path)
        self._forget()

    def _forget(self) -> None:
        self.last: dict[str, Any] = {}  # the newest value of every field
        self.step_s = 0.0
        self.curve: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []
        self.rate: list[tuple[int, float]] = []

    def read(self) -> None:
        """Take over what is new."""
        events, again = self._lines.new()
        if again:
            self._forget()
        for event in events:
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, step = event.get("kind"), event.get("step")
        if not isinstance(step, int):
            return
        self.last |= event
        if event.get("eta_s"):
            self.step_s = float(event["eta_s"]) / max(1, int(event.get("steps", 0)) - step)
        if kind == "saved":
            self.last["saved"] = step
        for wanted, points, name in (
            ("step", self.curve, "loss"), ("dev", self.dev, "dev_loss"), ("step", self.rate, "learning_rate"),
        ):  # fmt: skip
            # A resumed training does some steps again; their points replace the old ones.
            while points and (points[-1][0] > step or (points[-1][0] == step and kind == wanted)):
                points.pop()
            if kind == wanted and name in event:
                points.append((step, float(event[name])))


def status(folder: str | Path) -> TrainingStatus:
    """Where the training of a folder stands; asked again, it reads only what is new."""
    path = Path(folder)
    with _followers_lock:
        follower = _followers.pop(path, None) or Follower(path)
        _followers[path] = follower
        while len(_followers) > KEPT_FOLLOWERS:
            _followers.popitem(last=False)
        return follower.read()


_followers: OrderedDict[Path, Follower] = OrderedDict()
_followers_lock = threading.Lock()


def _steps(manifest: dict[str, Any] | None, job: dict[str, Any] | None) -> int:
    """The planned steps, as long as no event has told them."""
    task = (manifest or {}).get("task") or ((job or {}).get("what") or {}).get("task") or {}
    return int((task.get("plan") or {}).get("max_steps") or 0)


class _Lines:
    """The new whole lines of a growing file of JSON objects."""

    def __init__(self, path: Path) -> None:
        self.path, self._at, self._file = path, 0, 0

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """What was added, and whether the file is another one than before, read from its start."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                again = found.st_ino != self._file or found.st_size < self._at
                if again:
                    self._at, self._file = 0, found.st_ino
                file.seek(self._at)
                data = file.read()
        except OSError:
            again, self._at, self._file = self._file != 0, 0, 0
            return [], again
        data = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._at += len(data)
        lines = []
        for line in data.split(b"\n"):
            with suppress(ValueError):  # cut by a kill
                if isinstance(value := json.loads(line), dict):
                    lines.append(value)
        return lines, again


class _File:
    """A JSON file that is replaced as a whole, parsed again only where it changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._value: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """Its value, or None where there is no file."""
        try:
            found = self.path.stat()
        except OSError:
            self._seen = self._value = None
            return None
        now = (found.st_ino, found.st_mtime_ns, found.st_size)
        if now != self._seen:
            self._value, self._seen = read_json(self.path) or None, now
        return self._value
