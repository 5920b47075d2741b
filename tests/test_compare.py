"""Comparisons: right about equal models as often as they say, refused where nothing can be compared, same rows only."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from glm_core import cli, compare, evaluate, jobs, statistics
from glm_core.errors import GLMError
from glm_core.jobs import JobStore
from glm_core.report_html import comparison_page
from glm_core.settings import Settings

TIMES = 2000  # comparisons of a simulation
NEAR = 0.015


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "workspace" / "workbench.db")


@pytest.fixture
def run(store, tmp_path):
    """A run of predictions, each beside its question and reference."""
    made = []

    def make(rows, head=("question", "label", "prediction"), title="", **options):
        path = tmp_path / f"{len(made)}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])
        made.append(evaluate.import_predictions(store, path, title=title or f"run {len(made)}", **options))
        return made[-1]

    return make


def answered(wrong, n=40):
    """Rows of label 0 and 1 in turn, those numbered in `wrong` answered with the other one."""
    return [(f"q{i}", str(i % 2), str((i + (i + 1 in wrong)) % 2)) for i in range(n)]


def drawn(generator, n, only_a, only_b):
    """Right and wrong answers of two models, with these chances that only one of them is right."""
    u = generator.random(n)
    return u < 0.5 + only_a, (u < 0.5) | (u >= 1 - only_b)


def expected(n, only_a, only_b):
    """The test of n rows that came out exactly as the chances say."""
    gain = only_b - only_a
    return compare.Tested(
        gain, 0.0, 0.0, 1.0, n, round(n * (only_a + only_b)), round(n * only_a), round(n * only_b),
        (only_a + only_b - gain**2) ** 0.5, "exact McNemar", True,
    )  # fmt: skip


# ---- honesty


def test_equal_models_are_called_different_in_5_percent_and_intervals_hold_95():
    generator = np.random.default_rng(11)
    better = covered = 0
    for _ in range(TIMES):
        tested = compare.paired_shares(*drawn(generator, 3000, 0.2, 0.2))
        better += (
            compare.judge(tested, "a", "b", metric="accuracy", delta=0, suggest=False).outcome == "better"
        )
        covered += tested.low <= 0 <= tested.high
    assert better / TIMES == pytest.approx(0.05, abs=NEAR)
    assert covered / TIMES == pytest.approx(0.95, abs=NEAR)


def test_equal_texts_are_called_different_in_5_percent_and_intervals_hold_95():
    generator = np.random.default_rng(12)
    better = covered = 0
    for _ in range(TIMES):
        rows = generator.gamma(2.0, 10.0, 100)
        tested = compare.paired_scores(rows + generator.normal(0, 8, 100), rows + generator.normal(0, 8, 100))
        better += (
            compare.judge(tested, "a", "b", metric="rouge-l", unit=100, delta=0, suggest=False).outcome
            == "better"
        )
        covered += tested.low <= 0 <= tested.high
    assert better / TIMES == pytest.approx(0.05, abs=NEAR)
    assert covered / TIMES == pytest.approx(0.95, abs=NEAR)


def test_with_few_rows_equal_models_are_not_called_different_more_often():
    generator = np.random.default_rng(1)
    better = 0
    for _ in range(TIMES):
        tested = compare.paired_shares(*drawn(generator, 60, 0.1, 0.1))
        better += (
            compare.judge(tested, "a", "b", metric="accuracy", delta=0, suggest=False).outcome == "better"
        )
    assert better / TIMES <= 0.05 + NEAR


@pytest.mark.parametrize(("only_a", "only_b"), [(0.05, 0.09), (0.02, 0.05), (0.0, 0.03), (0.10, 0.16)])
def test_the_suggested_number_of_rows_finds_the_difference_in_80_percent(only_a, only_b):
    generator = np.random.default_rng(13)
    rows = compare.rows_to_differ(expected(100_000, only_a, only_b))
    found = 0
    for _ in range(1000):
        tested = compare.paired_shares(*drawn(generator, rows, only_a, only_b))
        found += compare.judge(tested, "a", "b", metric="accuracy", delta=0, suggest=False).better == "b"
    assert found / 1000 == pytest.approx(0.8, abs=0.05)


def test_the_suggested_number_of_texts_finds_the_difference_in_80_percent():
    generator = np.random.default_rng(14)
    tested = replace(expected(100, 0.1, 0.1), difference=2.0, spread=11.3, test="paired bootstrap")
    rows = compare.rows_to_differ(tested)
    found = 0
    for _ in range(600):
        gain = generator.normal(2.0, 11.3, rows)
        verdict = compare.judge(
            compare.paired_scores(np.zeros(rows), gain),
            "a",
            "b",
            metric="rouge-l",
            unit=100,
            delta=0,
            suggest=False,
        )
        found += verdict.better == "b"
    assert found / 600 == pytest.approx(0.8, abs=0.05)


def test_the_suggested_number_of_rows_shows_equal_models_to_be_the_same_in_80_percent():
    generator = np.random.default_rng(15)
    rows = compare.rows_to_equal(expected(1000, 0.06, 0.06), 0.01)
    same = 0
    for _ in range(500):
        tested = compare.paired_shares(*drawn(generator, rows, 0.06, 0.06))
        same += (
            compare.judge(tested, "a", "b", metric="accuracy", delta=0.01, suggest=False).outcome == "same"
        )
    assert same / 500 == pytest.approx(0.8, abs=0.05)


def test_several_comparisons_together_keep_5_percent():
    generator = np.random.default_rng(16)
    wrong = 0
    for _ in range(1000):
        u = generator.random((3, 3000)) < 0.7
        tested = [compare.paired_shares(u[i], u[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        raised = statistics.holm([one.p_value for one in tested])
        wrong += any(
            compare.judge(
                one, "a", "b", metric="accuracy", delta=0, p_value=p, comparisons=3, suggest=False
            ).outcome
            == "better"
            for one, p in zip(tested, raised, strict=True)
        )
    assert wrong / 1000 <= 0.065


def test_the_power_of_the_test_is_that_of_simulated_tests():
    generator = np.random.default_rng(17)
    found = sum(
        (tested := compare.paired_shares(*drawn(generator, 300, 0.04, 0.10))).p_value < 0.05
        and tested.difference > 0
        for _ in range(2000)
    )
    assert compare.mcnemar_power(300, 0.14, 0.10 / 0.14) == pytest.approx(found / 2000, abs=0.03)


def test_many_texts_are_tested_by_the_normal_interval_which_is_that_of_the_bootstrap(monkeypatch):
    generator = np.random.default_rng(18)
    a = generator.gamma(2.0, 10.0, 21_000)
    b = a + generator.normal(0.1, 8, 21_000)
    many = compare.paired_scores(a, b)
    monkeypatch.setattr(compare, "NORMAL_ROWS", 10**9)
    drawn_ = compare.paired_scores(a, b)
    assert (many.test, drawn_.test) == ("paired z", "paired bootstrap")
    assert many.difference == drawn_.difference
    assert (many.low, many.high, many.p_value) == pytest.approx(
        (drawn_.low, drawn_.high, drawn_.p_value), abs=0.02
    )


# ---- verdicts


def test_under_six_different_rows_no_test_can_decide(store, run):
    a, b = run(answered({1, 2, 3, 4, 5})), run(answered(set()))
    found = compare.compare(store, a.id, b.id)
    assert found.verdict.outcome == "not decisive" and "no test can decide" in found.verdict.text
    assert found.flips.fixed == (1, 2, 3, 4, 5) and found.flips.broken == ()
    assert found.metrics[0].p_value is None and "no test can decide" in found.metrics[0].reason
    six = compare.compare(store, run(answered({1, 2, 3, 4, 5, 6})).id, b.id)
    assert six.verdict.outcome == "better" and six.verdict.p_value == 2 / 64


def test_five_different_texts_do_not_decide_either(store, run):
    rows = [(f"q{i}", f"一段不同的话 {i}", "" if i < 5 else f"一段不同的话 {i}") for i in range(30)]
    full = [(asked, told, told) for asked, told, _ in rows]
    found = compare.compare(store, run(rows, kind="text").id, run(full, kind="text").id)
    assert found.verdict.outcome == "not decisive" and len(found.flips.fixed) == 5


def test_the_better_run_is_named_with_its_interval(store, run):
    a, b = run(answered(set(range(1, 16))), title="base"), run(answered({3, 40}), title="tuned")
    found = compare.compare(store, a.id, b.id)
    verdict = found.verdict
    assert (verdict.outcome, verdict.better) == ("better", "tuned")
    assert verdict.difference == pytest.approx(13 / 40)
    assert verdict.low < verdict.difference < verdict.high
    assert "tuned is better by 32.5 points" in verdict.text
    assert len(found.flips.fixed) == 14 and found.flips.broken == (40,) and found.flips.both_wrong == (3,)
    assert found.agreement == (24, 1, 14, 1) and len(found.flips.both_right) == 24
    other = compare.compare(store, b.id, a.id)
    assert other.verdict.better == "tuned" and other.verdict.difference == -verdict.difference
    assert (
        other.verdict.p_value
        == verdict.p_value
        == statistics.mcnemar([True] * 14 + [False], [False] * 14 + [True]).p_value
    )


def test_equal_answers_are_the_same_and_a_small_difference_within_delta(store, run):
    a, b = run(answered({2, 9})), run(answered({2, 9}))
    same = compare.compare(store, a.id, b.id).verdict
    assert same.outcome == "same" and "all 40 rows" in same.text
    near = compare.compare(store, a.id, run(answered({2})).id, delta=0.2).verdict
    assert near.outcome == "same" and "within 20 points" in near.text


def test_an_open_question_says_how_many_rows_would_settle_it(store, run):
    a, b = run(answered(set(range(1, 9)))), run(answered(set(range(6, 10))))
    verdict = compare.compare(store, a.id, b.id).verdict
    assert verdict.outcome == "not decisive" and verdict.rows_needed == min(
        one for one in (verdict.to_differ, verdict.to_equal) if one
    )
    shown = re.search(r"About ([\d,]+) rows would", verdict.text)
    assert verdict.rows_needed <= int(shown[1].replace(",", "")) <= 1.1 * verdict.rows_needed + 1


def test_three_runs_share_one_level(store, run):
    ids = [run(answered(set(range(1, k)))).id for k in (1, 8, 9)]
    found = compare.compare_all(store, ids)
    alone = [compare.compare(store, one.a, one.b).verdict.p_value for one in found]
    assert [one.verdict.p_value for one in found] == pytest.approx(statistics.holm(alone))
    assert all(one.verdict.comparisons == 3 for one in found) and "Holm" in found[0].verdict.text
    assert [(one.a, one.b) for one in compare.compare_all(store, ids, baseline=ids[1])] == [
        (ids[1], ids[0]), (ids[1], ids[2])
    ]  # fmt: skip


def test_label_scores_have_paired_intervals(store, run):
    a, b = run(answered(set(range(1, 16)))), run(answered({3, 40}))
    rows = {row.metric: row for row in compare.compare(store, a.id, b.id).metrics}
    assert set(rows) == {"accuracy", "macro-f1", "weighted-f1", "balanced-accuracy", "mcc"}
    for name, row in rows.items():
        assert row.difference == pytest.approx(row.b.estimate - row.a.estimate)
        assert row.low < row.difference < row.high and row.p_value < 0.05 and row.formula
        assert row.a.estimate == pytest.approx(evaluate.scores(store, a.id).values[name].estimate)


# ---- which rows


def test_partly_overlapping_rows_are_compared_on_what_both_have(store, run):
    rows = answered({5, 6, 35})
    a, b = run(rows[:30]), run([*reversed(rows[10:]), ("new", "0", "0")])
    found = compare.compare(store, a.id, b.id)
    assert (found.rows_a, found.rows_b, found.n) == (30, 31, 20)
    assert found.notes == ("Compared on the 20 rows that both have; A has 30 and B 31.",)
    assert found.verdict.outcome == "same"


def test_equal_questions_are_matched_one_to_one(store, run):
    a = run([("q", "0", "0"), ("q", "0", "1"), ("r", "1", "1")] * 4)
    b = run([("q", "0", "0"), ("r", "1", "1")] * 4)
    assert compare.compare(store, a.id, b.id).n == 8


def test_predictions_without_questions_are_matched_by_their_place(store, run):
    head = ("labels", "predict")
    rows = [(label, told) for _, label, told in answered({2})]
    a = run(rows, head)
    assert compare.compare(store, a.id, run([(one, one) for one, _ in rows], head).id).n == 40
    with pytest.raises(GLMError, match="row 2 is to be '1' in one and '0' in the other"):
        compare.compare(store, a.id, run([rows[0], ("0", "0"), *rows[2:]], head).id)
    with pytest.raises(GLMError, match="not known which rows are the same"):
        compare.compare(store, a.id, run(rows[:30], head).id)


def test_other_files_kinds_labels_and_prompts_are_refused_with_the_reason(store, run):
    a = run(answered({1}))
    with pytest.raises(GLMError, match="no row in common"):
        compare.compare(store, a.id, run([(f"other {i}", "0", "0") for i in range(9)], labels=["0", "1"]).id)
    with pytest.raises(GLMError, match="label answers and the other text"):
        compare.compare(store, a.id, run(answered({1}), kind="text").id)
    with pytest.raises(GLMError, match="The labels of the two runs differ"):
        compare.compare(store, a.id, run(answered({1}), labels=["0", "1", "2"]).id)
    with pytest.raises(GLMError, match="compared with itself"):
        compare.compare(store, a.id, a.id)
    with pytest.raises(GLMError, match="'bleu-4' cannot decide"):
        compare.compare(store, a.id, run(answered({1})).id, metric="bleu-4")


def test_runs_that_were_asked_differently_are_refused(store, run):
    a, b = run(answered({1})), run(answered({2}))
    asked = [replace(one, task=replace(one.task, method="generate", template=template)) for one, template in ((a, "{question}"), (b, "Say: {question}"))]  # fmt: skip
    with pytest.raises(GLMError, match="asked differently: the template"):
        compare._checked(*asked)
    compare._checked(asked[0], replace(asked[1], task=replace(asked[0].task, precision="int4")))


def test_only_what_differs_is_listed(store, run):
    a, b = run(answered({1})), run(answered({2}), title="b")
    found = compare.compare(store, a.id, b.id)
    assert set(found.settings) == {"input_name", "input_sha256"}


# ---- the shell and the page


def test_a_comparison_from_the_shell_and_its_page_need_nothing_from_elsewhere(tmp_path, capsys):
    own = jobs.store(Settings.read())
    ids = []
    for name, wrong in (("base", set(range(1, 16))), ("tuned", {3, 40})):
        path = tmp_path / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = [(f"<b>{asked}</b>", label, told) for asked, label, told in answered(wrong)]
            csv.writer(file).writerows([("question", "label", "prediction"), *rows])
        ids.append(evaluate.import_predictions(own, path, title=name).id)
    page = tmp_path / "report.html"
    assert cli.main(["compare", "base", "tuned", "--html", str(page)]) == 0
    assert "tuned is better by 32.5 points" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "tuned is better by 32.5 points" in html and "default-src 'none'" in html
    assert "&lt;b&gt;q0&lt;/b&gt;" in html and "<b>q0" not in html
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", html)
    assert cli.main(["compare", *ids, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["better"] == "tuned" and found["flips"]["broken"] == [40]
    assert "places" not in found["flips"]


def test_a_page_of_three_runs_shows_every_pair(store, run):
    found = compare.compare_all(store, [run(answered(set(range(1, k)))).id for k in (1, 8, 20)])
    html = comparison_page(store, found)
    assert html.count('class="verdict"') == 3 and html.count("<svg") == 3
