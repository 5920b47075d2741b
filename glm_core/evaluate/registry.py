"""The registry of runs: listed, named, tagged, done again, deleted; predictions made elsewhere; series of checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import batch
from ..errors import GLMError
from ..jobs import Job, JobStore, Result, StopSignal, this_process
from ..tables import ReadOptions, Table, WriteReport, open_table, write
from ..tables.options import excerpt
from . import work
from .answers import spellings
from .scoring import Scores, folder_of, known, per_row, update
from .task import (
    ANSWERS,
    EXTRA,
    IMPORTED,
    EvaluationTask,
    Kind,
    Left,
    _kind_of,
    guess_kind,
    known_metrics,
    option_columns,
    rows_of,
    with_model,
)
from .work import KIND, unstored

NAMES = "run.json"
PREDICTIONS = (
    "generated_predictions.txt"  # one {"labels", "predict"} a line, as the released scripts write it
)
IMPORT_ROWS = 5000
LONGEST_NAME = 200
ASKED = (
    "prompt",
    "question",
    "input",
    "content",
    "text",
    "instruction",
    "query",
    "问题",
    "题目",
    "提示",
    "内容",
    "文本",
)


STEP = re.compile(r"checkpoint-(\d+)")  # the folder of a step in that of its training


@dataclass(frozen=True)
class Run:
    """One evaluation as it stands; `scores` is None until all its present answers are scored."""

    id: str
    title: str
    state: str
    task: EvaluationTask
    job: Job
    scores: Scores | None
    tags: tuple[str, ...] = ()
    rerun_of: str = ""

    @property
    def imported(self) -> bool:
        """Whether its predictions were made elsewhere."""
        return self.task.method == "imported"

    @property
    def step(self) -> int | None:
        """The step of the training that its checkpoint is of; by its folder, where it was not run as one of a series."""
        if self.task.step is not None:
            return self.task.step
        found = STEP.fullmatch(Path(self.task.checkpoint).name)
        return int(found[1]) if found else None

    @property
    def training(self) -> str:
        """The folder of the training that its checkpoint is a step of; empty where it is none."""
        if self.task.group or self.step is None:
            return self.task.group
        return str(Path(self.task.checkpoint).parent.resolve())


# ---- looking


def runs(
    store: JobStore, *, kind: Kind | None = None, tag: str = "", group: str = "", limit: int = 1000
) -> list[Run]:
    """The newest runs first; all, or those of a kind, with a tag, or of a group."""
    found = (run_of(store, job.id, job) for job in store.list(limit, KIND))
    return [
        one
        for one in found
        if (kind is None or one.task.kind == kind)
        and (not tag or tag in one.tags)
        and (not group or one.task.group == group)
    ]


def run_of(store: JobStore, run_id: str, job: Job | None = None) -> Run:
    """One run; GLMError if there is none of that id."""
    job = job or store.get(run_id)
    if job.kind != KIND:
        raise GLMError(f"{run_id} is no evaluation.", "Choose one of the list of runs.")
    task = EvaluationTask.from_json(job.task)
    names = _names(store, run_id)
    return Run(
        job.id, str(names.get("title") or job.title), job.state, task, job, known(store, job),
        tuple(map(str, names.get("tags", ()))), str(names.get("rerun_of", "")),
    )  # fmt: skip


def _names(store: JobStore, run_id: str) -> dict[str, Any]:
    try:
        found = json.loads((folder_of(store, run_id) / NAMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rename(store: JobStore, run_id: str, **values: Any) -> Run:
    run_of(store, run_id)
    folder = folder_of(store, run_id)
    beside = folder / f".{os.getpid()}-{NAMES}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps(_names(store, run_id) | values, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(folder / NAMES)
    except OSError as error:
        raise GLMError(
            f"{folder / NAMES} could not be written: {error.strerror or error}.", "Free some disk space."
        ) from error
    return run_of(store, run_id)


def rename(store: JobStore, run_id: str, title: str) -> Run:
    """Give a run another name; a blank one is its first name again."""
    return _rename(store, run_id, title=" ".join(title.split())[:LONGEST_NAME])


def tag(store: JobStore, run_id: str, tags: Iterable[str]) -> Run:
    """Give a run these tags in place of those it has."""
    kept = dict.fromkeys(" ".join(one.split())[:LONGEST_NAME] for one in tags)
    return _rename(store, run_id, tags=[one for one in kept if one])


def delete(store: JobStore, run_id: str) -> None:
    """Delete a run with its answers and scores; GLMError while it runs."""
    run_of(store, run_id)
    store.delete(run_id)
    shutil.rmtree(folder_of(store, run_id), ignore_errors=True)


# ---- doing again


def rerun(store: JobStore, run_id: str) -> Run:
    """The same rows asked again by the same checkpoint with the same settings, as a new run."""
    before = run_of(store, run_id)
    return _again(store, before, before.job.task, before.title, rerun_of=run_id)


def start_precisions(
    store: JobStore, run_id: str, precisions: Sequence[str], device: str = "auto"
) -> list[Run]:
    """The rows of a run asked again by the same checkpoint at other precisions, a new run for each.

    GLMError, with no run started, where the checkpoint cannot be loaded so or is another one by now.
    """
    before = run_of(store, run_id)
    task = before.task
    if before.imported:
        raise GLMError("The predictions were made elsewhere.", "Choose a run of a checkpoint.")
    if task.remote:
        raise GLMError(
            "The run is of a model on a server, whose precision is the server's.",
            "Choose a run of a checkpoint.",
        )
    alone = replace(task, group="", step=None)  # no step of the series the run may belong to
    tasks = [
        with_model(alone, task.checkpoint, task.base or None, one, device, task.generation)
        for one in precisions
    ]
    if any(one.checkpoint_fingerprint != task.checkpoint_fingerprint for one in tasks):
        raise GLMError(
            f"The checkpoint {Path(task.checkpoint).name} is not the one this run was made with; its files have"
            " changed.",
            "Put the old files back, or start a new evaluation.",
        )
    title = before.title.removesuffix(f" ({task.precision.upper()})")
    return [_again(store, before, one.to_json(), f"{title} ({one.precision.upper()})") for one in tasks]


def _again(store: JobStore, before: Run, task: dict[str, Any], title: str, **names: Any) -> Run:
    """A new run on the rows of another one."""
    if not before.job.complete:
        raise GLMError("The file was not read to its end.", "Start the evaluation again from the file.")
    if before.imported and before.job.left:
        raise GLMError("Some rows have no prediction.", "Import the file again.")
    job = store.create(KIND, title, task)
    try:
        store.add_rows(job.id, (cells for _, cells, _ in store.iter_results(before.id)))
        for warning in before.job.warnings:
            if warning.startswith("Not asked: "):
                store.warn(job.id, warning)
        if before.imported:
            _save(
                store, job, (one.prediction for _, _, one in store.iter_results(before.id) if one is not None)
            )
        store.mark_ready(job.id)
    except BaseException:
        store.mark_unready(job.id, "The rows were not copied to their end.")
        raise
    made = _rename(store, job.id, tags=list(before.tags), **names)
    return _finished(store, made.job) if before.imported else made


# ---- predictions made elsewhere


def import_predictions(
    store: JobStore,
    file: str | Path,
    *,
    name: str | None = None,
    kind: Kind | None = None,
    reference: str = "",
    prediction: str = "",
    labels: Sequence[str] = (),
    chosen: Sequence[str] = (),
    title: str = "",
    options: ReadOptions | None = None,
    wait: bool = True,
    background: bool = False,
) -> Run:
    """A run of predictions that a file brings along: {"labels", "predict"} lines, or a table with two such columns.

    name        how the file is called on screen
    reference, prediction   the columns; default: told from their names
    chosen      the metrics; default: all of the kind
    wait        score them here and now; else the thread that runs jobs does, as it takes seconds per 1,000 long texts
    background  copy the rows of a large file in a thread of its own; the run is "preparing" meanwhile
    The other columns are kept. GLMError for what cannot be read; a blank prediction counts as an answer that is wrong.
    """
    from ..engine import GenerationSettings

    source = Path(file)
    table = open_table(source, options or ReadOptions(), name)
    have = table.info.columns
    reference, prediction = _pair(table, reference, prediction)
    if kind is None:
        place = have.index(reference)
        given = [row[place].strip() for row in table.preview(2000) if row[place].strip()]
        of_options = guess_kind(have, ()) == "choice" and reference.strip().casefold() in ANSWERS
        kind = "choice" if of_options else _kind_of(given)
    task = EvaluationTask(
        kind=kind, method="imported", input_name=table.info.name, input_path=str(source.resolve()),
        input_sha256=batch.file_sha256(source), columns=have, prompt="", reference=reference,
        metrics=known_metrics(kind, chosen), settings=GenerationSettings(),
        options=option_columns(have) if kind == "choice" else (),
        subject=next((one for one in have if one.strip().casefold() in ("subject", "科目", "学科")), "")
        if kind == "choice" else "",
        labels=_labels(table, reference, labels) if kind == "label" else (),
        prediction=prediction, read_options=(options or ReadOptions()).to_json(),
    )  # fmt: skip
    job = store.create(KIND, title.strip() or work.title_of(task), task.to_json())

    def fill() -> None:
        left = Left()
        place = have.index(prediction)
        told: list[str] = []

        def rows() -> Iterator[tuple[str, ...]]:
            for row in rows_of(task, table, left):
                told.append(row.cells[place])
                yield row.cells

        with batch.preparing(store, job):
            if not store.add_rows(job.id, rows()):
                raise GLMError(
                    f"{task.input_name} has no rows.", "Choose a file with at least one row of data."
                )
            for warning in (*table.warnings, *work.left_out(left)):
                store.warn(job.id, warning)
            _save(store, job, told)
            store.mark_ready(job.id)

    if background:
        batch.in_background(job, fill)
        return run_of(store, job.id)
    fill()
    return _finished(store, job) if wait else run_of(store, job.id)


def _pair(table: Table, reference: str, prediction: str) -> tuple[str, str]:
    have = table.info.columns
    by_name = {column.strip().casefold(): column for column in reversed(have)}
    if not (reference and prediction):
        for a, b in IMPORTED:
            pair = reference or by_name.get(a, ""), prediction or by_name.get(b, "")
            if all(pair) and pair[0] != pair[1]:
                reference, prediction = pair
                break
    if not (reference and prediction):
        raise GLMError(
            f"The columns of {table.info.name} do not say which is the correct answer and which the prediction; it has"
            f" {', '.join(excerpt(one, 30) for one in have[:30])}.",
            "Choose both columns.",
        )
    for one in (reference, prediction):
        if one not in have:
            raise GLMError(
                f"{table.info.name} has no column {one!r}; it has {', '.join(excerpt(one, 30) for one in have[:30])}.",
                "Choose one of these columns, or rename the column in the file.",
            )
    return reference, prediction


def _labels(table: Table, reference: str, chosen: Sequence[str]) -> tuple[str, ...]:
    if chosen:
        return tuple(spellings(one for one in chosen if one.strip()).values())
    place = table.info.columns.index(reference)
    return tuple(spellings(row[place] for row in table.rows() if row[place].strip()).values())


def _save(store: JobStore, job: Job, predictions: Iterable[str]) -> None:
    """Store predictions in the order of the rows."""
    waiting: list[Result] = []
    for idx, told in enumerate(predictions):
        waiting.append(Result(idx, "ok", told))
        if len(waiting) == IMPORT_ROWS:
            store.save_results(job.id, waiting)
            waiting = []
    store.save_results(job.id, waiting)


def _finished(store: JobStore, job: Job) -> Run:
    """Score a run without a model here and now, unless the thread that runs jobs was faster."""
    owner = this_process()
    if (claimed := store.claim((KIND,), owner, job.id)) is not None:
        state, message = "failed", "The scoring was interrupted; open the run to score it again."
        try:
            work.run(claimed, store, StopSignal(store, claimed))
            state, message = "done", ""
        finally:
            store.release(job.id, owner, state, message)
    return run_of(store, job.id)


# ---- series


def start_steps(
    store: JobStore,
    task: EvaluationTask,
    training: str | Path,
    base: str | Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    with_base: bool = True,
) -> list[Run]:
    """Start a run for every checkpoint-N of a training's folder, all of one group; the base is step 0.

    base   what the checkpoints are adapters of; default: what they name
    GLMError, with no run started, where the folder has no checkpoint or one cannot be loaded.
    """
    from .. import checkpoints
    from ..finetune import state

    folder = Path(training)
    steps = state.checkpoints(folder)
    if not steps:
        raise GLMError(f"{folder} has no checkpoint of a step.", "Choose the output folder of a training.")
    tasks = []
    first = checkpoints.inspect(steps[0])
    if with_base and first.needs_base:
        tasks.append(
            replace(with_model(task, checkpoints.base_of(first, base).path, None, precision, device), step=0)
        )
    for one in steps:
        tasks.append(replace(with_model(task, one, base, precision, device), step=state.step_of(one)))
    group = str(folder.resolve())
    jobs = [
        work.start(store, replace(one, group=group), f"{folder.name}, step {one.step:,} on {task.input_name}")
        for one in tasks
    ]
    return [run_of(store, job.id, job) for job in jobs]


def by_step(found: Iterable[Run]) -> list[tuple[int, Run]]:
    """The runs of a series in the order of their steps; of several of one step the newest."""
    newest: dict[int, Run] = {}
    for one in sorted(found, key=lambda one: (one.job.created, one.id)):
        if one.step is not None:
            newest[one.step] = one
    return sorted(newest.items())


# ---- rows and files


def answers_page(store: JobStore, run_id: str, offset: int, limit: int) -> list[dict[str, Any]]:
    """Rows as a screen shows them: number, question, reference, prediction, reasoning, what is to know about it."""
    task = run_of(store, run_id).task
    return [
        _shown(task, idx, cells, result) for idx, cells, result in store.results_page(run_id, offset, limit)
    ]


def _shown(task: EvaluationTask, idx: int, cells: Sequence[str], result: Result | None) -> dict[str, Any]:
    extra = dict(zip(EXTRA, cells[len(task.columns) :], strict=True))
    prediction, reasoning = result.prediction if result is not None else "", ""
    values: dict[str, float] = {}
    if task.method in ("likelihood", "chain"):
        prediction, values, reasoning = unstored(prediction)
    place = question_column(task)
    question = extra["question"] or (cells[place] if place is not None else "")
    return {
        "idx": idx,
        "number": int(extra["number in the file"]),
        "question": question,
        "reference": extra["reference"],
        "prediction": prediction,
        "reasoning": reasoning,
        "log_probabilities": values,
        "status": result.status if result is not None else "not run",
        "note": result.error if result is not None else "",
    }


def column(store: JobStore, run_id: str, name: str) -> list[str]:
    """The cells of a column of the file for every row of a run, to cut the scores by; GLMError if there is none."""
    task = run_of(store, run_id).task
    if name not in task.columns:
        raise GLMError(
            f"{task.input_name} has no column {name!r}; it has {', '.join(excerpt(one, 30) for one in task.columns[:30])}.",
            "Choose one of these columns, or rename the column in the file.",
        )
    place = task.columns.index(name)
    return [cells[place] for _, cells, _ in store.iter_results(run_id)]


def question_column(task: EvaluationTask) -> int | None:
    """Which column holds the questions; of predictions made elsewhere the one that is called so, if any."""
    if task.prompt:
        return task.columns.index(task.prompt)
    by_name = {column.strip().casefold(): place for place, column in enumerate(task.columns)}
    for name in ASKED:
        if name in by_name and task.columns[by_name[name]] not in (task.reference, task.prediction):
            return by_name[name]
    return None


def manifest(store: JobStore, run_id: str) -> dict[str, Any]:
    """How the answers were made and what they scored; without paths and host name."""
    found = run_of(store, run_id)
    whole = batch.manifest(store, run_id)
    whole["task"] = {
        **whole["task"],
        "base": Path(found.task.base).name,
        "group": Path(found.task.group).name,
    }
    return whole | {
        "title": found.title,
        "tags": list(found.tags),
        "scores": found.scores.to_json() if found.scores is not None else None,
    }


def export(
    store: JobStore,
    run_id: str,
    path: str | Path,
    format: Literal["csv", "xlsx", "jsonl", "parquet"],
    guard: bool = True,
) -> WriteReport:
    """The file's rows with prediction, what it was read as, whether it is right, its scores; and a manifest beside it.

    GLMError if a file cannot be written.
    """
    found, table = run_of(store, run_id), per_row(store, run_id)
    task = found.task
    own = ["prediction", "answer", "right", *table.scores, "status", "truncated", "note"]
    columns = [*task.columns]
    for name in own:
        free, number = name, 2
        while free in columns:
            free, number = f"{name} ({number})", number + 1
        columns.append(free)

    def rows() -> Iterator[tuple[str | float | None, ...]]:
        for place, (_, cells, result) in enumerate(store.iter_results(run_id)):
            shown = _shown(task, place, cells, result)
            given = shown["reasoning"] or shown["prediction"]
            scored = bool(table.scored[place])
            yield (
                *cells[: len(task.columns)],
                given,
                str(table.answer[place]),
                int(table.right[place]) if scored else "",
                *(float(values[place]) if scored else "" for values in table.scores.values()),
                str(shown["status"]),
                "yes" if table.truncated[place] else "no",
                str(shown["note"]),
            )

    target = Path(path)
    report = write(target, columns, rows(), format, guard=guard)
    write_text(
        target.with_name(f"{target.name}.manifest.json"),
        json.dumps(manifest(store, run_id), ensure_ascii=False, indent=2) + "\n",
    )
    return report


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none; GLMError where that is not possible."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise GLMError(
            f"{path.name} could not be written: {error.strerror or error}.",
            "Free some disk space or choose another folder.",
        ) from error


def save_predictions(store: JobStore, run_id: str, path: str | Path) -> None:
    """The predictions as the released scripts write them, one {"labels", "predict"} a line."""
    task = run_of(store, run_id).task
    lines = []
    for idx, cells, result in store.iter_results(run_id):
        shown = _shown(task, idx, cells, result)
        lines.append(
            json.dumps({"labels": shown["reference"], "predict": shown["prediction"]}, ensure_ascii=False)
        )
    write_text(Path(path), "\n".join(lines) + "\n")


def score_again(store: JobStore, run_id: str) -> Run:
    """Compute the scores of a run anew, as after a change of the program."""
    update(store, run_id)
    return run_of(store, run_id)
