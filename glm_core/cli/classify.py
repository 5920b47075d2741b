"""python -m glm_core classify: one label per row of a table with its probability, resumable; scores where known."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GLMError
from .arguments import FORMATS
from .job import carried_out, opened_store, reading, writable
from .model import chosen, connected, where
from .output import INTERRUPTED, SOME_ROWS_FAILED, json_text, printable, say

if TYPE_CHECKING:
    from ..classify import Label, LabelTask, Matched
    from ..jobs import Job, JobStore
    from ..statistics import Interval
    from ..tables import Table

WAYS = {
    "classify": "scored by the server, label by label",
    "echo": "from the server's log-probabilities of each label",
    "first": "from the server's likeliest first tokens; what is outside them counts as outside",
    "greedy": "none, this server gives none; a label is what the model wrote",
}
MOST_VALUES = 10  # named in a line
DRAWN = 4_000_000  # rows over all resamples of an interval
RESAMPLES = (200, 2000)


def classify(options: argparse.Namespace) -> int:
    """Label every row of a table as a durable job and write the result; 3 if rows failed."""
    from .. import classify as work
    from .. import tables
    from ..remote import shown
    from ..tables.options import plural

    out = writable(options.out, options.file)
    store, how = opened_store(options.owner), reading(options)
    table = tables.open_table(options.file, how)
    task = _task(options, table.info.columns, how.to_json())
    gold = _gold(options, table, task) if options.gold is not None else None

    def begin() -> Job:
        say(f"Reading {table.info.name} ...")
        job = work.start(store, task, table)
        say(f"Job {job.id}: {job.total:,} rows for {shown(task.checkpoint)}.")
        if way := task.remote.get("labels"):
            say(f"Probabilities: {WAYS[way]}.")
        return job

    job = carried_out(options, store, "classify", task.to_json(), begin, work.run, "labelled")
    if job is None:
        return INTERRUPTED
    report = work.export(store, job.id, out, FORMATS[out.suffix.lower()], guard=not options.no_guard)
    for note in (*job.warnings, *report.notes):
        say(f"Note: {note}")
    found = _summary(store, job, task, gold)
    if options.json:
        print(json_text({"job": job.id, "out": str(out)} | found))
    else:
        shortened = f", {job.truncated:,} shortened to fit" if job.truncated else ""
        print(f"{out}: {plural(job.done, 'row')} labelled, {job.failed:,} failed{shortened}")
        for line in _lines(found):
            print(printable(line))
    if job.failed:
        say("The columns status and reason say which rows failed and why; --retry-failed tries them again.")
        return SOME_ROWS_FAILED
    return 0


def _way(options: argparse.Namespace, labels: tuple[Label, ...]) -> str:
    """Where the probabilities of these labels will come from on the server that --model names."""
    from ..remote.labels import way_for

    with connected(options) as engine:
        return way_for(engine, True, [label.written for label in labels])


def _labels(text: str) -> tuple[Label, ...]:
    """Labels as written in one argument: "正常,垃圾", or with what the model says for each: "0=正常,1=垃圾"."""
    from ..classify import Label

    found = []
    for one in text.replace("，", ",").split(","):
        name, _, written = one.partition("=")
        found.append(Label(name.strip(), written.strip()))
    return tuple(found)


def _task(options: argparse.Namespace, columns: tuple[str, ...], read_options: dict[str, Any]) -> LabelTask:
    """The task, checked against table and checkpoint before anything is stored; GLMError where it fails."""
    from .. import batch
    from .. import classify as work

    for column in filter(None, (options.column, options.gold)):
        if column not in columns:
            raise GLMError(
                f"{options.file.name} has no column {column!r}; it has {', '.join(columns)}.",
                "Choose one of these.",
            )
    labels = _labels(options.labels)
    instruction = options.instruction or ""
    if options.template is not None:
        template = options.template
    else:
        template = batch.reference(options.column, columns)
        if options.instruction is None:
            instruction = work.instruction_for(labels)
            asked_in_chinese = not instruction.isascii()
            template = f"评论：{template}" if asked_in_chinese else f"Comment: {template}"
    names = [label.name for label in labels]
    _, model = chosen(options)
    if "remote" in model:
        model["remote"]["labels"] = _way(options, labels)
    task = work.LabelTask(
        **model,
        **where(options, model),
        template=template,
        columns=columns,
        labels=labels,
        instruction=instruction,
        system=options.system,
        positive=options.positive or (names[-1] if len(names) == 2 else ""),
        threshold=options.threshold,
        content_free=options.content_free,
        abstain_below=options.abstain_below,
        output_column=options.output_column,
        input_name=options.file.name,
        input_path=str(options.file.resolve()),
        input_sha256=batch.file_sha256(options.file),
        read_options=read_options,
        limit_rows=options.limit,
        versions=batch.versions(),
    )
    task.check()
    return task


# ---- where the correct labels are known


def _gold(options: argparse.Namespace, table: Table, task: LabelTask) -> tuple[int, dict[str, str]]:
    """(column of the correct labels, what each of its values means); GLMError naming values that mean none."""
    from .. import classify as work

    place = task.columns.index(options.gold)
    counts: Counter[str] = Counter()
    for row in table.rows():
        counts[row[place] if place < len(row) else ""] += 1
    counts.pop("", None)  # rows nobody labelled are not scored
    found = work.match_labels(counts, task.labels)
    confirmed = {}
    for one in options.gold_value or ():
        value, equals, name = one.rpartition("=")
        if not equals or name not in task.names:
            raise GLMError(
                f"--gold-value {one} names no label.", f"Write VALUE=LABEL; the labels are {', '.join(task.names)}."
            )  # fmt: skip
        confirmed[value] = name
    left = {value: count for value, count in found.unknown.items() if value not in confirmed}
    if left:
        raise GLMError(
            f"The column {options.gold} holds values that are no labels: {_named(left, found)}.",
            "Say what each means with --gold-value VALUE=LABEL, or correct the file.",
        )
    return place, dict(found.mapped) | confirmed


def _named(values: Mapping[str, int], found: Matched) -> str:
    shown = []
    for value, count in list(values.items())[:MOST_VALUES]:
        meant = found.proposals.get(value)
        shown.append(f"{value!r} ({count:,} rows{f', perhaps {meant}' if meant else ''})")
    return ", ".join(shown) + (f" and {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else "")


def _summary(
    store: JobStore, job: Job, task: LabelTask, gold: tuple[int, dict[str, str]] | None
) -> dict[str, Any]:
    """Counts, and scores with intervals where the correct labels are known."""
    from .. import classify as work

    names, answers = work.read_answers(store, job.id)
    numbers, probability = [], []
    counts: Counter[str] = Counter()
    review = greedy = 0
    rows = []
    for one in answers:
        counts[names[one.answer]] += 1
        review += bool(one.reason)
        greedy += one.greedy == one.answer
        if gold is not None:
            rows.append(one.idx)
            numbers.append(one.answer)
            probability.append(one.probabilities)
    found: dict[str, Any] = {
        "rows": job.done,
        "failed": job.failed,
        "shortened": job.truncated,
        "labels": {name: counts[name] for name in names},
        "to_review": review,
        # Where the label is the free answer itself, agreement says nothing.
        "greedy_agreement": greedy / job.done if job.done and task.remote.get("labels") != "greedy" else None,
    }
    if gold is None:
        return found
    place, meaning = gold
    truth = []
    wanted = set(rows)
    for idx, cells, _ in store.iter_results(job.id):
        if idx in wanted:
            name = meaning.get(cells[place] if place < len(cells) else "")
            truth.append(-1 if name is None else names.index(name))
    kept = [i for i, number in enumerate(truth) if number >= 0]
    scores = _scores(
        [truth[i] for i in kept], [numbers[i] for i in kept], [probability[i] for i in kept], task
    )
    return found | {"scored": len(kept), "scores": {name: one.to_json() for name, one in scores.items()}}


def _scores(
    truth: Sequence[int], answers: Sequence[int], probability: Sequence[Sequence[float]], task: LabelTask
) -> dict[str, Interval]:
    """Accuracy with Wilson's interval; macro-F1, ROC AUC and calibration error with bootstrap intervals."""
    import numpy as np

    from .. import metrics, statistics

    size, n = len(task.labels), len(truth)
    correct, given = np.array(truth, dtype=np.int64), np.array(answers, dtype=np.int64)
    bare = any(not one for one in probability)  # a server that gives no probabilities
    shares = np.zeros((n, size)) if bare else np.array(probability, dtype=np.float64).reshape(n, size)
    positive = [task.names.index(task.positive)] if task.positive else range(size)
    right = shares.argmax(axis=1) == correct if n else correct == given
    sure = shares.max(axis=1) if n else np.zeros(0)

    def macro_f1(rows: Any) -> float | None:
        table = np.bincount(correct[rows] * size + given[rows], minlength=size * size).reshape(size, size)
        of, to = table.sum(axis=1), table.sum(axis=0)
        some = of + to > 0
        return float((2 * np.diagonal(table)[some] / (of + to)[some]).mean()) if some.any() else None

    def area(rows: Any) -> float | None:
        curves = (metrics.roc(correct[rows] == i, shares[rows, i]) for i in positive)
        areas = [curve.area for curve in curves if curve is not None]
        return sum(areas) / len(areas) if areas else None

    def error(rows: Any) -> float | None:
        return metrics.reliability(sure[rows], right[rows])[1]

    resamples = max(RESAMPLES[0], min(RESAMPLES[1], DRAWN // max(1, n)))
    found = {"accuracy": statistics.wilson(int((correct == given).sum()), n)}
    for name, statistic in (("macro-f1", macro_f1), ("roc-auc", area), ("ece", error))[: 1 if bare else 3]:
        found[name] = statistics.bootstrap(n, statistic, resamples=resamples)
    return found


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [", ".join(f"{name}: {count:,}" for name, count in found["labels"].items())]
    if found["to_review"]:
        lines.append(f"{found['to_review']:,} rows to review")
    for name, one in found.get("scores", {}).items():
        if one["estimate"] is None:
            lines.append(f"{name:10} – ({one['reason']})")
        elif one["low"] is None:
            lines.append(f"{name:10} {one['estimate']:.4f} ({one['reason']})")
        else:
            lines.append(
                f"{name:10} {one['estimate']:.4f} (95 %: {one['low']:.4f} to {one['high']:.4f}, n = {one['n']:,})"
            )
    return lines
