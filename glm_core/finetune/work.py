"""A training from files to a checkpoint: the same call behind the screen's job and the shell.

The output folder gets the checkpoint itself, ready to load, and beside it what the training was: manifest.json (task,
hashes of the data and the base, split, versions, losses), events.jsonl (the curve, written as it grows), audit.json,
samples.jsonl (answers to the same dev questions at every checkpoint), and the steps' own checkpoints to resume from.
Where the model reads unlabelled texts first, adapt/ has the same files of that step.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from ..settings import MINI
from .adapt import FOLDER, Adapt
from .examples import Columns, Example, Loaded, Problem, labels_of, read
from .loop import Event, Outcome, Plan, mean_loss, train

if TYPE_CHECKING:
    from ..checkpoints import LoadedModel
    from ..tables import ReadOptions
    from .adapt import Texts
    from .methods import Trainee

MANIFEST, EVENTS, AUDIT, SAMPLES = "manifest.json", "events.jsonl", "audit.json", "samples.jsonl"
GENERAL = MINI.parents[1] / "dialogue" / "train.jsonl"
GENERAL_TOKENS = 128  # at least this much of a general question and of its answer
SAMPLED, SAMPLED_TOKENS = 4, 32  # questions, and the longest answer to each
WITHOUT = "without-adapting"  # folder of the same training without the unlabelled texts
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
    adapt        unlabelled texts to read before the labelled rows
    general_share  rows of general_file mixed in for every row of the training file, so that less is forgotten;
                 the conversations that come with the program where no file is named
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
    adapt: Adapt | None = None
    general_share: float = 0.0
    general_file: str = ""
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
            "adapt": self.adapt.to_json() if self.adapt else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FinetuneTask:
        """The task `to_json` gave; unknown keys are ignored."""
        known = {one.name for one in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["plan"] = Plan.from_json(data["plan"])
        values["columns"] = Columns(**data["columns"]) if data.get("columns") else None
        values["adapt"] = Adapt.from_json(data["adapt"]) if data.get("adapt") else None
        return cls(**values)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the task before any file is read, each with what to do."""
        found = self.plan.problems() + (self.adapt.problems() if self.adapt else [])
        if not 0 <= self.general_share <= 10:
            found.append(
                (f"{self.general_share:g} general rows for every row are too many.", "Choose 0 to 10.")
            )
        return found


@dataclass(frozen=True)
class Data:
    """The examples of a training, as read and split."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    loaded: Loaded
    dev_loaded: Loaded | None
    history: bool  # the data has a column of earlier rounds
    general: tuple[Example, ...] = ()


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
    found_dev = found_general = None
    if task.dev_file:
        found_dev = read(
            task.dev_file, task.columns or found.columns, options, task.limit_dev, training=False
        )
    if task.general_share:
        found_general = read(task.general_file or GENERAL)
    _refuse([problem for one in (found, found_dev, found_general) if one for problem in one.stops])
    history = bool(found.columns and found.columns.history)
    train_part, dev_part = found.examples, found_dev.examples if found_dev is not None else ()
    if found_dev is None and task.dev_share:
        parts = split(found.examples, task.dev_share, 0.0, task.split_seed)
        train_part, dev_part = (tuple(found.examples[i] for i in part) for part in (parts.train, parts.dev))
    general: tuple[Example, ...] = ()
    if found_general is not None:
        general = _some(found_general.examples, round(task.general_share * len(train_part)), task.plan.seed)
    return Data(train_part, dev_part, found, found_dev, history, general)


def _some(examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    """So many of the examples, each again only once all were taken."""
    chance, found = random.Random(f"{seed}-general"), list[Example]()
    while len(found) < count and examples:
        found += chance.sample(examples, min(len(examples), count - len(found)))
    return tuple(found)


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

    on_event  also written to events.jsonl; those of the unlabelled texts to adapt/events.jsonl
    stop      asked after every step; anything true ends the training with a checkpoint to resume from
    resume    go on from the newest checkpoint in the output folder
    overwrite  a training that the output folder holds is deleted, once the new one is sure to start
    say       told what is being done, a sentence at a time
    cache     folder of the encoded rows
    GLMError for everything an analyst can correct; nothing is trained then, and what is in the folder stays.
    """
    from .. import checkpoints

    tell = say or (lambda text: None)
    output = Path(task.output).expanduser()
    refuse_used(output, resume, overwrite)
    for message, todo in task.problems():
        raise GLMError(message, todo)
    work = _Work(task, output, tell, cache)
    if overwrite and output.is_dir():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        result = work.run(on_event, stop, resume)
    finally:
        checkpoints.release(work.loaded)
    if result.outcome.stopped or task.adapt is None or not task.adapt.compare:
        return result
    tell("The same training without the unlabelled texts, to compare ...")
    plain = replace(task, adapt=None, output=str(output / WITHOUT))
    other = carry_out(plain, on_event, stop, True, False, say, cache)
    return replace(result, outcome=other.outcome) if other.outcome.stopped else result


class _Work:
    """One training with everything read and encoded; making it refuses what cannot work."""

    def __init__(
        self, task: FinetuneTask, output: Path, tell: Callable[[str], None], cache: Path | None
    ) -> None:
        from .. import checkpoints
        from .audit import audit
        from .encoding import encode_all

        self.task, self.output, self.tell = task, output, tell
        self.data = data = load_data(task)
        mixed = f" and {len(data.general):,} general ones" if data.general else ""
        tell(f"{len(data.train):,} rows{mixed} to train on, {len(data.dev):,} to check with.")
        self.texts = self._texts()
        tell(f"Loading {Path(task.checkpoint).name} ...")
        self.loaded = loaded = checkpoints.load(
            task.checkpoint, task.plan.precision, task.device, task.generation or None
        )
        try:
            limits = (task.max_source, task.max_target)
            chosen = task.plan if task.plan.precision != "auto" else None
            self.plan = chosen or replace(task.plan, precision=loaded.precision)
            _check_context(loaded, limits)
            settings: dict[str, Any] = {"source_prefix": task.source_prefix, "cache": cache}
            own: dict[str, Any] = settings | {"history_column": data.history}
            self.rows: Sequence[Any] = encode_all(data.train, loaded.tokenizer, *limits, **own)
            self.dev = encode_all(data.dev, loaded.tokenizer, *limits, **own)
            self.audit = audit(data.train, data.dev, self.rows, self.dev)
            _refuse([finding for finding in self.audit.findings if finding.severity == "stop"])
            if data.general:
                # A label's limit would cut every conversation in the middle of its answer.
                longer = [max(limit, GENERAL_TOKENS) for limit in limits]
                self.rows = [*self.rows, *encode_all(data.general, loaded.tokenizer, *longer, cache=cache)]
            for finding in (*data.loaded.problems, *self.audit.findings):
                if finding.severity == "warn":
                    tell(f"{finding.message} {finding.todo}".strip())
            self.trainee = _attach(loaded, task, self.plan)
        except BaseException:
            checkpoints.release(loaded)
            raise

    def _texts(self) -> Texts | None:
        from ..tables import ReadOptions
        from .adapt import texts

        adapt = self.task.adapt
        if adapt is None:
            return None
        judged = [*self.data.dev]
        for file in adapt.exclude:
            found = read(file, self.task.columns, training=False)
            _refuse(found.stops)
            judged += found.examples
        # The options belong to the training file; only where this is the same one do they fit.
        same = Path(adapt.file) == Path(self.task.train_file)
        options = ReadOptions.from_json(self.task.read_options) if same else None
        return texts(adapt.file, adapt.column, judged, options, self.task.plan.seed)

    def run(
        self, on_event: Callable[[Event], None] | None, stop: Callable[[], object] | None, resume: bool
    ) -> Result:
        """Adapt, train, publish; the manifest says at any time how far it is."""
        from . import state

        manifest = _manifest(self.task, self.data, self.loaded, self.trainee)
        _write_json(self.output / AUDIT, self.audit.to_json())
        before = _read_json(self.output / MANIFEST) if resume else {}
        if "adapt" in before:
            manifest["adapt"] = before["adapt"]
        _write_json(self.output / MANIFEST, manifest | {"state": "running"})
        pad = self.loaded.tokenizer.pad_id
        try:
            if self.texts is not None and not (resume and state.latest(self.output)):
                outcome = self._adapt(manifest, on_event, stop)
                if outcome.stopped:
                    _write_json(self.output / MANIFEST, manifest | {"state": "stopped"})
                    return Result(self.output, outcome, manifest | {"state": "stopped"})
            self.tell(f"Training {self.trainee.trainable_count:,} numbers, {self.plan.max_steps:,} steps.")
            with _EventFile(self.output, resume, on_event, self._sampler()) as tell:
                outcome = train(
                    self.trainee, self.rows, self.dev, self.plan, self.output, pad, tell, stop, resume
                )
        except GLMError as error:
            _write_json(self.output / MANIFEST, manifest | {"state": "failed", "error": str(error)})
            raise
        manifest |= {"state": "stopped" if outcome.stopped else "done", **_ended(outcome)}
        if not outcome.stopped and outcome.best is not None:
            publish(outcome.best, self.output)
        _write_json(self.output / MANIFEST, manifest)
        return Result(self.output, outcome, manifest)

    def _adapt(
        self,
        manifest: dict[str, Any],
        on_event: Callable[[Event], None] | None,
        stop: Callable[[], object] | None,
    ) -> Outcome:
        """Train on the unlabelled texts, and keep in the manifest what that changed."""
        from .adapt import encode_texts

        adapt, texts, plan = self.task.adapt, self.texts, self.plan
        assert adapt is not None and texts is not None
        tokenizer, folder = self.loaded.tokenizer, self.output / FOLDER
        rows, held = (encode_texts(one, tokenizer, adapt.length) for one in (texts.train, texts.held))
        own = replace(
            plan,
            max_steps=adapt.steps(len(rows), plan.batch_size * plan.accumulation),
            learning_rate=adapt.learning_rate or plan.learning_rate,
            warmup_steps=None,
            save_total=1,
        )
        self.tell(f"Reading {len(texts.train):,} unlabelled texts, {own.max_steps:,} steps.")
        pad, size = tokenizer.pad_id, plan.batch_size
        found = {
            "texts": len(texts.train), "held": len(texts.held), "rows": texts.rows, "empty": texts.empty,
            "copies": texts.copies, "excluded": texts.excluded, "steps": own.max_steps,
            "sha256": _sha256(Path(adapt.file)),
        }  # fmt: skip
        before = _read_json(folder / MANIFEST)
        if "dev_loss_before" not in before:
            before = {"text_loss_before": mean_loss(self.trainee, held, size, pad), "dev_loss_before": None}
            if len(self.dev):
                before["dev_loss_before"] = mean_loss(self.trainee, self.dev, size, pad)
            folder.mkdir(exist_ok=True)
            _write_json(folder / MANIFEST, before)
        with _EventFile(folder, True, on_event) as tell:
            outcome = train(self.trainee, rows, held, own, folder, pad, tell, stop, True)
        if not outcome.stopped:
            found |= before | {"text_loss": mean_loss(self.trainee, held, size, pad), "dev_loss": None}
            if len(self.dev):
                found["dev_loss"] = mean_loss(self.trainee, self.dev, size, pad)
            manifest["adapt"] = found | {"seconds": outcome.seconds}
            _write_json(self.output / MANIFEST, manifest | {"state": "running"})
        return outcome

    def _sampler(self) -> Callable[[Event], None]:
        """What writes the model's answers to a few dev questions at every checkpoint."""
        from .encoding import encode_prompt

        rows = _varied(self.data.dev or self.data.train)
        prompts = [
            encode_prompt(one, self.loaded.tokenizer, self.task.max_source, source_prefix=self.task.source_prefix)
            for one in rows
        ]  # fmt: skip
        tokenizer, longest = self.loaded.tokenizer, min(SAMPLED_TOKENS, self.task.max_target)

        def sample(event: Event) -> None:
            if event.kind != "saved":
                return
            self.trainee.evaluating()
            answers = self.trainee.greedy(prompts, tokenizer.stop_ids, longest, tokenizer.pad_id)
            with (self.output / SAMPLES).open("a", encoding="utf-8") as file:
                for row, ids in zip(rows, answers, strict=True):
                    told = tokenizer.answer_text(ids, len(ids) < longest)
                    line = {
                        "step": event.step, "prompt": row.prompt, "expected": row.response, "answer": told,
                    }  # fmt: skip
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

        return sample


def _varied(examples: Sequence[Example]) -> list[Example]:
    """A few examples, of different classes where there are classes."""
    if labels_of([one.response for one in examples]):
        first = {one.response: one for one in reversed(examples)}
        chosen = list(first.values())[:SAMPLED]
        return chosen + [one for one in examples if one not in chosen][: SAMPLED - len(chosen)]
    return list(examples[:SAMPLED])


class _EventFile:
    """Writes every event into a folder's events.jsonl as it comes, and passes it on."""

    def __init__(self, folder: Path, resume: bool, *also: Callable[[Event], None] | None) -> None:
        self._path, self._mode = folder / EVENTS, "a" if resume else "w"
        self._also = [one for one in also if one is not None]

    def __enter__(self) -> Callable[[Event], None]:
        self._file = self._path.open(self._mode, encoding="utf-8")
        return self._tell

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _tell(self, event: Event) -> None:
        self._file.write(json.dumps({**event.to_json(), "time": round(time.time(), 3)}) + "\n")
        self._file.flush()
        for one in self._also:
            one(event)


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


def refuse_used(output: Path, resume: bool, overwrite: bool) -> None:
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


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or none that is whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
