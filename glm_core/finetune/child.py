"""The process that trains for a job: python -m glm_core.finetune.child FOLDER.

job.run starts it and holds the other end of its stdin. A line there, or its end, which is also how the death of the
server shows, asks for a checkpoint and the end.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from ..errors import GLMError
from ..settings import Settings
from . import job
from .adapt import FOLDER as ADAPT
from .work import EVENTS, MANIFEST, WITHOUT, carry_out


class _Stop:
    """Whether to stop. Before the first step and while measuring there is nothing to save, so it ends at once."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self.asked = threading.Event()
        self.locked = False  # this process has the folder
        self._saving = False
        self._lock = threading.RLock()  # a signal may come while it is held

    def __call__(self) -> bool:
        """Asked by the loop before its first and after every step."""
        with self._lock:
            self._saving = True
        return self.asked.is_set()

    def idle(self) -> None:
        """Nothing is being computed that a stop should keep."""
        with self._lock:
            self._saving = False
            if self.asked.is_set():
                self._leave()

    def ask(self, *_: object) -> None:
        """Stop as soon as that loses nothing."""
        self.asked.set()
        with self._lock:
            if not self._saving:
                self._leave()

    def watch(self) -> None:
        """Wait for a byte or the end of stdin; the process does not outlive that by more than `patience`."""
        with suppress(OSError):
            os.read(0, 1)  # sys.stdin would have to be free when the interpreter ends
        self.ask()
        time.sleep(job.patience(self.folder))
        os._exit(1)

    def finish(self, state: str, message: str = "", todo: str = "", warnings: tuple[str, ...] = ()) -> None:
        """Say how it ended; nothing that is asked later changes that."""
        with self._lock:
            self._saving = True
            job.write_result(self.folder, self.token, state, message, todo, warnings)

    def _leave(self) -> None:
        with suppress(OSError):  # without a result it is seen to have stopped all the same
            if self.locked:
                job.write_result(self.folder, self.token, "stopped")
        os._exit(0)


def main(folder: Path) -> int:
    """Do what job.json in the folder says and leave result.json; 1 where not even that is possible."""
    faulthandler.enable()
    if hasattr(os, "nice"):
        os.nice(5)  # screens and chat come first
    given = job.read_json(folder / job.JOB)
    stop = _Stop(folder, str(given.get("run", "")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop.ask)
    threading.Thread(target=stop.watch, name="glm-stop", daemon=True).start()
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}")

    def waiting() -> None:
        job.write_message(
            folder, "starting", "Waiting until an earlier process of this training has ended ..."
        )

    try:
        with job.hold(folder, waiting=waiting):
            stop.locked = True
            (folder / job.RESULT).unlink(missing_ok=True)
            try:
                warnings = _work(folder, job.FinetuneJob.from_json(given["what"]), stop)
                stop.finish("stopped" if warnings is None else "done", warnings=warnings or ())
            except GLMError as error:
                print(f"Error: {error}")
                stop.finish("failed", error.message, error.todo)
            except Exception as error:
                traceback.print_exc()
                stop.finish("failed", *_sentences(error, folder))
    except GLMError as error:  # the folder is not free
        print(f"Error: {error}")
        stop.finish("failed", error.message, error.todo)
    return 0


def _work(folder: Path, what: job.FinetuneJob, stop: _Stop) -> tuple[str, ...] | None:
    """Train and measure, as far as that is not done yet: the warnings, or None where it was stopped."""
    stage = "starting"

    def say(text: str) -> None:
        print(text)
        job.write_message(folder, stage, text)

    if not _trained(folder, what):
        say("Reading the data ...")
        for part in (".", ADAPT, WITHOUT):
            _mend(folder / part / EVENTS)

        def event(_: object) -> None:
            nonlocal stage
            if stage != "running":
                stage = "running"
                job.write_message(folder, stage)

        # Without a checkpoint this starts at the first step; the folder has been this job's own from its start.
        settings = Settings.read()
        settings.make_folders()
        result = carry_out(what.task, event, stop, resume=True, say=say, cache=settings.cache)
        if result.outcome.stopped:
            return None
    stop.idle()
    todo = [one for one in _parts(folder, what) if not (one / job.REPORT).is_file()]
    if not what.report or not todo:
        return ()
    stage = "measuring"
    say("Measuring what the training changed ...")
    try:
        from . import report

        for one in todo:
            report.make(one, say=say, stop=stop.asked.is_set)
    except Exception as error:  # the training is done and is of use without a report
        if stop.asked.is_set():
            return None
        if isinstance(error, GLMError):
            return (f"The report could not be made: {error}",)
        traceback.print_exc()
        return (f"The report could not be made: {' '.join(_sentences(error, folder))}",)
    return ()


def _trained(folder: Path, what: job.FinetuneJob) -> bool:
    """Whether only the report is left to make."""
    return all(job.read_json(part / MANIFEST).get("state") == "done" for part in _parts(folder, what))


def _parts(folder: Path, what: job.FinetuneJob) -> tuple[Path, ...]:
    """The folder, and that of the same training without the unlabelled texts where both are to be compared."""
    compared = what.task.adapt is not None and what.task.adapt.compare
    return (folder, folder / WITHOUT) if compared else (folder,)


def _mend(path: Path) -> None:
    """End a line that a kill cut in the middle, so that the next one is whole."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _sentences(error: Exception, folder: Path) -> tuple[str, str]:
    """What happened and what to do, for an error that is no GLMError."""
    torch = sys.modules.get("torch")
    memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if memory or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return (
            "There was too little memory for the training.",
            "Choose a smaller batch, lower token limits, gradient checkpointing or a lower precision; or close other "
            "programs and resume.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {folder} is full.", "Free some disk space and resume; what is saved stays."
    text = (str(error).splitlines() or [""])[0][:200]
    return (
        f"The training ended with an internal error: {type(error).__name__}: {text}.",
        f"The details are at the end of {folder / job.LOG}.",
    )


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # all is written, and tearing down the model libraries takes over a second
