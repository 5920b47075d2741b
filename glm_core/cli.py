"""The shell: python -m glm_core chat | batch | models | doctor, with the calls the pages make.

Answers and tables go to standard output, everything said about them to standard error. Exit status: 0 done,
1 a problem (one line says what to do), 2 wrong usage, 3 some rows failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__
from .errors import GLMError
from .settings import MINI, Settings

if TYPE_CHECKING:
    from .batch import BatchTask
    from .checkpoints import CheckpointInfo
    from .engine import Engine, EngineHost, GenerationSettings, Handle
    from .jobs import Job, JobStore, Progress
    from .tokenizers.chatglm2 import Message

PROGRAM = "python -m glm_core"
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
FORMATS: dict[str, Literal["csv", "xlsx", "jsonl", "parquet"]] = {
    ".csv": "csv",
    ".xlsx": "xlsx",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}
# What two tasks may differ in and still be the same work: where the file was, and what is installed.
NOT_THE_TASK = ("versions", "input_name", "input_path")
LONGEST_ANSWER = 512
POLL_S = 0.1
PLAIN_LINES_S = 10.0  # between two lines of progress where there is no terminal
FAILED, INTERRUPTED, SOME_ROWS_FAILED = 1, 130, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; wrong usage is argparse's SystemExit(2)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without Chinese shows ? and goes on
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.arguments = given
    commands = {"chat": chat, "batch": batch, "models": models, "doctor": doctor}
    log = _log_file()
    logging.getLogger("glm_core").addHandler(log)
    try:
        status = commands[options.command](options)
        sys.stdout.flush()
        return status
    except GLMError as error:
        say(f"Error: {error}")
    except sqlite3.Error as error:
        say(f"Error: The workspace's database cannot be used: {error}. Free some disk space, then try again.")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("glm_core"):
            raise
        say(f"Error: The package {error.name} is missing. `{PROGRAM} doctor` says how to get it.")
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        logging.getLogger("glm_core").removeHandler(log)
        log.close()
    return FAILED


def say(text: str) -> None:
    """Print one line about the run to standard error."""
    print(_printable(" ".join(text.splitlines())), file=sys.stderr, flush=True)


def _log_file() -> logging.Handler:
    """Where tracebacks go instead of onto the screen: a file of the workspace, once there is one."""
    with suppress(GLMError, OSError):
        folder = Settings.read().workspace
        if folder.is_dir():
            (folder / "logs").mkdir(exist_ok=True, mode=0o700)
            return logging.FileHandler(folder / "logs" / "shell.log", encoding="utf-8", delay=True)
    return logging.NullHandler()


# ---- the arguments


def parser() -> argparse.ArgumentParser:
    """All commands and their options; imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Talk to a GLM, label a table with it, see what is there. Nothing leaves this machine.",
        epilog="Exit status: 0 done, 1 a problem, 2 wrong usage, 3 some rows failed, 130 interrupted.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"GLM Workbench {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = _command(commands, "chat", "talk to a model", "Type clear to start over and stop to end.")
    _model_options(one)
    _sampling_options(one, "as the checkpoint says")
    one.add_argument("--prompt", type=_text, metavar="TEXT", help="answer this one question and end")

    one = _command(
        commands,
        "batch",
        "one answer per row of a table",
        "Finished rows are kept whatever happens: the same command goes on where it was stopped, and writes "
        "the file again once all rows are done.",
    )
    one.add_argument("file", type=Path, metavar="FILE", help="csv, tsv, xlsx, xls, json, jsonl or parquet")
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("--column", type=_text, help="the cells of this column are the prompts")
    which.add_argument("--prompt", type=_text, metavar="TEMPLATE", help='such as "Translate: {comment}"')
    one.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=f"where to: {', '.join(FORMATS)}"
    )
    one.add_argument("--output-column", type=_text, default="answer", metavar="NAME", help="default: answer")
    _model_options(one)
    _sampling_options(one, "greedy")
    one.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    one.add_argument("--sheet", help="sheet of a workbook; default: the first")
    one.add_argument("--encoding", help="such as utf-8 or gb18030; default: found out")
    one.add_argument("--delimiter", type=_delimiter, help="one character, or tab; default: found out")
    one.add_argument("--on-bad-rows", choices=("stop", "skip", "join"), default="stop", help="default: stop")
    one.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    one.add_argument("--retry-failed", action="store_true", help="answer a finished job's failed rows anew")
    one.add_argument("--no-guard", action="store_true", help="CSV for machines: leave = + - @ as they are")

    one = _command(commands, "models", "the checkpoints on this machine", "")
    one.add_argument("--inspect", type=Path, metavar="PATH", help="one folder, with the memory it will take")
    one.add_argument("--json", action="store_true", help="for programs")

    one = _command(commands, "doctor", "what is installed, what is missing, how to get it", "")
    one.add_argument("--json", action="store_true", help="for programs")
    return top


def _command(commands: Any, name: str, does: str, more: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}. {more}", allow_abbrev=False
    )
    return made


def _model_options(one: argparse.ArgumentParser) -> None:
    group = one.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help="folder or name; default: the embedded model")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    group.add_argument("--system", type=_text, default="", metavar="TEXT", help="the system prompt")


def _sampling_options(one: argparse.ArgumentParser, default: str) -> None:
    group = one.add_argument_group("answers", f"default: {default}")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest answer, always the same"
    )
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, help="same seed, same sampled answer")
    group.add_argument(
        "--stop", type=_text, action="append", metavar="TEXT", help="ends the answer; may repeat"
    )


def _text(value: str) -> str:
    """An argument as Unicode; bytes that are none become U+FFFD instead of an error in the tokenizer."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _positive(value: str) -> int:
    if (number := int(value)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _delimiter(value: str) -> str:
    return {"tab": "\t", "\\t": "\t"}.get(value, value)


# ---- the model


def _folder(named: str | None) -> Path:
    """The checkpoint meant by --model: a folder, or a name in the model folders; GLMError if neither."""
    from . import checkpoints

    hint = f"`{PROGRAM} models` lists the checkpoints found."
    if named is None:
        if not (MINI / "config.json").is_file():
            raise GLMError(f"There is no embedded model in {MINI}.", f"Choose one with --model; {hint}")
        return MINI
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder.resolve()
    for info in checkpoints.find(Settings.read().model_roots):
        if info.name == named:
            return info.path
    raise GLMError(f"There is neither a folder nor a checkpoint {named!r}.", f"Check the path; {hint}")


@contextmanager
def _own_model() -> Iterator[EngineHost]:
    """The engine host; what is loaded inside is unloaded after it: no thread may compute at Python's end."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would write across ours
    from . import engine

    host = engine.host()
    before = host.current
    try:
        yield host
    finally:
        if host.current is not before:
            with suppress(GLMError):
                host.unload()


def _settings(options: argparse.Namespace, defaults: Mapping[str, Any], context: int) -> GenerationSettings:
    """What was asked for over the defaults; a default longest answer leaves the prompt half the context."""
    from .engine import GenerationSettings

    longest = min(int(defaults.get("max_new_tokens", LONGEST_ANSWER)), max(1, context // 2))
    settings = GenerationSettings.from_json({**defaults, "max_new_tokens": longest, **_asked(options)})
    settings.check()
    return settings


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}


# ---- chat


def chat(options: argparse.Namespace) -> int:
    """Answer one question, or those typed or piped in; 1 if a piped question could not be answered."""
    from .engine import GenerationSettings

    GenerationSettings.from_json(_asked(options)).check()  # before a large model is loaded for nothing
    folder = _folder(options.model)
    once = options.prompt is not None
    typed = not once and sys.stdin.isatty()
    with _own_model() as host:
        if typed:
            say(f"Loading {folder.name} ...")
        engine = host.use(folder, options.precision, options.device)
        settings = _settings(options, engine.loaded.defaults, engine.context)
        talk = _Talk(engine, settings, options.system, typed)
        if once:
            return INTERRUPTED if talk.ask(options.prompt).state == "cancelled" else 0
        if typed:
            info = engine.loaded.info
            what = f"{info.name}: {info.family}, {engine.loaded.precision} on {engine.device}"
            say(f"{what}, {engine.context:,} tokens of context.")
            say("clear starts over, stop ends, Ctrl-C stops an answer.")
        status = 0
        for question in _questions(typed):
            if question == "stop":
                break
            try:
                if question == "clear":
                    talk.turns.clear()
                    say("The history is empty.")
                elif question:
                    talk.ask(question)
            except GLMError as error:
                say(f"Error: {error}")
                status = status if typed else FAILED
        return status


def _questions(typed: bool) -> Iterator[str]:
    """What is typed at the prompt, or the lines of a pipe; Ctrl-C and Ctrl-D end it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys, where the system has it
    try:
        while True:
            line = input("\n> " if sys.stdout.isatty() else "") if typed else sys.stdin.readline()
            if not line and not typed:
                return
            yield line.strip()
    except (EOFError, KeyboardInterrupt):
        if typed:
            print()


class _Talk:
    """A conversation on a terminal; it lasts as long as the command."""

    def __init__(self, engine: Engine, settings: GenerationSettings, system: str, typed: bool) -> None:
        """GLMError where this model knows no system prompt, or it is too long."""
        from .chat import budget
        from .tokenizers.chatglm2 import Message

        self.engine, self.settings, self.system, self.typed = engine, settings, system, typed
        self.turns: list[Message] = []
        question = Message("user", "")
        budget(engine.tokenizer, system, [question], engine.context, settings.max_new_tokens)

    def ask(self, question: str) -> Handle:
        """Print the answer as it comes and keep it; Ctrl-C stops it. GLMError where there is no answer."""
        from .chat import budget
        from .engine import Request
        from .tables.options import plural
        from .tokenizers.chatglm2 import Message

        turns = [*self.turns, Message("user", question)]
        room = self.settings.max_new_tokens
        plan = budget(self.engine.tokenizer, self.system, turns, self.engine.context, room)
        handle = self.engine.submit(Request(plan.prompt_ids, self.settings))
        self._print(handle)
        if handle.error is not None:
            raise handle.error
        if handle.text.strip():
            self.turns = [*turns, Message("assistant", handle.text)]
        notes = list(handle.notes)
        if handle.state == "cancelled":
            notes.append("stopped")
        elif handle.finish_reason == "length":
            notes.append(f"cut at {handle.n_tokens:,} tokens, --max-new-tokens allows more")
        if plan.dropped_turns:
            rounds = plural(plan.dropped_turns // 2, "round")
            notes.append(f"{rounds} at the beginning no longer fit and were not sent")
        if self.typed or notes:
            used = f"{plan.used + handle.n_tokens:,} of {plan.limit:,} tokens of context"
            say(f"[{'; '.join([used, f'{handle.tokens_per_second:.1f} tokens/s', *notes])}]")
        return handle

    def _print(self, handle: Handle) -> None:
        shown = ""
        try:
            while not handle.wait(0.03):
                text = _settled(handle.text, self.settings.stop)
                if len(text) > len(shown) and text.startswith(shown):
                    print(_printable(text[len(shown) :]), end="", flush=True)
                    shown = text
        except KeyboardInterrupt:
            handle.cancel("user")
            handle.wait(10)
        finally:
            if not handle.done:
                handle.cancel("not shown")
        rest = handle.text.removeprefix(shown) if handle.text.startswith(shown) else ""
        print(_printable(rest), flush=True)


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing answer that stays: no space at its end, and no beginning of a stop text."""
    text = text.rstrip()
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


def _printable(text: str) -> str:
    """Text without control characters: a model's output must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# ---- batch


def batch(options: argparse.Namespace) -> int:
    """Answer every row of a table as a durable job and write the result; 3 if rows failed."""
    from . import batch as work
    from . import jobs, tables
    from .tables.options import plural

    out = _writable(options.out, options.file)
    settings = Settings.read()
    settings.make_folders()
    store = jobs.store(settings)
    store.recover()  # a job whose process was killed is nobody's now, and can be taken over
    reading = tables.ReadOptions(
        encoding=options.encoding,
        delimiter=options.delimiter,
        sheet=options.sheet,
        on_bad_rows=options.on_bad_rows,
    )
    table = tables.open_table(options.file, reading)
    task = _task(options, table.info.columns, reading.to_json())
    job = None if options.restart else _earlier(store, task)
    if job is None:
        say(f"Reading {table.info.name} ...")
        job = work.start(store, task, table)
        say(f"Job {job.id}: {job.total:,} rows for {Path(task.checkpoint).name}.")
    elif job.state == "done" and job.failed and options.retry_failed:
        job = store.retry_failed(job.id)
        say(f"Job {job.id}: {job.message}")
    elif job.state == "done":
        say(f"Job {job.id} has answered these rows already; --restart would do it anew.")
    else:
        if job.state in ("paused", "failed", "cancelled"):
            job = store.resume(job.id)
        where = "is run by another process; this is how far it is" if job.state == "running" else "goes on"
        say(f"Job {job.id} {where}: {job.total - job.left:,} of {job.total:,} rows are done.")
    if job.state != "done":
        job, interrupted = _follow(store, job.id)
        if job.state != "done":
            return _not_done(job, interrupted, options.arguments)
    report = work.export(store, job.id, out, FORMATS[out.suffix.lower()], guard=not options.no_guard)
    for note in (*job.warnings, *report.notes):
        say(f"Note: {note}")
    shortened = f", {job.truncated:,} shortened to fit" if job.truncated else ""
    print(f"{out}: {plural(job.done, 'row')} answered, {job.failed:,} failed{shortened}")
    if job.failed:
        say("The columns status and note say which rows failed and why; --retry-failed tries them again.")
        return SOME_ROWS_FAILED
    return 0


def _writable(out: Path, source: Path) -> Path:
    """Where the result goes; GLMError now rather than after hours, where it cannot be written there."""
    out = out.expanduser()
    if out.suffix.lower() not in FORMATS:
        raise GLMError(f"{out.name} is no format to write.", f"End the name with {', '.join(FORMATS)}.")
    if not out.parent.is_dir():
        raise GLMError(f"There is no folder {out.parent}.", "Create it, or choose another for --out.")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise GLMError(f"{out} cannot be written.", "Choose another place for --out.")
    if out.exists() and source.exists() and out.samefile(source):
        raise GLMError(f"{out.name} is the table itself.", "Choose another name for --out.")
    return out


def _task(options: argparse.Namespace, columns: tuple[str, ...], read_options: dict[str, Any]) -> BatchTask:
    """The task, checked against table and checkpoint before anything is stored; GLMError where it fails."""
    from . import batch as work
    from . import checkpoints
    from .tokenizers.chatglm2 import ChatGLM2Tokenizer

    if options.column is not None and options.column not in columns:
        raise GLMError(
            f"{options.file.name} has no column {options.column!r}; it has {', '.join(columns)}.",
            "Choose one of these.",
        )
    template = options.prompt if options.column is None else work.reference(options.column, columns)
    folder = _folder(options.model)
    info = checkpoints.inspect(folder)
    if info.problems:
        problems = " ".join(info.problems)
        raise GLMError(f"{folder} cannot be loaded. {problems}", "Repair the folder or choose another.")
    settings = _settings(options, {}, info.context)
    tokenizer = ChatGLM2Tokenizer(folder / "tokenizer.model", info.generation)  # type: ignore[arg-type]
    work.Prompts(tokenizer, template, options.system, columns, info.context, settings.max_new_tokens)
    device = checkpoints.best_device() if options.device == "auto" else options.device
    auto = options.precision == "auto"
    return work.BatchTask(
        checkpoint=str(folder),
        checkpoint_fingerprint=checkpoints.fingerprint(folder),
        precision=checkpoints.best_precision(info, device) if auto else options.precision,
        device=device,
        template=template,
        system=options.system,
        settings=settings,
        output_column=options.output_column,
        input_name=options.file.name,
        input_path=str(options.file.resolve()),
        input_sha256=work.file_sha256(options.file),
        columns=columns,
        read_options=read_options,
        limit_rows=options.limit,
        generation=info.generation,
        versions=work.versions(),
    )


def _earlier(store: JobStore, task: BatchTask) -> Job | None:
    """The newest job of the same task on the same rows; one whose file was not read to its end is none."""

    def key(values: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in values.items() if k not in NOT_THE_TASK}, sort_keys=True)

    wanted, jobs = key(task.to_json()), store.list(limit=100_000, kind="batch")
    same = [job for job in jobs if job.complete and key(job.task) == wanted]
    return max(same, key=lambda job: job.created, default=None)  # ids of one second are in no order


def _follow(store: JobStore, job_id: str) -> tuple[Job, bool]:
    """Run a job here, or watch the process that does, until it stops; and whether Ctrl-C stopped it."""
    from . import batch as work
    from . import jobs

    worker = jobs.Supervisor(store, {"batch": work.run})  # not started: it runs this one job and no other
    thread: threading.Thread | None = None
    meter, pausing = _Meter(), False
    with _own_model():
        while True:
            try:
                alive = thread is not None and thread.is_alive()
                job = store.get(job_id)
                if not alive and (pausing or job.state not in ("queued", "running")):
                    meter.show(store.progress(job_id), last=True)
                    return job, pausing
                if not alive and (claimed := store.claim(("batch",), worker.owner, job_id)):
                    thread = threading.Thread(target=worker.run, args=(claimed,), daemon=True)
                    thread.start()
                if worker.problem:  # such as a full disk, which cannot even store that the job has stopped
                    worker.stop()
                    raise GLMError(worker.problem, "Run the same command again to go on.")
                meter.show(store.progress(job_id))
                if thread is None:  # watching: should that process die, the job is ours
                    store.recover()
                time.sleep(POLL_S if thread else 10 * POLL_S)
            except KeyboardInterrupt:
                meter.end()
                if pausing or thread is None:  # a second time; or somebody else's job, which goes on
                    raise
                pausing = True
                say("Pausing: the rows being answered are given up, the finished ones are kept.")
                with suppress(GLMError):  # it was done a moment ago
                    store.request_pause(job_id)


def _not_done(job: Job, interrupted: bool, arguments: Sequence[str]) -> int:
    again = [part for part in arguments if part not in ("--restart", "--retry-failed")]
    kept = f"{job.total - job.left:,} of {job.total:,} rows are done and kept."
    if interrupted:
        say(f"Paused: {kept} To go on: {PROGRAM} {shlex.join(again)}")
        return INTERRUPTED
    what = job.message or f"The job was {job.state} from elsewhere."
    raise GLMError(what, f"{kept} The same command goes on.")


class _Meter:
    """Progress of a job: one line that changes on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.shown = -math.inf
        self.width = 0

    def show(self, progress: Progress, last: bool = False) -> None:
        """Print where the job stands if it is time to."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else PLAIN_LINES_S) and not last:
            return
        self.shown = now
        line = _progress_line(progress)
        if self.terminal:
            room = max(20, shutil.get_terminal_size().columns - 1)
            sys.stderr.write(f"\r{line[:room].ljust(min(self.width, room))}")
            sys.stderr.flush()
            self.width = len(line)
        else:
            say(line)
        if last:
            self.end()

    def end(self) -> None:
        """Leave the line that changes."""
        if self.terminal and self.width:
            print(file=sys.stderr)
        self.width = 0


def _progress_line(progress: Progress) -> str:
    ended = progress.done + progress.failed
    share = ended / max(progress.total, 1)
    parts = [f"[{'#' * int(share * 20):.<20}] {ended:,} of {progress.total:,} rows ({share:.0%})"]
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.rate:
        parts.append(f"{progress.rate:.1f} rows/s")
        if progress.eta_seconds is not None:
            parts.append(f"about {_duration(progress.eta_seconds)} left")
    elif progress.state == "running" and progress.message:
        parts.append(progress.message)
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Time as a person says it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ---- models and doctor


def models(options: argparse.Namespace) -> int:
    """List the checkpoints in the model folders, or describe one folder."""
    from . import checkpoints

    if options.inspect is not None:
        info = checkpoints.inspect(options.inspect.expanduser())
        print(_json(_facts(info)) if options.json else _described(info))
        return 0
    roots = Settings.read().model_roots
    found = checkpoints.find(roots)
    if options.json:
        print(_json([_facts(info) for info in found]))
    elif found:
        print(_listed(found))
    else:
        say(f"There is no checkpoint in {', '.join(map(str, roots))}. Add your own folders with GLM_MODELS.")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Show what there is and what is missing; 1 if something is."""
    from . import doctor as examination

    found = examination.report()
    print(_json(found) if options.json else _printable(examination.text(found)))
    return FAILED if found["problems"] else 0


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _facts(info: CheckpointInfo) -> dict[str, Any]:
    from .checkpoints import PRECISIONS, fingerprint

    facts = {name: getattr(info, name) for name in info.__dataclass_fields__}
    facts |= {"path": str(info.path), "loadable": info.loadable}
    if info.loadable:
        facts["memory_bytes"] = {precision: info.memory_bytes(precision) for precision in PRECISIONS}
        facts["fingerprint"] = fingerprint(info.path)
    return facts


def _described(info: CheckpointInfo) -> str:
    from .checkpoints import PRECISIONS
    from .doctor import size

    rows = {
        "folder": info.path,
        "family": info.family,
        "parameters": f"{info.parameters:,}",
        "size on disk": f"{size(info.size_bytes)}, stored as {info.dtype or 'unknown'}",
        "layers": f"{info.layers} of width {info.hidden_size:,}",
        "context": f"{info.context:,} tokens",
        "weights in memory": ", ".join(f"{p} {size(info.memory_bytes(p))}" for p in PRECISIONS),
    } | {f"problem {n}": problem for n, problem in enumerate(info.problems, 1)}
    return _printable("\n".join(f"{name:18} {value}" for name, value in rows.items()))


def _listed(found: Sequence[CheckpointInfo]) -> str:
    """A table of checkpoints, with what is wrong under each."""
    from .doctor import size

    table = [("name", "family", "parameters", "size", "stored as", "context", "folder")]
    for info in found:
        sizes = (_short(info.parameters), size(info.size_bytes), info.dtype, f"{info.context:,}")
        table.append((info.name, info.family, *sizes, str(info.path)))
    widths = [max(_width(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row, problems in zip(table, [(), *(info.problems for info in found)], strict=True):
        cells = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        lines += [f"  ! {problem}" for problem in problems]
    return _printable("\n".join(lines))


def _short(count: int) -> str:
    """6,243,584,000 as "6.2B"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count or "?")


def _width(text: str) -> int:
    """Columns a text takes on a terminal, where Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
