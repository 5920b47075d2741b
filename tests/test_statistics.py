"""Statistics equal scipy's, statsmodels' or scikit-learn's, else a published example or a brute-force count."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core import metrics, statistics

EXACT = 1e-9


def plain(result: Any) -> Any:
    """A result through JSON, where no number may be missing silently."""
    return json.loads(json.dumps(result.to_json(), allow_nan=False))


# ------------------------------------------------------------------------------------------------ shares


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_wilson_is_that_of_statsmodels_and_scipy(n):
    proportion = pytest.importorskip(
        "statsmodels.stats.proportion", reason="statsmodels is only compared with"
    )
    stats = pytest.importorskip("scipy.stats")
    for k in {0, 1, n // 3, n - 1, n}:
        for level in (0.9, 0.95, 0.99):
            found = statistics.wilson(k, n, level)
            expected = proportion.proportion_confint(k, n, 1 - level, "wilson")
            assert (found.low, found.high) == pytest.approx(expected, abs=EXACT)
            other = stats.binomtest(k, n).proportion_ci(level, "wilson")
            assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=EXACT)


def test_no_rows_have_no_share():
    assert plain(statistics.wilson(0, 0))["reason"] == "There are no rows."
    assert statistics.share_at_least(0, 0) is None
    with pytest.raises(ValueError, match="3 of 2"):
        statistics.wilson(3, 2)


@pytest.mark.parametrize(("rows", "share"), [(29, 0.90), (59, 0.95), (149, 0.98), (299, 0.99)])
def test_so_many_rows_without_an_error_prove_a_share(rows, share):
    pytest.importorskip("scipy")
    assert statistics.share_at_least(rows, rows) >= share > statistics.share_at_least(rows - 1, rows - 1)


def test_the_exact_bound_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 9), (1, 9), (8, 9), (9, 9), (480, 500), (99_000, 100_000)):
        expected = stats.binomtest(k, n, alternative="greater").proportion_ci(0.95, "exact").low
        assert statistics.share_at_least(k, n) == pytest.approx(expected, abs=EXACT)
        if k:
            bound = statistics.share_at_least(k, n)
            assert stats.binom.sf(k - 1, n, bound) == pytest.approx(0.05, abs=1e-6)


# ------------------------------------------------------------------------------------------------ bootstrap


def scores(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.5, 20.0, n)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("n", [2, 25, 400])
def test_intervals_are_those_of_scipy_on_the_same_resamples(n, method):
    stats = pytest.importorskip("scipy.stats")
    values = scores(n, n)
    name = {"percentile": "percentile", "bca": "BCa"}[method]
    for statistic in (np.mean, np.median):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = stats.bootstrap(
                (values,), statistic, n_resamples=500, method=name, rng=np.random.default_rng(3)
            ).confidence_interval
        found = statistics.bootstrap(
            n, lambda rows, s=statistic: float(s(values[rows])), method=method, resamples=500, seed=3
        )
        if not math.isnan(theirs.low):
            assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=EXACT)
    fast = statistics.bootstrap_mean(values, method=method, resamples=500, seed=3)
    slow = statistics.bootstrap(
        n, lambda rows: float(values[rows].mean()), method=method, resamples=500, seed=3
    )
    assert (fast.estimate, fast.low, fast.high) == pytest.approx(
        (slow.estimate, slow.low, slow.high), abs=EXACT
    )


def test_the_same_seed_gives_the_same_interval_whatever_fits_into_memory(monkeypatch):
    values = scores(1, 60)
    first = statistics.bootstrap_mean(values, seed=5)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 700)
    assert statistics.bootstrap_mean(values, seed=5) == first
    assert statistics.bootstrap_mean(values, seed=6) != first


def test_many_rows_leave_out_groups_and_get_nearly_the_same_interval(monkeypatch):
    values = scores(2, 900)
    one_by_one = statistics.bootstrap_mean(values, method="bca")
    monkeypatch.setattr(statistics, "JACKKNIFE", 300)
    grouped = statistics.bootstrap_mean(values, method="bca")
    assert grouped != one_by_one
    width = one_by_one.high - one_by_one.low
    assert (grouped.low, grouped.high) == pytest.approx((one_by_one.low, one_by_one.high), abs=0.02 * width)
    slow = statistics.bootstrap(900, lambda rows: float(values[rows].mean()), method="bca")
    assert (slow.low, slow.high) == pytest.approx((grouped.low, grouped.high), abs=EXACT)


def test_intervals_of_95_percent_hold_the_truth_in_95_percent():
    generator = np.random.default_rng(11)
    misses = dict.fromkeys(("wilson", "bootstrap"), 0)
    for seed in range(1200):
        hits = int(generator.binomial(200, 0.8))
        found = statistics.wilson(hits, 200)
        misses["wilson"] += not found.low <= 0.8 <= found.high
        values = generator.normal(50, 10, 100)
        found = statistics.bootstrap_mean(values, resamples=400, seed=seed)
        misses["bootstrap"] += not found.low <= 50 <= found.high
    assert all(0.035 <= count / 1200 <= 0.065 for count in misses.values()), misses


def test_rows_of_one_document_are_drawn_together():
    # Ten documents of twenty equal rows are ten rows, not 200.
    of_documents = scores(3, 10)
    values, names = np.repeat(of_documents, 20), np.repeat(np.arange(10), 20).tolist()

    def mean(rows: Any) -> float:
        return float(values[rows].mean())

    for method in ("percentile", "bca"):
        found = statistics.bootstrap(200, mean, clusters=names, method=method, seed=1)
        ten = statistics.bootstrap_mean(of_documents, method=method, seed=1)
        assert (found.low, found.high) == pytest.approx((ten.low, ten.high), abs=EXACT)
    assert "One cluster" in statistics.bootstrap(3, lambda rows: 1.0, clusters=["a"] * 3).reason


def test_an_interval_that_cannot_be_given_says_why():
    assert plain(statistics.bootstrap_mean([]))["reason"] == "There are no rows."
    one = statistics.bootstrap_mean([3.0])
    assert (one.estimate, one.low, one.high) == (3.0, None, None) and one.reason == "One row has no interval."
    same = statistics.bootstrap_mean([0.1] * 30, method="bca")
    assert same.low == same.high == same.estimate and same.reason == "Every resample gave the same value."
    none = statistics.bootstrap(30, lambda rows: None)
    assert none.estimate is None and none.reason == "The score is undefined for these rows."
    truth = np.array([True] + [False] * 19)  # the one positive row is missing in 36 % of the resamples
    rare = statistics.bootstrap(20, lambda rows: 0.5 if truth[rows].any() else None, resamples=400)
    assert rare.estimate == 0.5 and rare.low is None
    count = int(rare.reason.split(" in ")[1].split()[0])
    assert 100 < count < 190 and rare.reason.endswith("of 400 resamples.")


def test_a_difference_is_judged_on_the_same_resamples():
    stats = pytest.importorskip("scipy.stats")
    a, b = scores(4, 80), scores(5, 80)
    found = statistics.paired_bootstrap_mean(a, b, resamples=500, seed=2)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), paired=True, vectorized=True,
        n_resamples=500, method="percentile", rng=np.random.default_rng(2),
    )  # fmt: skip
    interval = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=EXACT)
    drawn = theirs.bootstrap_distribution
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / 501)
    assert found.p_value == pytest.approx(p, abs=EXACT)
    assert (found.a, found.b, found.n_different) == (pytest.approx(a.mean()), pytest.approx(b.mean()), 80)
    assert found.difference == pytest.approx(a.mean() - b.mean(), abs=EXACT)
    any_score = statistics.paired_bootstrap(
        80, lambda rows: float(a[rows].mean()), lambda rows: float(b[rows].mean()), resamples=500, seed=2
    )
    assert (any_score.low, any_score.high) == pytest.approx((found.low, found.high), abs=EXACT)
    assert any_score.p_value == found.p_value
    turned = statistics.paired_bootstrap_mean(b, a, resamples=500, seed=2)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=EXACT)


def test_equal_models_differ_in_5_percent_of_comparisons():
    generator = np.random.default_rng(12)
    better = {"bootstrap": 0, "mcnemar": 0}
    for seed in range(2000):
        shared = generator.normal(0, 10, 150)
        a, b = shared + generator.normal(0, 8, 150), shared + generator.normal(0, 8, 150)
        better["bootstrap"] += statistics.paired_bootstrap_mean(a, b, resamples=400, seed=seed).p_value < 0.05
        right = generator.random((2, 150)) < 0.8
        better["mcnemar"] += statistics.mcnemar(*right).p_value < 0.05
    assert 0.035 <= better["bootstrap"] / 2000 <= 0.065, better
    assert better["mcnemar"] / 2000 <= 0.05, better  # an exact test of counts keeps below its level


def test_identical_answers_and_few_rows_are_no_difference():
    same = statistics.paired_bootstrap_mean([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])
    assert (same.difference, same.p_value, same.n_different) == (0.0, 1.0, 0)
    for n in (0, 1):
        found = plain(statistics.paired_bootstrap_mean([0.5] * n, [0.25] * n))
        assert found["p_value"] is None and found["low"] is None and found["reason"]
        found = plain(statistics.paired_bootstrap(n, lambda rows: 0.5, lambda rows: 0.25))
        assert found["p_value"] is None and found["reason"]


# ------------------------------------------------------------------------------------------------ paired tests


def split(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = ((True, True, both), (True, False, only_a), (False, True, only_b), (False, False, neither))
    rows = [(a, b) for a, b, count in counts for _ in range(count)]
    return [a for a, _ in rows], [b for _, b in rows]


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (5, 0), (0, 6), (12, 2), (40, 40), (600, 401), (900, 1100), (4000, 4100)]
)
def test_mcnemar_is_the_exact_one_of_statsmodels_and_scipy(only_a, only_b):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="only compared with")
    stats = pytest.importorskip("scipy.stats")
    found = statistics.mcnemar(*split(30, only_a, only_b, 10))
    expected = tables.mcnemar([[30, only_a], [only_b, 10]], exact=True).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-8, abs=1e-12)
    if only_a + only_b:
        coin = stats.binomtest(only_a, only_a + only_b).pvalue
        assert found.p_value == pytest.approx(coin, rel=1e-8, abs=1e-12)
    counts = (found.both_right, found.only_a, found.only_b, found.both_wrong)
    assert counts == (30, only_a, only_b, 10) and found.low <= found.difference <= found.high


def test_under_six_different_rows_no_split_is_significant():
    five, six = (statistics.mcnemar(*split(50, count, 0, 0)) for count in (5, 6))
    assert (five.smallest_p, six.smallest_p) == (0.0625, 0.03125)
    assert five.p_value == 0.0625
    assert plain(statistics.mcnemar([], []))["reason"] == "There are no rows."
    one = statistics.mcnemar([True], [False])
    assert (one.p_value, one.difference) == (1.0, 1.0) and -1 <= one.low < one.high <= 1


@pytest.mark.parametrize("table", [(20, 12, 2, 10), (40, 0, 0, 4), (0, 3, 0, 0), (5, 1, 4, 2), (90, 0, 7, 3)])
def test_the_interval_of_a_paired_difference_is_that_of_a_score_test(table):
    """Its ends are where the score test, its likeliest shares searched for numerically, gives the level's z."""
    optimize = pytest.importorskip("scipy.optimize")
    both, only_a, only_b, neither = table
    n, z = sum(table), statistics.z_of(0.95)
    found = statistics.mcnemar(*split(*table))

    def score(delta: float) -> float:
        def loss(q: float) -> float:
            shares = (q + delta, q, 1 - 2 * q - delta)
            counts = (only_a, only_b, both + neither)
            return -sum(c * math.log(max(p, 1e-300)) for c, p in zip(counts, shares, strict=True) if c)

        q = optimize.minimize_scalar(
            loss, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        return (only_a - only_b - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))

    for end, sign in ((found.low, 1), (found.high, -1)):
        if abs(end) < 1 - 1e-9:
            assert score(end) == pytest.approx(sign * z, abs=2e-4)


def test_holm_is_that_of_statsmodels():
    multi = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is only compared with")
    generator = random.Random(3)
    for count in (1, 2, 3, 6, 6, 6):
        values = [round(generator.random() ** 3, 3) for _ in range(count)]
        assert statistics.holm(values) == pytest.approx(
            multi.multipletests(values, method="holm")[1], abs=EXACT
        )
    assert statistics.holm([]) == []


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("labels", ["ab", "abcde"])
def test_kappa_is_that_of_scikit_learn_and_its_interval_that_of_statsmodels(labels):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is only compared with")
    raters = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is only compared with")
    generator = random.Random(len(labels))
    first = generator.choices(labels, weights=range(1, len(labels) + 1), k=150)
    second = [a if generator.random() < 0.7 else generator.choice(labels) for a in first]
    found = statistics.cohen_kappa([*first, None, "a"], [*second, "a", None])
    assert found.n == 150
    assert found.value == pytest.approx(sk.cohen_kappa_score(first, second), abs=EXACT)
    table = [
        [sum((a, b) == (x, y) for a, b in zip(first, second, strict=True)) for y in labels] for x in labels
    ]
    theirs = raters.cohens_kappa(np.array(table))
    assert (found.low, found.high) == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=EXACT)


# Krippendorff 2011, section C: four observers, twelve units, missing judgements; alpha is 0.743.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
UNITS = [[None if one == "." else one for one in unit] for unit in zip(*OBSERVERS, strict=True)]


def test_alpha_is_that_of_krippendorffs_example():
    found = statistics.krippendorff_alpha(UNITS)
    assert round(found.value, 3) == 0.743
    assert found.n == 11  # one of the twelve was judged once
    assert found.low < found.value <= found.high


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=3, max_size=3), max_size=12))
def test_alpha_is_one_minus_observed_over_expected_disagreement(ratings):
    found = statistics.krippendorff_alpha(ratings, resamples=20)
    units = [[one for one in row if one is not None] for row in ratings]
    units = [unit for unit in units if len(unit) > 1]
    values = [one for unit in units for one in unit]
    pairs = list(itertools.permutations(values, 2))
    expected = sum(a != b for a, b in pairs) / len(pairs) if pairs else 0
    if not expected:
        assert found.value is None and found.reason
        return
    observed = 0.0
    for unit in units:
        observed += sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1)
    assert found.value == pytest.approx(1 - observed / len(values) / expected, abs=EXACT)


def test_ac1_stays_high_where_kappa_does_not():
    # Gwet 2002: 118 rows both positive, 5 and 2 only one, none both negative: kappa -0.02, AC1 0.94.
    pairs = [("+", "+")] * 118 + [("+", "-")] * 5 + [("-", "+")] * 2
    kappa = statistics.cohen_kappa([a for a, _ in pairs], [b for _, b in pairs])
    ac1 = statistics.gwet_ac1(pairs)
    assert round(kappa.value, 4) == -0.0234 and round(ac1.value, 4) == 0.9408
    assert ac1.observed == kappa.observed == 118 / 125
    assert ac1.low < ac1.value < ac1.high


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=3, max_size=3), max_size=12))
def test_ac1_is_that_of_plain_counting(ratings):
    found = statistics.gwet_ac1(ratings, resamples=20, labels=3)
    rows = [[one for one in row if one is not None] for row in ratings]
    judged = [row for row in rows if row]
    several = [row for row in judged if len(row) > 1]
    assert found.n == len(several)
    if not several:
        assert found.value is None and found.reason
        return
    same = [np.mean([a == b for a, b in itertools.permutations(row, 2)]) for row in several]
    used = [np.mean([row.count(label) / len(row) for row in judged]) for label in "abc"]
    chance = sum(share * (1 - share) for share in used) / 2
    assert found.value == pytest.approx((np.mean(same) - chance) / (1 - chance), abs=EXACT)


def test_agreement_without_two_raters_or_two_labels_says_so():
    for found in (
        statistics.cohen_kappa([], []),
        statistics.cohen_kappa(["a", "a"], ["a", "a"]),
        statistics.krippendorff_alpha([["a", None]]),
        statistics.krippendorff_alpha([["a", "a"], ["a", "a"]]),
        statistics.gwet_ac1([]),
        statistics.gwet_ac1([["a", "a"], ["a", "a"]]),
    ):
        told = plain(found)
        assert told["value"] is None and told["low"] is None and told["reason"]
    one = statistics.cohen_kappa(["a"], ["b"])
    assert one.value == 0.0 and one.low is None and one.reason


# ------------------------------------------------------------------------------------------------ calibration


def overconfident(seed: int, labels: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose right temperature is 2.5 and whose second label is shifted by 1, before the temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (n, labels))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.array([generator.choice(labels, p=one) for one in chances])
    return logits * 2.5 + np.eye(labels)[1], truth


def log_loss(given_: np.ndarray, truth: np.ndarray) -> float:
    special = pytest.importorskip("scipy.special")
    return float(-special.log_softmax(given_, axis=1)[np.arange(len(truth)), truth].mean())


@pytest.mark.parametrize("labels", [2, 4])
def test_the_temperature_has_the_least_log_loss(labels):
    optimize = pytest.importorskip("scipy.optimize")
    given_, truth = overconfident(labels, labels)
    found = statistics.fit_calibration(given_, truth)
    best = optimize.minimize_scalar(
        lambda inverse: log_loss(given_ * inverse, truth), bounds=(0.01, 100), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert found.temperature == pytest.approx(1 / best.x, rel=1e-6)
    assert found.log_loss_after == pytest.approx(best.fun, abs=EXACT)
    assert found.log_loss_before == pytest.approx(log_loss(given_, truth), abs=EXACT)
    assert 2 < found.temperature < 3.2 and not found.at_limit
    # At the optimum the mean score of the labels drawn is that of the correct ones.
    mean = (found.apply(given_) * given_).sum(axis=1).mean()
    assert mean == pytest.approx(given_[np.arange(len(truth)), truth].mean(), abs=EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_and_bias_are_those_of_logistic_regression(seed):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is only compared with")
    given_, truth = overconfident(seed, 2)
    found = statistics.fit_calibration(given_, truth, bias=True)
    margin = (given_[:, 1] - given_[:, 0])[:, None]
    theirs = linear.LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    theirs.fit(margin, truth)
    assert 1 / found.temperature == pytest.approx(float(theirs.coef_[0, 0]), rel=1e-6)
    assert found.bias == (0.0, pytest.approx(float(theirs.intercept_[0]), abs=1e-6))
    assert found.apply(given_) == pytest.approx(theirs.predict_proba(margin), abs=1e-6)
    # The optimum: no error is left on average, nor in proportion to the margin.
    left = found.apply(given_)[:, 1] - truth
    assert left.mean() == pytest.approx(0, abs=EXACT)
    assert (left * margin[:, 0]).mean() == pytest.approx(0, abs=1e-8)


def test_calibration_stays_within_its_limits_and_says_so():
    always = np.array([[0.0, 1.0], [1.0, 0.0]] * 20)
    right, wrong = np.array([1, 0] * 20), np.array([0, 1] * 20)
    for bias in (False, True):
        sure, unsure = (statistics.fit_calibration(always, truth, bias) for truth in (right, wrong))
        assert sure.temperature == pytest.approx(0.01) and sure.at_limit
        assert unsure.temperature == pytest.approx(100) and unsure.at_limit
        assert np.isfinite(sure.apply(always)).all()


def test_rows_that_cannot_be_calibrated_on_leave_the_scores_as_they_are():
    one_label = statistics.fit_calibration([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]], [1, 1, 1], bias=True)
    assert one_label.bias == () and "no bias was fitted" in one_label.reason
    for found in (
        statistics.fit_calibration([], []),
        statistics.fit_calibration([[0.0, 1.0]], [1]),
        statistics.fit_calibration([[1.0, 1.0]] * 9, [1] * 9),
    ):
        assert (found.temperature, found.bias) == (1.0, ()) and plain(found)["reason"]
    with pytest.raises(ValueError, match="not finite"):
        statistics.fit_calibration([[0.0, math.inf]], [0])


@pytest.mark.parametrize("groups", [False, True])
def test_no_row_is_judged_by_a_calibration_fitted_on_it(groups):
    given_, truth = overconfident(9, 2, 203)
    names = [f"text {i // 3}" for i in range(203)] if groups else None
    found = statistics.cross_fit(given_, truth, bias=True, groups=names)
    assert sorted(set(found.fold.tolist())) == [0, 1, 2, 3, 4]
    for part, fit in enumerate(found.fits):
        mine = found.fold == part
        again = statistics.fit_calibration(given_[~mine], truth[~mine], bias=True)
        assert fit == again and np.array_equal(found.probability[mine], again.apply(given_[mine]))
        if names:
            assert not {names[i] for i in np.flatnonzero(mine)} & {names[i] for i in np.flatnonzero(~mine)}
        else:  # each part has its share of each label
            assert abs(mine[truth == 1].sum() - (truth == 1).sum() / 5) <= 1
    assert found.final == statistics.fit_calibration(given_, truth, bias=True)
    same = statistics.cross_fit(given_, truth, bias=True, groups=names)
    assert np.array_equal(same.fold, found.fold) and np.array_equal(same.probability, found.probability)
    assert "probability" not in plain(found) and len(plain(found)["fits"]) == 5


def test_cross_fitting_makes_probabilities_mean_what_they_say():
    given_, truth = overconfident(10, 2, 4000)
    raw = statistics.Calibration().apply(given_)
    fitted = statistics.cross_fit(given_, truth, bias=True).probability
    errors = [
        metrics.reliability(one.max(axis=1), one.argmax(axis=1) == truth, equal_mass=True)[1]
        for one in (raw, fitted)
    ]
    assert errors[0] > 0.08 and errors[1] < 0.03


def test_cross_fitting_few_rows_works_or_says_why():
    for n in (0, 1):
        found = statistics.cross_fit(np.zeros((n, 2)), [0] * n)
        assert found.final.reason and len(found.probability) == n
    two = statistics.cross_fit([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    assert len(two.fits) == 2 and np.isfinite(two.probability).all()


# ------------------------------------------------------------------------------------------------ thresholds


def rows_with_ties(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.random(n) < 0.4
    return np.round(np.clip(generator.normal(0.4 + 0.2 * truth, 0.2), 0, 1), 1 + seed % 2), truth


def counted(given_: np.ndarray, truth: np.ndarray, threshold: float) -> tuple[int, int, int]:
    called = [s >= threshold for s in given_]
    pairs = list(zip(called, truth, strict=True))
    return (
        sum(c and t for c, t in pairs),
        sum(c and not t for c, t in pairs),
        sum(t and not c for c, t in pairs),
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_is_the_best_of_all(seed):
    given_, truth = rows_with_ties(seed)
    every = [*sorted(set(given_.tolist())), 2.0]
    tables = {value: counted(given_, truth, value) for value in every}
    names = range(60)

    best = statistics.choose_threshold(given_, truth, "f1", rows=names)
    f1 = {v: 2 * a / (2 * a + b + c) for v, (a, b, c) in tables.items()}
    assert best.f1 == pytest.approx(max(f1.values())) and best.value == max(
        v for v in every if f1[v] == max(f1.values())
    )

    for wanted in (0.5, 0.6, 0.75):
        reached = {v: a for v, (a, b, _) in tables.items() if a + b and a / (a + b) >= wanted}
        found = statistics.choose_threshold(given_, truth, "precision", precision=wanted, rows=names)
        if not reached:
            assert found.value is None and found.reason
            continue
        assert found.precision >= wanted
        assert found.value == max(v for v, hits in reached.items() if hits == max(reached.values()))

    for costs in ((1.0, 1.0), (5.0, 1.0), (0.5, 20.0), (1000.0, 1.0)):
        spent = {v: b * costs[0] + c * costs[1] for v, (_, b, c) in tables.items()}
        found = statistics.choose_threshold(given_, truth, "cost", costs=costs, rows=names)
        assert found.cost == pytest.approx(min(spent.values()))
        table = counted(given_, truth, found.value)
        assert table[1] * costs[0] + table[2] * costs[1] == pytest.approx(found.cost)


def test_a_threshold_judged_on_its_own_rows_is_called_optimistic():
    given_, truth = rows_with_ties(1, 200)
    dev, test = (list(range(100)), list(range(100, 200)))
    chosen = statistics.choose_threshold(given_[:100], truth[:100], "f1", rows=dev)
    own = statistics.judge(chosen, given_[:100], truth[:100], rows=dev)
    other = statistics.judge(chosen, given_[100:], truth[100:], rows=test)
    mixed = statistics.judge(chosen, given_[99:], truth[99:], rows=[99, *test])
    assert [one.optimistic for one in (own, other, mixed)] == [True, False, True]
    assert [one.overlap for one in (own, other, mixed)] == [100, 0, 1]
    assert (own.f1, own.precision.estimate, own.recall.estimate) == (
        chosen.f1,
        chosen.precision,
        chosen.recall,
    )
    hits, false, missed = counted(given_[100:], truth[100:], chosen.value)
    assert (other.true_positives, other.false_positives, other.false_negatives) == (hits, false, missed)
    assert other.recall == statistics.wilson(hits, hits + missed)
    assert plain(other)["n"] == 100 and "rows" not in plain(chosen)


def test_a_threshold_that_cannot_be_chosen_says_why():
    for goal in ("f1", "precision"):
        assert statistics.choose_threshold([], [], goal, rows=[]).reason == "There are no rows."
        none = statistics.choose_threshold([0.5], [False], goal, rows=["a"])
        assert plain(none)["value"] is None and none.reason == "No row has the positive label."
    high = statistics.choose_threshold([0.5, 0.6], [True, False], "precision", rows="ab", precision=0.9)
    assert high.reason == "No threshold reaches a precision of 0.9; the highest is 0.5000."
    cheap = statistics.choose_threshold([0.5], [False], "cost", rows="a")
    assert cheap.cost == 0 and cheap.value > 0.5 and "no row positive" in cheap.reason
    nobody = statistics.judge(cheap, [0.5], [False], rows="b")
    assert nobody.precision.estimate is None and nobody.precision.reason and nobody.f1 is None


# ------------------------------------------------------------------------------------------------ abstaining


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=6))
def test_the_area_under_risk_is_the_mean_over_all_orders_of_equal_rows(rows):
    found = statistics.risk_coverage([s for s, _ in rows], [r for _, r in rows])
    areas = []
    for order in itertools.permutations(rows):
        ordered = sorted(order, key=lambda row: -row[0])
        risks = [sum(not right for _, right in ordered[: k + 1]) / (k + 1) for k in range(len(ordered))]
        areas.append(np.mean(risks))
    assert found.area == pytest.approx(np.mean(areas), abs=EXACT)
    for coverage, risk, threshold in zip(found.coverage, found.risk, found.thresholds, strict=True):
        kept = [right for sure, right in rows if sure >= threshold]
        assert coverage == len(kept) / len(rows) and risk == pytest.approx(1 - np.mean(kept))


def test_coverage_at_a_risk_is_the_largest_share_with_no_more_errors():
    sure = [0.99, 0.98, 0.97, 0.96, 0.95, 0.6, 0.5]
    right = [True, True, False, True, True, False, False]
    found = statistics.risk_coverage(sure, right)
    assert found.coverage_at(0.2) == 5 / 7 and found.coverage_at(0.0) == 2 / 7 and found.coverage_at(1) == 1
    low, high = statistics.wilson(1, 5).low, statistics.wilson(1, 5).high
    assert (found.low[4], found.high[4]) == pytest.approx((low, high), abs=EXACT)
    many = np.linspace(0, 1, 5000)
    curve = statistics.risk_coverage(many, many > 0.2)
    thin = curve.thinned(100)
    assert len(thin.coverage) == 100 and thin.area == curve.area and thin.coverage[-1] == 1.0
    nothing = statistics.risk_coverage([], [])
    assert plain(nothing)["area"] is None and nothing.reason and nothing.coverage_at(0.1) == 0


def test_answers_are_accepted_at_a_threshold_and_certified_on_other_rows():
    pytest.importorskip("scipy")
    generator = np.random.default_rng(5)
    sure = generator.random(4000)
    right = generator.random(4000) < np.where(sure > 0.4, 0.99, 0.7)
    dev, test = range(2000), range(2000, 4000)
    chosen = statistics.choose_acceptance(sure[:2000], right[:2000], 0.02, rows=dev)
    assert 0.35 < chosen.value < 0.45
    kept = sure[:2000] >= chosen.value
    assert 1 - statistics.share_at_least(int((kept & right[:2000]).sum()), int(kept.sum())) <= 0.02
    assert chosen.accepted == kept.sum()
    proof = statistics.certify(chosen, sure[2000:], right[2000:], rows=test)
    kept = sure[2000:] >= chosen.value
    assert proof.accepted == kept.sum() and proof.errors == (kept & ~right[2000:]).sum()
    assert proof.at_least == statistics.share_at_least(proof.accepted - proof.errors, proof.accepted)
    assert not proof.optimistic and 0.975 < proof.at_least < proof.accuracy
    assert statistics.certify(chosen, sure[:2000], right[:2000], rows=dev).optimistic
    plain(proof)


def test_an_acceptance_that_cannot_be_proved_says_why():
    pytest.importorskip("scipy")
    few = statistics.choose_acceptance([0.9] * 20, [True] * 20, 0.05, rows=range(20))
    assert few.value is None and "the lowest bound is 0.1391" in few.reason
    assert statistics.choose_acceptance([], [], 0.05, rows=[]).reason == "There are no rows."
    empty = statistics.certify(0.95, [0.9], [True], rows=[1])
    assert empty.at_least is None and empty.accuracy is None and empty.reason == "No row is as sure as this."


# ------------------------------------------------------------------------------------------------ prevalence


def survey(
    generator: np.random.Generator, share: float, rows: int, labelled: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of the rows without a label, and answers and labels of the others; 85 % and 93 % are right."""
    truth = generator.random(rows + labelled) < share
    said = generator.random(rows + labelled) < np.where(truth, 0.85, 0.07)
    return said[:rows], said[rows:], truth[rows:]


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_corrected_shares_hold_the_truth_where_the_naive_one_does_not(share):
    generator = np.random.default_rng(8)
    held = {"naive": 0, "rogan-gladen": 0, "ppi": 0, "labelled alone": 0}
    widths = {"ppi": 0.0, "labelled alone": 0.0}
    runs = 1000
    for _ in range(runs):
        said, labelled, truth = survey(generator, share, 3000, 400)
        alone = statistics.wilson(int(truth.sum()), len(truth))
        found = [
            statistics.prevalence_naive(said),
            statistics.rogan_gladen(said, labelled, truth),
            statistics.prediction_powered(said, labelled, truth),
            alone,
        ]
        for name, one in zip(held, found, strict=True):
            held[name] += one.low <= share <= one.high
            if name in widths:
                widths[name] += one.high - one.low
    assert held["naive"] < 0.2 * runs
    assert 0.93 * runs <= held["ppi"] <= 0.975 * runs, held
    assert 0.93 * runs <= held["rogan-gladen"] <= 0.985 * runs, held
    assert widths["ppi"] < 0.95 * widths["labelled alone"]


def test_rogan_gladen_turns_the_answers_round():
    # Of 1,000 rows 260 called positive; sensitivity 0.9, specificity 0.8: (0.26 + 0.8 - 1) / 0.7.
    said = np.arange(1000) < 260
    truth = np.arange(200) < 100
    labelled = np.concatenate([np.arange(100) < 90, np.arange(100) < 20])
    found = statistics.rogan_gladen(said, labelled, truth)
    assert found.estimate == pytest.approx(0.06 / 0.7, abs=EXACT) and found.low < found.estimate < found.high
    none = statistics.rogan_gladen(np.arange(1000) < 180, labelled, truth)
    assert none.estimate == none.low == 0.0 < none.high
    # One in a hundred called positive cannot be, where one in five of the negative rows is.
    other = statistics.rogan_gladen(np.arange(1000) < 10, labelled, truth)
    assert other.estimate is None and "do not fit" in other.reason


def test_rogan_gladens_interval_holds_the_shares_that_fit_the_counts():
    # 30 of 120 called positive; 45 of 50 and 52 of 60 labelled rows are right.
    z2 = statistics.z_of(0.95) ** 2
    called, sick, alarm = (30 + z2 / 2) / (120 + z2), 46 / 52, 9 / 62
    fitting = [
        p
        for p in np.linspace(0, 1, 200_001)
        if (called - p * sick - (1 - p) * alarm) ** 2
        <= z2
        * (
            called * (1 - called) / (120 + z2)
            + p**2 * sick * (1 - sick) / 52
            + (1 - p) ** 2 * alarm * (1 - alarm) / 62
        )
    ]
    truth = np.arange(110) < 50
    labelled = np.concatenate([np.arange(50) < 45, np.arange(60) < 8])
    found = statistics.rogan_gladen(np.arange(120) < 30, labelled, truth)
    assert (found.low, found.high) == pytest.approx((fitting[0], fitting[-1]), abs=1e-5)


def test_prediction_powered_is_that_of_its_paper():
    # Classical form: mean of the answers plus the mean error, and the variances of the two added up.
    free, said, truth = np.arange(50) % 3 == 0, np.arange(20) % 2 == 0, np.arange(20) % 4 == 0
    found = statistics.prediction_powered(free, said, truth, tuned=False)
    gap = truth.astype(float) - said
    estimate = free.mean() + gap.mean()
    error = math.sqrt(free.var(ddof=1) / 50 + gap.var(ddof=1) / 20)
    assert found.estimate == pytest.approx(estimate, abs=EXACT)
    assert found.high == pytest.approx(estimate + statistics.z_of(0.95) * error, abs=EXACT)
    # Tuned: no other weight gives the labelled rows a narrower interval.
    generator = np.random.default_rng(2)
    free, said, truth = survey(generator, 0.3, 4000, 500)
    tuned = statistics.prediction_powered(free, said, truth)

    def width(weight: float) -> float:
        return weight**2 * free.var(ddof=1) / 4000 + (truth - weight * said).var(ddof=1) / 500

    half = (tuned.high - tuned.low) / 2 / statistics.z_of(0.95)
    assert half**2 == pytest.approx(min(width(w) for w in np.linspace(0, 1, 1001)), rel=1e-3)


def test_a_share_that_cannot_be_given_says_why():
    yes, no = [True], [False]
    for found in (
        statistics.prevalence_naive([]),
        statistics.rogan_gladen([], yes + no, yes + no),
        statistics.rogan_gladen(yes, yes, yes),
        statistics.rogan_gladen(yes, no + yes, yes + no),
        statistics.prediction_powered(yes, [], []),
        statistics.prediction_powered([], yes, yes),
    ):
        told = plain(found)
        assert told["estimate"] is None and told["low"] is None and told["reason"]
    few = statistics.rogan_gladen(yes * 5 + no * 5, yes * 2 + no * 2, yes * 2 + no * 2)
    assert few.estimate == 0.5 and (few.low is None) == bool(few.reason)
    one = statistics.prediction_powered([0.2, 0.4], [0.5], yes)
    assert one.low is None and one.reason == "One row has no interval."
    alike = statistics.prediction_powered(no * 100, no * 30, no * 30)
    assert (alike.low, alike.high) == (0.0, statistics.wilson(0, 30).high) and alike.reason
