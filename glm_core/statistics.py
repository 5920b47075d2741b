"""Intervals, paired tests, agreement, calibration, thresholds and prevalence: how sure a number is.

Pure functions over plain sequences. What is random takes a seed and gives the same result each time. Where a number
is undefined (no rows, one row, one label) it is None, and `reason` says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .metrics import package

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Statistic = Callable[[Ints], float | None]  # of the numbers of the rows drawn; None where it is undefined
Method = Literal["percentile", "bca"]

LEVEL = 0.95
RESAMPLES = 2000
NO_ROWS = "There are no rows."
# Resamples in which a score may be undefined (say, no row of a class was drawn) before its interval is.
UNDEFINED = 0.05
# Sums of the same numbers in another order differ by rounding; a difference below this is none.
EQUAL = 1e-12
JACKKNIFE = 1000  # groups; above so many rows the acceleration of BCa is found by leaving out groups
DRAWN_AT_ONCE = 2_000_000  # row numbers in memory
TEMPERATURES = (0.01, 100.0)
MANY_TERMS = 1000  # of a binomial sum; more are added as logarithms
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Result:
    """A number with what it takes to read it."""

    def to_json(self) -> dict[str, Any]:
        """The fields in types JSON has; those kept in memory only are left out."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self) if one.repr}


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Interval(Result):
    """An estimate and the interval around it; None where `reason` says why."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    level: float
    method: str
    reason: str = ""


def z_of(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches to each side."""
    if not 0 < level < 1:
        raise ValueError(f"a level of {level}")
    return _NORMAL.inv_cdf(0.5 + level / 2)


def _counts(part: int, whole: int) -> None:
    if not 0 <= part <= whole:
        raise ValueError(f"{part} of {whole}")


# ------------------------------------------------------------------------------------------------ shares


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (1927)."""
    _counts(successes, n)
    if n == 0:
        return Interval(None, None, None, 0, level, "wilson", NO_ROWS)
    low, high = _wilson(np.array([successes / n]), np.array([n]), level)
    return Interval(successes / n, float(low[0]), float(high[0]), n, level, "wilson")


def _wilson(share: Floats, n: Floats | Ints, level: float) -> tuple[Floats, Floats]:
    z = z_of(level)
    centre = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and 1 both terms are equal but for rounding.
    low = np.where(share == 0, 0.0, (centre - half) / scale)
    high = np.where(share == 1, 1.0, (centre + half) / scale)
    return low, high


def share_at_least(successes: int, n: int, level: float = LEVEL) -> float | None:
    """The share that is exceeded with this confidence: the exact one-sided bound of Clopper and Pearson (1934).

    With no failure in 29, 59, 149 and 299 rows it is at least 90, 95, 98 and 99 %. None without rows.
    """
    _counts(successes, n)
    if n == 0:
        return None
    return float(_clopper_pearson(np.array([successes]), np.array([n]), level)[0])


def _clopper_pearson(successes: Ints, n: Ints, level: float) -> Floats:
    special = package("scipy.special", "An exact binomial bound")
    bound = special.betaincinv(np.maximum(successes, 1), n - successes + 1, 1 - level)
    return np.asarray(np.where(successes == 0, 0.0, bound))


# ------------------------------------------------------------------------------------------------ bootstrap


def bootstrap(
    n: int,
    statistic: Statistic,
    *,
    method: Method = "percentile",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Interval of any score of n rows, by drawing rows with replacement (Efron 1979; BCa: Efron 1987).

    statistic   gets the numbers of the rows drawn, 0 to n - 1, and returns the score
    clusters    per row the document or the person it belongs to: these are then drawn instead of rows

    With more than 1,000 rows the acceleration of BCa leaves out one of 1,000 groups at a time instead of one row.
    """
    units = _units(n, clusters)
    if (early := _too_few(n, units, statistic, level, method)) is not None:
        return early
    estimate = _number(statistic(np.arange(n)))
    drawn = np.array(
        [_number(statistic(rows)) for rows in _draws(n, units, resamples, seed)], dtype=np.float64
    )
    left_out = _left_out(n, units, statistic, seed) if method == "bca" else None
    return _interval(estimate, drawn, left_out, n, level, method)


def bootstrap_mean(
    values: Sequence[float] | Floats,
    *,
    method: Method = "percentile",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of one score per row: `bootstrap` of the mean, many resamples at a time."""
    given = np.asarray(values, dtype=np.float64)
    if (
        early := _too_few(len(given), None, lambda rows: float(given[rows].mean()), level, method)
    ) is not None:
        return early
    drawn, left_out = _drawn_means(given, method, resamples, seed)
    return _interval(float(given.mean()), drawn, left_out, len(given), level, method)


def _drawn_means(values: Floats, method: Method, resamples: int, seed: int) -> tuple[Floats, Floats | None]:
    """Means of the resamples and, for BCa, without each group of rows."""
    n = len(values)
    drawn = np.concatenate([values[rows].mean(axis=1) for rows in _blocks(n, resamples, seed)])
    if method == "percentile":
        return drawn, None
    groups = _groups(n, seed)
    return drawn, (values.sum() - np.bincount(groups, values)) / (n - np.bincount(groups))


def _units(n: int, clusters: Sequence[Hashable] | None) -> list[Ints] | None:
    if clusters is None:
        return None
    if len(clusters) != n:
        raise ValueError("one cluster per row")
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(clusters):
        members.setdefault(name, []).append(row)
    return [np.array(rows) for rows in members.values()]


def _too_few(
    n: int, units: list[Ints] | None, statistic: Statistic, level: float, method: str
) -> Interval | None:
    if n == 0:
        return Interval(None, None, None, 0, level, method, NO_ROWS)
    if n == 1 or (units is not None and len(units) == 1):
        reason = "One row has no interval." if n == 1 else "One cluster has no interval."
        estimate = _number(statistic(np.arange(n)))
        return Interval(None if math.isnan(estimate) else estimate, None, None, n, level, method, reason)
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _blocks(n: int, resamples: int, seed: int) -> Iterator[Ints]:
    """Numbers of drawn rows, (some resamples, n) at a time; the same whatever the size of a block."""
    generator = np.random.default_rng(seed)
    size = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, resamples, size):
        yield generator.integers(0, n, size=(min(size, resamples - start), n))


def _draws(n: int, units: list[Ints] | None, resamples: int, seed: int) -> Iterator[Ints]:
    for block in _blocks(n if units is None else len(units), resamples, seed):
        for drawn in block:
            yield drawn if units is None else np.concatenate([units[i] for i in drawn])


def _groups(n: int, seed: int) -> Ints:
    """The group each row belongs to: its own, or one of JACKKNIFE at random."""
    if n <= JACKKNIFE:
        return np.arange(n)
    return np.random.default_rng(seed).permutation(np.arange(n) % JACKKNIFE)


def _left_out(n: int, units: list[Ints] | None, statistic: Statistic, seed: int) -> Floats:
    """The score without each row, each cluster, or each group of them."""
    count = n if units is None else len(units)
    groups = _groups(count, seed)
    found = []
    for group in range(int(groups.max()) + 1):
        kept = np.flatnonzero(groups != group)
        rows = kept if units is None else np.sort(np.concatenate([units[i] for i in kept]))
        found.append(_number(statistic(rows)))
    return np.array(found)


def _interval(
    estimate: float, drawn: Floats, left_out: Floats | None, n: int, level: float, method: Method
) -> Interval:
    known = drawn[~np.isnan(drawn)]
    undefined = len(drawn) - len(known)
    if math.isnan(estimate):
        return Interval(None, None, None, n, level, method, "The score is undefined for these rows.")
    if undefined > UNDEFINED * len(drawn):
        reason = f"The score is undefined in {undefined} of {len(drawn)} resamples."
        return Interval(estimate, None, None, n, level, method, reason)
    near = EQUAL * max(1.0, abs(estimate))
    if float(np.ptp(known)) <= near:
        return Interval(estimate, estimate, estimate, n, level, method, "Every resample gave the same value.")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "percentile":
        low, high = np.quantile(known, tails)
        return Interval(estimate, float(low), float(high), n, level, method)
    below, equal = np.mean(known < estimate - near), np.mean(np.abs(known - estimate) <= near)
    share = float(below + equal / 2)
    if not 0 < share < 1 or left_out is None or np.isnan(left_out).any():
        low, high = np.quantile(known, tails)
        reason = "BCa is undefined for these rows; this is the percentile interval."
        return Interval(estimate, float(low), float(high), n, level, "percentile", reason)
    shift = _NORMAL.inv_cdf(share)
    pull = left_out.mean() - left_out
    spread = float((pull**2).sum())
    # Rows that pull alike (all but for rounding) have no skewness.
    flat = spread <= near**2 * len(pull)
    acceleration = 0.0 if flat else float((pull**3).sum()) / (6 * spread**1.5)
    moved = [_moved(float(tail), shift, acceleration) for tail in tails]
    low, high = np.quantile(known, moved)
    return Interval(estimate, float(low), float(high), n, level, method)


def _moved(tail: float, shift: float, acceleration: float) -> float:
    z = shift + _NORMAL.inv_cdf(tail)
    return float(_NORMAL.cdf(shift + z / (1 - acceleration * z)))


@dataclass(frozen=True)
class Difference(Result):
    """Score of A, score of B on the same rows, A - B with its interval, and the two-sided p value of no difference.

    n_different    rows on which the two differ, where the score is a mean of rows
    """

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    n_different: int | None
    level: float
    method: str
    reason: str = ""


def paired_bootstrap(
    n: int,
    statistic_a: Statistic,
    statistic_b: Statistic,
    *,
    method: Method = "percentile",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Difference:
    """Whether any score of A differs from that of B on the same n rows: both are computed on each resample.

    p is twice the smaller share of resamples on one side of 0, each share with one added above and below.
    """

    def both(rows: Ints) -> float:
        return _number(statistic_a(rows)) - _number(statistic_b(rows))

    units = _units(n, clusters)
    if (early := _too_few(n, units, both, level, method)) is not None:
        a, b = (_number(one(np.arange(n))) if n else math.nan for one in (statistic_a, statistic_b))
        return _difference(a, b, early, None, None)
    rows = np.arange(n)
    a, b = _number(statistic_a(rows)), _number(statistic_b(rows))
    drawn = np.array([both(one) for one in _draws(n, units, resamples, seed)], dtype=np.float64)
    left_out = _left_out(n, units, both, seed) if method == "bca" else None
    return _difference(a, b, _interval(a - b, drawn, left_out, n, level, method), drawn, None)


def paired_bootstrap_mean(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    method: Method = "percentile",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """`paired_bootstrap` of the means of one score per row, many resamples at a time."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError("one score per row for each of the two")
    gain = first - second
    different = int((np.abs(gain) > EQUAL).sum())
    n = len(gain)
    means = (float(first.mean()), float(second.mean())) if n else (math.nan, math.nan)
    if (early := _too_few(n, None, lambda rows: float(gain[rows].mean()), level, method)) is not None:
        return _difference(*means, early, None, different)
    drawn, left_out = _drawn_means(gain, method, resamples, seed)
    found = _interval(float(gain.mean()), drawn, left_out, n, level, method)
    return _difference(*means, found, drawn, different)


def _difference(
    a: float, b: float, found: Interval, drawn: Floats | None, different: int | None
) -> Difference:
    p_value = None
    if drawn is not None and found.low is not None:
        known = drawn[~np.isnan(drawn)]
        sides = int((known <= EQUAL).sum()), int((known >= -EQUAL).sum())
        p_value = min(1.0, 2 * (1 + min(sides)) / (1 + len(known)))
    return Difference(
        a=None if math.isnan(a) else a,
        b=None if math.isnan(b) else b,
        difference=found.estimate,
        low=found.low,
        high=found.high,
        p_value=p_value,
        n=found.n,
        n_different=different,
        level=found.level,
        method=found.method,
        reason=found.reason,
    )


# ------------------------------------------------------------------------------------------------ paired tests


@dataclass(frozen=True)
class McNemar(Result):
    """Two answers to the same rows: how many only A, only B, both and neither got right.

    p_value      exact and two-sided: the chance of so uneven a split of the rows that only one got right
    smallest_p   what the most uneven split of as many rows would give: 0.0625 for 5, 0.03125 for 6
    difference   accuracy of A - accuracy of B, with Tango's score interval (1998)
    """

    n: int
    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    p_value: float | None
    smallest_p: float | None
    difference: float | None
    low: float | None
    high: float | None
    level: float
    reason: str = ""


def mcnemar(
    correct_a: Sequence[bool] | Bools, correct_b: Sequence[bool] | Bools, level: float = LEVEL
) -> McNemar:
    """Exact McNemar test of two answers to the same rows."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError("one answer per row for each of the two")
    n, both = len(a), int((a & b).sum())
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    rest = n - both - only_a - only_b
    if n == 0:
        return McNemar(0, 0, 0, 0, 0, None, None, None, None, None, level, NO_ROWS)
    split = only_a + only_b
    low, high = _tango(only_a, only_b, n, level)
    return McNemar(
        n, both, only_a, only_b, rest,
        p_value=_split_p(min(only_a, only_b), split),
        smallest_p=_split_p(0, split),
        difference=(only_a - only_b) / n,
        low=low,
        high=high,
        level=level,
        reason="" if split else "Both are right and wrong on the same rows.",
    )  # fmt: skip


def _split_p(smaller: int, n: int) -> float:
    """Two-sided chance that a fair coin splits n throws at least as unevenly as smaller : n - smaller."""
    if 2 * smaller >= n:
        return 1.0
    if n <= MANY_TERMS:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(smaller + 1)) / (1 << n))
    logarithms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(smaller + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logarithms)))


def _tango(b: int, c: int, n: int, level: float) -> tuple[float, float]:
    """The differences that a score test of paired shares does not reject; b and c of n rows are discordant."""
    z = z_of(level)

    def score(delta: float) -> float:
        linear = -b - c + (2 * n - b + c) * delta
        root = math.sqrt(max(0.0, linear * linear + 8 * n * c * delta * (1 - delta)))
        only_b = (root - linear) / (4 * n)  # most likely share of c, given the difference
        variance = n * (2 * only_b + delta * (1 - delta))
        distance = b - c - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    middle = (b - c) / n
    ends = []
    for edge, wanted in ((-1.0, z), (1.0, -z)):
        inside, outside = middle, edge
        for _ in range(100):
            tried = (inside + outside) / 2
            # The score falls as the difference grows.
            if tried != middle and abs(score(tried)) > abs(wanted):
                outside = tried
            else:
                inside = tried
        ends.append((inside + outside) / 2)
    return ends[0], ends[1]


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several comparisons, raised so that all together keep one level (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    raised = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        raised[i] = highest
    return raised


# ------------------------------------------------------------------------------------------------ agreement


@dataclass(frozen=True)
class Agreement(Result):
    """How far people (or a model and a person) agree beyond chance: 1 is always, 0 as often as chance.

    n          rows that at least two of them judged
    observed   share of agreeing pairs of judgements
    expected   the share that chance would give, as each measure understands chance
    """

    measure: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    observed: float | None
    expected: float | None
    level: float
    reason: str = ""


ONE_LABEL = "Every judgement is the same label, so chance would agree as well."


def cohen_kappa(
    first: Sequence[Hashable | None], second: Sequence[Hashable | None], level: float = LEVEL
) -> Agreement:
    """Cohen's kappa of two raters (1960) with its large-sample interval (Fleiss, Cohen and Everitt 1969).

    Rows that one of them left out (None) do not count.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n = len(pairs)
    if not n:
        return Agreement("cohen-kappa", None, None, None, 0, None, None, level, "No row was judged by both.")
    labels = {label: i for i, label in enumerate(dict.fromkeys(label for pair in pairs for label in pair))}
    table = np.zeros((len(labels), len(labels)))
    for a, b in pairs:
        table[labels[a], labels[b]] += 1
    table /= n
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    observed, expected = float(np.trace(table)), float(rows @ columns)
    if len(labels) == 1:
        return Agreement("cohen-kappa", None, None, None, n, observed, expected, level, ONE_LABEL)
    kappa = (observed - expected) / (1 - expected)
    same = np.diagonal(table) @ (1 - (rows + columns) * (1 - kappa)) ** 2
    weights = (columns[:, None] + rows[None, :]) ** 2
    np.fill_diagonal(weights, 0.0)
    different = (1 - kappa) ** 2 * (table * weights).sum()
    variance = (same + different - (kappa - expected * (1 - kappa)) ** 2) / ((1 - expected) ** 2 * n)
    half = z_of(level) * math.sqrt(max(0.0, float(variance)))
    low, high = max(-1.0, kappa - half), min(1.0, kappa + half)
    if n == 1:
        return Agreement(
            "cohen-kappa", kappa, None, None, n, observed, expected, level, "One row has no interval."
        )
    reason = "Both gave every row the same label, so the interval has no width." if observed == 1 else ""
    return Agreement("cohen-kappa", kappa, low, high, n, observed, expected, level, reason)


def krippendorff_alpha(
    ratings: Sequence[Sequence[Hashable | None]],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Krippendorff's alpha for nominal labels, any number of raters, None where one did not judge a row.

    ratings   per row the judgements of the raters
    The interval is the percentile bootstrap over rows. Source: Krippendorff, "Computing Krippendorff's
    Alpha-Reliability" (2011).
    """
    counts = _judgements(ratings)
    counts = counts[counts.sum(axis=1) >= 2]

    def shares(table: Floats, times: Ints) -> tuple[float, float]:
        each, used = table.sum(axis=1), times @ table
        n = used.sum()
        disagreeing = times @ ((each * each - (table * table).sum(axis=1)) / (each - 1)) / n
        return float(1 - disagreeing), float((used * (used - 1)).sum() / (n * (n - 1)))

    return _agreement("krippendorff-alpha", counts, shares, level, resamples, seed)


def gwet_ac1(
    ratings: Sequence[Sequence[Hashable | None]],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    labels: int | None = None,
) -> Agreement:
    """Gwet's AC1 (2008), which stays readable where one label is rare; raters and rows as in `krippendorff_alpha`.

    labels   how many labels there are to choose from, where some of them were never given
    """
    counts = _judgements(ratings)
    size = max(counts.shape[1], labels or 0)

    def shares(table: Floats, times: Ints) -> tuple[float, float]:
        # A row that one rater judged says nothing about agreement, but how often a label is used.
        each = table.sum(axis=1)
        used = times @ (table / each[:, None]) / times.sum()
        several = np.where(each >= 2, times, 0)
        if not several.any() or size < 2:
            return math.nan, math.nan
        same = (table * (table - 1)).sum(axis=1) / np.maximum(each * (each - 1), 1)
        return float(several @ same / several.sum()), float((used * (1 - used)).sum() / (size - 1))

    return _agreement("gwet-ac1", counts, shares, level, resamples, seed)


def _judgements(ratings: Sequence[Sequence[Hashable | None]]) -> Floats:
    """How often each label was given, (rows with a judgement, labels)."""
    rows = [[label for label in row if label is not None] for row in ratings]
    labels = {label: i for i, label in enumerate(dict.fromkeys(label for row in rows for label in row))}
    counts = np.zeros((len(rows), len(labels)))
    for i, row in enumerate(rows):
        for label, count in Counter(row).items():
            counts[i, labels[label]] = count
    return np.asarray(counts[counts.sum(axis=1) > 0])


def _agreement(
    measure: str,
    counts: Floats,
    shares: Callable[[Floats, Ints], tuple[float, float]],
    level: float,
    resamples: int,
    seed: int,
) -> Agreement:
    n = int((counts.sum(axis=1) >= 2).sum())
    if not n:
        reason = "No row was judged by two raters."
        return Agreement(measure, None, None, None, 0, None, None, level, reason)

    # Many rows were judged alike, so each kind is looked at once, with the number of times it was drawn.
    kinds, kind = np.unique(counts, axis=0, return_inverse=True)
    kind = kind.reshape(-1)

    def value(rows: Ints) -> float | None:
        observed, expected = shares(kinds, np.bincount(kind[rows], minlength=len(kinds)))
        # Equal to 1 but for rounding: chance agrees always.
        return (
            None if math.isnan(observed) or 1 - expected < EQUAL else (observed - expected) / (1 - expected)
        )

    observed, expected = shares(kinds, np.bincount(kind))
    if math.isnan(observed) or 1 - expected < EQUAL:
        given = None if math.isnan(observed) else observed
        return Agreement(measure, None, None, None, n, given, None, level, ONE_LABEL)
    found = bootstrap(len(counts), value, resamples=resamples, level=level, seed=seed)
    return Agreement(
        measure, found.estimate, found.low, found.high, n, observed, expected, level, found.reason
    )


# ------------------------------------------------------------------------------------------------ calibration


@dataclass(frozen=True)
class Calibration(Result):
    """Makes probabilities of label scores: softmax(score / temperature + bias).

    log_loss_before and log_loss_after are those of the rows it was fitted on. `at_limit`: these rows ask for a
    temperature beyond 0.01 or 100 (say, since the highest score is always right), and it was kept there.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    n: int = 0
    log_loss_before: float | None = None
    log_loss_after: float | None = None
    at_limit: bool = False
    reason: str = ""

    def apply(self, scores: Sequence[Sequence[float]] | Floats) -> Floats:
        """Probabilities (rows, labels) of label scores (rows, labels), up to a constant per row."""
        given = np.asarray(scores, dtype=np.float64) / self.temperature
        return _softmax(given + np.array(self.bias) if self.bias else given)


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _log_loss(scores: Floats, truth: Ints) -> float:
    highest = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - highest).sum(axis=1)) + highest[:, 0]
    return float((total - scores[np.arange(len(truth)), truth]).mean())


def fit_calibration(
    scores: Sequence[Sequence[float]] | Floats, truth: Sequence[int] | Ints, bias: bool = False
) -> Calibration:
    """The temperature (Guo et al. 2017), and with `bias` the shift of the second of two labels, of least log loss.

    scores   (rows, labels), log-likelihoods or logits
    truth    per row the number of its correct label
    """
    given, correct = _scored(scores, truth)
    if bias and len(given) and given.shape[1] != 2:
        raise ValueError("a bias is fitted for two labels")
    if len(given) < 2:
        return Calibration(
            n=len(given), reason=NO_ROWS if not len(given) else "One row cannot be calibrated on."
        )
    before = _log_loss(given, correct)
    if float(np.ptp(given, axis=1).max()) == 0:
        reason = "The labels of each row have the same score."
        return Calibration(n=len(given), log_loss_before=before, log_loss_after=before, reason=reason)
    reason = ""
    if bias and len(set(correct.tolist())) == 1:
        bias, reason = False, "Every row has the same correct label, so no bias was fitted."
    slope, shift, at_limit = _fit_two(given, correct) if bias else (*_fit_slope(given, correct), False)
    if not bias:
        at_limit = slope in (1 / TEMPERATURES[0], 1 / TEMPERATURES[1])
    shifts = (0.0, shift) if bias else ()
    after = _log_loss(given * slope + (np.array(shifts) if bias else 0.0), correct)
    return Calibration(1 / slope, shifts, len(given), before, after, at_limit, reason)


def _scored(scores: Sequence[Sequence[float]] | Floats, truth: Sequence[int] | Ints) -> tuple[Floats, Ints]:
    given = np.asarray(scores, dtype=np.float64).reshape(len(scores), -1 if len(scores) else 0)
    correct = np.asarray(truth, dtype=np.int64)
    if len(given) != len(correct):
        raise ValueError("one correct label per row")
    if not np.isfinite(given).all():
        raise ValueError("a score is not finite")
    if len(given) and not (0 <= correct.min() and correct.max() < given.shape[1]):
        raise ValueError("a correct label without a score")
    return given, correct


def _root(slope: Callable[[float], tuple[float, float]], low: float, high: float, start: float) -> float:
    """Where a rising function is 0: Newton's steps, halved intervals where they leave it; the end where it is not."""
    if slope(low)[0] >= 0:
        return low
    if slope(high)[0] <= 0:
        return high
    at = min(max(start, low), high)
    for _ in range(200):
        value, rise = slope(at)
        low, high = (at, high) if value < 0 else (low, at)
        following = at - value / rise if rise > 0 else math.nan
        if not low < following < high:
            following = (low + high) / 2
        if value == 0 or abs(following - at) <= 1e-13 * max(1.0, abs(at)) or not low < following < high:
            return at
        at = following
    return at


def _fit_slope(scores: Floats, truth: Ints) -> tuple[float, float]:
    """1 / temperature of least log loss, within the limits, and no shift."""
    centred = scores - scores.max(axis=1, keepdims=True)
    of_truth = float(centred[np.arange(len(truth)), truth].mean())

    def slope(inverse: float) -> tuple[float, float]:
        chances = _softmax(centred * inverse)
        mean = (chances * centred).sum(axis=1)
        spread = (chances * centred**2).sum(axis=1) - mean**2
        return float(mean.mean()) - of_truth, float(spread.mean())

    return _root(slope, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0], 1.0), 0.0


def _fit_two(scores: Floats, truth: Ints) -> tuple[float, float, bool]:
    """1 / temperature and shift of least log loss for two labels, and whether the temperature is at a limit."""
    margin, wanted = scores[:, 1] - scores[:, 0], truth.astype(np.float64)
    reach = float(np.abs(margin).max())

    def best_shift(inverse: float, start: float) -> float:
        def slope(shift: float) -> tuple[float, float]:
            chance = _logistic(inverse * margin + shift)
            return float((chance - wanted).mean()), float((chance * (1 - chance)).mean())

        edge = inverse * reach + 40.0
        return _root(slope, -edge, edge, start)

    # The loss at the best shift is a convex function of the slope, and by the envelope theorem its derivative is the
    # partial one; the second derivative is the Schur complement of the Hessian.
    last = [0.0]

    def slope(inverse: float) -> tuple[float, float]:
        last[0] = best_shift(inverse, last[0])
        chance = _logistic(inverse * margin + last[0])
        weight = chance * (1 - chance)
        total = float(weight.mean())
        mixed = float((weight * margin).mean())
        rise = float((weight * margin**2).mean()) - (mixed**2 / total if total > 0 else 0.0)
        return float(((chance - wanted) * margin).mean()), rise

    found = _root(slope, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0], 1.0)
    at_limit = found in (1 / TEMPERATURES[0], 1 / TEMPERATURES[1])
    return found, best_shift(found, last[0]), at_limit


def _logistic(z: Floats) -> Floats:
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1.0, small) / (1 + small))


@dataclass(frozen=True)
class CrossFit(Result):
    """Probabilities of rows that were all judged by a calibration fitted on other rows.

    fold     per row the number of the part it belongs to; its calibration is `fits[fold]`
    final    fitted on all rows, for rows to come
    """

    probability: Floats = field(repr=False)
    fold: Ints = field(repr=False)
    fits: tuple[Calibration, ...]
    final: Calibration


def cross_fit(
    scores: Sequence[Sequence[float]] | Floats,
    truth: Sequence[int] | Ints,
    *,
    folds: int = 5,
    bias: bool = False,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> CrossFit:
    """Calibrate each part of the rows by a fit on the other parts, where there is only one labelled file.

    groups   per row what must not be split, as equal texts; without it each part has its share of every label
    """
    given, correct = _scored(scores, truth)
    final = fit_calibration(given, correct, bias)
    generator = np.random.default_rng(seed)
    names: Sequence[Hashable] = list(range(len(given))) if groups is None else groups
    members = _units(len(given), names) or []
    order = generator.permutation(len(members))
    if groups is None:
        order = order[np.argsort(correct[order], kind="stable")]
    count = min(folds, len(members))
    fold = np.zeros(len(given), dtype=np.int64)
    for place, unit in enumerate(order):
        fold[members[unit]] = place % max(1, count)
    if count < 2:
        return CrossFit(final.apply(given) if len(given) else given, fold, (final,), final)
    fits = tuple(fit_calibration(given[fold != part], correct[fold != part], bias) for part in range(count))
    probability = np.empty_like(given)
    for part, fit in enumerate(fits):
        probability[fold == part] = fit.apply(given[fold == part])
    return CrossFit(probability, fold, fits, final)


# ------------------------------------------------------------------------------------------------ thresholds


Goal = Literal["f1", "precision", "cost"]


@dataclass(frozen=True)
class Threshold(Result):
    """A row counts as positive from this score upward; None where `reason` says why there is none.

    Precision, recall, F1 and cost are those of the rows it was chosen on, so they are too good: see `judge`.
    `rows` names those rows.
    """

    value: float | None
    goal: Goal
    wanted: float | None  # the precision asked for
    costs: tuple[float, float]  # of a false alarm and of a miss
    n: int
    precision: float | None
    recall: float | None
    f1: float | None
    cost: float | None
    reason: str = ""
    rows: frozenset[Hashable] = field(default=frozenset(), repr=False)


def choose_threshold(
    scores: Sequence[float] | Floats,
    truth: Sequence[bool] | Bools,
    goal: Goal,
    *,
    rows: Collection[Hashable],
    precision: float = 0.95,
    costs: tuple[float, float] = (1.0, 1.0),
) -> Threshold:
    """Choose the threshold of highest F1, of most recall at a precision, or of least cost, on these rows.

    rows    a name per row that no other row has, in this file or another: `judge` looks for them
    costs   of a row wrongly called positive, and of a positive row that was missed
    Of equally good thresholds the highest is chosen.
    """
    given, positive = _judged(scores, truth)
    names = _names(rows, len(given))

    def found(value: float | None, reason: str = "") -> Threshold:
        wanted = precision if goal == "precision" else None
        if value is None:
            return Threshold(None, goal, wanted, costs, len(given), None, None, None, None, reason, names)
        table = _table(given, positive, value)
        return Threshold(
            value, goal, wanted, costs, len(given), *_rates(*table[:3]), _cost(table, costs), reason, names
        )

    if not len(given):
        return found(None, NO_ROWS)
    if not positive.any() and goal != "cost":
        return found(None, "No row has the positive label.")
    order = np.argsort(-given, kind="stable")
    values, hits = given[order], np.cumsum(positive[order])
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))
    values, hits, called = values[last], hits[last], last + 1
    total = int(positive.sum())
    if goal == "f1":
        best = int(np.argmax(2 * hits / (called + total)))
        return found(float(values[best]))
    if goal == "precision":
        reached = np.flatnonzero(hits >= precision * called * (1 - EQUAL))
        if not len(reached):
            highest = float((hits / called).max())
            return found(
                None, f"No threshold reaches a precision of {precision:g}; the highest is {highest:.4f}."
            )
        # Of those with the most hits the highest threshold, which calls the fewest rows.
        best = int(reached[np.argmax(hits[reached])])
        return found(float(values[best]))
    spent = (called - hits) * costs[0] + (total - hits) * costs[1]
    best = int(np.argmin(spent))
    if total * costs[1] <= spent[best]:
        return found(math.nextafter(float(values[0]), math.inf), "It is cheapest to call no row positive.")
    return found(float(values[best]))


def _judged(scores: Sequence[float] | Floats, truth: Sequence[bool] | Bools) -> tuple[Floats, Bools]:
    given, correct = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if given.shape != correct.shape or given.ndim != 1:
        raise ValueError("one score and one answer per row")
    if not np.isfinite(given).all():
        raise ValueError("a score is not finite")
    return given, correct


def _names(rows: Collection[Hashable], n: int) -> frozenset[Hashable]:
    names = frozenset(rows)
    if len(rows) != n:
        raise ValueError("one name per row")
    return names


def _table(scores: Floats, truth: Bools, threshold: float) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives."""
    called = scores >= threshold
    hits, calls, positives = int((called & truth).sum()), int(called.sum()), int(truth.sum())
    return hits, calls - hits, positives - hits, len(truth) - calls - positives + hits


def _rates(hits: int, false: int, missed: int) -> tuple[float | None, float | None, float | None]:
    return (
        hits / (hits + false) if hits + false else None,
        hits / (hits + missed) if hits + missed else None,
        2 * hits / (2 * hits + false + missed) if hits + false + missed else None,
    )


def _cost(table: tuple[int, int, int, int], costs: tuple[float, float]) -> float:
    return table[1] * costs[0] + table[2] * costs[1]


@dataclass(frozen=True)
class Judgement(Result):
    """What a threshold does on some rows; precision, recall and accuracy with Wilson intervals.

    overlap       rows it was also chosen on
    optimistic    whether there is any, so that the numbers are better than they will be
    """

    threshold: float
    n: int
    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    precision: Interval
    recall: Interval
    accuracy: Interval
    f1: float | None
    cost: float
    overlap: int
    optimistic: bool


def judge(
    threshold: Threshold,
    scores: Sequence[float] | Floats,
    truth: Sequence[bool] | Bools,
    *,
    rows: Collection[Hashable],
    level: float = LEVEL,
) -> Judgement:
    """Judge a threshold on rows, best on none of those it was chosen on."""
    if threshold.value is None:
        raise ValueError("there is no threshold to judge")
    given, positive = _judged(scores, truth)
    overlap = len(_names(rows, len(given)) & threshold.rows)
    hits, false, missed, rest = _table(given, positive, threshold.value)
    return Judgement(
        threshold.value, len(given), hits, false, missed, rest,
        precision=wilson(hits, hits + false, level),
        recall=wilson(hits, hits + missed, level),
        accuracy=wilson(hits + rest, len(given), level),
        f1=_rates(hits, false, missed)[2],
        cost=_cost((hits, false, missed, rest), threshold.costs),
        overlap=overlap,
        optimistic=overlap > 0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ abstaining


@dataclass(frozen=True)
class RiskCoverage(Result):
    """Errors among the rows that are surer than a threshold, as it falls: share of rows kept, share of them wrong.

    low, high   Wilson interval of each risk on its own
    area        mean risk over all numbers of kept rows (AURC, Geifman and El-Yaniv 2017); equally sure rows come in
                any order, and this is the mean over the orders
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    thresholds: tuple[float, ...]
    area: float | None
    n: int
    level: float
    reason: str = ""

    def coverage_at(self, risk: float) -> float:
        """The largest share of rows whose observed risk is at most this; 0 where none is."""
        return max((c for c, r in zip(self.coverage, self.risk, strict=True) if r <= risk), default=0.0)

    def thinned(self, points: int = 1000) -> RiskCoverage:
        """At most so many points for a drawing; the area stays the exact one."""
        count = len(self.coverage)
        if count <= points:
            return self
        keep = [round(i * (count - 1) / (points - 1)) for i in range(points)]
        return replace(
            self,
            coverage=tuple(self.coverage[i] for i in keep),
            risk=tuple(self.risk[i] for i in keep),
            low=tuple(self.low[i] for i in keep),
            high=tuple(self.high[i] for i in keep),
            thresholds=tuple(self.thresholds[i] for i in keep),
        )


def risk_coverage(
    confidence: Sequence[float] | Floats, correct: Sequence[bool] | Bools, level: float = LEVEL
) -> RiskCoverage:
    """How many errors are left when only the rows of at least some confidence are answered."""
    sure, right = _judged(confidence, correct)
    n = len(sure)
    if not n:
        return RiskCoverage((), (), (), (), (), None, 0, level, NO_ROWS)
    order = np.argsort(-sure, kind="stable")
    sure, errors = sure[order], np.cumsum(~right[order]).astype(np.float64)
    last = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    kept = last + 1
    wrong = errors[last]
    low, high = _wilson(wrong / kept, kept, level)
    # Within a block of equal confidence each further row brings the block's mean of errors.
    expected = np.interp(np.arange(1, n + 1), np.append(0, kept), np.append(0.0, wrong))
    return RiskCoverage(
        coverage=tuple((kept / n).tolist()),
        risk=tuple((wrong / kept).tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        thresholds=tuple(sure[last].tolist()),
        area=float((expected / np.arange(1, n + 1)).mean()),
        n=n,
        level=level,
    )


@dataclass(frozen=True)
class AcceptThreshold(Result):
    """The confidence from which answers may be accepted without review; None where `reason` says why."""

    value: float | None
    max_error: float
    n: int
    accepted: int
    level: float
    reason: str = ""
    rows: frozenset[Hashable] = field(default=frozenset(), repr=False)


def choose_acceptance(
    confidence: Sequence[float] | Floats,
    correct: Sequence[bool] | Bools,
    max_error: float,
    *,
    rows: Collection[Hashable],
    level: float = LEVEL,
) -> AcceptThreshold:
    """The lowest confidence above which the exact bound of the error is at most `max_error` on these rows.

    It is the best of many, so it proves nothing yet: `certify` it on other rows.
    """
    sure, right = _judged(confidence, correct)
    names, n = _names(rows, len(sure)), len(sure)
    if not n:
        return AcceptThreshold(None, max_error, 0, 0, level, NO_ROWS, names)
    order = np.argsort(-sure, kind="stable")
    sure, hits = sure[order], np.cumsum(right[order], dtype=np.int64)
    last = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    bounds = 1 - _clopper_pearson(hits[last], last + 1, level)
    passing = np.flatnonzero(bounds <= max_error)
    if not len(passing):
        reason = (
            f"No threshold keeps the error at most {max_error:g}; the lowest bound is {bounds.min():.4f}."
        )
        return AcceptThreshold(None, max_error, n, 0, level, reason, names)
    best = last[passing[-1]]
    return AcceptThreshold(float(sure[best]), max_error, n, int(best) + 1, level, "", names)


@dataclass(frozen=True)
class Certificate(Result):
    """What a check of labelled rows proves about the answers of at least this confidence.

    at_least     accuracy of the accepted rows with this confidence: exact one-sided bound of Clopper and Pearson
    coverage     share of rows accepted
    optimistic   whether some of the rows were those the threshold was chosen on; it then proves less than it says
    """

    threshold: float
    n: int
    accepted: int
    errors: int
    coverage: Interval
    accuracy: float | None
    at_least: float | None
    level: float
    overlap: int
    optimistic: bool
    reason: str = ""


def certify(
    threshold: AcceptThreshold | float,
    confidence: Sequence[float] | Floats,
    correct: Sequence[bool] | Bools,
    *,
    rows: Collection[Hashable],
    level: float = LEVEL,
) -> Certificate:
    """Bound the accuracy of the answers accepted at a threshold; the rows are a random sample of those to come."""
    chosen = threshold if isinstance(threshold, AcceptThreshold) else None
    value = chosen.value if chosen is not None else float(threshold)  # type: ignore[arg-type]
    if value is None:
        raise ValueError("there is no threshold to certify")
    sure, right = _judged(confidence, correct)
    overlap = len(_names(rows, len(sure)) & (chosen.rows if chosen is not None else frozenset()))
    kept = sure >= value
    accepted, hits = int(kept.sum()), int((kept & right).sum())
    return Certificate(
        threshold=value,
        n=len(sure),
        accepted=accepted,
        errors=accepted - hits,
        coverage=wilson(accepted, len(sure), level),
        accuracy=hits / accepted if accepted else None,
        at_least=share_at_least(hits, accepted, level),
        level=level,
        overlap=overlap,
        optimistic=overlap > 0,
        reason="" if accepted else "No row is as sure as this.",
    )


# ------------------------------------------------------------------------------------------------ prevalence


def prevalence_naive(answers: Sequence[bool] | Bools, level: float = LEVEL) -> Interval:
    """Share of rows the model called positive, with Wilson's interval; its mistakes are not corrected."""
    called = np.asarray(answers, dtype=bool)
    found = wilson(int(called.sum()), len(called), level)
    return Interval(found.estimate, found.low, found.high, found.n, level, "naive", found.reason)


def rogan_gladen(
    answers: Sequence[bool] | Bools,
    labelled_answers: Sequence[bool] | Bools,
    labelled_truth: Sequence[bool] | Bools,
    level: float = LEVEL,
) -> Interval:
    """Share of positive rows, corrected by the sensitivity and specificity on labelled rows (Rogan and Gladen 1978).

    answers    of the rows without a label
    The interval holds the shares p for which positive answers = p * sensitivity + (1 - p) * (1 - specificity) is
    within the errors of all three (Fieller), after the added counts of Lang and Reiczigel (2014): z^2 rows, half of
    them positive, to the answers, one right and one wrong row to the sensitivity and to the specificity.
    """
    called = np.asarray(answers, dtype=bool)
    said, true = _flags(labelled_answers, labelled_truth)
    n, positives, negatives = len(called), int(true.sum()), int((~true).sum())

    def none(reason: str, estimate: float | None = None) -> Interval:
        return Interval(estimate, None, None, n, level, "rogan-gladen", reason)

    if not n:
        return none(NO_ROWS)
    if not positives or not negatives:
        return none("It needs labelled rows of both kinds.")
    hits, rejects = int((said & true).sum()), int((~said & ~true).sum())
    youden = hits / positives + rejects / negatives - 1
    if youden <= 0:
        return none("On the labelled rows the answers are no better than chance.")
    estimate = (called.sum() / n + rejects / negatives - 1) / youden
    estimate = float(min(1.0, max(0.0, estimate)))
    z2 = z_of(level) ** 2
    rows, sick, well = n + z2, positives + 2, negatives + 2
    share, sensitivity = (called.sum() + z2 / 2) / rows, (hits + 1) / sick
    alarm = 1 - (rejects + 1) / well  # 1 - specificity
    of_share, of_hits, of_alarms = (
        x * (1 - x) / m for x, m in ((share, rows), (sensitivity, sick), (alarm, well))
    )
    gain = sensitivity - alarm
    # (share - alarm - p * gain)^2 <= z^2 (var share + p^2 var sensitivity + (1 - p)^2 var alarm), a quadratic in p
    square = gain**2 - z2 * (of_hits + of_alarms)
    linear = -2 * (share - alarm) * gain + 2 * z2 * of_alarms
    constant = (share - alarm) ** 2 - z2 * (of_share + of_alarms)
    if square <= 0:
        return none("There are too few labelled rows to correct by.", estimate)
    root = math.sqrt(max(0.0, float(linear**2 - 4 * square * constant)))
    low, high = ((-linear + sign * root) / (2 * square) for sign in (-1, 1))
    if high < 0 or low > 1:
        return none(
            "The answers do not fit the error rates of the labelled rows: the rows are of another kind."
        )
    low, high = (min(1.0, max(0.0, float(edge))) for edge in (low, high))
    return Interval(estimate, min(low, estimate), max(high, estimate), n, level, "rogan-gladen")


def _flags(answers: Sequence[bool] | Bools, truth: Sequence[bool] | Bools) -> tuple[Bools, Bools]:
    said, true = np.asarray(answers, dtype=bool), np.asarray(truth, dtype=bool)
    if said.shape != true.shape:
        raise ValueError("one answer and one label per labelled row")
    return said, true


def prediction_powered(
    answers: Sequence[float] | Floats,
    labelled_answers: Sequence[float] | Floats,
    labelled_truth: Sequence[bool] | Bools,
    level: float = LEVEL,
    tuned: bool = True,
) -> Interval:
    """Share of positive rows by prediction-powered inference (Angelopoulos et al. 2023).

    answers    of the rows without a label: yes or no, or the probability of the positive label
    tuned      weigh the answers by how much they say about the labels (PPI++, Angelopoulos, Duchi and Zrnic 2023)
    The labelled rows have to be a random sample of all. The interval is the normal one.
    """
    free = np.asarray(answers, dtype=np.float64)
    said, true = np.asarray(labelled_answers, dtype=np.float64), np.asarray(labelled_truth, dtype=np.float64)
    if said.shape != true.shape:
        raise ValueError("one answer and one label per labelled row")
    n, rest = len(true), len(free)
    if not n or not rest:
        reason = "There are no labelled rows." if not n else NO_ROWS
        return Interval(None, None, None, rest, level, "ppi", reason)
    if n == 1 or rest == 1:
        estimate = float(np.clip(free.mean() + true.mean() - said.mean(), 0, 1))
        return Interval(estimate, None, None, rest, level, "ppi", "One row has no interval.")
    weight = 1.0
    if tuned:
        spread = float(np.var(np.concatenate([free, said]), ddof=1))
        together = float(((true - true.mean()) * (said - said.mean())).sum() / (n - 1))
        weight = min(1.0, max(0.0, together / ((1 + n / rest) * spread))) if spread > 0 else 0.0
    estimate = weight * float(free.mean()) + float((true - weight * said).mean())
    variance = weight**2 * float(np.var(free, ddof=1)) / rest
    variance += float(np.var(true - weight * said, ddof=1)) / n
    estimate = min(1.0, max(0.0, estimate))
    if variance <= EQUAL**2:
        # All labelled rows are of one kind: the normal interval would have no width.
        exact = wilson(int(true.sum()), n, level)
        reason = "All labelled rows are alike; this is the Wilson interval of them alone."
        return Interval(exact.estimate, exact.low, exact.high, rest, level, "ppi", reason)
    half = z_of(level) * math.sqrt(variance)
    return Interval(estimate, max(0.0, estimate - half), min(1.0, estimate + half), rest, level, "ppi")
