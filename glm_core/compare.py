"""Two or more runs on the same rows: who is better, by how much, and whether that is certain.

Differences are B - A, so "fixed" is a row that A got wrong and B right. Runs of different files or prompts are refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from . import evaluate, metrics, statistics
from .errors import GLMError
from .evaluate.answers import label_key
from .evaluate.registry import question_column
from .evaluate.scoring import NORMAL_ROWS, mean_interval
from .evaluate.task import EXTRA, differing, same_question
from .evaluate.work import unstored
from .statistics import Agreement, Interval, Result
from .tables.options import excerpt

if TYPE_CHECKING:
    from pathlib import Path

    from .evaluate import EvaluationTask, PerRow, Run
    from .jobs import JobStore
    from .tables import WriteReport

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Outcome = Literal["better", "not decisive", "same"]
Place = Literal["best", "shared", "open"]
FlipName = Literal["fixed", "broken", "both_wrong", "both_right"]

LEVEL = statistics.LEVEL
ALPHA = 1 - LEVEL
POWER = 0.8
DELTA = 0.01  # of 100 %: what counts as the same where nothing else is said
SEED = 0
FEWEST = 6  # rows that differ; with fewer no two-sided test reaches 5 %
EXACT_ROWS = 20_000  # suggested numbers of rows up to which the power of the exact test is summed up
MOST_ROWS = 100_000_000
READ_ROWS = 2000  # at a time
QUESTION_NAMES = {
    "template": "the template",
    "system": "the system text",
    "shots": "the examples shown",
    "prompt": "the prompt column",
    "history": "the history column",
    "input": "the input column",
    "alpaca": "the Alpaca wording",
    "method": "how answers are found",
    "extraction": "the question after the chain of thought",
}


@dataclass(frozen=True)
class Flips(Result):
    """What became of each row from A to B, as numbers of the rows in A's file.

    For right and wrong answers: fixed, broken, both wrong, both right. For scores of texts fixed means higher in B,
    broken lower, and both_right holds the rows of equal score; both_wrong is empty. The largest changes come first.
    places   for each of these names, (rows, 2): idx of the row in A and in B, to look them up by
    """

    fixed: tuple[int, ...]
    broken: tuple[int, ...]
    both_wrong: tuple[int, ...]
    both_right: tuple[int, ...]
    places: Mapping[str, Ints] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class MetricRow(Result):
    """One line of the metric table: both scores on the common rows, and their difference B - A.

    p_value   of no difference, for this pair and this metric alone; None where there is no test
    """

    metric: str
    formula: str
    a: Interval
    b: Interval
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n_different: int | None
    test: str
    reason: str = ""


@dataclass(frozen=True)
class Verdict(Result):
    """What may be said.

    better       the run that is better, where the outcome is "better"
    p_value      of the deciding metric, raised by Holm where several runs are compared
    rows_needed  how many such rows would probably settle it; None where nothing says so
    to_differ    rows at which a difference as large as this one is found in 80 % of the cases
    to_equal     rows at which the interval lies within delta in 80 % of the cases
    """

    outcome: Outcome
    better: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    comparisons: int
    delta: float
    rows_needed: int | None
    to_differ: int | None
    to_equal: int | None
    text: str


@dataclass(frozen=True)
class Comparison(Result):
    """Two runs on the rows they share.

    rows_a, rows_b   scored rows of each; n: those that both have
    agreement        2 x 2: both right, only A, only B, both wrong; for texts None
    kappa            how far both give the same answers beyond chance; for texts None
    settings         what the two were run with, differences only: name -> (A, B)
    """

    a: str
    b: str
    title_a: str
    title_b: str
    kind: str
    rows_a: int
    rows_b: int
    n: int
    metrics: tuple[MetricRow, ...]
    verdict: Verdict
    flips: Flips
    agreement: tuple[int, int, int, int] | None
    kappa: Agreement | None
    settings: Mapping[str, tuple[Any, Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing(Result):
    """Which of several runs is best, from the verdicts of every pair of them.

    place    "best": better than each other one; "shared": the same as `equal`, better than the rest; "open": not
             decided against those in `undecided`, though ahead
    """

    leader: str
    title: str
    place: Place
    equal: tuple[str, ...]
    undecided: tuple[str, ...]


# ---- which rows


@dataclass(frozen=True)
class _Pair:
    """Two runs cut down to the rows they share, in the same order."""

    a: Run
    b: Run
    rows_a: PerRow
    rows_b: PerRow
    at_a: Ints
    at_b: Ints
    notes: tuple[str, ...] = field(default=())


def _checked(a: Run, b: Run) -> None:
    """GLMError where two runs were not asked the same."""
    if a.id == b.id:
        raise GLMError("A run cannot be compared with itself.", "Choose two runs.")
    for one in (a, b):
        if not one.job.done:
            raise GLMError(f"The run {one.title!r} has no answers yet.", "Wait for it, or choose another.")
    if a.task.kind != b.task.kind:
        raise GLMError(
            f"One run scores {a.task.kind} answers and the other {b.task.kind}.", "Choose runs of one kind."
        )
    if names := same_question(a.task, b.task):
        raise GLMError(
            f"The two runs were asked differently: {', '.join(QUESTION_NAMES[name] for name in names)}.",
            "A difference would come from the prompt as well as from the checkpoint; run both with one prompt.",
        )
    if a.task.kind == "label" and _keys(a.task) != _keys(b.task):
        raise GLMError(
            f"The labels of the two runs differ: {', '.join(a.task.labels)} and {', '.join(b.task.labels)}.",
            "Run both with the same labels.",
        )


def refusal(a: Run, b: Run) -> GLMError | None:
    """Why two runs cannot be compared, as far as is known without reading their rows; None where nothing is."""
    try:
        _checked(a, b)
    except GLMError as error:
        return error
    return None


def _keys(task: EvaluationTask) -> set[str]:
    return {label_key(label) for label in task.labels}


class _Reader:
    """What is read of the runs, once for all pairs of them."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._rows: dict[str, PerRow] = {}
        self._asked: dict[str, list[tuple[str, str, str]] | None] = {}
        self._references: dict[str, list[str]] = {}

    def rows(self, run: Run) -> PerRow:
        if run.id not in self._rows:
            self._rows[run.id] = evaluate.per_row(self.store, run.id)
        return self._rows[run.id]

    def asked(self, run: Run) -> list[tuple[str, str, str]] | None:
        if run.id not in self._asked:
            self._asked[run.id] = _asked(self.store, run)
        return self._asked[run.id]

    def references(self, run: Run) -> list[str]:
        if run.id not in self._references:
            self._references[run.id] = _references(self.store, run)
        return self._references[run.id]


def _paired(read: _Reader, a: Run, b: Run) -> _Pair:
    """The rows both were scored on; GLMError where they have none in common or belong to different files."""
    _checked(a, b)
    rows_a, rows_b = read.rows(a), read.rows(b)
    same_file = all(
        getattr(a.task, name) == getattr(b.task, name)
        for name in ("input_sha256", "reference", "read_options")
    )
    if same_file:
        keys_a, keys_b = _by_number(rows_a), _by_number(rows_b)
    else:
        keys_a, keys_b = _other_files(read, a, b, rows_a, rows_b)
    common = [key for key in keys_a if key in keys_b]
    at_a = np.array([keys_a[key] for key in common], dtype=np.int64)
    at_b = np.array([keys_b[key] for key in common], dtype=np.int64)
    if not len(common):
        raise GLMError(
            f"The two runs have no row in common: {a.task.input_name} and {b.task.input_name} hold other rows.",
            "Compare runs on the same labelled file.",
        )
    scored = rows_a.scored[at_a] & rows_b.scored[at_b]
    at_a, at_b = at_a[scored], at_b[scored]
    if not len(at_a):
        raise GLMError(
            "No row was answered by both runs.", "Wait until both have answered some rows of the file."
        )
    notes = []
    whole = int(rows_a.scored.sum()), int(rows_b.scored.sum())
    if len(at_a) < max(whole):
        notes.append(
            f"Compared on the {len(at_a):,} rows that both have; A has {whole[0]:,} and B {whole[1]:,}."
        )
    return _Pair(a, b, rows_a, rows_b, at_a, at_b, tuple(notes))


def _by_number(rows: PerRow) -> dict[tuple[int, int], int]:
    """Place of every row by its number in the file; a conversation gives several rows of one number."""
    seen: Counter[int] = Counter()
    found = {}
    for place, number in enumerate(rows.number.tolist()):
        found[number, seen[number]] = place
        seen[number] += 1
    return found


def _other_files(
    read: _Reader, a: Run, b: Run, rows_a: PerRow, rows_b: PerRow
) -> tuple[dict[Any, int], dict[Any, int]]:
    """Places by question and reference where both files have questions, else by number with equal references."""
    asked_a, asked_b = read.asked(a), read.asked(b)
    if asked_a is not None and asked_b is not None:
        return _by_content(asked_a), _by_content(asked_b)
    keys_a, keys_b = _by_number(rows_a), _by_number(rows_b)
    told_a, told_b = read.references(a), read.references(b)
    for key in keys_a.keys() & keys_b.keys():
        if told_a[keys_a[key]] != told_b[keys_b[key]]:
            raise GLMError(
                f"{a.task.input_name} and {b.task.input_name} are different files: row {key[0]:,} is to be"
                f" {excerpt(told_a[keys_a[key]], 30)!r} in one and {excerpt(told_b[keys_b[key]], 30)!r} in the other.",
                "Compare runs on the same labelled file.",
            )
    if len(keys_a) != len(keys_b):
        raise GLMError(
            f"{a.task.input_name} has {len(keys_a):,} rows and {b.task.input_name} {len(keys_b):,}, and the questions"
            " are not in both files, so it is not known which rows are the same.",
            "Import predictions with a column of the questions, or compare runs on the same labelled file.",
        )
    return keys_a, keys_b


def _asked(store: JobStore, run: Run) -> list[tuple[str, str, str]] | None:
    """(question, earlier rounds, reference) of every row; None where the file has no questions."""
    task = run.task
    place = question_column(task)
    if place is None:
        return None
    extra = len(task.columns)
    at = {name: extra + i for i, name in enumerate(EXTRA)}
    options = [task.columns.index(one) for one in task.options]
    return [
        (
            "\x1f".join([cells[at["question"]] or cells[place], *(cells[i] for i in options)]),
            cells[at["history"]],
            cells[at["reference"]],
        )
        for cells in _cells(store, run.id)
    ]


def _cells(store: JobStore, run_id: str) -> Iterator[list[str]]:
    """The cells of every row in order, without the results: half the time for 100,000 rows."""
    query = "SELECT cells FROM row WHERE job_id = ?1 AND idx >= ?2 AND idx < ?2 + ?3 ORDER BY idx"
    begin = 0
    while page := store.connection().execute(query, (run_id, begin, READ_ROWS)).fetchall():
        yield from (json.loads(row["cells"]) for row in page)
        begin += READ_ROWS


def _references(store: JobStore, run: Run) -> list[str]:
    at = len(run.task.columns) + EXTRA.index("reference")
    return [cells[at] for cells in _cells(store, run.id)]


def _by_content(asked: Sequence[tuple[str, str, str]]) -> dict[Any, int]:
    """Place by what is asked; of equal rows the first with the first, and so on."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = {}
    for place, key in enumerate(asked):
        found[key, seen[key]] = place
        seen[key] += 1
    return found


# ---- tests


@dataclass(frozen=True)
class Tested:
    """A difference B - A of a mean of rows, with its interval and test; `spread` is the deviation of a row's difference.

    decidable   False where too few rows differ for any test to decide
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    n_different: int
    only_a: int
    only_b: int
    spread: float
    test: str
    decidable: bool


def paired_shares(right_a: Bools, right_b: Bools) -> Tested:
    """Right and wrong answers to the same rows: exact McNemar test, Tango's interval of the difference."""
    found = statistics.mcnemar(right_b, right_a)
    assert found.difference is not None and found.low is not None and found.high is not None
    only_b, only_a = found.only_a, found.only_b  # mcnemar was given B first, so that differences are B - A
    split = only_a + only_b
    spread = math.sqrt(max(0.0, split / found.n - found.difference**2))
    return Tested(
        found.difference, found.low, found.high, found.p_value or 0.0, found.n, split, only_a, only_b, spread,
        "exact McNemar", split >= FEWEST,
    )  # fmt: skip


def paired_scores(a: Floats, b: Floats) -> Tested:
    """A score per row: paired bootstrap of the mean difference, percentile interval; normal above 20,000 rows."""
    gain = b - a
    n = len(gain)
    up, down = int((gain > statistics.EQUAL).sum()), int((gain < -statistics.EQUAL).sum())
    spread, difference = float(gain.std()), float(gain.mean())
    if n > NORMAL_ROWS:
        error = spread / math.sqrt(n)
        half = statistics.z_of(LEVEL) * error
        p = math.erfc(abs(difference) / error / math.sqrt(2)) if error > 0 else 1.0
        low, high, test = difference - half, difference + half, "paired z"
    else:
        found = statistics.paired_bootstrap_mean(b, a, seed=SEED)
        low = difference if found.low is None else found.low
        high = difference if found.high is None else found.high
        p, test = 1.0 if found.p_value is None else found.p_value, "paired bootstrap"
    return Tested(difference, low, high, p, n, up + down, down, up, spread, test, up + down >= FEWEST)


# ---- how many rows


def rows_to_differ(tested: Tested, power: float = POWER, alpha: float = ALPHA) -> int | None:
    """Rows at which a difference as large as the one found is significant with this power; None where there is none.

    For right and wrong answers the power of the exact McNemar test is summed up over the numbers of discordant rows;
    above 20,000 rows, and for scores, it is the normal one.
    """
    if abs(tested.difference) <= statistics.EQUAL or not tested.n_different:
        return None
    z = statistics.z_of(1 - alpha) + statistics.z_of(2 * power - 1)
    if tested.test != "exact McNemar":
        n = (z * tested.spread / tested.difference) ** 2
        return max(2, math.ceil(n)) if n < MOST_ROWS else None
    split = tested.n_different / tested.n
    share = max(tested.only_a, tested.only_b) / tested.n_different
    gain = abs(tested.difference)
    reach = statistics.z_of(1 - alpha) * math.sqrt(split)
    n = ((reach + statistics.z_of(2 * power - 1) * math.sqrt(max(split - gain**2, 0.0))) / gain) ** 2
    if n > MOST_ROWS:
        return None
    if n > EXACT_ROWS:
        return math.ceil(n + 1 / gain)  # the exact test needs about one more discordant row on each side
    low, high = 1, max(8, math.ceil(1.2 * n + 1 / gain))
    while mcnemar_power(high, split, share, alpha) < power:
        low, high = high, 2 * high
    low = max(low, math.floor(0.8 * n)) if high > 100 else low
    while high - low > 1:
        middle = (low + high) // 2
        if mcnemar_power(middle, split, share, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def mcnemar_power(n: int, split: float, share: float, alpha: float = ALPHA) -> float:
    """Chance that the exact McNemar test of n rows is significant, in favour of the one that is better.

    split   chance that only one of the two is right about a row
    share   of such rows, the share that the better one gets right
    """
    binom = metrics.package("scipy.stats", "The power of a test").binom
    mean, deviation = n * split, math.sqrt(n * split * (1 - split))
    first, last = max(0, math.floor(mean - 8 * deviation) - 1), min(n, math.ceil(mean + 8 * deviation) + 1)
    counts = np.arange(first, last + 1)
    # The fewest wins that are significant: at most alpha / 2 of a fair coin's throws have as many or more.
    needed = binom.isf(alpha / 2, counts, 0.5) + 1
    significant = binom.sf(needed - 1, counts, share)
    return float((binom.pmf(counts, n, split) * significant).sum())


def rows_to_equal(tested: Tested, delta: float, power: float = POWER, level: float = LEVEL) -> int | None:
    """Rows at which the interval of the difference found lies within delta with this power; None where it cannot."""
    gap = abs(tested.difference)
    if gap >= delta or tested.spread == 0:
        return None
    z = statistics.z_of(level)
    normal = NormalDist().cdf
    low, high = 0.0, (z + 4) / (delta - gap)  # 1 / standard error
    for _ in range(60):
        middle = (low + high) / 2
        inside = normal((delta - gap) * middle - z) + normal((delta + gap) * middle - z) - 1
        low, high = (middle, high) if inside < power else (low, middle)
    n = (high * tested.spread) ** 2
    return max(2, math.ceil(n)) if n < MOST_ROWS else None


# ---- the verdict


def judge(
    tested: Tested,
    title_a: str,
    title_b: str,
    *,
    metric: str,
    unit: float = 1.0,
    delta: float = DELTA,
    p_value: float | None = None,
    comparisons: int = 1,
    suggest: bool = True,
) -> Verdict:
    """What may be said of a tested difference.

    unit     what is 100 % of the metric; delta is a share of it
    p_value  raised for several comparisons; default: that of the test
    suggest  say how many rows would settle what is open
    """
    edge = delta * unit
    p = tested.p_value if p_value is None else p_value
    inside = -edge <= tested.low and tested.high <= edge
    better = title_b if tested.difference > 0 else title_a
    certain = p < ALPHA and tested.decidable
    points = f"{abs(tested.difference) / unit * 100:.1f}"
    between = f"{_points(tested.low, unit)} to {_points(tested.high, unit)}"
    rows, same = f"{tested.n:,}", "1.0" if delta == 0.01 else f"{delta * 100:g}"
    more = equal = needed = None
    outcome: Outcome
    said = []
    if tested.n_different == 0:
        outcome = "same"
        said.append(f"Both are the same on all {rows} rows ({metric}).")
    elif inside and delta > 0:
        outcome = "same"
        said.append(
            f"They are the same within {same} points of {metric} (95 % interval of B - A: {between}; {rows} rows)."
        )
        if certain:
            said.append(f"That they differ at all is certain (p {_p(p)}).")
    elif certain:
        outcome = "better"
        said.append(
            f"{better} is better by {points} points of {metric} (95 % interval of B - A: {between}; {rows} rows;"
            f" p {_p(p)})."
        )
    else:
        outcome = "not decisive"
        if suggest:
            more = rows_to_differ(tested, alpha=ALPHA / comparisons)
            equal = rows_to_equal(tested, edge)
        needed = min((one for one in (more, equal) if one is not None), default=None)
        if not tested.decidable:
            said.append(
                f"Not decisive: only {tested.n_different} of {rows} rows differ; with fewer than {FEWEST} no test can"
                " decide."
            )
        else:
            said.append(
                f"Not decisive: {points} points of {metric} apart (95 % interval of B - A: {between}; {rows} rows;"
                f" p {_p(p)})."
            )
        if needed is not None and needed > tested.n and needed == more:
            said.append(f"About {_round(needed):,} rows would probably be enough to find this difference.")
        elif needed is not None and needed > tested.n:
            said.append(
                f"About {_round(needed):,} rows would probably show that it is less than {same} points."
            )
    if comparisons > 1 and tested.decidable and tested.n_different:
        said.append(f"The p value is raised by Holm's method for {comparisons} comparisons.")
    text = " ".join(said)
    return Verdict(
        outcome, better if outcome == "better" else "", metric, tested.difference, tested.low, tested.high,
        p, comparisons, delta, needed, more, equal, text,
    )  # fmt: skip


def _points(value: float, unit: float) -> str:
    return f"{value / unit * 100:+.1f}"


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"


def _round(count: int) -> int:
    """Two digits are as many as an estimate has."""
    digits = max(0, len(str(count)) - 2)
    step: int = 10**digits
    return -(-count // step) * step


# ---- comparing


def compare(store: JobStore, run_a: str, run_b: str, *, metric: str = "", delta: float = DELTA) -> Comparison:
    """Compare two runs on the rows they share; GLMError with the reason where they cannot be compared.

    metric   decides; default: the headline's
    delta    share of 100 % that counts as no difference, 0.01 is one point
    """
    return compare_all(store, [run_a, run_b], metric=metric, delta=delta)[0]


def compare_all(
    store: JobStore,
    run_ids: Sequence[str],
    *,
    metric: str = "",
    delta: float = DELTA,
    baseline: str = "",
) -> list[Comparison]:
    """Compare every pair of runs, or each with the baseline; several p values are raised by Holm's method."""
    if len(set(run_ids)) < 2:
        raise GLMError("A run cannot be compared with itself.", "Choose two runs.")
    if not 0 <= delta < 1:
        raise GLMError(f"delta is {delta:g}.", "Choose a share from 0 to 1: 0.01 is one point.")
    ids = list(dict.fromkeys(run_ids))
    found = {one: evaluate.run_of(store, one) for one in ids}
    if baseline:
        pairs = [(baseline, one) for one in ids if one != baseline]
        found.setdefault(baseline, evaluate.run_of(store, baseline))
    else:
        pairs = list(combinations(ids, 2))
    read = _Reader(store)
    paired = [_paired(read, found[a], found[b]) for a, b in pairs]
    chosen = [_metric(pair, metric) for pair in paired]
    tested = [_tested(pair, name) for pair, name in zip(paired, chosen, strict=True)]
    raised = statistics.holm([one.p_value for one in tested])
    return [
        _compared(pair, name, one, delta, p, len(pairs))
        for pair, name, one, p in zip(paired, chosen, tested, raised, strict=True)
    ]


def standing(comparisons: Sequence[Comparison]) -> Standing:
    """Who is ahead among the runs of these comparisons, which should be all their pairs, and whether that is certain."""
    titles = {
        id_: title for one in comparisons for id_, title in ((one.a, one.title_a), (one.b, one.title_b))
    }
    wins: Counter[str] = Counter()
    ahead: dict[str, float] = dict.fromkeys(titles, 0.0)
    for one in comparisons:
        gain = one.verdict.difference or 0.0
        ahead[one.a] -= gain
        ahead[one.b] += gain
        if one.verdict.outcome == "better":
            wins[one.b if gain > 0 else one.a] += 1
            wins[one.a if gain > 0 else one.b] -= 1
    leader = max(titles, key=lambda id_: (wins[id_], ahead[id_]))
    equal, undecided = [], []
    for one in comparisons:
        if leader not in (one.a, one.b):
            continue
        other = one.b if leader == one.a else one.a
        gain = (one.verdict.difference or 0.0) * (1 if leader == one.b else -1)
        if one.verdict.outcome == "same":
            equal.append(titles[other])
        elif one.verdict.outcome == "not decisive" or gain < 0:
            undecided.append(titles[other])
    place: Place = "open" if undecided else "shared" if equal else "best"
    return Standing(leader, titles[leader], place, tuple(equal), tuple(undecided))


def _metric(pair: _Pair, metric: str) -> str:
    of_rows = (
        ["accuracy"] if not pair.rows_a.scores else [n for n in pair.rows_a.scores if n in pair.rows_b.scores]
    )
    name = metric or ("accuracy" if not pair.rows_a.scores else "rouge-l")
    if name not in of_rows:
        raise GLMError(
            f"{name!r} cannot decide between these runs.",
            f"Choose a metric that both have for every row: {', '.join(of_rows) or 'none is in both runs'}.",
        )
    return name


def _tested(pair: _Pair, metric: str) -> Tested:
    if metric in ("accuracy", "exact-match"):
        found = paired_shares(pair.rows_a.right[pair.at_a], pair.rows_b.right[pair.at_b])
        return _scaled(found, 100.0) if metric == "exact-match" else found
    return paired_scores(pair.rows_a.scores[metric][pair.at_a], pair.rows_b.scores[metric][pair.at_b])


def _scaled(found: Tested, factor: float) -> Tested:
    return replace(
        found, difference=found.difference * factor, low=found.low * factor, high=found.high * factor,
        spread=found.spread * factor,
    )  # fmt: skip


def _compared(
    pair: _Pair, metric: str, tested: Tested, delta: float, p_value: float, comparisons: int
) -> Comparison:
    a, b = pair.a, pair.b
    unit = 100.0 if a.task.kind == "text" else 1.0
    verdict = judge(
        tested,
        a.title,
        b.title,
        metric=metric,
        unit=unit,
        delta=delta,
        p_value=p_value,
        comparisons=comparisons,
    )
    right_a, right_b = pair.rows_a.right[pair.at_a], pair.rows_b.right[pair.at_b]
    agreement, kappa = None, None
    if a.task.kind != "text":
        both, only_a = int((right_a & right_b).sum()), int((right_a & ~right_b).sum())
        only_b = int((~right_a & right_b).sum())
        agreement = both, only_a, only_b, len(right_a) - both - only_a - only_b
        given_a, given_b = pair.rows_a.answer[pair.at_a].tolist(), pair.rows_b.answer[pair.at_b].tolist()
        kappa = statistics.cohen_kappa(given_a, given_b)
    return Comparison(
        a=a.id, b=b.id, title_a=a.title, title_b=b.title, kind=a.task.kind,
        rows_a=int(pair.rows_a.scored.sum()), rows_b=int(pair.rows_b.scored.sum()), n=len(pair.at_a),
        metrics=tuple(_table(pair)), verdict=verdict, flips=_flips(pair, metric),
        agreement=agreement, kappa=kappa, settings=differing(a.task, b.task), notes=pair.notes,
    )  # fmt: skip


def _flips(pair: _Pair, metric: str) -> Flips:
    a, b = pair.rows_a.measure(metric)[pair.at_a], pair.rows_b.measure(metric)[pair.at_b]
    gain = b - a
    up, down = gain > statistics.EQUAL, gain < -statistics.EQUAL
    same = ~(up | down)
    wrong = same & ~pair.rows_a.right[pair.at_a] if _is_right_or_wrong(pair, metric) else np.zeros_like(same)
    order = np.argsort(-np.abs(gain), kind="stable")
    numbers = pair.rows_a.number[pair.at_a][order]
    idx = np.stack([pair.rows_a.idx[pair.at_a], pair.rows_b.idx[pair.at_b]], axis=1)[order]
    which = {"fixed": up, "broken": down, "both_wrong": wrong, "both_right": same & ~wrong}
    chosen = {name: np.flatnonzero(mask[order]) for name, mask in which.items()}
    listed = {name: tuple(numbers[places].tolist()) for name, places in chosen.items()}
    return Flips(**listed, places={name: idx[places] for name, places in chosen.items()})


def _is_right_or_wrong(pair: _Pair, metric: str) -> bool:
    return pair.a.task.kind != "text" or metric == "exact-match"


def _table(pair: _Pair) -> list[MetricRow]:
    """Every metric that both have, on the common rows."""
    kind, n = pair.a.task.kind, len(pair.at_a)
    if kind == "text":
        found = []
        for name in pair.rows_a.scores:
            if name not in pair.rows_b.scores:
                continue
            sides = [
                rows.scores[name][at] for rows, at in ((pair.rows_a, pair.at_a), (pair.rows_b, pair.at_b))
            ]
            if name == "exact-match":
                means = [_times(statistics.wilson(int((one > 0).sum()), n), 100.0) for one in sides]
            else:
                means = [mean_interval(one) for one in sides]
            found.append(_line(name, kind, means, _tested(pair, name)))
        return found
    means = [
        statistics.wilson(int(rows.right[at].sum()), n)
        for rows, at in ((pair.rows_a, pair.at_a), (pair.rows_b, pair.at_b))
    ]
    found = [_line("accuracy", kind, means, _tested(pair, "accuracy"))]
    return found + (_of_labels(pair) if kind == "label" else [])


def _times(found: Interval, factor: float) -> Interval:
    values = [None if one is None else one * factor for one in (found.estimate, found.low, found.high)]
    return Interval(values[0], values[1], values[2], found.n, found.level, found.method, found.reason)


def _line(name: str, kind: Any, means: Sequence[Interval], tested: Tested) -> MetricRow:
    reason = (
        "" if tested.decidable
        else f"Only {tested.n_different} rows differ; with fewer than {FEWEST} no test can decide."
    )  # fmt: skip
    return MetricRow(
        name, evaluate.formula(kind, name), means[0], means[1], tested.difference, tested.low, tested.high,
        tested.p_value if tested.decidable else None, tested.n_different, tested.test, reason,
    )  # fmt: skip


def _numbers(values: npt.NDArray[np.str_], labels: Mapping[str, int]) -> Ints:
    """The number of each answer's label, that after the last for any other answer."""
    kinds, which = np.unique(values, return_inverse=True)
    found = np.array([labels.get(label_key(str(one)), len(labels)) for one in kinds], dtype=np.int64)
    return np.asarray(found[which])


def _of_labels(pair: _Pair) -> list[MetricRow]:
    """The scores of labels that are no mean of rows: paired bootstrap over the table of (truth, A, B)."""
    from .evaluate.scoring import METRICS_OF_TABLE, _percentile, of_tables

    labels = {label_key(one): i for i, one in enumerate(pair.a.task.labels)}
    size, n = len(labels), len(pair.at_a)
    truth, first, second = (
        _numbers(values, labels)
        for values in (
            pair.rows_a.truth[pair.at_a], pair.rows_a.answer[pair.at_a], pair.rows_b.answer[pair.at_b]
        )
    )  # fmt: skip
    cells, counts = np.unique(np.stack([truth, first, second]), axis=1, return_counts=True)

    def tables(weights: Ints, side: int) -> Ints:
        found = np.zeros((len(weights), size, size + 1), dtype=np.int64)
        for place in range(cells.shape[1]):
            found[:, cells[0, place], cells[side, place]] += weights[:, place]
        return found

    drawn = np.random.default_rng(SEED).multinomial(n, counts / n, statistics.RESAMPLES)
    whole = [of_tables(tables(counts[None], side)) for side in (1, 2)]
    sampled = [of_tables(tables(drawn, side)) for side in (1, 2)]
    different = int((first != second).sum())
    found = []
    for name in METRICS_OF_TABLE:
        if name not in pair.a.task.metrics or name not in pair.b.task.metrics:
            continue
        values = [float(one[name][0]) for one in whole]
        if n < 2 or any(map(math.isnan, values)):
            sides = [
                Interval(
                    None if math.isnan(one) else one,
                    None,
                    None,
                    n,
                    LEVEL,
                    "percentile",
                    "It is undefined here.",
                )
                for one in values
            ]
            found.append(
                MetricRow(name, evaluate.formula("label", name), sides[0], sides[1], None, None, None, None,
                          different, "paired bootstrap", "It is undefined here.")
            )  # fmt: skip
            continue
        sides = [_percentile(value, one[name], n) for value, one in zip(values, sampled, strict=True)]
        gap = sampled[1][name] - sampled[0][name]
        interval = _percentile(values[1] - values[0], gap, n)
        known = gap[~np.isnan(gap)]
        below = int((known <= statistics.EQUAL).sum()), int((known >= -statistics.EQUAL).sum())
        p = min(1.0, 2 * (1 + min(below)) / (1 + len(known)))
        usable = different >= FEWEST and interval.low is not None
        reason = "" if different >= FEWEST else (
            f"Only {different} rows differ; with fewer than {FEWEST} no test can decide."
        )  # fmt: skip
        found.append(
            MetricRow(name, evaluate.formula("label", name), sides[0], sides[1], values[1] - values[0], interval.low,
                      interval.high, p if usable else None, different, "paired bootstrap", reason or interval.reason)
        )  # fmt: skip
    return found


# ---- rows and files


def predictions(store: JobStore, run_id: str) -> dict[int, str]:
    """The answer to every row that has one, by its idx; of a chain of thought what follows it."""
    scored = evaluate.run_of(store, run_id).task.method in ("likelihood", "chain")
    return {
        idx: unstored(found.prediction)[0] if scored else found.prediction
        for idx, _, found in store.iter_results(run_id)
        if found is not None
    }


def other_words(store: JobStore, one: Comparison) -> set[int]:
    """The idx in A of the common rows that A and B answered in other words, right or wrong."""
    said_a, said_b = predictions(store, one.a), predictions(store, one.b)
    return {
        idx_a
        for places in one.flips.places.values()
        for idx_a, idx_b in places.tolist()
        if said_a.get(idx_a, "").strip() != said_b.get(idx_b, "").strip()
    }


def export(
    store: JobStore,
    comparisons: Sequence[Comparison],
    path: Path,
    format: Literal["csv", "xlsx", "jsonl", "parquet"] = "csv",
    guard: bool = True,
) -> WriteReport:
    """The rows of A: question, reference, each run's answer and score, and what became of the row in each B.

    comparisons   those of the first one's A are written
    A row that a run does not share is blank there. GLMError if the file cannot be written.
    """
    from . import tables

    first = comparisons[0]
    kept = [one for one in comparisons if one.a == first.a]
    runs = {first.a: first.title_a} | {one.b: one.title_b for one in kept}
    names = _distinct(runs)
    metric = first.verdict.metric
    said = {id_: predictions(store, id_) for id_ in runs}
    rows_of = {id_: evaluate.per_row(store, id_) for id_ in runs}
    measured = {
        id_: dict(zip(rows.idx.tolist(), rows.measure(metric).tolist(), strict=True))
        for id_, rows in rows_of.items()
    }
    fate: dict[str, dict[int, tuple[int, str]]] = {
        one.b: {
            idx_a: (idx_b, name.replace("_", " "))
            for name, places in one.flips.places.items()
            for idx_a, idx_b in places.tolist()
        }
        for one in kept
    }
    columns = ["row", "question", "reference"]
    for id_ in runs:
        columns += [f"answer: {names[id_]}", f"{metric}: {names[id_]}"]
    columns += [f"{names[id_]} against {names[first.a]}" for id_ in fate]
    common = sorted(set().union(*fate.values()))

    def rows() -> Iterator[tuple[str | float | None, ...]]:
        shown: dict[int, dict[str, Any]] = {}
        for idx in common:
            if idx not in shown:
                page = evaluate.answers_page(store, first.a, idx, READ_ROWS)
                shown = {one["idx"]: one for one in page}
            own = shown[idx]
            cells: list[str | float | None] = [own["number"], own["question"], own["reference"]]
            for id_ in runs:
                at = idx if id_ == first.a else fate[id_].get(idx, (-1, ""))[0]
                cells += [said[id_].get(at, ""), measured[id_].get(at, "") if at >= 0 else ""]
            yield (*cells, *(fate[id_].get(idx, (-1, ""))[1] for id_ in fate))

    return tables.write(path, columns, rows(), format, guard=guard)


def _distinct(titles: Mapping[str, str]) -> dict[str, str]:
    """A name for every run; those of equal titles also say the id."""
    counts = Counter(titles.values())
    return {id_: title if counts[title] == 1 else f"{title} ({id_})" for id_, title in titles.items()}
