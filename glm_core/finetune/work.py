"""A training from files to a checkpoint: the same call behind the screen's job and the shell.

The output folder gets the checkpoint itself, ready to load, and beside it what the training was: manifest.json (task,
hashes of the data and the base, split, versions, losses), events.jsonl (the curve, written as it grows), audit.json,
and the steps' own checkpoints to resume from.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from .examples import Columns, Example, Loaded, Problem, read
from .loop import Event, Outcome, Plan, train

if TYPE_CHECKING:
    from ..checkpoints import LoadedModel
    from ..tables import ReadOptions
    from .methods import Trainee

MANIFEST, EVENTS, AUDIT = "manifest.json", "events.jsonl", "audit.json"
STATE_FILES = (
    "trainer_state",
    "trainer.pt",
    "optimizer",
)  # of a step's checkpoint, of no use to who loads it
PACKAGES = ("torch", "transformers", "peft", "sentencepiece")


@dataclass(frozen=True)
class FinetuneTask:
    """What to train on which data, and where to.

    output       folder of the result; new, empty, or that of a run to go on with
    dev_share    share of the training file held back, where there is no dev_file
    start_from   folder of an adapter of the same kind to go on from, with fresh steps
    max_source, max_target   longest prompt and answer in tokens; see `encoding.encode`
    """

    checkpoint: str
    plan: Plan
    train_file: str
    output: str
    dev_file: str = ""
    columns: Columns | None = None
    dev_share: float = 0.0
    split_seed: int = 42
    max_source: int = 64
    max_target: int = 64
    source_prefix: str = ""
    generation: str = ""
    device: str = "auto"
    start_from: str = ""
    limit_train: int | None = None
    limit_dev: int | None = None
    read_options: dict[str, Any] = field(default_factory=dict)
    name: str = ""  # how the training file is called on screen

    def to_json(self) -> dict[str, Any]:
        """The task as JSON types."""
        columns = asdict(self.columns) if self.columns else None
        return {one.name: getattr(self, one.name) for one in fields(self)} | {
            "plan": self.plan.to_json(),
            "columns": columns,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FinetuneTask:
        """The task `to_json` gave; unknown keys are ignored."""
        known = {one.name for one in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["plan"] = Plan.from_json(data["plan"])
        values["columns"] = Columns(**data["columns"]) if data.get("columns") else None
        return cls(**values)


@dataclass(frozen=True)
class Data:
    """The examples of a training, as read and split."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    loaded: Loaded
    dev_loaded: Loaded | None
    history: bool  # the data has a column of earlier rounds


@dataclass(frozen=True)
class Result:
    """What became of a training."""

    folder: Path
    outcome: Outcome
    manifest: dict[str, Any]


def load_data(task: FinetuneTask) -> Data:
    """Read and split the examples; GLMError with everything that prevents training, in all files."""
    from ..tables import ReadOptions
    from .split import split

    options: ReadOptions = ReadOptions.from_json(task.read_options)
    found = read(task.train_file, task.columns, options, task.limit_train, task.name or None)
    found_dev = None
    if task.dev_file:
        found_dev = read(
            task.dev_file, task.columns or found.columns, options, task.limit_dev, training=False
        )
    _refuse([*found.stops, *(found_dev.stops if found_dev else ())])
    history = bool(found.columns and found.columns.history)
    if found_dev is not None:
        return Data(found.examples, found_dev.examples, found, found_dev, history)
    if task.dev_share:
        parts = split(found.examples, task.dev_share, 0.0, task.split_seed)
        chosen = [tuple(found.examples[i] for i in part) for part in (parts.train, parts.dev)]
        return Data(chosen[0], chosen[1], found, None, history)
    return Data(found.examples, (), found, None, history)


def carry_out(
    task: FinetuneTask,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], object] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    cache: Path | None = None,
) -> Result:
    """Train as the task says and leave a checkpoint that loads in task.output.

    on_event  also written to events.jsonl
    stop      asked after every step; anything true ends the training with a checkpoint to resume from
    resume    go on from the newest checkpoint in the output folder
    overwrite  a training that the output folder holds is deleted, once the new one is sure to start
    say       told what is being done, a sentence at a time
    cache     folder of the encoded rows
    GLMError for everything an analyst can correct; nothing is trained then, and what is in the folder stays.
    """
    from .. import checkpoints
    from .audit import audit
    from .encoding import encode_all

    tell = say or (lambda text: None)
    output = Path(task.output).expanduser()
    _refuse_used(output, resume, overwrite)
    for message, todo in task.plan.problems():
        raise GLMError(message, todo)
    data = load_data(task)
    tell(f"{len(data.train):,} rows to train on, {len(data.dev):,} to check with.")
    tell(f"Loading {Path(task.checkpoint).name} ...")
    loaded = checkpoints.load(task.checkpoint, task.plan.precision, task.device, task.generation or None)
    limits = (task.max_source, task.max_target)
    plan = task.plan if task.plan.precision != "auto" else replace(task.plan, precision=loaded.precision)
    _check_context(loaded, limits)
    settings: dict[str, Any] = {
        "source_prefix": task.source_prefix, "history_column": data.history, "cache": cache,
    }  # fmt: skip
    encoded = encode_all(data.train, loaded.tokenizer, *limits, **settings)
    encoded_dev = encode_all(data.dev, loaded.tokenizer, *limits, **settings)
    found = audit(data.train, data.dev, encoded, encoded_dev)
    _refuse([finding for finding in found.findings if finding.severity == "stop"])
    for finding in (*data.loaded.problems, *found.findings):
        if finding.severity == "warn":
            tell(f"{finding.message} {finding.todo}".strip())
    trainee = _attach(loaded, task, plan)
    manifest = _manifest(task, data, loaded, trainee)
    if overwrite and output.is_dir():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(output / AUDIT, found.to_json())
    _write_json(output / MANIFEST, manifest | {"state": "running"})
    tell(f"Training {trainee.trainable_count:,} numbers, {task.plan.max_steps:,} steps.")
    with (output / EVENTS).open("a" if resume else "w", encoding="utf-8") as file:

        def event(one: Event) -> None:
            file.write(json.dumps({**one.to_json(), "time": round(time.time(), 3)}) + "\n")
            file.flush()
            if on_event is not None:
                on_event(one)

        try:
            outcome = train(
                trainee, encoded, encoded_dev, plan, output, loaded.tokenizer.pad_id, event, stop, resume
            )
        except GLMError as error:
            _write_json(output / MANIFEST, manifest | {"state": "failed", "error": str(error)})
            raise
    manifest |= {"state": "stopped" if outcome.stopped else "done", **_ended(outcome)}
    if not outcome.stopped and outcome.best is not None:
        publish(outcome.best, output)
    _write_json(output / MANIFEST, manifest)
    return Result(output, outcome, manifest)


def publish(step: Path, output: Path) -> None:
    """Put the files of a step's checkpoint into the output folder itself, without a second copy where possible."""
    for file in sorted(step.iterdir()):
        if not file.is_file() or file.name.startswith(STATE_FILES):
            continue
        target = output / file.name
        beside = target.with_name(f"{target.name}.part")
        with suppress(FileNotFoundError):
            beside.unlink()
        try:
            os.link(file, beside)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, beside)
        beside.replace(target)


def _refuse(stops: Sequence[Problem]) -> None:
    """All that prevents training, in one sentence after the other."""
    if stops:
        raise GLMError(
            " ".join(problem.message for problem in stops),
            " ".join(dict.fromkeys(problem.todo for problem in stops if problem.todo)),
        )


def _refuse_used(output: Path, resume: bool, overwrite: bool) -> None:
    if resume or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise GLMError(
            f"The output folder {output} is in use.", "Choose a new folder, resume, or let it be overwritten."
        )
    if not output.is_dir() or not ((output / MANIFEST).is_file() or any(output.glob("checkpoint-*"))):
        raise GLMError(
            f"{output} does not look like the folder of a training, so it is not overwritten.",
            "Choose another folder.",
        )


def _check_context(loaded: LoadedModel, limits: tuple[int, int]) -> None:
    longest, context = sum(limits) + 1, loaded.info.context
    if context and longest > context:
        raise GLMError(
            f"{limits[0]:,} tokens of a prompt and {limits[1]:,} of an answer do not fit into the model's context "
            f"of {context:,}.",
            "Choose smaller limits.",
        )


def _attach(loaded: LoadedModel, task: FinetuneTask, plan: Plan) -> Trainee:
    from .methods import attach

    trainee = attach(loaded, plan.method, plan.precision, plan.seed)
    if task.start_from:
        trainee.load(Path(task.start_from).expanduser())
    return trainee


def _manifest(task: FinetuneTask, data: Data, loaded: LoadedModel, trainee: Trainee) -> dict[str, Any]:
    from importlib.metadata import version

    from .. import __version__, checkpoints

    files = {"train": task.train_file, **({"dev": task.dev_file} if task.dev_file else {})}
    return {
        "task": task.to_json(),
        "data": {
            part: {"file": Path(name).name, "sha256": _sha256(Path(name))} for part, name in files.items()
        },
        "rows": {"train": len(data.train), "dev": len(data.dev)},
        "base": {"name": loaded.info.name, "fingerprint": checkpoints.fingerprint(loaded.info.path)},
        "prompt_format": loaded.tokenizer.generation,
        "trainable": trainee.trainable_count,
        "parameters": loaded.info.parameters,
        "device": str(loaded.device),
        "started": time.time(),
        "versions": {"glm-workbench": __version__, **{name: version(name) for name in PACKAGES}},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def _ended(outcome: Outcome) -> dict[str, Any]:
    return {
        "finished": time.time(),
        "steps": outcome.steps,
        "losses": outcome.losses,
        "dev_losses": outcome.dev,
        "best": outcome.best.name if outcome.best else "",
        "seconds": outcome.seconds,
        "tokens": outcome.tokens,
        "peak_bytes": outcome.peak_bytes,
    }


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """The events of a training so far; a half-written last line is left out."""
    path = Path(folder) / EVENTS
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def predict(
    task: FinetuneTask,
    test_file: str,
    adapter: str | Path | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> list[tuple[str, str]]:
    """(expected, predicted) of every row of a labelled file, greedily, in order; with or without the adapter."""
    from .. import checkpoints
    from ..engine import Engine, GenerationSettings, Request
    from ..tables import ReadOptions
    from .encoding import encode_prompt

    options = ReadOptions.from_json(task.read_options)
    found = read(test_file, task.columns, options, task.limit_dev, training=False)
    found.checked()
    loaded = checkpoints.load(
        adapter or task.checkpoint, task.plan.precision, task.device, task.generation or None,
        task.checkpoint if adapter else None,
    )  # fmt: skip
    engine = Engine(loaded)
    try:
        settings = GenerationSettings(max_new_tokens=task.max_target)
        requests = [
            Request(
                tuple(encode_prompt(one, loaded.tokenizer, task.max_source, source_prefix=task.source_prefix)),
                settings, "batch",
            )
            for one in found.examples
        ]  # fmt: skip
        answers = []
        for start in range(0, len(requests), 256):
            for handle in engine.submit_many(requests[start : start + 256]):
                handle.wait()
                if handle.error is not None:
                    raise handle.error
                answers.append(handle.text)
            if on_row is not None:
                on_row(len(answers), len(requests))
    finally:
        engine.close()
        checkpoints.release(loaded)
    return [(one.response, answer) for one, answer in zip(found.examples, answers, strict=True)]
