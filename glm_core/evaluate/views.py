"""What the scores of a run look like: spread over the rows, cut by a column, row by row, and beside other precisions."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from .. import metrics, statistics
from ..statistics import Interval
from .scoring import FEW, SEED, PerRow, mean_interval
from .task import EvaluationTask

if TYPE_CHECKING:
    from .registry import Run

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Order = Literal["worst", "best", "random", "file", "empty", "no answer", "truncated", "failed"]

BINS = 20
GROUPS = 4  # groups of equally many rows, where a column holds numbers or long texts
MOST_KINDS = 60  # different values of a column that are groups of their own
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-dynamic", "int4-g32", "int4-g64", "int4-g128", "int4")
LONGEST_DIFF = 4000  # words of both texts together; a longer pair is shown without marks
BLANK = "(blank)"


@dataclass(frozen=True)
class Bin:
    """How many rows score from `low` to `high`; a score on an edge belongs to the upper bin, the highest to the last."""

    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Slice:
    """The rows with one value of a column, and what they score; `few` is under 30 rows, which say little."""

    value: str
    n: int
    score: Interval

    @property
    def few(self) -> bool:
        return self.n < FEW


@dataclass(frozen=True)
class Guess:
    """The most frequent correct answer and how often saying nothing else would be right."""

    answer: str
    share: float
    n: int


def histogram(values: Floats, top: float = 100.0, bins: int = BINS) -> tuple[Bin, ...]:
    """Scores from 0 to `top` in bins of equal width; NaN is left out."""
    counts, edges = np.histogram(values[~np.isnan(values)], bins=bins, range=(0.0, top))
    return tuple(
        Bin(float(low), float(high), int(n))
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    )


def places(table: PerRow, order: Order, metric: str, seed: int = SEED) -> Ints:
    """Which rows of `table`, and in which order; of equal scores the earlier row first.

    Where rows are right or wrong, "worst" holds the wrong ones, the surest first, and "best" the right ones.
    """
    chosen = {
        "worst": table.scored,
        "best": table.scored,
        "random": table.answered,
        "file": np.ones(len(table), dtype=bool),
        "empty": table.empty,
        "no answer": table.scored & (table.answer == "") if not table.scores else np.zeros(len(table), bool),
        "truncated": table.truncated,
        "failed": ~table.answered,
    }[order]
    found = np.flatnonzero(chosen).astype(np.int64)
    if order == "random":
        return np.random.default_rng(seed).permutation(found)
    if order not in ("worst", "best"):
        return found
    if table.scores:
        score = table.measure(metric)[found]
        return found[np.lexsort((found, score if order == "worst" else -score))]
    found = found[table.right[found] if order == "best" else ~table.right[found]]
    sure = np.nan_to_num(table.confidence[found], nan=0.0)
    return found[np.lexsort((found, -sure))]


# ---- slices


def slices(table: PerRow, values: Sequence[str], metric: str) -> tuple[Slice, ...]:
    """The scored rows by a value each, the largest group first; a mean by bootstrap, a share by Wilson.

    values   one per row of `table`, as the file or `grouped` gives them
    """
    scored = np.flatnonzero(table.scored)
    score = table.measure(metric)
    members: dict[str, list[int]] = {}
    for place in scored.tolist():
        members.setdefault(values[place].strip() or BLANK, []).append(place)
    found = []
    for value, rows in members.items():
        given = score[rows]
        if table.scores and metric != "exact-match":
            interval = mean_interval(given)
        elif table.scores:
            interval = _times(statistics.wilson(int((given > 0).sum()), len(rows)), 100.0)
        else:
            interval = statistics.wilson(int(table.right[rows].sum()), len(rows))
        found.append(Slice(value, len(rows), interval))
    return tuple(sorted(found, key=lambda one: (-one.n, one.value)))


def _times(found: Interval, factor: float) -> Interval:
    low, estimate, high = (
        None if value is None else value * factor for value in (found.low, found.estimate, found.high)
    )
    return replace(found, estimate=estimate, low=low, high=high)


def grouped(values: Sequence[str]) -> tuple[list[str], Literal["value", "number", "length"]]:
    """(a group per row, by what): the value itself, or where these are too many, four ranges of number or of length."""
    kinds = Counter(value.strip() for value in values)
    if len(kinds) <= MOST_KINDS:
        return list(values), "value"
    numbers = [_number(value) for value in values]
    if all(value is not None or not text.strip() for value, text in zip(numbers, values, strict=True)):
        return ranges([math.nan if value is None else value for value in numbers]), "number"
    return ranges([float(len(value.strip())) for value in values]), "length"


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def ranges(numbers: Sequence[float]) -> list[str]:
    """Numbers by four ranges of about equally many rows, as "12 – 40"; NaN is blank."""
    given = np.asarray(numbers, dtype=np.float64)
    known = given[~np.isnan(given)]
    if not len(known):
        return [""] * len(given)
    inner = np.unique(np.quantile(known, np.linspace(0, 1, GROUPS + 1)[1:-1], method="higher"))
    group = np.searchsorted(inner, given, side="right")
    names = {}
    for number in range(len(inner) + 1):
        inside = given[(group == number) & ~np.isnan(given)]
        if len(inside):
            low, high = (f"{value:,.10g}" for value in (inside.min(), inside.max()))
            names[number] = low if low == high else f"{low} – {high}"
    return [
        "" if math.isnan(value) else names[int(number)] for value, number in zip(given, group, strict=True)
    ]


def guess(table: PerRow) -> Guess | None:
    """What always saying the most frequent correct answer would score; None for texts and numbers without one."""
    if table.scores:
        return None
    truth = Counter(table.truth[table.scored].tolist())
    if not truth:
        return None
    answer, count = min(truth.items(), key=lambda one: (-one[1], one[0]))
    n = sum(truth.values())
    return Guess(answer, count / n, n)


# ---- one row


def marked(a: str, b: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, each with whether the other lacks it; compared word by word, Chinese cut by jieba.

    Texts of more than 4,000 words together come back whole and unmarked.
    """
    words_a, words_b = metrics.segment(a), metrics.segment(b)
    if len(words_a) + len(words_b) > LONGEST_DIFF:
        return [(a, False)], [(b, False)]
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for what, a0, a1, b0, b1 in difflib.SequenceMatcher(None, words_a, words_b, autojunk=False).get_opcodes():
        for pieces, words in ((left, words_a[a0:a1]), (right, words_b[b0:b1])):
            if words:
                pieces.append(("".join(words), what != "equal"))
    return left, right


# ---- the same at other precisions


def by_precision(run: Run, found: Iterable[Run]) -> list[tuple[str, Run]]:
    """The runs that differ from one in the precision alone, itself among them; of several the newest."""
    wanted, newest = _but_precision(run.task), {}
    for one in sorted(found, key=lambda one: (one.job.created, one.id)):
        if one.imported or one.scores is None or _but_precision(one.task) != wanted:
            continue
        newest[one.task.precision] = one
    if run.scores is not None and not run.imported:
        newest[run.task.precision] = run
    order = {name: place for place, name in enumerate(PRECISIONS)}
    return sorted(newest.items(), key=lambda one: (order.get(one[0], len(order)), one[0]))


def _but_precision(task: EvaluationTask) -> EvaluationTask:
    return replace(
        task, precision="", device="", versions={}, group="", step=None, input_path="", input_name="",
        few_shot_name="", metrics=(),
    )  # fmt: skip
