"""Reviews: what people say is kept at once, counted as it stands, and never mixed with the model's answers."""

from __future__ import annotations

import csv
import math
import threading
import time

import numpy as np
import pytest

from glm_core import jobs, review
from glm_core.errors import GLMError
from glm_core.finetune import examples
from glm_core.jobs import JobStore
from glm_core.review import Answers, Reviews, Truth, rank, truth_numbers

LABELS = ("0", "1")
NORMAL, SPAM = LABELS
WORDS = ("正常", "垃圾")


def finished_job(store, spam, texts=None, gold=None, others=(), **task) -> jobs.Job:
    """A classification that is done, with these probabilities of the second label."""
    from glm_core import classify

    columns = ["id", "comment", *(["gold"] if gold else []), *(name for name, _ in others)]
    made = store.create("classify", "notes.csv", classify_task(columns, **task).to_json())
    rows = []
    for i in range(len(spam)):
        row = [str(i), texts[i] if texts else f"comment {i}", *([gold[i]] if gold else [])]
        rows.append((*row, *(values[i] for _, values in others)))
    store.add_rows(made.id, rows)
    store.mark_ready(made.id)
    store.claim(("classify",), "test:1:1", made.id)
    results = [
        classify.to_result(i, classify.Scored(LABELS[p > 0.5], logs(p), (1 - p, p), 0.01, reason=reason(p)))
        for i, p in enumerate(spam)
    ]
    store.save_results(made.id, results, "test:1:1")
    store.release(made.id, "test:1:1", "done")
    return store.get(made.id)


def logs(p: float) -> tuple[float, float]:
    """Scores of the two labels that give these probabilities, with 1 % outside."""
    return math.log(0.99 * (1 - p)), math.log(0.99 * p)


def reason(p: float) -> str:
    return "" if abs(p - 0.5) > 0.1 else f"The probability is {max(p, 1 - p):.2f}, below 0.60."


def classify_task(columns, **more):
    """A task that says 正常 or 垃圾 of a comment."""
    from glm_core.classify import Label, LabelTask

    labels = tuple(Label(*one) for one in zip(LABELS, WORDS, ("normal", "spam"), strict=True))
    return LabelTask(
        **{
            "checkpoint": "gone", "checkpoint_fingerprint": "0", "precision": "fp32", "device": "cpu",
            "labels": labels, "template": "垃圾还是正常？{comment}", "columns": tuple(columns),
            "input_name": "notes.csv", "input_path": "notes.csv", "positive": SPAM,
        }
        | more
    )  # fmt: skip


@pytest.fixture
def store(tmp_path) -> JobStore:
    return JobStore(tmp_path / "workbench.db")


@pytest.fixture
def reviews(store: JobStore) -> Reviews:
    return Reviews(store)


@pytest.fixture
def job(store: JobStore) -> jobs.Job:
    """Ten rows; row i is spam with probability 0.05 + i / 10."""
    return finished_job(store, [0.05 + i / 10 for i in range(10)])


def arrays(probabilities) -> Answers:
    p = np.array(probabilities, dtype=np.float64)
    n = len(p)
    return Answers(LABELS, np.arange(n), np.log(p), p, np.zeros(n), p.argmax(axis=1), ("",) * n)


# ---- the order


def test_the_smallest_margin_comes_first_and_equal_rows_keep_the_order_of_the_table():
    given = arrays([[0.9, 0.1], [0.45, 0.55], [0.1, 0.9], [0.5, 0.5]])
    assert rank(given, "uncertain").tolist() == [3, 1, 0, 2]


def test_of_equal_margins_the_larger_entropy_comes_first():
    p = np.array([[0.5, 0.4, 0.1], [0.4, 0.3, 0.3]])
    given = Answers(("a", "b", "c"), np.arange(2), np.log(p), p, np.zeros(2), p.argmax(axis=1), ("", ""))
    assert given.margin == pytest.approx([0.1, 0.1])
    assert rank(given, "uncertain").tolist() == [1, 0]


def test_disagreements_come_with_the_surest_answer_first():
    given = arrays([[0.9, 0.1], [0.45, 0.55], [0.01, 0.99], [0.2, 0.8]])
    truth = np.array([1, 0, 1, -1])
    assert rank(given, "disagree", truth).tolist() == [0, 1]


def test_an_order_by_disagreement_without_correct_labels_is_refused():
    with pytest.raises(ValueError):
        rank(arrays([[0.9, 0.1]]), "disagree")


def test_the_answers_of_a_job_come_as_arrays(store, job):
    given = review.answers(store, job.id)
    assert given.labels == LABELS
    assert given.idx.tolist() == list(range(10))
    assert given.probability[:, 1] == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert given.answer.tolist() == [0] * 5 + [1] * 5


# ---- the queue


def test_a_reviewer_is_not_shown_a_row_twice(store, reviews, job):
    ranked = rank(review.answers(store, job.id), "uncertain")
    seen = []
    while found := reviews.queue(job.id, ranked, "Ann"):
        seen.append(found[0])
        (reviews.skip if len(seen) % 3 == 0 else lambda *a: reviews.label(*a, SPAM))(job.id, found[0], "Ann")
    assert seen == ranked.tolist()
    assert reviews.queue(job.id, ranked, "Ann", limit=10, skipped=True) == ranked[2::3].tolist()


def test_a_second_reviewer_sees_all_rows_and_not_the_labels_of_the_first(reviews, job):
    for idx in range(4):
        reviews.label(job.id, idx, "Ann", SPAM)
    assert reviews.queue(job.id, range(10), "Bo", limit=3) == [0, 1, 2]
    assert reviews.latest(job.id, "Bo") == []


def test_the_position_is_that_of_the_database_not_of_a_session(store, reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM)
    assert Reviews(JobStore(store.path)).queue(job.id, range(10), "Ann") == [1]


def test_a_hundred_thousand_rows_are_ranked_and_queued(store):
    generator = np.random.default_rng(0)
    spam = generator.random(100_000)
    given = arrays(np.stack([1 - spam, spam], axis=1))
    ranked = rank(given, "uncertain")
    assert np.all(np.diff(np.abs(2 * spam - 1)[ranked]) >= -1e-12)
    job = finished_job(store, [0.5] * 3)
    reviews = Reviews(store)
    reviews.label(job.id, 1, "Ann", SPAM)
    ordered = [1, *(int(i) for i in ranked if i != 1)]
    assert reviews.queue(job.id, ordered, "Ann") == [ordered[1]]


# ---- the log


def test_undo_takes_back_the_last_entry_and_shows_its_row_again(reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM)
    reviews.skip(job.id, 1, "Ann")
    assert reviews.undo(job.id, "Ann").idx == 1
    assert reviews.queue(job.id, range(10), "Ann") == [1]
    assert reviews.undo(job.id, "Ann").idx == 0
    assert reviews.undo(job.id, "Ann") is None
    assert reviews.count(job.id) == 0


def test_undo_touches_nobody_elses_entries(reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM)
    reviews.label(job.id, 0, "Bo", NORMAL)
    reviews.undo(job.id, "Ann")
    assert [(one.reviewer, one.label) for one in reviews.latest(job.id)] == [("Bo", NORMAL)]


def test_undo_brings_back_the_label_before(reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM)
    reviews.label(job.id, 0, "Ann", NORMAL)
    reviews.undo(job.id, "Ann")
    assert [one.label for one in reviews.latest(job.id)] == [SPAM]


def test_nothing_is_ever_deleted_from_the_log(reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM, "a link")
    reviews.label(job.id, 0, "Ann", NORMAL)
    reviews.undo(job.id, "Ann")
    assert [(one["action"], one["label"], one["note"]) for one in reviews.log(job.id)] == [
        ("label", SPAM, "a link"), ("label", NORMAL, ""), ("undo", "", ""),
    ]  # fmt: skip


def test_a_key_pressed_twice_counts_once(reviews, job):
    first = reviews.label(job.id, 0, "Ann", SPAM)
    assert reviews.label(job.id, 0, "Ann", SPAM) == first
    assert len(reviews.log(job.id)) == 1


def test_two_people_at_once_lose_no_label(store, job):
    errors = []

    def work(name: str) -> None:
        try:
            mine = Reviews(JobStore(store.path))
            for idx in range(10):
                mine.label(job.id, idx, name, SPAM)
                if idx % 2:
                    mine.undo(job.id, name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert not errors
    assert Reviews(store).reviewers(job.id) == {f"p{i}": 5 for i in range(4)}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda r, j: r.label(j, 0, "Ann", "eggs"), "'eggs' is not one of the labels"),
        (lambda r, j: r.label(j, 0, "  ", SPAM), "no name"),
        (lambda r, j: r.label(j, 0, "x" * 61, SPAM), "61 characters"),
        (lambda r, j: r.label(j, 10, "Ann", SPAM), "no row 11"),
        (lambda r, j: r.skip(j, -1, "Ann"), "no row 0"),
        (lambda r, j: r.label("nowhere", 0, "Ann", SPAM), "no job 'nowhere'"),
    ],
)
def test_a_wrong_entry_is_refused_in_a_sentence(reviews, job, act, says):
    with pytest.raises(GLMError, match=says):
        act(reviews, job.id)
    assert reviews.log(job.id) == []


def test_a_job_of_another_kind_has_no_labels(store, reviews):
    made = store.create("batch", "notes.csv", {"columns": ["a"]})
    with pytest.raises(GLMError, match=r"notes\.csv is no classification"):
        reviews.label(made.id, 0, "Ann", SPAM)


# ---- agreement and corrections


def test_agreement_is_that_of_the_statistics(reviews, job):
    ann = [SPAM, SPAM, NORMAL, NORMAL, SPAM, NORMAL, SPAM, SPAM]
    bo = [SPAM, NORMAL, NORMAL, NORMAL, SPAM, NORMAL, SPAM, NORMAL]
    for idx, (a, b) in enumerate(zip(ann, bo, strict=True)):
        reviews.label(job.id, idx, "Ann", a)
        reviews.label(job.id, idx, "Bo", b)
    reviews.label(job.id, 9, "Ann", SPAM)  # seen by one alone
    found = reviews.agreement(job.id)
    assert found.n == 8
    assert found.percent.estimate == 0.75
    # observed 6/8; Ann says spam 5/8, Bo 3/8: expected 30/64; kappa = (0.75 - 30/64) / (1 - 30/64)
    assert found.kappa.value == pytest.approx((0.75 - 30 / 64) / (34 / 64))
    assert found.differing == (1, 7)


def test_one_reviewer_alone_has_no_agreement(reviews, job):
    reviews.label(job.id, 0, "Ann", SPAM)
    assert reviews.agreement(job.id) is None


def test_most_people_decide_and_of_equally_many_the_last(reviews, job):
    for who, label in (("Ann", SPAM), ("Bo", NORMAL), ("Cy", SPAM)):
        reviews.label(job.id, 0, who, label)
    reviews.label(job.id, 1, "Ann", SPAM)
    reviews.label(job.id, 1, "Bo", NORMAL, "says thanks")
    reviews.skip(job.id, 2, "Ann")
    assert [(one.idx, one.label, one.note) for one in reviews.corrections(job.id)] == [
        (0, SPAM, ""), (1, NORMAL, "says thanks"),
    ]  # fmt: skip


def test_the_models_answers_stay_what_they_are(store, reviews, job):
    before = review.answers(store, job.id)
    for idx in range(10):
        reviews.label(job.id, idx, "Ann", NORMAL)
    after = review.answers(store, job.id)
    assert after.answer.tolist() == before.answer.tolist()
    assert after.probability.tolist() == before.probability.tolist()


# ---- training data


@pytest.mark.parametrize("format", review.FORMATS)
def test_corrections_are_read_as_training_data(store, reviews, tmp_path, format):
    texts = ["=1+1 便宜", 'a "quote", a comma', "two\nlines", "  spaces  "]
    job = finished_job(store, [0.9, 0.2, 0.6, 0.4], texts=texts)
    for idx, label in enumerate((SPAM, NORMAL, NORMAL, SPAM)):
        reviews.label(job.id, idx, "Ann", label)
    reviews.export(job.id, path := tmp_path / f"made.{format}")
    found = examples.read(path)
    assert found.stops == ()
    assert [one.prompt for one in found.examples] == texts
    assert [one.response for one in found.examples] == ["垃圾", "正常", "正常", "垃圾"]


def test_every_exported_row_says_where_it_comes_from(store, reviews, tmp_path):
    job = finished_job(store, [0.9, 0.2])
    reviews.label(job.id, 0, "Ann", NORMAL, "a joke")
    reviews.label(job.id, 0, "Bo", NORMAL)
    reviews.export(job.id, path := tmp_path / "made.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["source"] == "human"
    assert row["row"] == "1"
    assert (row["model_answer"], row["agrees"]) == (SPAM, "no")
    assert float(row["model_probability"]) == pytest.approx(0.9, abs=1e-5)
    assert row["reviewers"] == f"Ann: {NORMAL}; Bo: {NORMAL}"
    assert (row["note"], row["job"]) == ("a joke", job.id)
    assert row["reviewed"].startswith(time.strftime("%Y-"))


def test_without_a_label_nothing_is_exported(reviews, job, tmp_path):
    reviews.skip(job.id, 0, "Ann")
    with pytest.raises(GLMError, match="Nobody has labelled"):
        reviews.export(job.id, tmp_path / "made.csv")
    assert not (tmp_path / "made.csv").exists()


def test_another_ending_is_refused(reviews, job, tmp_path):
    reviews.label(job.id, 0, "Ann", SPAM)
    with pytest.raises(GLMError, match=r"\.docx"):
        reviews.export(job.id, tmp_path / "made.docx")


# ---- correct labels


def test_values_mean_what_was_said_and_the_rest_is_left_out():
    truth = Truth("gold", {"1": SPAM, "1.0": SPAM, "0": NORMAL, "?": None})
    assert truth_numbers(["1", "0", "?", "1.0", "new"], truth, LABELS).tolist() == [1, 0, -1, 1, -1]


def test_the_choice_of_correct_labels_is_kept(store, reviews, job):
    truth = Truth("id", {"0": NORMAL, "x": None})
    reviews.set_truth(job.id, truth)
    assert Reviews(JobStore(store.path)).truth(job.id) == truth
    reviews.set_truth(job.id, None)
    assert reviews.truth(job.id) is None


@pytest.mark.parametrize("truth", [Truth("nowhere", {}), Truth("id", {"1": "eggs"})])
def test_an_unknown_column_or_label_is_refused(reviews, job, truth):
    with pytest.raises(GLMError):
        reviews.set_truth(job.id, truth)
    assert reviews.truth(job.id) is None


# ---- deleting


def test_reviews_go_with_their_job_and_others_stay(store, reviews, job):
    other = finished_job(store, [0.5])
    for one in (job, other):
        reviews.label(one.id, 0, "Ann", SPAM)
    assert reviews.forget_deleted() == 0
    store.delete(job.id)
    assert reviews.forget_deleted() == 1
    assert reviews.count(other.id) == 1
    assert reviews.forget(other.id) == 1
    assert reviews.log(other.id) == []
