"""Classification: the task, one text, a file, what its results are worth, and the review queue."""

from __future__ import annotations

import json
import re
import shutil
import time

import numpy as np
import pytest

from glm_core import engine, jobs, metrics, review, statistics
from glm_core.finetune import examples
from glm_core.review import Reviews, Truth
from glm_core.settings import Settings
from pages.shared import classify_data, classify_measures, classify_more, classify_task
from tests.test_review import LABELS, finished_job, logs

NORMAL, SPAM = LABELS
FILE = "text,site,mark\n" + "".join(
    f"{'加我微信' if i % 3 == 0 else '视频不错'} {i},{'ab'[i % 2]},{'spam' if i % 3 == 0 else 'normal'}\n"
    for i in range(30)
)


@pytest.fixture
def store():
    return jobs.store(Settings.read())


def labelled(store, n: int = 300, known: float = 1.0, **task):
    """A finished job with correct labels for a share of its rows, and those labels."""
    generator = np.random.default_rng(3)
    truth = generator.random(n) < 0.4
    spam = 1 / (1 + np.exp(-(np.where(truth, 2.2, -2.4) + 1.8 * generator.normal(size=n))))
    gold = [("spam" if one else "normal") if generator.random() < known else "" for one in truth]
    texts = [f"{'加我微信' if one else '视频不错'} {i}" for i, one in enumerate(truth)]
    sites = ["rare" if i < 5 else "ab"[i % 2] for i in range(n)]
    job = finished_job(store, spam.tolist(), texts, gold, others=[("site", sites)], **task)
    Reviews(store).set_truth(job.id, Truth("gold", {"spam": SPAM, "normal": NORMAL, "": None}))
    return job


def button(app, start: str):
    return next(one for one in app.button if str(one.key).startswith(start))


def metric(app, label: str):
    return next(one for one in app.metric if one.label == label)


def fill(app, text: str):
    return app.text_area(key="widget.classify.one_text.text").set_value(text).run()


def upload(app, name: str, data: str):
    return app.get("file_uploader")[0].set_value((name, data.encode(), "text/csv")).run()


def wait_for(store, job_id: str, seconds: float = 90):
    jobs.supervisor(Settings.read())
    end = time.monotonic() + seconds
    while store.get(job_id).state not in ("done", "failed") and time.monotonic() < end:
        time.sleep(0.05)
    assert store.get(job_id).state == "done", store.get(job_id).message


# --- the task


def test_without_a_model_the_page_offers_to_load_one(open_page, words):
    app = open_page("classify")
    assert not app.exception
    assert "No model is loaded" in words(app)


def test_the_page_begins_with_spam_and_the_question_of_the_embedded_model(open_page, loaded_model):
    app = open_page("classify")
    shown = [one.value for one in app.text_input if str(one.key).startswith("label_")]
    assert shown == ["0", "正常", "normal", "1", "垃圾", "spam"]
    assert app.text_area(key="widget.classify.template").value.endswith("评论：{text}")
    assert app.selectbox(key="widget.classify.positive").value == "1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda app: app.text_area(key="widget.classify.template").set_value("no place"),
            "no place for the text",
        ),
        (lambda app: app.text_area(key="widget.classify.template").set_value("{text"), "single {"),
        (lambda app: app.text_input(key="label_name_1_0").set_value("0"), "Two labels have the same name: 0"),
        (lambda app: app.text_input(key="label_name_1_0").set_value(""), "1 of the labels have no name"),
        (
            lambda app: app.text_input(key="label_verbaliser_1_0").set_value("正常"),
            "The model is to say 正常 for two labels",
        ),
        (
            lambda app: app.text_area(key="widget.classify.shots").set_value("eggs | a text"),
            "Example 1 is not",
        ),
    ],
)
def test_a_wrong_task_is_a_sentence_and_nothing_can_be_started(open_page, loaded_model, words, change, says):
    app = change(open_page("classify", sample="comments")).run()
    assert not app.exception
    assert says in words(app).replace("\\", "")
    assert not any(str(one.key).startswith("classify_start") for one in app.button)


def test_labels_are_added_removed_and_remembered(open_page, loaded_model):
    app = open_page("classify")
    app.button(key="label_add").click().run()
    app.text_input(key="label_name_2_1").set_value("广告").run()
    again = open_page("classify")
    names = [one.value for one in again.text_input if str(one.key).startswith("label_name")]
    assert names == ["0", "1", "广告"]
    again.button(key="label_drop_0").click().run()
    names = [one.value for one in again.text_input if str(one.key).startswith("label_name")]
    assert names == ["1", "广告"]


def test_a_fine_tuned_checkpoint_proposes_the_labels_it_was_trained_on(
    open_page, model_folder, tmp_path, monkeypatch, words
):
    folder = tmp_path / "tuned"
    shutil.copytree(model_folder, folder)
    (folder / "manifest.json").write_text(json.dumps({"task": {"source_prefix": "评论：{"}}))
    (folder / "audit.json").write_text(json.dumps({"classes": [["好", 10, 2], ["坏", 8, 1]]}))
    monkeypatch.setenv("GLM_MODELS", str(tmp_path))
    engine.host().use(folder)
    app = open_page("classify")
    assert "was trained to answer 坏 / 好" in words(app)
    app.button(key="use_trained").click().run()
    assert not app.exception
    names = [one.value for one in app.text_input if str(one.key).startswith("label_name")]
    assert sorted(names) == ["坏", "好"]
    assert app.text_area(key="widget.classify.template").value == "评论：{{{text}"
    assert not any(one.key == "use_trained" for one in app.button)


def test_the_text_column_takes_the_place_of_text_and_other_columns_stay():
    template = classify_task.for_column("{site}: { text } {{text}}", "text here", ["site", "text here"])
    assert template == "{site}: {text here} {{text}}"


# --- one text


def test_one_text_gets_a_label_probabilities_and_its_words(open_page, loaded_model, words):
    app = fill(open_page("classify"), "加我微信 <b>abc</b>")
    app.button(key="classify_try").click().run()
    assert not app.exception
    shown = words(app)
    assert re.search(r"### [01] · (normal|spam)", shown)
    probability = float(re.search(r"badge\[(\d+\.\d)%\]", shown)[1])
    assert 50 <= probability <= 100
    spans = next(one.proto.body for one in app.get("html") if "classify-words" in str(one.proto.body))
    assert "&lt;" in spans and "<b>abc" not in spans  # a text is shown, not drawn
    assert re.sub(r"<[^>]+>", "", spans).startswith("加我微信 &lt;b&gt;abc")


def test_an_answer_from_before_a_change_says_so(open_page, loaded_model, words):
    app = fill(open_page("classify"), "加我微信")
    app.button(key="classify_try").click().run()
    assert "before the last change" not in words(app)
    assert "before the last change" in words(fill(app, "好看"))


# --- a file


def test_values_that_are_no_labels_are_mapped_by_a_person_before_the_start(
    open_page, loaded_model, words, store
):
    app = upload(open_page("classify"), "marks.csv", FILE)
    gold = next(one for one in app.selectbox if str(one.key).startswith("classify_gold"))
    assert gold.value == ""
    gold.set_value("mark").run()
    shown = words(app)
    assert "2 values of **mark** are not among the labels (0 of 30 rows are)" in shown
    assert "**normal** · 20" in shown and "**spam** · 10" in shown
    assert button(app, "classify_start").disabled
    proposed = [one.value for one in app.selectbox if str(one.key).startswith("truth_file")]
    assert proposed == ["0", "1"]  # as they are shown, yet a person has to say so
    app.checkbox[0].check().run()
    assert not button(app, "classify_start").disabled
    button(app, "classify_start").click().run()
    assert not app.exception
    (job,) = store.list(kind="classify")
    assert Reviews(store).truth(job.id) == Truth("mark", {"normal": "0", "spam": "1"})
    wait_for(store, job.id)
    app = open_page("classify", job=job.id)
    assert not app.exception
    assert "On 30 rows with a correct label" in words(app)
    assert len(review.answers(store, job.id)) == 30


def test_a_file_without_correct_labels_is_classified_as_well(open_page, loaded_model, store, words):
    app = upload(open_page("classify"), "marks.csv", FILE)
    app.button(key="classify_trial").click().run()
    trial = next(one.value for one in app.dataframe if "margin" in one.value.columns)
    assert len(trial) == 20
    assert (
        (trial["p · 0 · normal"].astype(float) + trial["p · 1 · spam"].astype(float))
        .between(0.998, 1.002)
        .all()
    )
    button(app, "classify_start").click().run()
    (job,) = store.list(kind="classify")
    wait_for(store, job.id)
    app = open_page("classify", job=job.id)
    assert not app.exception
    assert Reviews(store).truth(job.id) is None
    rows = next(one.value for one in app.dataframe if "answer" in one.value.columns)
    assert rows["text"].tolist()[:2] == ["加我微信 0", "视频不错 1"]


def test_exact_labels_need_no_confirmation(open_page, loaded_model, words):
    app = upload(open_page("classify"), "marks.csv", FILE.replace("normal", "0").replace("spam", "1"))
    next(one for one in app.selectbox if str(one.key).startswith("classify_gold")).set_value("mark").run()
    assert "All 2 values of mark are labels" in words(app)
    assert not button(app, "classify_start").disabled


@pytest.mark.parametrize("data", ["", "text\n", "a,a\n1,2\n", "x" * 2000])
def test_a_poor_file_is_a_sentence(open_page, loaded_model, data):
    app = upload(open_page("classify"), "poor.csv", data)
    assert not app.exception


# --- results


@pytest.mark.parametrize(
    "view",
    ["results", "quality", "threshold", "calibration", "abstain", "slices", "share", "baseline", "review"],
)
@pytest.mark.parametrize("known", [0.6, 0.05])
def test_every_view_draws_with_many_and_with_few_correct_labels(open_page, store, view, known):
    job = labelled(store, 200, known)
    app = open_page("classify", job=job.id, view=view)
    assert not app.exception
    assert app.query_params["view"] in (view, [view])


def test_a_job_of_another_kind_and_a_missing_one_are_sentences(open_page, store, words):
    other = store.create("batch", "a.csv", {"columns": []})
    assert "no classification" in words(open_page("classify", job=other.id))
    assert "There is no job" in words(open_page("classify", job="nowhere")).replace("\\", "")


def test_the_cards_are_the_scores_of_the_file(open_page, store):
    job = labelled(store)
    app = open_page("classify", job=job.id, view="quality")
    rows = classify_data.found(job).rows
    truth = [LABELS[i] for i in rows.truth]
    scores = metrics.classification(truth, [LABELS[i] for i in rows.answer], LABELS).scores
    area = metrics.probabilities(truth, rows.probability, LABELS, SPAM).scores["roc-auc"]
    assert metric(app, "Accuracy").value == f"{scores['accuracy']:.1%}"
    assert metric(app, "Macro F1").value == f"{scores['macro-f1']:.3f}"
    assert metric(app, "MCC").value == f"{scores['mcc']:.3f}"
    assert metric(app, "ROC AUC").value == f"{area:.3f}"
    interval = statistics.wilson(int(rows.right.sum()), len(rows))
    assert metric(app, "Accuracy").delta == f"{interval.low:.1%} – {interval.high:.1%}"


def test_a_click_on_a_confusion_cell_shows_exactly_its_rows(open_page, store, words):
    job = labelled(store)
    app = open_page("classify", job=job.id, view="quality")
    rows = classify_data.found(job).rows
    wanted = rows.idx[(rows.truth == 0) & (rows.answer == 1)]
    assert app.button(key="cell_0_1").label == str(len(wanted))
    app.button(key="cell_0_1").click().run()
    assert f"**{len(wanted)} rows**" in words(app)
    shown = next(
        one.value for one in app.dataframe if "id" in one.value.columns and "answer" in one.value.columns
    )
    assert sorted(shown.index - 1) == sorted(wanted)


def test_errors_come_with_the_surest_first(open_page, store):
    job = labelled(store)
    app = open_page("classify", job=job.id, view="quality")
    rows = classify_data.found(job).rows
    shown = [one.value for one in app.dataframe if "correct" in one.value.columns][-1]
    sure = np.maximum(shown["p · 0 · normal"], shown["p · 1 · spam"])
    assert len(shown) == int((~rows.right).sum())
    assert np.all(np.diff(sure) <= 0)
    assert (shown["answer"] != shown["correct"]).all()


def test_correct_labels_can_be_named_after_the_run(open_page, store, words):
    job = labelled(store)
    Reviews(store).set_truth(job.id, None)
    app = open_page("classify", job=job.id)
    assert not any("Accuracy" in one.label for one in app.metric)
    app.selectbox(key=f"classify_truth_{job.id}").set_value("gold").run()
    app.checkbox[0].check().run()
    app.button(key="truth_set").click().run()
    assert not app.exception
    assert Reviews(store).truth(job.id).mapping == {"normal": NORMAL, "spam": SPAM}


# --- threshold, calibration, acceptance


def test_a_threshold_is_judged_on_the_half_it_was_not_chosen_on(open_page, store, words):
    job = labelled(store, 400)
    app = open_page("classify", job=job.id, view="threshold")
    rows = classify_data.found(job).rows
    dev = classify_measures.halves(rows.groups)
    chosen = statistics.choose_threshold(
        rows.probability[dev, 1], rows.truth[dev] == 1, "f1", rows=rows.part(dev).names
    )
    other = rows.part(~dev)
    judged = statistics.judge(chosen, other.probability[:, 1], other.truth == 1, rows=other.names)
    assert "judged on the other half" in words(app)
    assert metric(app, "Precision").value == f"{judged.precision.estimate:.1%}"
    assert metric(app, "F1").value == f"{judged.f1:.3f}"


def test_moving_the_threshold_changes_what_it_brings(open_page, store):
    job = labelled(store, 400)
    app = open_page("classify", job=job.id, view="threshold")
    rows = classify_data.found(job).rows
    other = rows.part(~classify_measures.halves(rows.groups))
    slider = next(one for one in app.slider if str(one.key).startswith("classify_threshold"))
    slider.set_value(0.9).run()
    assert not app.exception
    called = other.probability[:, 1] >= 0.9
    recall = (called & (other.truth == 1)).sum() / (other.truth == 1).sum()
    assert metric(app, "Recall").value == f"{recall:.1%}"


def test_a_threshold_on_few_rows_is_called_optimistic(open_page, store, words):
    app = open_page("classify", job=labelled(store, 60).id, view="threshold")
    assert "optimistic" in words(app)


def test_the_cheapest_threshold_follows_the_costs(open_page, store):
    app = open_page("classify", job=labelled(store, 400).id, view="threshold")
    next(one for one in app.button_group if one.key == "widget.classify.goal").set_value("cost").run()
    assert not app.exception
    found = []
    for alarm, miss in ((1, 50), (50, 1)):
        app.number_input(key="widget.classify.cost_alarm").set_value(alarm).run()
        app.number_input(key="widget.classify.cost_miss").set_value(miss).run()
        found.append(next(one for one in app.slider if str(one.key).startswith("classify_threshold")).value)
    assert found[0] < found[1]


def test_calibration_is_cross_fitted_from_the_scores(open_page, store):
    job = labelled(store, 300)
    app = open_page("classify", job=job.id, view="calibration")
    rows = classify_data.found(job).rows
    found = statistics.cross_fit(rows.scores, rows.truth, bias=True, groups=rows.groups.tolist())
    truth = [LABELS[i] for i in rows.truth]
    after = metrics.probabilities(truth, found.probability, LABELS, SPAM).scores["ece"]
    before = metrics.probabilities(truth, rows.probability, LABELS, SPAM).scores["ece"]
    assert metric(app, "ECE").value == f"{after:.4f}"
    assert metric(app, "ECE").delta == f"before {before:.4f}"


def test_the_certificate_counts_the_errors_of_other_rows(open_page, store, words):
    job = labelled(store, 600)
    app = open_page("classify", job=job.id, view="abstain")
    app.select_slider(key="widget.classify.risk").set_value(10.0).run()
    rows = classify_data.found(job).rows
    dev = classify_measures.halves(rows.groups)
    chosen, other = rows.part(dev), rows.part(~dev)
    found = statistics.choose_acceptance(chosen.confidence, chosen.right, 0.1, rows=chosen.names)
    proof = statistics.certify(found, other.confidence, other.right, rows=other.names)
    assert f"{proof.accepted:,} were accepted and {proof.errors:,} of them wrong" in words(app)


# --- carried to the next run


def measured(store, model, n: int = 300, **task):
    """A finished job of the loaded model, with the question and the labels the page begins with."""
    question = classify_task.default_template().replace("{text}", "{comment}")
    return labelled(
        store,
        n,
        **{
            "checkpoint": str(model.loaded.info.path),
            "precision": model.loaded.precision,
            "template": question,
        }
        | task,
    )


def started(app, store):
    """Start a job on a small file; its task."""
    upload(app, "next.csv", FILE)
    button(app, "classify_start").click().run()
    assert not app.exception
    return next(job for job in store.list(kind="classify") if job.title == "next.csv").task


def carry_review(open_page, job) -> float:
    """Let the next run send to review what may not be accepted at a risk of a tenth; the probability."""
    app = open_page("classify", job=job.id, view="abstain")
    app.select_slider(key="widget.classify.risk").set_value(10.0).run()
    button(app, "carry_review").click().run()
    return app.session_state["kept.classify.carried"]["abstain_below"]


def test_a_threshold_that_was_measured_holds_for_the_next_run_until_it_is_dropped(
    open_page, loaded_model, store, words
):
    job = measured(store, loaded_model)
    app = open_page("classify", job=job.id, view="threshold")
    value = next(one for one in app.slider if str(one.key).startswith("classify_threshold")).value
    button(app, "carry_threshold").click().run()
    assert button(app, "carry_threshold").disabled
    app = open_page("classify")
    assert f"spam from {value:.4f}" in words(app) or f"1 from {value:.4f}" in words(app)
    task = started(app, store)
    assert (task["positive"], task["threshold"]) == (SPAM, pytest.approx(value, abs=1e-6))
    app = open_page("classify")
    app.button(key="carried_drop").click().run()
    assert "As measured on" not in words(app)
    assert open_page("classify").session_state["kept.classify.carried"] is None


def test_a_calibration_that_was_measured_gives_the_next_run_its_probabilities(
    open_page, loaded_model, store, words
):
    from glm_core.classify import LabelTask

    job = measured(store, loaded_model)
    app = open_page("classify", job=job.id, view="threshold")
    button(app, "carry_threshold").click().run()
    app = open_page("classify", job=job.id, view="calibration")
    button(app, "carry_calibration").click().run()
    app = open_page("classify")
    assert "calibration (temperature" in words(app)
    task = LabelTask.from_json(started(app, store))
    rows = classify_data.found(job).rows
    fit = statistics.fit_calibration(rows.scores, rows.truth, bias=True)
    assert task.temperature == pytest.approx(fit.temperature)
    assert task.bias == pytest.approx(fit.bias)
    assert task.threshold is None  # it was one of the probabilities before


def test_what_was_measured_with_another_checkpoint_or_question_is_not_used(
    open_page, loaded_model, store, words
):
    job = measured(store, loaded_model, checkpoint="/elsewhere/other-model")
    carry_review(open_page, job)
    app = open_page("classify")
    assert "Not used here" in words(app)
    assert "other\\-model" in words(app)
    assert started(app, store)["abstain_below"] == 0.6
    job = measured(store, loaded_model)
    value = carry_review(open_page, job)
    app = open_page("classify")
    assert f"review below {value:.4f}" in words(app)
    app.text_area(key="widget.classify.template").set_value("Is it spam? {text}").run()
    assert "other labels, question or examples" in words(app)


def test_reviews_go_with_the_job_they_belong_to(open_page, store):
    job = labelled(store, 10)
    Reviews(store).label(job.id, 0, "Ann", SPAM)
    app = open_page("jobs")
    button(app, f"delete_list_{job.id}").click().run()
    assert not app.exception
    assert Reviews(store).count(job.id) == 0


def test_the_share_of_a_label_is_corrected_by_the_labelled_rows(open_page, store):
    job = labelled(store, 400, known=0.5)
    app = open_page("classify", job=job.id, view="share")
    this = classify_data.found(job)
    free = ~np.isin(this.answers.idx, this.rows.idx)
    ppi = statistics.prediction_powered(
        this.answers.probability[free, 1], this.rows.probability[:, 1], this.rows.truth == 1
    )
    assert metric(app, "Corrected (PPI)").value == f"{ppi.estimate:.1%}"
    assert metric(app, "As answered").value == f"{(this.answers.answer == 1).mean():.1%}"


def test_slices_of_few_rows_are_marked(open_page, store, words):
    app = open_page("classify", job=labelled(store, 200).id, view="slices")
    assert app.selectbox[0].value == "site"
    assert "Grey: fewer than 30 rows" in words(app)
    shown = next(one.value for one in app.dataframe if "95 % interval" in one.value.columns)
    assert shown["value"].tolist() == ["a", "b", "rare"] or shown["value"].tolist() == ["b", "a", "rare"]


def test_the_baseline_is_fitted_on_other_rows_and_compared_row_by_row(open_page, store, words):
    job = labelled(store, 120)
    app = open_page("classify", job=job.id, view="baseline")
    app.button(key="baseline_start").click().run()
    classify_more._comparing._thread.join(120)
    app.run()
    assert not app.exception
    found = classify_more._comparing.found
    assert found.rows == 120
    assert found.test.n == 120
    assert found.baseline.estimate > 0.95  # the words give the label away, and equal numbers do not
    assert "exact McNemar p" in words(app)


def test_too_few_rows_for_a_baseline_are_a_sentence(open_page, store, words):
    app = open_page("classify", job=labelled(store, 8).id, view="baseline")
    app.button(key="baseline_start").click().run()
    classify_more._comparing._thread.join(60)
    assert "at least 10 different labelled texts" in words(app.run())


# --- the measures themselves


def random_rows(n: int, labels: int, seed: int = 0) -> classify_measures.Judged:
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.full(labels, 0.5), n)
    truth = np.array([generator.choice(labels, p=0.5 * row + 0.5 / labels) for row in p])
    answer = p.argmax(axis=1)
    answer[::17] = -1
    return classify_measures.Judged(
        tuple("abcdefg"[:labels]),
        np.arange(n),
        np.log(p + 1e-12),
        p,
        np.zeros(n),
        answer,
        truth,
        np.arange(n),
    )


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_resampled_tables_have_the_scores_of_resampled_rows(labels):
    rows = random_rows(150, labels)
    found = classify_measures.bootstrapped(classify_measures.table_of(rows))
    scores = classify_measures.classification(rows).scores
    assert found["macro-f1"].estimate == pytest.approx(scores["macro-f1"], abs=1e-12)
    assert found["mcc"].estimate == pytest.approx(scores["mcc"], abs=1e-12)

    def macro(chosen):
        return classify_measures.classification(rows.part(chosen)).scores["macro-f1"]

    slow = statistics.bootstrap(len(rows), macro, method="percentile", resamples=2000)
    assert found["macro-f1"].low == pytest.approx(slow.low, abs=0.012)
    assert found["macro-f1"].high == pytest.approx(slow.high, abs=0.012)


def test_the_area_has_delongs_standard_error():
    generator = np.random.default_rng(5)
    truth = generator.random(60) < 0.4
    scores = np.round(np.where(truth, 0.7, 0.0) + generator.normal(size=60), 1)  # with ties
    yes, no = scores[truth], scores[~truth]
    kernel = (yes[:, None] > no).astype(float) + 0.5 * (yes[:, None] == no)
    area = kernel.mean()
    variance = kernel.mean(axis=1).var(ddof=1) / len(yes) + kernel.mean(axis=0).var(ddof=1) / len(no)
    found = classify_measures.area(truth, scores)
    assert found.estimate == pytest.approx(area, abs=1e-12)
    half = (np.log(found.high / (1 - found.high)) - np.log(found.low / (1 - found.low))) / 2
    assert half == pytest.approx(1.959964 * np.sqrt(variance) / (area * (1 - area)), rel=1e-5)


def test_an_area_without_errors_has_no_interval():
    found = classify_measures.area(np.array([True, True, False, False]), np.array([0.9, 0.8, 0.2, 0.1]))
    assert (found.estimate, found.low) == (1.0, None)


def test_equal_texts_are_in_one_half_and_both_halves_have_rows():
    groups = classify_measures.text_groups([f"text {i // 2}" for i in range(2000)])
    dev = classify_measures.halves(groups)
    assert (dev[::2] == dev[1::2]).all()
    assert 900 < dev.sum() < 1100


def test_a_slice_counts_its_rows():
    rows = random_rows(100, 2)
    found = classify_measures.slices(rows, ["x" if i < 70 else "y" for i in range(100)], 1)
    assert [(one.value, one.n, one.few) for one in found] == [("x", 70, False), ("y", 30, False)]
    assert found[0].accuracy.estimate == pytest.approx(rows.right[:70].mean())
    assert found[1].positive_true == pytest.approx((rows.truth[70:] == 1).mean())


def test_a_hundred_thousand_rows_are_measured(store):
    rows = random_rows(100_000, 2)
    found = classify_measures.headline(rows, 1)
    assert found["accuracy"].estimate == pytest.approx(rows.right.mean())
    assert found["roc-auc"].high - found["roc-auc"].low < 0.02
    assert len(classify_measures.errors(rows, 200)) == 200


# --- review


def reviewing(open_page, job, name: str = "Ann"):
    app = open_page("classify", job=job.id, view="review")
    return app.text_input(key="widget.classify.reviewer").set_value(name).run()


def current(words, app) -> int:
    """The row on the screen, counted from 0."""
    return int(re.search(r"\[row ([\d,]+)\]", words(app))[1].replace(",", "")) - 1


def test_the_least_sure_row_comes_first_and_a_label_brings_the_next(open_page, store, words):
    job = labelled(store, 50)
    ranked = review.rank(review.answers(store, job.id), "uncertain").tolist()
    app = reviewing(open_page, job)
    assert current(words, app) == ranked[0]
    app.button(key="review_label_1").click().run()
    assert current(words, app) == ranked[1]
    app.text_input(key=f"review_note_{job.id}_{ranked[1]}_Ann").set_value("unclear").run()
    app.button(key="review_skip").click().run()
    assert current(words, app) == ranked[2]
    assert [(one.idx, one.action, one.label, one.note) for one in Reviews(store).latest(job.id)] == [
        (ranked[0], "label", SPAM, ""), (ranked[1], "skip", "", "unclear"),
    ]  # fmt: skip


def test_a_reload_goes_on_where_the_reviewer_was(open_page, store, words):
    job = labelled(store, 50)
    app = reviewing(open_page, job)
    app.button(key="review_label_0").click().run()
    before = current(words, app)
    again = reviewing(open_page, job)
    assert current(words, again) == before
    assert "1 of 50 rows seen by Ann" in words(again)
    again.button(key="review_undo").click().run()
    assert "0 of 50 rows seen by Ann" in words(again)


def test_a_second_reviewer_begins_at_the_start_and_agreement_is_shown(open_page, store, words):
    job = labelled(store, 50)
    app = reviewing(open_page, job)
    first = current(words, app)
    for _ in range(3):
        app.button(key="review_label_1").click().run()
    app = reviewing(open_page, job, "Bo")
    assert current(words, app) == first
    for key in ("review_label_1", "review_label_1", "review_label_0"):
        app.button(key=key).click().run()
    app = reviewing(open_page, job, "Bo")
    assert metric(app, "Agree").value == "66.7%"
    assert "On 3 rows that both labelled" in words(app)


def test_the_models_answer_can_be_hidden(open_page, store, words):
    app = reviewing(open_page, labelled(store, 50))
    assert "The model:" in words(app)
    app.toggle(key="widget.classify.hide_answer").set_value(True).run()
    assert "The model:" not in words(app)
    assert "in the file" not in words(app)


def test_disagreements_with_the_file_can_come_first(open_page, store, words):
    job = labelled(store, 200)
    app = reviewing(open_page, job)
    app.selectbox(key="widget.classify.review_order").set_value("disagree").run()
    rows = classify_data.found(job).rows
    wrong = rows.part(~rows.right)
    assert current(words, app) == int(wrong.idx[wrong.confidence.argmax()])


def test_when_all_rows_are_seen_the_skipped_ones_can_be_looked_at(open_page, store, words):
    app = reviewing(open_page, labelled(store, 3))
    for key in ("review_label_1", "review_skip", "review_label_0"):
        app.button(key=key).click().run()
    assert "No row is left here" in words(app)
    app.button(key="review_again").click().run()
    app.button(key="review_label_1").click().run()
    assert "No row is left here" in words(app)


def test_a_row_is_shown_as_text_and_not_drawn(open_page, store, words):
    job = finished_job(store, [0.5], texts=["![x](http://evil.example/a.png) <img src=x> *b*"])
    shown = words(reviewing(open_page, job))
    assert "\\!\\[x\\]\\(http\\:" in shown


def test_corrections_go_to_fine_tuning_as_a_file_it_reads(open_page, store):
    job = labelled(store, 50)
    app = reviewing(open_page, job)
    for key in ("review_label_1", "review_label_0"):
        app.button(key=key).click().run()
    app.button(key="review_finetune").click().run()
    (file,) = Settings.read().exports.glob("corrections-*.csv")
    found = examples.read(file)
    assert found.columns.response == "label"
    assert {one.response for one in found.examples} == {"正常", "垃圾"}
    assert Settings.read().allowed_table(file) == file.resolve()


def test_the_label_of_a_row_without_an_answer_does_not_break_the_page(open_page, store):
    from glm_core import classify

    made = store.create("classify", "a.csv", labelled(store, 3).task)
    store.add_rows(made.id, [("1", "text", "spam", "a"), ("2", "text", "spam", "a")])
    store.mark_ready(made.id)
    store.claim(("classify",), "test:1:1", made.id)
    answer = classify.Scored(SPAM, logs(0.8), (0.2, 0.8), 0.01)
    store.save_results(
        made.id,
        [classify.to_result(0, answer), jobs.Result(1, "failed", error="It was cancelled.")],
        "test:1:1",
    )
    store.release(made.id, "test:1:1", "done")
    Reviews(store).label(made.id, 1, "Ann", SPAM)
    for view in ("results", "review"):
        assert not open_page("classify", job=made.id, view=view).exception


def test_the_list_of_jobs_links_here_and_says_what_is_deleted_with_a_job(open_page, store, words):
    job = labelled(store, 10)
    Reviews(store).label(job.id, 0, "Ann", SPAM)
    app = open_page("jobs")
    assert not app.exception
    assert "People labelled 1 row of this job" in words(app)
    links = [str(one.proto.page) for one in app.get("page_link")]
    assert any("classify" in link for link in links)


def test_the_page_speaks_chinese(open_page, store, words):
    job = labelled(store, 100)
    for view in ("quality", "threshold", "calibration", "abstain", "slices", "share", "review"):
        app = open_page("classify", job=job.id, view=view, lang="zh")
        assert not app.exception
        assert "分类" in words(app)
