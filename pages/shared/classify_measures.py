"""How good a classification is, in numbers: from arrays of answers and correct labels, drawn by other files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_core import metrics, statistics
from glm_core.review import Answers, confidence
from glm_core.statistics import Interval

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 2000
AT_A_TIME = 500  # resampled tables held in memory
SMALLEST = 1e-9  # as probabilities are stored
HALF = 50  # rows that each half must have, so that one can be chosen on and the other judged on
POINTS = 600  # of a curve that are drawn
FEW = 30  # rows, below which a share says little
FITTED_ROWS = 20_000  # that a calibration is fitted on
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Judged:
    """The answered rows that have a correct label.

    truth    (rows) number of the correct label
    answer   (rows) number of the label given, -1 for none
    groups   (rows) equal for rows with the same text, which must not be split between two parts
    """

    labels: tuple[str, ...]
    idx: Ints
    scores: Floats
    probability: Floats
    outside: Floats
    answer: Ints
    truth: Ints
    groups: Ints

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def right(self) -> Bools:
        return np.asarray(self.answer == self.truth)

    @property
    def confidence(self) -> Floats:
        return confidence(self.probability, self.answer)

    @property
    def names(self) -> list[int]:
        """A name per row, for statistics that look whether two parts share rows."""
        return [int(idx) for idx in self.idx]

    def part(self, chosen: Bools | Ints) -> Judged:
        """Some of the rows."""
        return Judged(
            self.labels, self.idx[chosen], self.scores[chosen], self.probability[chosen], self.outside[chosen],
            self.answer[chosen], self.truth[chosen], self.groups[chosen],
        )  # fmt: skip


def judged(given: Answers, truth: Ints, groups: Ints) -> Judged:
    """The rows whose correct label is known; `truth` and `groups` are per answered row."""
    known = truth >= 0
    return Judged(
        given.labels, given.idx[known], given.scores[known], given.probability[known], given.outside[known],
        given.answer[known], truth[known], groups[known],
    )  # fmt: skip


def text_groups(texts: Sequence[str]) -> Ints:
    """A number per text, the same for equal texts in every file and on every machine."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest()) for text in texts],
        dtype=np.int64,
    )  # fmt: skip


def halves(groups: Ints) -> Bools:
    """Which rows belong to the half that settings are chosen on; equal texts are on one side."""
    return np.asarray((groups >> 1) % 2 == 0)


def classification(rows: Judged) -> metrics.ClassificationScores:
    """The scores of the whole and of every label."""
    truth = [rows.labels[i] for i in rows.truth.tolist()]
    given = [rows.labels[i] if i >= 0 else None for i in rows.answer.tolist()]
    return metrics.classification(truth, given, rows.labels)


def table_of(rows: Judged) -> Ints:
    """Counts, (correct label, answer), with a last column for rows without an answer."""
    size = len(rows.labels)
    given = np.where(rows.answer < 0, size, rows.answer)
    return np.bincount(rows.truth * (size + 1) + given, minlength=size * (size + 1)).reshape(size, size + 1)


def _macro_f1(tables: Floats) -> Floats:
    """Macro F1 of many tables (n, labels, labels + 1), as metrics.classification has it."""
    size = tables.shape[1]
    hits = tables[:, range(size), range(size)]
    both = tables.sum(axis=2) + tables[:, :, :size].sum(axis=1)
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return np.asarray(f1.sum(axis=1) / np.maximum((both > 0).sum(axis=1), 1))


def _mcc(tables: Floats) -> Floats:
    """Matthews correlation of many tables, NaN where it is undefined; as metrics.classification has it."""
    size = tables.shape[1]
    hits = tables[:, range(size), range(size)].sum(axis=1)
    wanted, given = tables.sum(axis=2), tables.sum(axis=1)
    n = tables.sum(axis=(1, 2))
    both = n * hits - (wanted * given[:, :size]).sum(axis=1)
    spread = (n * n - (wanted**2).sum(axis=1)) * (n * n - (given**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(spread > 0, both / np.sqrt(spread), math.nan))


def bootstrapped(table: Ints, seed: int = 0) -> dict[str, Interval]:
    """Macro F1 and MCC with percentile bootstrap intervals.

    Both depend on the table of counts alone, so rows are resampled as counts: a table drawn with the shares of the
    cells is what a resample of the rows gives.
    """
    n = int(table.sum())
    shapes = {"macro-f1": _macro_f1, "mcc": _mcc}
    if not n:
        return {name: Interval(None, None, None, 0, statistics.LEVEL, "percentile", "There are no rows.") for name in shapes}  # fmt: skip
    generator = np.random.default_rng(seed)
    share = (table / n).reshape(-1)
    drawn: dict[str, list[Floats]] = {name: [] for name in shapes}
    for begin in range(0, RESAMPLES, AT_A_TIME):
        count = min(AT_A_TIME, RESAMPLES - begin)
        tables = generator.multinomial(n, share, size=count).reshape(count, *table.shape).astype(np.float64)
        for name, shape in shapes.items():
            drawn[name].append(shape(tables))
    found = {}
    for name, shape in shapes.items():
        estimate = float(shape(table[None].astype(np.float64))[0])
        known = np.concatenate(drawn[name])
        known = known[~np.isnan(known)]
        tail = (1 - statistics.LEVEL) / 2
        if math.isnan(estimate) or n < 2 or not len(known):
            reason = "It needs rows of two labels, and answers of two labels."
            value = None if math.isnan(estimate) else estimate
            found[name] = Interval(value, None, None, n, statistics.LEVEL, "percentile", reason)
            continue
        low, high = (float(x) for x in np.quantile(known, [tail, 1 - tail]))
        found[name] = Interval(
            estimate, min(low, estimate), max(high, estimate), n, statistics.LEVEL, "percentile"
        )
    return found


def area(truth: Bools, scores: Floats) -> Interval:
    """ROC AUC with DeLong's standard error (1988), the interval on the logit scale.

    Source: Sun and Xu, "Fast implementation of DeLong's algorithm" (2014), for the midranks.
    """
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    level, n = statistics.LEVEL, len(truth)
    if np.isnan(scores).any():
        return Interval(None, None, None, n, level, "delong", "The server gave no probabilities to rank by.")
    curve = metrics.roc(truth, scores)
    if curve is None:
        reason = "It needs rows that have the label and rows that have not."
        return Interval(None, None, None, n, level, "delong", reason)
    yes, no = scores[truth], scores[~truth]
    ranks = rankdata(np.concatenate([yes, no]))
    above = (ranks[: len(yes)] - rankdata(yes)) / len(no)  # share of the negatives below each positive
    below = 1 - (ranks[len(yes) :] - rankdata(no)) / len(yes)
    if len(yes) < 2 or len(no) < 2:
        return Interval(curve.area, None, None, n, level, "delong", "One row of a kind has no interval.")
    variance = float(np.var(above, ddof=1) / len(yes) + np.var(below, ddof=1) / len(no))
    if not 0 < curve.area < 1 or variance <= 0:
        return Interval(
            curve.area, None, None, n, level, "delong", "The ranking leaves no error to estimate from."
        )
    middle = math.log(curve.area / (1 - curve.area))
    half = statistics.z_of(level) * math.sqrt(variance) / (curve.area * (1 - curve.area))
    low, high = (1 / (1 + math.exp(-(middle + sign * half))) for sign in (-1, 1))
    return Interval(curve.area, low, high, n, level, "delong")


def headline(rows: Judged, positive: int | None) -> dict[str, Interval]:
    """Accuracy (Wilson), macro F1, MCC (bootstrap) and AUC (DeLong) with their intervals."""
    found = {"accuracy": statistics.wilson(int(rows.right.sum()), len(rows))}
    found |= bootstrapped(table_of(rows))
    if positive is not None:
        found["roc-auc"] = area(rows.truth == positive, rows.probability[:, positive])
    else:
        areas = [area(rows.truth == i, rows.probability[:, i]).estimate for i in range(len(rows.labels))]
        known = [one for one in areas if one is not None]
        value = math.fsum(known) / len(known) if known else None
        reason = "The mean over the labels has no interval; choose a positive label."
        if np.isnan(rows.probability).any():
            reason = "The server gave no probabilities to rank by."
        found["roc-auc"] = Interval(value, None, None, len(rows), statistics.LEVEL, "mean", reason)
    return found


@dataclass(frozen=True)
class Calibrated:
    """Probabilities as they came and as calibrated by a fit on other rows, with the scores of both."""

    probability: Floats
    before: metrics.ProbabilityScores
    after: metrics.ProbabilityScores
    fit: statistics.Calibration
    truth: Ints
    n_of: int  # rows there are; fewer are fitted on where there are very many


def calibrated(rows: Judged, positive: int | None, shifted: bool = False, seed: int = 0) -> Calibrated:
    """Calibrate by temperature, for two labels also by a bias, cross-fitted in five parts.

    shifted   the model's preference was taken out of the probabilities, so that they are what to start from
    """
    some = rows
    if len(rows) > FITTED_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), FITTED_ROWS, replace=False))
        some = rows.part(chosen)
    found = statistics.cross_fit(
        np.log(np.maximum(some.probability, SMALLEST)) if shifted else some.scores,
        some.truth,
        bias=len(rows.labels) == 2,
        seed=seed,
        groups=some.groups.tolist(),
    )
    truth = [some.labels[i] for i in some.truth.tolist()]
    name = some.labels[positive] if positive is not None else None
    return Calibrated(
        probability=found.probability,
        before=metrics.probabilities(truth, some.probability, some.labels, name),
        after=metrics.probabilities(truth, found.probability, some.labels, name),
        fit=found.final,
        truth=some.truth,
        n_of=len(rows),
    )


def histogram(rows: Judged) -> tuple[Floats, Ints, Ints]:
    """(edges, right, wrong): rows per band of confidence, from chance to 1."""
    edges = np.linspace(1 / len(rows.labels), 1, HISTOGRAM_BINS + 1)
    right, _ = np.histogram(np.clip(rows.confidence[rows.right], edges[0], 1), edges)
    wrong, _ = np.histogram(np.clip(rows.confidence[~rows.right], edges[0], 1), edges)
    return edges, right, wrong


@dataclass(frozen=True)
class Slice:
    """The rows with one value in a column."""

    value: str
    n: int
    accuracy: Interval
    positive_rate: float | None  # of the answers
    positive_true: float | None

    @property
    def few(self) -> bool:
        return self.n < FEW


def slices(rows: Judged, values: Sequence[str], positive: int | None, most: int = 200) -> list[Slice]:
    """Accuracy per value of a column, those with the most rows first; `values` are per row."""
    kinds, place, count = np.unique(
        np.array(values, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    hits = np.bincount(place, weights=rows.right, minlength=len(kinds)).astype(int)
    said = np.bincount(place, weights=rows.answer == (positive or 0), minlength=len(kinds))
    true = np.bincount(place, weights=rows.truth == (positive or 0), minlength=len(kinds))
    order = np.argsort(-count, kind="stable")[:most]
    return [
        Slice(
            str(kinds[i]), int(count[i]), statistics.wilson(int(hits[i]), int(count[i])),
            float(said[i] / count[i]) if positive is not None else None,
            float(true[i] / count[i]) if positive is not None else None,
        )
        for i in order.tolist()
    ]  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A plain text classifier on the same rows, each row judged by a fit on other rows.

    rows   those compared; test is A = the language model, B = the baseline
    """

    test: statistics.McNemar
    model: Interval
    baseline: Interval
    rows_per_second: float
    fit_seconds: float
    description: str
    rows: int
    of: int
    folds: int


def compared(
    rows: Judged, texts: Sequence[str], most: int = 20_000, folds: int = 5, seed: int = 0
) -> Compared:
    """Cross-fit TF-IDF + logistic regression on the rows themselves and compare; GLMError where it cannot learn."""
    from glm_core.errors import GLMError
    from glm_core.finetune import baseline

    whole = len(rows)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(whole, most, replace=False)) if whole > most else np.arange(whole)
    some, texts = rows.part(chosen), [texts[i] for i in chosen.tolist()]
    kinds = np.unique(some.groups)
    if len(kinds) < 2 * folds:
        raise GLMError(
            f"The baseline needs at least {2 * folds} different labelled texts; there are {len(kinds):,}.",
            "Add labelled rows.",
        )
    part_of = dict(
        zip(generator.permutation(kinds).tolist(), (np.arange(len(kinds)) % folds).tolist(), strict=True)
    )
    fold = np.array([part_of[one] for one in some.groups.tolist()])
    names = [some.labels[i] for i in some.truth.tolist()]
    right = np.zeros(len(some), dtype=bool)
    fitted = told = 0.0
    description = ""
    for part in range(folds):
        learn, ask = np.flatnonzero(fold != part).tolist(), np.flatnonzero(fold == part).tolist()
        found = baseline.fit_predict(
            [texts[i] for i in learn], [names[i] for i in learn], [texts[i] for i in ask], seed
        )
        right[ask] = [given == names[i] for given, i in zip(found.predicted, ask, strict=True)]
        fitted, told = fitted + found.seconds_fit, told + found.seconds_predict
        description = found.description
    return Compared(
        test=statistics.mcnemar(some.right, right),
        model=statistics.wilson(int(some.right.sum()), len(some)),
        baseline=statistics.wilson(int(right.sum()), len(some)),
        rows_per_second=len(some) / max(told, 1e-9),
        fit_seconds=fitted,
        description=description,
        rows=len(some),
        of=whole,
        folds=folds,
    )


@dataclass(frozen=True)
class Prevalence:
    """The share of positive rows among all answered ones, by three ways of counting."""

    naive: Interval
    rogan_gladen: Interval
    ppi: Interval
    labelled: Interval  # the correct labels alone
    n: int
    n_labelled: int


def prevalence(given: Answers, rows: Judged, positive: int) -> Prevalence:
    """How many of all rows are positive, corrected by the labelled ones among them."""
    free = ~np.isin(given.idx, rows.idx)
    called = given.answer == positive
    probability = given.probability[:, positive]
    return Prevalence(
        naive=statistics.prevalence_naive(called),
        rogan_gladen=statistics.rogan_gladen(called[free], rows.answer == positive, rows.truth == positive),
        ppi=statistics.prediction_powered(
            probability[free], rows.probability[:, positive], rows.truth == positive
        ),
        labelled=statistics.wilson(int((rows.truth == positive).sum()), len(rows)),
        n=len(given),
        n_labelled=len(rows),
    )


def errors(rows: Judged, most: int) -> Ints:
    """Places of the wrong rows, the surest answers first."""
    wrong = np.flatnonzero(~rows.right)
    return np.asarray(wrong[np.lexsort((rows.idx[wrong], -rows.confidence[wrong]))][:most])


def thinned(xs: Sequence[Any], points: int) -> list[int]:
    """Which of many points to draw, the first and the last among them."""
    count = len(xs)
    return (
        list(range(count))
        if count <= points
        else [round(i * (count - 1) / (points - 1)) for i in range(points)]
    )
