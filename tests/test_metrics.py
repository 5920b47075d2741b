"""Scores of texts equal the reference's and the packages it used; scores of labels equal scikit-learn's."""

from __future__ import annotations

import json
import math
import random
import sys
import tracemalloc
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_core import metrics
from glm_core.errors import GLMError
from tests.conftest import GOLDEN, REPOSITORY

PAIRS = json.loads((GOLDEN / "metrics" / "metrics.json").read_text(encoding="utf-8"))
SCORED = [pair for pair in PAIRS["pairs"] if "scores" in pair]
# Words, marks that end a sentence, quotes, dots and white space: what the reference cuts texts at.
PARTS = ("天气", "很", "好", "不好", "a", "the", "7", "。", "！", "？", "?", "”", "’", "，", "…", "......", "\n", " ", "\u3000", "👋")  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), max_size=24).map("".join) | st.text(max_size=30)
EXACT = 1e-9


def reference_rouge(prediction: str, reference: str) -> dict[str, float]:
    """rouge_chinese called as the reference does, 0 to 1."""
    from rouge_chinese import Rouge

    words = [" ".join(metrics.segment(text)) for text in (prediction, reference)]
    return {name: found["f"] for name, found in Rouge().get_scores(*words)[0].items()}


def words_of(text: str) -> list[str]:
    return metrics.rouge_words(" ".join(metrics.segment(text)))


def slow_lcs(a: Any, b: Any) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    return row[-1]


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("pair", SCORED, ids=lambda pair: pair["prediction"][:12])
def test_a_pair_scores_what_the_reference_printed(pair):
    assert metrics.segment(pair["prediction"]) == pair["jieba_prediction"]
    assert metrics.score_text(pair["prediction"], pair["reference"]) == pair["scores"]
    assert metrics.bleu(pair["prediction"], pair["reference"]) == pair["bleu4_raw"]
    raw = metrics.rouge(words_of(pair["prediction"]), words_of(pair["reference"]))
    assert raw == tuple(pair["rouge_raw"][name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l"))


def test_the_mean_is_that_of_the_reference():
    found = metrics.texts([pair["prediction"] for pair in SCORED], [pair["reference"] for pair in SCORED])
    assert found.n == PAIRS["n_averaged"] and found.n_empty == found.n_no_reference == 0
    assert found.scores == PAIRS["averaged_over_pairs_that_do_not_raise"]


@settings(max_examples=1000, deadline=None)
@given(TEXTS, TEXTS)
def test_any_pair_scores_what_rouge_chinese_and_nltk_give(prediction, reference):
    if not prediction.strip() or not reference.strip():
        found = metrics.score_text(prediction, reference)
        assert found is None if not reference.strip() else set(found.values()) == {0.0}
        with pytest.raises(ValueError, match="is empty"):
            reference_rouge(prediction, reference)
        return
    ours = metrics.rouge(words_of(prediction), words_of(reference))
    theirs = reference_rouge(prediction, reference)
    assert ours == (theirs["rouge-1"], theirs["rouge-2"], theirs["rouge-l"])
    bleu = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is only compared with")
    smooth = bleu.SmoothingFunction().method3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = bleu.sentence_bleu([list(reference)], list(prediction), smoothing_function=smooth)
    assert metrics.bleu(prediction, reference) == expected


def test_long_texts_score_what_rouge_chinese_gives():
    generator = random.Random(4)
    for words in (90, 600):
        vocabulary = [f"词{i}" for i in range(words // 6)] + ["。", "，", "？”"]
        first, second = (generator.choices(vocabulary, k=words) for _ in range(2))
        second[words // 3 :] = first[words // 3 : -words // 9]
        from rouge_chinese import Rouge

        joined = [" ".join(text) for text in (first, second)]
        theirs = Rouge().get_scores(*joined)[0]
        ours = metrics.rouge(*map(metrics.rouge_words, joined))
        assert ours == tuple(theirs[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l"))
        assert 0.1 < ours[2] < 0.99


@settings(max_examples=500, deadline=None)
@given(st.text("abcd", max_size=80), st.text("abcde", max_size=80))
def test_the_longest_common_subsequence_is_that_of_the_plain_table(a, b):
    assert metrics.longest_common(a, b) == slow_lcs(a, b)


def test_two_texts_of_5000_characters_need_little_memory():
    generator = random.Random(5)
    characters = [chr(0x4E00 + generator.randrange(3000)) for _ in range(700)]
    first, second = ("".join(generator.choices(characters, k=5000)) for _ in range(2))
    words = [list(first), list(second)]  # as many words as there can be
    metrics.score_text("好", "好")
    tracemalloc.start()
    metrics.rouge(*words)
    metrics.score_text(first, second)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.parametrize("blank", ["", " ", "\n", "\u3000", None])
def test_a_blank_prediction_scores_0_and_is_counted(blank):
    found = metrics.texts([blank, "今天天气很好"], ["今天", "今天天气很好"], metrics.OF_ROWS)
    assert (found.n, found.n_empty, found.n_no_reference) == (2, 1, 0)
    assert set(found.scores.values()) == {50.0}
    assert found.rows["rouge-l"] == (0.0, 100.0)


def test_a_row_without_a_reference_is_left_out_and_counted():
    found = metrics.texts(["今天天气很好", "好"], ["今天天气很好", " "], ("rouge-1", "corpus-bleu"))
    assert (found.n, found.n_no_reference) == (1, 1)
    assert found.rows["rouge-1"] == (100.0, None) and found.scores["rouge-1"] == 100.0


def test_no_rows_give_no_number_but_the_reason():
    every = (*metrics.OF_ROWS, *metrics.OF_FILES)
    for found in (metrics.texts([], [], every), metrics.texts(["好"], [""], every)):
        assert set(found.scores.values()) == {None}
        assert set(found.reasons.values()) == {"No row has a reference."} and set(found.reasons) == set(every)
        json.dumps(found.to_json(), allow_nan=False)


def test_files_of_different_lengths_are_refused():
    with pytest.raises(GLMError, match="2 predictions and 1 correct answers"):
        metrics.texts(["a", "b"], ["a"])


def test_character_rouge_counts_repeated_characters():
    # 重复 twice of five times: 2 characters common of 10 and 2; pairs 重复 once of 9 and 1.
    found = metrics.character_rouge("重复重复重复重复重复", "重 复")
    assert found == (2 * 2 / 12, 2 * 1 / 10, 2 * 2 / 12)
    assert metrics.character_rouge("今天天气很好", "今天天气很好") == (1.0, 1.0, 1.0)
    assert metrics.character_rouge("好", "好") == (1.0, 0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.text("天气好 a", max_size=30), st.text("天气好 ab", max_size=30))
def test_character_rouge_is_that_of_plain_counting(prediction, reference):
    def f1(both: int, ours: int, theirs: int) -> float:
        if not both:
            return 0.0
        precision, recall = Fraction(both, ours), Fraction(both, theirs)
        return float(2 * precision * recall / (precision + recall))

    a, b = prediction.replace(" ", ""), reference.replace(" ", "")
    expected = []
    for n in (1, 2):
        ours, theirs = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in (a, b))
        both = sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))
        expected.append(f1(both, len(ours), len(theirs)))
    expected.append(f1(slow_lcs(a, b), len(a), len(b)))
    assert metrics.character_rouge(prediction, reference) == pytest.approx(expected, abs=EXACT)


def test_scores_of_files_are_those_of_their_formulas():
    predictions, references = ["今天天气很好", "好 好 好"], ["今天天气不好", "好"]
    found = metrics.texts(
        predictions, references, ("exact-match", "length-ratio", "distinct-1", "distinct-2")
    )
    assert found.scores["exact-match"] == 0.0
    assert found.scores["length-ratio"] == 11 / 7
    # 今天天气 | 很 | 好, 好 | 好 | 好: 3 of 6 words, and of 4 pairs 今天天气 很, 很 好, 好 好
    assert found.scores["distinct-1"] == 3 / 6 and found.scores["distinct-2"] == 3 / 4
    assert metrics.score_text(" yes\n", "yes", ("exact-match",)) == {"exact-match": 100.0}
    one = metrics.texts(["好"], ["好"], ("distinct-2",))
    assert one.scores["distinct-2"] is None and one.reasons["distinct-2"] == "No prediction has 2 words."


def test_corpus_bleu_adds_counts_over_rows_and_takes_chinese_characters_apart():
    pytest.importorskip("sacrebleu", reason="an optional package")
    predictions, references = ["今天天气很好", "我们去公园吧"], ["今天天气不好", "我们去公园玩吧"]
    # Matches of 1 to 4 characters in both rows together: 11 of 12, 7 of 10, 5 of 8, 3 of 6; lengths 12 and 13.
    shares = (11 / 12, 7 / 10, 5 / 8, 3 / 6)
    expected = math.exp(1 - 13 / 12) * math.prod(shares) ** 0.25 * 100
    assert metrics.corpus_bleu(predictions, references) == pytest.approx(expected, abs=EXACT)
    assert metrics.chrf(references, references) == pytest.approx(100.0)
    assert 0 < metrics.chrf(predictions, references) < 100


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(GLMError) as caught:
        metrics.corpus_bleu(["a"], ["a"])
    assert caught.value.message == "Corpus BLEU needs the package sacrebleu, which is not installed."
    assert caught.value.todo == "Run: pip install sacrebleu"


def test_every_score_has_its_formula():
    texts = {*metrics.OF_ROWS, *metrics.OF_FILES}
    labels = set(metrics.classification(["a"], ["a"], ["a", "b"]).scores)
    chances = set(metrics.probabilities(["a"], [[1.0, 0.0]], ["a", "b"]).scores)
    assert texts | labels | chances | {"precision", "recall", "f1"} == set(metrics.FORMULAS)


def test_both_modules_start_without_the_packages_they_may_use():
    import subprocess

    absent = (
        "scipy",
        "sklearn",
        "statsmodels",
        "sacrebleu",
        "jieba",
        "rouge_chinese",
        "nltk",
        "pandas",
        "torch",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); "
        "from glm_core import metrics, statistics; "
        "print(statistics.wilson(9, 10).low, metrics.bleu('好', '好'), "
        "metrics.classification(['a'], ['b'], ['a', 'b']).n)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ labels


def answers(seed: int, labels: tuple[str, ...], n: int = 300) -> tuple[list[str], list[str]]:
    """Correct labels, and answers of which three of five are right and some are no label."""
    generator = random.Random(seed)
    truth = generator.choices(labels, weights=range(1, len(labels) + 1), k=n)
    wrong = generator.choices((*labels, "不知道"), k=n)
    return truth, [t if generator.random() < 0.6 else w for t, w in zip(truth, wrong, strict=True)]


@pytest.mark.parametrize("labels", [("正常", "垃圾"), ("1", "10", "2"), tuple("abcdefghijkl")], ids=len)
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_labels_are_those_of_scikit_learn(labels, seed):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is only compared with")
    truth, predicted = answers(seed, labels)
    found = metrics.classification(truth, predicted, labels)
    for average in ("macro", "weighted"):
        theirs = sk.precision_recall_fscore_support(
            truth, predicted, labels=labels, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), theirs[:3], strict=True):
            assert found.scores[f"{average}-{name}"] == pytest.approx(value, abs=EXACT)
    single = sk.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    for one, *theirs in zip(found.by_label, *single, strict=True):
        assert (one.precision, one.recall, one.f1, one.support) == pytest.approx(tuple(theirs), abs=EXACT)
    assert found.scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted), abs=EXACT)
    assert found.scores["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, predicted), abs=EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers that are no correct label
        balanced = sk.balanced_accuracy_score(truth, predicted)
    assert found.scores["balanced-accuracy"] == pytest.approx(balanced, abs=EXACT)
    matrix = sk.confusion_matrix(truth, predicted, labels=[*labels, "不知道"])
    assert np.array_equal(np.array(found.confusion), matrix[:-1])


def test_an_answer_outside_the_labels_is_wrong_and_has_its_own_column():
    found = metrics.classification(["a", "a", "b", "b"], ["a", None, "B", "b"], ["a", "b"])
    assert found.confusion == ((1, 0, 1), (0, 1, 1))
    assert found.n_outside == 2 and dict(found.outside) == {None: 1, "B": 1}
    assert found.scores["accuracy"] == 0.5
    assert found.by_label[0].precision == 1.0 and found.by_label[0].recall == 0.5
    json.dumps(found.to_json(), allow_nan=False)


def test_a_correct_label_outside_the_labels_is_refused_with_its_count():
    with pytest.raises(GLMError, match=r"2 correct answers are not among the labels: 'spam' \(2\)"):
        metrics.classification(["spam", "a", "spam"], ["a", "a", "a"], ["a", "b"])


def test_a_label_that_no_row_has_or_was_given_changes_no_mean():
    truth, predicted = answers(7, ("a", "b"))
    few, more = (metrics.classification(truth, predicted, labels) for labels in ("ab", "abc"))
    assert few.scores == more.scores
    unused = more.by_label[2]
    assert (unused.support, unused.precision, unused.recall, unused.f1) == (0, None, None, None)


def test_what_cannot_be_divided_is_none_with_a_reason():
    nothing = metrics.classification([], [], ["a", "b"])
    assert set(nothing.scores.values()) == {None} and set(nothing.reasons) == set(nothing.scores)
    same = metrics.classification(["a", "a"], ["a", "a"], ["a", "b"])
    assert same.scores["accuracy"] == 1.0 and same.scores["mcc"] is None and "mcc" in same.reasons
    never = metrics.classification(["a", "b"], ["a", "a"], ["a", "b"])
    assert never.by_label[1].precision is None and never.by_label[1].f1 == 0.0
    assert never.scores["macro-precision"] == 0.25


# ------------------------------------------------------------------------------------------------ probabilities


def chances(
    seed: int, labels: int, n: int = 200, digits: int = 9
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Correct labels and probabilities that know something of them, rounded so that there may be ties."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, labels, n)
    scores = generator.normal(size=(n, labels)) + 1.2 * np.eye(labels)[truth]
    given = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    given = np.round(given, digits)
    given[:, 0] += 1 - given.sum(axis=1)
    names = tuple("abcdefgh"[:labels])
    return [names[i] for i in truth], np.clip(given, 0, 1), names


@pytest.mark.parametrize("digits", [9, 1], ids=["distinct", "tied"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_two_probabilities_are_those_of_scikit_learn(seed, digits):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is only compared with")
    truth, given_, labels = chances(seed, 2, digits=digits)
    hit = np.array(truth) == "b"
    found = metrics.probabilities(truth, given_, labels, positive="b").scores
    assert found["roc-auc"] == pytest.approx(sk.roc_auc_score(hit, given_[:, 1]), abs=EXACT)
    assert found["pr-auc"] == pytest.approx(sk.average_precision_score(hit, given_[:, 1]), abs=EXACT)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(hit, given_[:, 1]), abs=EXACT)
    assert found["log-loss"] == pytest.approx(sk.log_loss(truth, given_, labels=labels), abs=EXACT)
    false, true, thresholds = sk.roc_curve(hit, given_[:, 1], drop_intermediate=False)
    curve = metrics.roc(hit, given_[:, 1])
    assert curve.x == pytest.approx(false) and curve.y == pytest.approx(true)
    assert curve.thresholds[1:] == pytest.approx(thresholds[1:]) and curve.thresholds[0] is None
    precision, recall, thresholds = sk.precision_recall_curve(hit, given_[:, 1])
    curve = metrics.precision_recall(hit, given_[:, 1])
    assert curve.y == pytest.approx(precision[::-1]) and curve.x == pytest.approx(recall[::-1])
    assert curve.thresholds[1:] == pytest.approx(thresholds[::-1])


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_several_probabilities_are_those_of_scikit_learn(seed):
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is only compared with")
    truth, given_, labels = chances(seed, 5)
    found = metrics.probabilities(truth, given_, labels).scores
    hit = np.array([[one == label for label in labels] for one in truth])
    expected = sk.roc_auc_score(truth, given_, multi_class="ovr", average="macro", labels=labels)
    assert found["roc-auc"] == pytest.approx(expected, abs=EXACT)
    assert found["pr-auc"] == pytest.approx(sk.average_precision_score(hit, given_), abs=EXACT)
    assert found["brier"] == pytest.approx(((given_ - hit) ** 2).sum(axis=1).mean(), abs=EXACT)
    assert found["log-loss"] == pytest.approx(sk.log_loss(truth, given_, labels=labels), abs=EXACT)


def test_calibration_error_is_that_of_a_worked_example():
    # Bins of one fifteenth: 0.95 and 0.97 share the last, 0.62 and 0.68 have one each, 0.8 exactly ends its bin.
    sure, right = [0.95, 0.97, 0.62, 0.68, 0.8, 0.79], [1, 0, 1, 1, 1, 0]
    bins, error = metrics.reliability(sure, right)
    expected = (2 * abs(0.5 - 0.96) + abs(1 - 0.62) + abs(1 - 0.68) + 2 * abs(0.5 - 0.795)) / 6
    assert error == pytest.approx(expected, abs=EXACT)
    assert [one.n for one in bins if one.n] == [1, 1, 2, 2] and len(bins) == 15
    bins, error = metrics.reliability(sure, right, bins=3, equal_mass=True)
    assert [one.n for one in bins] == [2, 2, 2]
    expected = (2 * abs(1 - 0.65) + 2 * abs(0.5 - 0.795) + 2 * abs(0.5 - 0.96)) / 6
    assert error == pytest.approx(expected, abs=EXACT)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.9, 1.0]), st.booleans()), max_size=40), st.randoms()
)
def test_bins_hold_every_row_once_whatever_the_order(rows, generator):
    shuffled = rows[:]
    generator.shuffle(shuffled)
    for equal in (False, True):
        first, second = (
            metrics.reliability([s for s, _ in one], [r for _, r in one], 7, equal)
            for one in (rows, shuffled)
        )
        assert first == second
        assert sum(one.n for one in first[0]) == len(rows)
        assert (first[1] is None) == (not rows)


def test_a_label_that_no_row_has_is_left_out_of_the_mean_by_name():
    found = metrics.probabilities(["a", "b", "a"], [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]], "abc")
    assert found.roc_auc["c"] is None and found.scores["roc-auc"] == pytest.approx(0.5)
    assert found.reasons["roc-auc"].endswith("left out: c.")
    one = metrics.probabilities(["a"], [[0.8, 0.2]], "ab", positive="a")
    assert one.scores["roc-auc"] is None and "roc-auc" in one.reasons
    assert one.scores["log-loss"] == pytest.approx(-math.log(0.8))
    json.dumps(one.to_json(), allow_nan=False)
    nothing = metrics.probabilities([], [], "ab")
    assert set(nothing.scores.values()) == {None} and set(nothing.reasons) == set(nothing.scores)


def test_probabilities_that_are_none_are_refused_with_their_row():
    for values in ([0.7, 0.7], [1.2, -0.2], [math.nan, 1.0]):
        with pytest.raises(GLMError, match="Row 2 holds no probabilities"):
            metrics.probabilities(["a", "b"], [[0.5, 0.5], values], "ab")
    with pytest.raises(GLMError, match="There are 3 probabilities per row and 2 labels"):
        metrics.probabilities(["a"], [[0.2, 0.3, 0.5]], "ab")


def test_a_curve_is_thinned_to_its_ends_and_keeps_its_area():
    generator = np.random.default_rng(1)
    curve = metrics.roc(generator.random(5000) < 0.3, generator.random(5000))
    thin = curve.thinned(50)
    assert len(thin.x) == 50 and thin.area == curve.area
    assert (thin.x[0], thin.y[0], thin.x[-1], thin.y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert metrics.roc([True], [0.5]) is None and metrics.precision_recall([], []) is None
