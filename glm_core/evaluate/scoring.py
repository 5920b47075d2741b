"""The scores of a run from its stored answers: each row and the whole, with intervals, kept beside the database.

The same answers give the same bytes in scores.json: nothing in it depends on time, machine or the id of the run.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import metrics, statistics
from ..jobs import Job, JobStore, Result
from ..statistics import Interval
from . import answers
from .task import EXTRA, MAIN, TEXT_METRICS, EvaluationTask, Kind
from .work import unstored

if TYPE_CHECKING:
    from pandas import DataFrame

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]

FORMAT = 1
SCORES, ROWS, TEXTS = "scores.json", "rows.npz", "texts.npz"
SEED = 0  # of the resamples
NORMAL_ROWS = (
    20_000  # above, drawing 2,000 times as many rows takes seconds a score and changes no shown digit
)
KEPT_EVERY = 20_000  # scored texts, after which they are kept
TOLD_EVERY = 500
LONGEST_ANSWER = 60  # characters of an answer outside the labels that are kept with a row
MOST_SUBJECTS = 500
FEW = 30  # rows, below which a subject says little

# What is computed for kinds of which glm_core.metrics knows nothing; accuracy is read as the kind finds answers.
FORMULAS: Mapping[tuple[Kind, str], str] = {
    ("label", "accuracy"): "Share of rows whose answer is the correct label; width, case, marks around it and a leading"
    ' "answer:" do not count, and any other answer is wrong.',
    ("choice", "accuracy"): "Share of rows whose option is the correct one; a row without a clear option is wrong.",
    ("number", "accuracy"): "Share of rows whose final number equals that of the reference: the first behind ####, else the"
    ' last in \\boxed{}, else the one behind the last "the answer is" or "答案是", else the last number of all; 1,234.0 is'
    " 1234, and a row without a number is wrong.",
}  # fmt: skip
# (data set, checkpoint, its published scores): lines to compare with where a file is that data set's.
PUBLISHED: tuple[tuple[str, str, Mapping[str, float]], ...] = (
    (
        "ADGEN", "ChatGLM-6B, P-tuning v2",
        {"bleu-4": 8.10, "rouge-1": 31.12, "rouge-2": 7.11, "rouge-l": 24.97},
    ),
)  # fmt: skip
HIDDEN: Mapping[Kind, str] = {
    "label": "ROUGE and BLEU compare words; a label is right or wrong.",
    "choice": "ROUGE and BLEU compare words; an option is right or wrong.",
    "number": "ROUGE and BLEU compare words; a number is right or wrong.",
}


def formula(kind: Kind, metric: str) -> str:
    """What exactly a number of a run is."""
    return FORMULAS.get((kind, metric)) or metrics.FORMULAS[metric]


def published(task: EvaluationTask) -> tuple[tuple[str, str, Mapping[str, float]], ...]:
    """Published scores of a data set with these columns; whether the file is that data set, its owner knows."""
    adgen = task.kind == "text" and (task.prompt, task.reference) == ("content", "summary")
    return tuple(one for one in PUBLISHED if adgen and one[0] == "ADGEN")


@dataclass(frozen=True)
class Scores:
    """What a run scored.

    n               rows that count: answered, with a reference
    n_failed        rows the engine could not answer; n_left: not answered yet; n_truncated: asked with a shortened prompt
    n_empty         of the rows that count, those with a blank prediction
    n_no_answer     of the rows that count, those whose prediction holds no label, option or number
    main            the metric of the headline
    values          metric -> estimate with its interval; texts from 0 to 100, shares from 0 to 1
    hidden          metrics that say nothing here -> why
    labels          what glm_core.metrics.classification says, for labels and options
    subjects        (subject, rows, right ones, accuracy with its interval), where the file names subjects
    """

    kind: Kind
    method: str
    rows: int
    n: int
    n_failed: int
    n_left: int
    n_truncated: int
    n_empty: int
    n_no_answer: int
    n_no_reference: int
    main: str
    values: Mapping[str, Interval]
    formulas: Mapping[str, str]
    hidden: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] | None = None
    subjects: tuple[tuple[str, int, int, Interval], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> Interval:
        """The main metric with its interval."""
        return self.values[self.main]

    @property
    def unit(self) -> float:
        """What is 100 %: 100 for scores of texts, 1 for shares."""
        return 100.0 if self.kind == "text" else 1.0

    def to_json(self) -> dict[str, Any]:
        """Everything, in types JSON has."""
        return vars(self) | {
            "values": {name: one.to_json() for name, one in self.values.items()},
            "subjects": [[name, n, right, one.to_json()] for name, n, right, one in self.subjects],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """What `to_json` gave."""
        known = {name: data[name] for name in cls.__dataclass_fields__}
        known["values"] = {name: Interval(**one) for name, one in data["values"].items()}
        known["subjects"] = tuple(
            (name, n, right, Interval(**one)) for name, n, right, one in data["subjects"]
        )
        return cls(**known | {"notes": tuple(data["notes"])})


@dataclass(frozen=True)
class PerRow:
    """One entry per row of a run, in the order of the file.

    number      of the row in the file
    answered    it has a prediction; scored: and a reference
    right       the answer is correct, or the text equals the reference
    scores      metric -> score from 0 to 100, NaN where the row is not scored; texts only
    answer, truth   the label, option or number, "" where there is none; texts have none
    confidence  probability of the answer among those possible, NaN where they were not scored
    """

    idx: Ints
    number: Ints
    answered: Bools
    scored: Bools
    empty: Bools
    truncated: Bools
    right: Bools
    seconds: Floats
    characters: Ints
    scores: Mapping[str, Floats]
    answer: npt.NDArray[np.str_]
    truth: npt.NDArray[np.str_]
    confidence: Floats

    def __len__(self) -> int:
        return len(self.idx)

    def measure(self, metric: str) -> Floats:
        """A row's part in a metric that is a mean of rows: 0 to 100 for texts, else 0 or 1; NaN where not scored."""
        if metric in self.scores:
            return self.scores[metric]
        return np.where(self.scored, self.right.astype(np.float64), np.nan)

    def frame(self) -> DataFrame:
        """The rows as a table."""
        import pandas as pd

        columns: dict[str, Any] = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "scores"
        }
        if self.scores:
            del columns["answer"], columns["truth"], columns["confidence"]
        return pd.DataFrame(columns | dict(self.scores))


# ---- keeping


def folder_of(store: JobStore, run_id: str) -> Path:
    """Where a run keeps what can be computed again, and its names."""
    return store.path.parent / "runs" / run_id


def _state(job: Job) -> dict[str, int]:
    return {"format": FORMAT, "done": job.done, "failed": job.failed, "total": job.total}


def known(store: JobStore, job: Job) -> Scores | None:
    """The kept scores of a run, None where there are none of all the answers it has now."""
    try:
        found = json.loads((folder_of(store, job.id) / SCORES).read_text(encoding="utf-8"))
        return Scores.from_json(found["scores"]) if found["of"] == _state(job) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def scores(store: JobStore, run_id: str, progress: Progress | None = None) -> Scores:
    """The scores of a run as far as it is; kept ones where they are of all its answers, else computed now."""
    job = store.get(run_id)
    return known(store, job) or update(store, run_id, progress)


def per_row(store: JobStore, run_id: str, progress: Progress | None = None) -> PerRow:
    """The rows of a run as arrays; kept ones where they are of all its answers, else computed now."""
    if known(store, store.get(run_id)) is None:
        update(store, run_id, progress)
    with np.load(folder_of(store, run_id) / ROWS) as kept:
        arrays = {name: kept[name] for name in kept.files}
    scored = {name[2:]: arrays.pop(name) for name in list(arrays) if name.startswith("m:")}
    return PerRow(**arrays, scores=scored)


def update(store: JobStore, run_id: str, progress: Progress | None = None) -> Scores:
    """Score a run anew and keep the result; texts that were scored before are not scored again."""
    job = store.get(run_id)
    task = EvaluationTask.from_json(job.task)
    folder = folder_of(store, run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = _Rows(task)
    for idx, cells, result in store.iter_results(run_id):
        rows.add(idx, cells, result)
    found = _texts(rows, folder, progress) if task.kind == "text" else {}
    table = rows.arrays(found)
    done = _scores(task, job, rows, table)
    arrays: dict[str, Any] = {f"m:{name}": values for name, values in table.scores.items()}
    arrays |= {name: getattr(table, name) for name in PerRow.__dataclass_fields__ if name != "scores"}
    _replace(folder / ROWS, lambda path: np.savez(path, **arrays))
    text = json.dumps({"of": _state(job), "scores": done.to_json()}, ensure_ascii=False, indent=1) + "\n"
    _replace(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))
    return done


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ---- rows


class _Rows:
    """The rows of a run, read once: what they were given, what they should be, and what was made of both."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task
        self.labels = {answers.label_key(label): label for label in task.labels}
        self.idx, self.number, self.characters = array("q"), array("q"), array("q")
        self.seconds, self.confidence = array("d"), array("d")
        self.answered, self.truncated, self.right, self.failed = (
            array("b"),
            array("b"),
            array("b"),
            array("b"),
        )
        self.predictions: list[str] = []
        self.references: list[str] = []
        self.answer: list[str] = []
        self.truth: list[str] = []
        self.subject: list[str] = []
        self._at = len(task.columns) + EXTRA.index("reference")
        self._subject = task.columns.index(task.subject) if task.subject else None
        self._options = [task.columns.index(one) for one in task.options]

    def add(self, idx: int, cells: Sequence[str], result: Result | None) -> None:
        """One row with its result, None where it has none yet."""
        task = self.task
        answered = result is not None and result.status == "ok"
        told = result.prediction if result is not None and answered else ""
        reference = cells[self._at]
        values: dict[str, float] = {}
        if task.method in ("likelihood", "chain"):
            told, values, _ = unstored(told)
        answer, truth, right = self._judge(told, reference, cells, bool(values))
        self.idx.append(idx)
        self.number.append(int(cells[self._at - 1]))
        self.answered.append(answered)
        self.failed.append(result is not None and not answered)
        self.truncated.append(result is not None and result.truncated)
        self.seconds.append(result.seconds if result is not None else 0.0)
        self.characters.append(len(told))
        self.right.append(answered and right)
        self.confidence.append(_confidence(values, told))
        self.predictions.append(told)
        self.references.append(reference)
        self.answer.append(answer)
        self.truth.append(truth)
        if self._subject is not None:
            self.subject.append(cells[self._subject])

    def _judge(self, told: str, reference: str, cells: Sequence[str], chosen: bool) -> tuple[str, str, bool]:
        """(answer, correct answer, whether they are the same)."""
        kind = self.task.kind
        if kind == "text":
            return "", "", bool(told.strip()) and told.strip() == reference.strip()
        if kind == "number":
            given, wanted = answers.number_of(told), answers.number_of(reference)
            right = given is not None and given == wanted
            return answers.shown_number(given)[:LONGEST_ANSWER], answers.shown_number(wanted), right
        if chosen:
            return told, reference, told == reference
        if kind == "label":
            found = answers.label_of(told, self.labels)
            return (
                (found if found is not None else told.strip()[:LONGEST_ANSWER]),
                reference,
                found == reference,
            )
        letters = self.task.letters or tuple("ABCDEFGHIJ")
        found = answers.option_of(told, letters, [cells[place] for place in self._options])
        return found or "", reference, found is not None and found == reference

    def arrays(self, scored: Mapping[str, Floats]) -> PerRow:
        """What is kept of the rows."""
        answered = np.array(self.answered, dtype=bool)
        referenced = np.fromiter((bool(one.strip()) for one in self.references), bool, len(self.references))
        blank = np.fromiter((not one.strip() for one in self.predictions), bool, len(self.predictions))
        return PerRow(
            idx=np.array(self.idx, dtype=np.int64),
            number=np.array(self.number, dtype=np.int64),
            answered=answered,
            scored=answered & referenced,
            empty=answered & blank,
            truncated=np.array(self.truncated, dtype=bool),
            right=np.array(self.right, dtype=bool) & referenced,
            seconds=np.array(self.seconds, dtype=np.float64),
            characters=np.array(self.characters, dtype=np.int64),
            scores=scored,
            answer=np.array(self.answer, dtype=np.str_),
            truth=np.array(self.truth, dtype=np.str_),
            confidence=np.array(self.confidence, dtype=np.float64),
        )


def _confidence(values: Mapping[str, float], answer: str) -> float:
    if answer not in values:
        return float("nan")
    given = np.array(list(values.values()))
    return float(1 / np.exp(given - values[answer]).sum())


# ---- scores of texts


def _texts(rows: _Rows, folder: Path, progress: Progress | None) -> dict[str, Floats]:
    """Scores per row of the metrics that rows have, NaN where a row is not scored."""
    names = tuple(one for one in rows.task.metrics if one in metrics.OF_ROWS)
    table = np.full((len(rows.idx), len(names)), np.nan)
    ready = _kept_texts(folder, rows, names, table)
    for place in range(len(rows.idx)):
        if progress is not None and (place % TOLD_EVERY == 0 or place + 1 == len(rows.idx)):
            progress(place + 1, len(rows.idx))
        if ready[place] or not rows.answered[place]:
            continue
        found = metrics.score_text(rows.predictions[place], rows.references[place], names)
        if found is not None:
            table[place] = [found[name] for name in names]
        ready[place] = True
        if (place + 1) % KEPT_EVERY == 0:
            _keep_texts(folder, names, ready, table)
    _keep_texts(folder, names, ready, table)
    return {name: table[:, i].copy() for i, name in enumerate(names)}


def _kept_texts(folder: Path, rows: _Rows, names: Sequence[str], table: Floats) -> Bools:
    """Fill in what was scored before; which rows that is. A row that failed then may be answered by now."""
    ready = np.zeros(len(table), dtype=bool)
    try:
        with np.load(folder / TEXTS) as kept:
            if tuple(kept["names"]) == tuple(names) and int(kept["format"]) == FORMAT:
                count = min(len(kept["ready"]), len(table))
                ready[:count] = kept["ready"][:count]
                table[:count] = kept["table"][:count]
    except (OSError, ValueError, KeyError):
        return ready
    ready &= np.array(rows.answered, dtype=bool)
    table[~ready] = np.nan
    return ready


def _keep_texts(folder: Path, names: Sequence[str], ready: Bools, table: Floats) -> None:
    values: dict[str, Any] = {
        "names": np.array(names),
        "ready": ready,
        "table": table,
        "format": np.array(FORMAT),
    }
    _replace(folder / TEXTS, lambda path: np.savez(path, **values))


# ---- the whole


def _scores(task: EvaluationTask, job: Job, rows: _Rows, table: PerRow) -> Scores:
    counted = np.flatnonzero(table.scored)
    n = len(counted)
    labels: dict[str, Any] | None = None
    subjects: tuple[tuple[str, int, int, Interval], ...] = ()
    if task.kind == "text":
        values = dict(_of_texts(task, rows, table, counted))
    else:
        values = {"accuracy": statistics.wilson(int(table.right[counted].sum()), n)}
        if task.kind == "label":
            labels, more = _of_labels(task, rows, counted)
            values |= {name: more[name] for name in task.metrics if name != "accuracy"}
        elif task.kind == "choice":
            letters = task.letters or tuple(sorted(set(table.truth[counted])))
            labels = _confusion(rows, counted, letters).to_json()
            subjects = _of_subjects(rows, table, counted)
    no_answer = 0
    if task.kind == "label":
        no_answer = int(labels["n_outside"]) if labels else 0
    elif task.kind != "text":
        no_answer = int((table.answer[counted] == "").sum())
    return Scores(
        kind=task.kind,
        method=task.method,
        rows=job.total,
        n=n,
        n_failed=int(sum(rows.failed)),
        n_left=job.total - int(table.answered.sum()) - int(sum(rows.failed)),
        n_truncated=int((table.truncated & table.answered).sum()),
        n_empty=int((table.empty & table.scored).sum()),
        n_no_answer=no_answer,
        n_no_reference=int((table.answered & ~table.scored).sum()),
        main=MAIN[task.kind],
        values=values,
        formulas={name: formula(task.kind, name) for name in values},
        hidden={} if task.kind == "text" else dict.fromkeys(TEXT_METRICS[:-3], HIDDEN[task.kind]),
        labels=labels,
        subjects=subjects,
        notes=_notes(task, rows, counted),
    )


def _of_texts(
    task: EvaluationTask, rows: _Rows, table: PerRow, counted: Ints
) -> Iterator[tuple[str, Interval]]:
    files = [name for name in task.metrics if name in metrics.OF_FILES]
    whole = metrics.texts(
        [rows.predictions[i] for i in counted], [rows.references[i] for i in counted], files
    ) if files else None  # fmt: skip
    for name in task.metrics:
        if name == "exact-match":
            share = statistics.wilson(int(table.right[counted].sum()), len(counted))
            yield name, _times(share, 100.0)
        elif name in table.scores:
            yield name, mean_interval(table.scores[name][counted])
        elif whole is not None:
            reason = whole.reasons.get(name, "A score of the whole file; it has no interval here.")
            yield name, Interval(whole.scores[name], None, None, whole.n, statistics.LEVEL, "none", reason)


def mean_interval(values: Floats) -> Interval:
    """The mean of a score per row: percentile bootstrap, and above 20,000 rows, where both agree, the normal interval."""
    n = len(values)
    if n <= NORMAL_ROWS:
        return statistics.bootstrap_mean(values, seed=SEED)
    mean = float(values.mean())
    half = statistics.z_of(statistics.LEVEL) * float(values.std(ddof=1)) / float(np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, statistics.LEVEL, "normal")


def _times(found: Interval, factor: float) -> Interval:
    low, estimate, high = (
        None if value is None else value * factor for value in (found.low, found.estimate, found.high)
    )
    return Interval(estimate, low, high, found.n, found.level, found.method, found.reason)


def _confusion(rows: _Rows, counted: Ints, labels: Sequence[str]) -> metrics.ClassificationScores:
    truth, given = [rows.truth[i] for i in counted], [rows.answer[i] or None for i in counted]
    return metrics.classification(truth, given, labels)


def _of_labels(
    task: EvaluationTask, rows: _Rows, counted: Ints
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """The scores of labels, their intervals by resampling the table of answers: the same as resampling rows."""
    whole = _confusion(rows, counted, task.labels)
    names = [name for name in METRICS_OF_TABLE if name in task.metrics]
    values: dict[str, Interval] = {}
    table = np.array(whole.confusion, dtype=np.int64).reshape(len(task.labels), len(task.labels) + 1)
    n = int(table.sum())
    if n > 1:
        generator = np.random.default_rng(SEED)
        drawn = generator.multinomial(n, table.ravel() / n, statistics.RESAMPLES).reshape(-1, *table.shape)
        found = of_tables(drawn)
    for name in names:
        estimate = whole.scores[name]
        if estimate is None or n < 2:
            reason = whole.reasons.get(name, "One row has no interval." if n else statistics.NO_ROWS)
            values[name] = Interval(estimate, None, None, n, statistics.LEVEL, "percentile", reason)
            continue
        values[name] = _percentile(estimate, found[name], n)
    return whole.to_json(), values


METRICS_OF_TABLE = ("macro-f1", "weighted-f1", "balanced-accuracy", "mcc")


def of_tables(tables: Ints) -> dict[str, Floats]:
    """Scores of many tables of answers at once, (tables, labels, labels + 1), as glm_core.metrics defines them."""
    table = tables.astype(np.float64)
    hits = np.diagonal(table, axis1=1, axis2=2)
    support, given, n = table.sum(axis=2), table[:, :, :-1].sum(axis=1), table.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(support + given > 0, 2 * hits / (support + given), 0.0)
        recall = np.where(support > 0, hits / support, 0.0)
        everything = table.sum(axis=1)
        both = n * hits.sum(axis=1) - (support * everything[:, :-1]).sum(axis=1)
        spread = (n**2 - (support**2).sum(axis=1)) * (n**2 - (everything**2).sum(axis=1))
        return {
            "macro-f1": f1.sum(axis=1) / ((support + given) > 0).sum(axis=1),
            "weighted-f1": (f1 * support).sum(axis=1) / n,
            "balanced-accuracy": recall.sum(axis=1) / (support > 0).sum(axis=1),
            "mcc": np.where(spread > 0, both / np.sqrt(spread), np.nan),
        }


def _percentile(estimate: float, drawn: Floats, n: int) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if len(drawn) - len(known) > statistics.UNDEFINED * len(drawn):
        reason = f"The score is undefined in {len(drawn) - len(known)} of {len(drawn)} resamples."
        return Interval(estimate, None, None, n, statistics.LEVEL, "percentile", reason)
    low, high = np.quantile(known, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])
    reason = "Every resample gave the same value." if low == high else ""
    return Interval(estimate, float(low), float(high), n, statistics.LEVEL, "percentile", reason)


def _of_subjects(rows: _Rows, table: PerRow, counted: Ints) -> tuple[tuple[str, int, int, Interval], ...]:
    if not rows.subject:
        return ()
    all_, right = Counter[str](), Counter[str]()
    for i in counted:
        all_[rows.subject[i]] += 1
        right[rows.subject[i]] += bool(table.right[i])
    return tuple(
        (name, count, right[name], statistics.wilson(right[name], count))
        for name, count in sorted(all_.items())[:MOST_SUBJECTS]
    )


def _notes(task: EvaluationTask, rows: _Rows, counted: Ints) -> tuple[str, ...]:
    found = []
    if task.kind == "label":
        support = Counter(rows.truth[i] for i in counted)
        rare = [label for label in task.labels if 0 < support[label] < 10]
        if rare:
            found.append(
                f"Fewer than 10 rows have the label {', '.join(rare[:5])}: intervals that weigh labels alike are rough."
            )
    return tuple(found)
