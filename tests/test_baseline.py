"""The plain classifier beside a fine-tuned model: what it learns, that it repeats itself, and what it refuses."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from glm_core.errors import GLMError
from glm_core.finetune import baseline
from glm_core.settings import DATA


def comments(part, limit):
    with (DATA / "comments" / f"{part}.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    return [row["text"] for row in rows], [row["label"] for row in rows]


@pytest.fixture(scope="module")
def spam():
    texts, labels = comments("train", 1500)
    return texts, labels, *comments("dev", 400)


def test_comments_are_told_apart_far_better_than_by_their_commonest_label(spam):
    texts, labels, test, truth = spam
    found = baseline.fit_predict(texts, labels, test)
    right = np.mean([a == b for a, b in zip(found.predicted, truth, strict=True)])
    commonest = max(truth.count(label) for label in set(truth)) / len(truth)
    assert commonest < 0.6 and right > 0.8
    assert found.labels == ("normal", "spam")
    assert found.probabilities.shape == (400, 2)
    assert np.allclose(found.probabilities.sum(axis=1), 1)
    assert [found.labels[i] for i in found.probabilities.argmax(axis=1)] == list(found.predicted)
    assert found.description.startswith("TF-IDF of ") and "cross-validation on 1,500" in found.description


def test_the_same_rows_give_the_same_numbers(spam):
    texts, labels, test, _ = spam
    first, second = (baseline.fit_predict(texts[:400], labels[:400], test[:50]) for _ in range(2))
    assert np.array_equal(first.probabilities, second.probabilities)
    assert first.description == second.description


def test_more_than_two_labels_have_probabilities_of_their_own():
    texts = [
        "红苹果很甜",
        "大红苹果",
        "苹果汁红",
        "小猫喵喵",
        "喵喵的猫",
        "一只猫叫",
        "汽车引擎",
        "引擎很响",
        "开汽车去",
    ]
    labels = ["fruit"] * 3 + ["cat"] * 3 + ["car"] * 3
    found = baseline.fit_predict(texts, labels, ["甜苹果", "猫在叫", "汽车很响"])
    assert found.predicted == ("fruit", "cat", "car")
    assert found.probabilities.shape == (3, 3)


def test_two_rows_are_enough_to_learn_from_and_the_settings_are_then_those_of_habit():
    found = baseline.fit_predict(["免费领红包", "画质不错"], ["1", "0"], ["领红包", "画质好"])
    assert found.predicted == ("1", "0")
    assert "by habit" in found.description


def test_width_and_case_make_no_difference():
    train = ["FREE CASH", "free cash now", "nice video", "Nice Video clip"]
    found = baseline.fit_predict(train, ["1", "1", "0", "0"], ["ＦＲＥＥ ＣＡＳＨ", "free cash"])
    assert np.array_equal(found.probabilities[0], found.probabilities[1])


def test_without_test_rows_nothing_is_predicted():
    found = baseline.fit_predict(["a b", "c d"], ["1", "0"], [])
    assert found.predicted == () and found.probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        ([], [], "no training rows"),
        (["a", "b"], ["x", "x"], "All 2 training rows have the label 'x'"),
        (["", ""], ["x", "y"], "no text"),
    ],
)
def test_rows_that_teach_nothing_are_refused(texts, labels, said):
    with pytest.raises(GLMError, match=said) as caught:
        baseline.fit_predict(texts, labels, ["a"])
    assert caught.value.todo
