"""python -m glm_core evaluate and compare: runs with scores and intervals, and which of two is better."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from .job import carried_out, opened_store, reading
from .model import asked, folder_of
from .output import INTERRUPTED, SOME_ROWS_FAILED, json_text, printable, say, width

if TYPE_CHECKING:
    from ..compare import Comparison
    from ..evaluate import EvaluationTask, Run
    from ..jobs import Job, JobStore
    from ..statistics import Interval

# What two tasks may differ in and still be the same work.
NOT_THE_TASK = ("versions", "input_name", "input_path", "group", "step", "remote")
MOST_RUNS = 4
SCORES, ROWS, PREDICTIONS = "scores.json", "rows.csv", "generated_predictions.txt"


def evaluate(options: argparse.Namespace) -> int:
    """Score a checkpoint or predictions on a labelled file, or list the runs; 3 if rows failed."""
    store = opened_store(options.owner)
    if options.list:
        return _list(store, options.json)
    if options.predictions is not None and options.file is not None:
        raise GLMError("There are two files.", "Give the labelled FILE, or --predictions, not both.")
    if options.predictions is not None:
        run: Run | None = _imported(store, options)
    elif options.file is not None:
        run = _asked(store, options)
    else:
        raise GLMError("There is no file.", "Give a labelled FILE, --predictions FILE, or --list.")
    if run is None:
        return INTERRUPTED
    _show(store, run, options.json)
    if options.out is not None:
        _write(store, run, options.out)
    if run.job.failed:
        say("Some rows failed; they are not counted.")
        return SOME_ROWS_FAILED
    return 0


def _names(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _imported(store: JobStore, options: argparse.Namespace) -> Run:
    from .. import evaluate as work

    return work.import_predictions(
        store,
        options.predictions,
        kind=options.kind,
        reference=options.response_column,
        prediction=options.prediction_column,
        labels=_names(options.labels),
        chosen=_names(options.metrics),
        title=options.title,
        options=reading(options),
    )


def _asked(store: JobStore, options: argparse.Namespace) -> Run | None:
    """The run of a checkpoint, gone on with where there is one already; None where it was interrupted."""
    from .. import evaluate as work
    from ..remote import shown

    task = _task(options)

    def begin() -> Job:
        job = work.start(store, task, options.title)
        say(f"Run {job.id}: {job.total:,} rows of kind {task.kind} for {shown(task.checkpoint)}.")
        return job

    plain = json.loads(json.dumps(task.to_json()))
    job = carried_out(options, store, "evaluate", plain, begin, work.run, "answered", NOT_THE_TASK)
    if job is None:
        return None
    return work.run_of(store, job.id)


def _task(options: argparse.Namespace) -> EvaluationTask:
    from .. import evaluate as work
    from ..engine import GenerationSettings
    from ..evaluate.task import LONGEST
    from ..remote import is_remote

    task = work.plan(
        options.file,
        options=reading(options),
        kind=options.kind,
        method=options.method,
        prompt=options.prompt_column,
        reference=options.response_column,
        template=options.template,
        system=options.system,
        labels=_names(options.labels),
        few_shot=options.few_shot,
        few_shot_file=options.few_shot_file,
        chosen=_names(options.metrics),
        limit=options.limit,
    )
    settings = GenerationSettings.from_json({"max_new_tokens": LONGEST[task.kind], **asked(options)})
    settings.check()
    from dataclasses import replace

    on_server = options.model is not None and is_remote(options.model)
    return work.with_model(
        replace(task, settings=settings),
        options.model if on_server else folder_of(options.model),
        options.base,
        options.precision,
        options.device,
        concurrency=options.concurrency,
        key_env=options.key_env or "",
    )


# ---- what is shown


def _value(found: Interval, unit: float) -> str:
    """A score with its interval, both in points of 100."""
    factor = 100 / unit
    if found.estimate is None:
        return found.reason
    text = f"{found.estimate * factor:.2f}"
    if found.low is not None and found.high is not None:
        text += f" ({found.low * factor:.2f} to {found.high * factor:.2f})"
    return text


RATIOS = ("length-ratio", "distinct-1", "distinct-2", "mcc")  # not of 100


def _show(store: JobStore, run: Run, as_json: bool) -> None:
    from .. import evaluate as work

    found = work.scores(store, run.id)
    if as_json:
        print(json_text(work.manifest(store, run.id)))
        return
    print(f"{run.id}  {printable(run.title)}")
    counted = [f"{found.n:,} of {found.rows:,} rows count"]
    for count, what in (
        (found.n_empty, "blank predictions"), (found.n_no_answer, "without an answer"), (found.n_failed, "failed"),
        (found.n_left, "not answered yet"), (found.n_no_reference, "without a reference"),
        (found.n_truncated, "asked with a shortened prompt"),
    ):  # fmt: skip
        if count:
            counted.append(f"{count:,} {what}")
    print("; ".join(counted))
    for name, one in found.values.items():
        mark = "*" if name == found.main else " "
        print(f"{mark} {name:18} {_value(one, 100.0 if name in RATIOS else found.unit)}")
    for note in (*run.job.warnings, *found.notes):
        say(f"Note: {note}")


def _list(store: JobStore, as_json: bool) -> int:
    from .. import evaluate as work

    found = work.runs(store)
    if as_json:
        print(json_text([_brief(one) for one in found]))
        return 0
    for one in found:
        headline = ""
        if one.scores is not None:
            headline = f"{one.scores.main} {_value(one.scores.headline, one.scores.unit)}"
        title = printable(one.title)
        print(f"{one.id}  {title}{' ' * max(1, 44 - width(title))}{one.state:10} {headline}".rstrip())
    if not found:
        say("There are no runs yet.")
    return 0


def _brief(run: Run) -> dict[str, Any]:
    from ..remote import shown

    return {
        "id": run.id,
        "title": run.title,
        "state": run.state,
        "kind": run.task.kind,
        "method": run.task.method,
        "checkpoint": shown(run.task.checkpoint),
        "file": run.task.input_name,
        "rows": run.job.total,
        "tags": list(run.tags),
        "scores": None if run.scores is None else {
            name: one.to_json() for name, one in run.scores.values.items()
        },
    }  # fmt: skip


def _write(store: JobStore, run: Run, folder: Path) -> None:
    """Scores, rows and predictions into a folder; GLMError where they cannot be written."""
    from .. import evaluate as work
    from ..evaluate.registry import save_predictions, write_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GLMError(
            f"{folder} cannot be made: {error.strerror or error}.", "Choose another folder."
        ) from error
    found = work.scores(store, run.id)
    write_text(folder / SCORES, json_text(found.to_json()) + "\n")
    work.export(store, run.id, folder / ROWS, "csv")
    save_predictions(store, run.id, folder / PREDICTIONS)
    say(f"Written: {SCORES}, {ROWS} with its manifest and {PREDICTIONS} in {folder}.")


# ---- compare


def compare(options: argparse.Namespace) -> int:
    """Print what may be said about the difference of runs."""
    from .. import compare as work

    if not 2 <= len(options.runs) <= MOST_RUNS:
        raise GLMError(f"There are {len(options.runs)} runs.", f"Give 2 to {MOST_RUNS}.")
    store = opened_store()
    ids = [_id(store, one) for one in options.runs]
    found = work.compare_all(store, ids, metric=options.metric, delta=options.delta / 100)
    if options.html is not None:
        from ..evaluate.registry import write_text
        from ..report_html import comparison_page

        write_text(options.html, comparison_page(store, found))
        say(f"Written: {options.html}")
    if options.json:
        print(json_text([one.to_json() for one in found] if len(found) > 1 else found[0].to_json()))
        return 0
    for one in found:
        _print(one)
    return 0


def _id(store: JobStore, named: str) -> str:
    """The run of that id or, where it is the only one, of that name or beginning of an id."""
    from .. import evaluate as work

    found = work.runs(store, limit=100_000)
    if any(one.id == named for one in found):
        return named
    same = [one.id for one in found if one.title == named] or [
        one.id for one in found if one.id.startswith(named)
    ]
    if len(same) != 1:
        how = "There is no run" if not same else f"{len(same)} runs are called"
        raise GLMError(f"{how} {named!r}.", "`python -m glm_core evaluate --list` shows their ids.")
    return same[0]


def _print(found: Comparison) -> None:
    print(f"A: {printable(found.title_a)}  ({found.a})")
    print(f"B: {printable(found.title_b)}  ({found.b})")
    for note in found.notes:
        print(note)
    unit = 100.0 if found.kind == "text" else 1.0
    print(f"  {'':18} {'A':>26} {'B':>26}   B - A")
    for row in found.metrics:
        own = 100.0 if row.metric in RATIOS else unit
        factor = 100 / own
        gap = "" if row.difference is None else f"{row.difference * factor:+.2f}"
        if row.low is not None and row.high is not None:
            gap += f" ({row.low * factor:+.2f} to {row.high * factor:+.2f})"
        p = "" if row.p_value is None else f", p = {row.p_value:.3g}"
        mark = "*" if row.metric == found.verdict.metric else " "
        print(f"{mark} {row.metric:18} {_value(row.a, own):>26} {_value(row.b, own):>26}   {gap}{p}")
    flips = found.flips
    if found.kind == "text":
        print(
            f"Higher in B: {len(flips.fixed):,}, lower: {len(flips.broken):,}, equal: {len(flips.both_right):,} rows"
        )
    else:
        print(f"Fixed: {len(flips.fixed):,}, broken: {len(flips.broken):,}, both wrong: {len(flips.both_wrong):,},"
              f" both right: {len(flips.both_right):,} rows")  # fmt: skip
    for name, (a, b) in found.settings.items():
        print(f"  {name}: {printable(_short(a))} | {printable(_short(b))}")
    print(printable(found.verdict.text))


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
